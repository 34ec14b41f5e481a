"""The documentation's site: python -m sphinx -W docs site"""

project = "advdmd"
html_title = "advdmd"
extensions = ["myst_parser"]
html_theme = "furo"
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
html_show_copyright = False
html_copy_source = False
