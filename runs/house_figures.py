"""Figures of the code and the documentation that CONTRIBUTING.md asks for: python runs/house_figures.py [--list]

Ends with status 1 if a figure is not reached; --list names what is missing.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src/advdmd"
MODULES = sorted(SRC.rglob("*.py"))
DOCS = sorted((ROOT / "docs").glob("*.md"))
SHAPE = re.compile(r"\[(\.\.\.|[a-z]|[^\]\n]*[A-Z0-9n][^\]\n]*)?\]|scalar|same shape|any shape")
# Names of before 27 November 2026. Only recipes/renamed.py, which reads old files, may have them.
OLD_NAMES = (
    *("descend", "tell_apart", "track_student", "match_teacher", "prefer_paid_hops", "catch_up", "make_cast", "make_twin"),
    *("make_players", "make_bonus", "make_deal", "at_home", "late_exits", "sights", "twin_grid", "closeness", "group_spread"),
    *("critic_steps", "match_turns", "match_every", "judge_every", "final_levels", "u_range", "auc_memory", "heads_rate"),
    *("trunk_rate", "exits_rate", "look_every", "exam_every", "exam_images", "look_prompts", "running_on", "way_out"),
    *("is_miniature", "in_miniature", "taught_by", "drawn_by", "suite_of", "judge_of", "own_sampling", "band_of"),
    *("critic", "critics", "pupil", "exam", "exams", "hop", "hops", "told", "supply", "perceiver", "players", "cast"),
    *("kernels.py", "supply.py", "players.py", "exam.py", "turns.py", "cast.py", "book.py", "meter.py", "page.py"),
)
# Names of random streams, which are seeds; typing.cast.
FROZEN = re.compile(r"""["'](critic\.(k|u|fake|real|order)|exams?|hops)["']|typing import.*cast|cast\((Any|Json),""")


def functions(tree: ast.Module) -> list[tuple[str, ast.FunctionDef, str]]:
    """Public functions and methods: name, node, and the docstring of its class."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found.append((node.name, node, ""))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            about = ast.get_docstring(node) or ""
            found += [(f"{node.name}.{n.name}", n, about) for n in node.body if isinstance(n, ast.FunctionDef)]
    keep = ("__init__", "__post_init__", "__call__", "forward")
    found = [x for x in found if not any(ast.unparse(d) == "overload" for d in x[1].decorator_list)]
    return [x for x in found if not x[1].name.startswith("_") or x[1].name in keep]


def takes_tensors(node: ast.FunctionDef) -> bool:
    notes = [a.annotation for a in (*node.args.args, *node.args.kwonlyargs)] + [node.returns]
    return any(re.search(r"\b(Tensor|ndarray|Cond)\b", ast.unparse(n)) for n in notes if n)


def raises(node: ast.FunctionDef) -> bool:
    inner = [n for b in node.body for n in ast.walk(b) if isinstance(n, ast.FunctionDef)]
    hidden = {id(x) for i in inner for x in ast.walk(i)}
    return any(
        isinstance(n, ast.Raise) and n.exc is not None and id(n) not in hidden and isinstance(n.exc, ast.Call)
        for n in ast.walk(node)
    )


def sentences(text: str) -> list[int]:
    """Lengths in words of the sentences of a page, without code, tables and headings."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    lines = [line for line in text.splitlines() if not re.match(r"\s*(\||#|<!--|!\[)", line)]
    blocks = re.split(r"\n\s*\n|\n(?=\s*[-*] |\s*\d+\. )", "\n".join(lines))
    out = []
    for block in blocks:
        block = re.sub(r"\]\([^)]*\)", "]", " ".join(block.split()))
        for s in re.split(r"(?<=[.!?:;])\s+(?=[A-Z`*\[(0-9])", block):
            words = [w for w in s.split() if re.search(r"\w", w)]
            if len(words) > 2:
                out.append(len(words))
    return out


def old_names() -> list[str]:
    pattern = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, OLD_NAMES))})(?!\w)")
    places = [*MODULES, ROOT / "README.md", *DOCS, *(ROOT / "tests").rglob("*.py"), *(ROOT / "runs").glob("*.*")]
    found = []
    for file in places:
        if file.name in ("renamed.py", "house_figures.py") or "teachers" in file.parts:
            continue
        for n, line in enumerate(file.read_text().splitlines(), 1):
            if (hit := pattern.search(line)) and not FROZEN.search(line):
                found.append(f"{file.relative_to(ROOT)}:{n}: {hit[1]}")
    return found


def main() -> None:
    shapes, errors = [], []
    for file in MODULES:
        if file.name == "mplug_worker.py":
            continue
        for name, node, about in functions(ast.parse(file.read_text())):
            doc = (ast.get_docstring(node) or "") + about
            place = f"{file.relative_to(SRC)}:{node.lineno}: {name}"
            if takes_tensors(node):
                shapes.append((bool(SHAPE.search(doc)), place))
            if raises(node):
                errors.append(("aises" in doc, place))
    share = lambda rows: sum(ok for ok, _ in rows) / len(rows)  # noqa: E731
    mean = lambda pages: sum(x := [n for p in pages for n in sentences(p.read_text())]) / len(x)  # noqa: E731
    any_uses = {f: len(re.findall(r"\bAny\b", re.sub(r"^.*\bimport\b.*$", "", f.read_text(), flags=re.M))) for f in MODULES}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    old = old_names()
    flat = [p.name for p in SRC.glob("*.py") if not p.name.startswith("__")]
    figures = [
        ("old names left", len(old), "<=", 0),
        ("flat modules", len(flat), "<=", 8),
        ("public functions of tensors with shapes in their docstring", share(shapes), ">=", 0.95),
        ("public functions that raise with errors named", share(errors), ">=", 0.95),
        ("mean sentence of README, words", mean([ROOT / "README.md"]), "<=", 16),
        ("mean sentence of docs, words", mean(DOCS), "<=", 18),
        ("README, lines", len((ROOT / "README.md").read_text().splitlines()), "<=", 150),
        ("`Any`", sum(any_uses.values()), "<=", 80),
        ("tracked files", len(tracked), "<=", 500),
    ]
    missed = False
    for name, value, sign, aim in figures:
        good = value <= aim if sign == "<=" else value >= aim
        missed |= not good
        print(f"{'ok  ' if good else 'MISS'} {name}: {value:.3g} ({sign} {aim})")
    if "--list" in sys.argv:
        print(*old[:400], sep="\n")
        print(*(place for ok, place in shapes + errors if not ok), sep="\n")
        print(*(f"{n} Any: {f.relative_to(SRC)}" for f, n in sorted(any_uses.items(), key=lambda x: -x[1]) if n), sep="\n")
        worst = sorted(((mean([p]), p.name) for p in DOCS), reverse=True)
        print(*(f"{m:.1f} words a sentence: {p}" for m, p in worst), sep="\n")
    sys.exit(missed)


if __name__ == "__main__":
    main()
