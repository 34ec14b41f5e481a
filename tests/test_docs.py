"""What the documentation says to type is typed here, and what it links to is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from advdmd import cli
from advdmd.recipes import find

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = typer.main.get_command(cli.app)
# What makes a command of the quick start small enough to run here: the same path with smaller numbers.
TINY = [
    *("iterations=2", "threads=1", "data.prompts=8", "data.reals=2", "prompts_per_step=2"),
    *("algorithm.group=4", "algorithm.warmup=1", "algorithm.ramp=1"),
]
SMALLER = {"train": TINY, "mini": [*TINY, "--images", "1"], "eval": ["--images", "2", "--prompts", "2", "--threads", "1"]}


def commands(page):
    """Every command in a page's shell blocks, comments off, continued lines joined."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def ours(words):
    """The words after `advdmd`, where that is what a command runs."""
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    return words[1:] if words[0] == "advdmd" else None


ALL = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page}-{' '.join(w)[:60]}" for page, w in ALL])
def test_every_command_in_the_documentation_is_one(page, words):
    """Its options exist, its arguments are as many and of the kind; its recipe and overrides resolve."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    told = ours(words)
    assert told is not None, f"{page}: {words[0]} is not tested"
    name, command, rest = COMMAND.resolve_command(COMMAND.make_context("advdmd", [], resilient_parsing=True), told)
    params = command.make_context(name, list(rest)).params
    if name in ("train", "show") and params["recipe"]:
        find.resolve(params["recipe"], params["changes"] or [])


def test_the_quick_start_runs_from_its_first_command_to_its_last(tmp_path, monkeypatch):
    """In order, in one new folder; only numbers are made smaller. The page in the browser has a test of its own."""
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    for words in commands(ROOT / "docs/index.md"):
        told = ours(words)
        if told[0] != "demo":
            COMMAND.main([*told, *SMALLER.get(told[0], [])], standalone_mode=False)
    for made in ("runs/mini/table.md", "runs/mini.html", "two.html", "pictures/000.png", "my-student/model_index.json"):
        assert (tmp_path / made).is_file(), made
    assert list((tmp_path / "runs/two/tensorboard").iterdir())


def test_the_readmes_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_the_site_builds_without_a_warning_and_asks_for_nothing_from_afar(tmp_path):
    """Dead links between pages, missing pictures and broken tables are warnings, and warnings are errors."""
    pytest.importorskip("furo")
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-W",
            "--keep-going",
            "-d",
            tmp_path / "cache",
            ROOT / "docs",
            tmp_path / "site",
        ],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    for page in PAGES[1:]:
        told = (tmp_path / "site" / f"{page.stem}.html").read_text()
        assert not re.search(r'(src|href)="https?://[^"]+\.(js|css|woff2?|png)', told), page
