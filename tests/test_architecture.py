"""The floors of the house, read from the source."""

import ast
import graphlib
from pathlib import Path

import advdmd

ROOT = Path(advdmd.__file__).parent
FLOORS = [
    {"flow", "coefficientss", "losses"},
    {"types", "rng", "rollout", "world", "files"},
    {"models"},
    {"data"},
    {"algorithms"},
    {"train"},
    {"evaluation"},
    {"recipe", "export", "comfyui", "look", "chart"},
    {"supply"},
    {"players"},
    {"recipes", "memory"},
    {"exam", "evaluate"},
    {"measure", "health"},
    {"run", "pretrain", "encode", "page", "demo"},
    {"cli_evaluate"},
    {"cli", "__main__"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
SOURCES = [f for f in ROOT.rglob("*.py") if f.name != "__init__.py"]


def home(file):
    return file.relative_to(ROOT).with_suffix("").parts[0]


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "advdmd":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names]


def test_imports_only_point_down():
    for file in SOURCES:
        for name in imports(file):
            assert FLOOR[name] <= FLOOR[home(file)], f"{file.relative_to(ROOT)} imports advdmd.{name} from a higher floor"


def test_every_module_has_a_floor():
    assert {home(f) for f in SOURCES} == set(FLOOR)


def test_only_the_learner_calls_backward():
    assert [f.name for f in SOURCES if ".backward(" in f.read_text()] == ["learner.py"]


def test_the_maths_knows_no_modules_and_no_files():
    for name in ("flow", "coefficientss", "losses", "rng", "rollout"):
        text = (ROOT / f"{name}.py").read_text()
        assert not any(word in text for word in ("nn.Module", "import os", "pathlib", "open(")), name


def test_the_world_needs_no_torch():
    assert not any("torch" in f.read_text() for f in (ROOT / "world").glob("*.py"))


def test_files_hold_one_idea():
    assert {f.name: n for f in SOURCES if (n := len(f.read_text().splitlines())) > 350} == {}


def test_no_file_imports_itself_by_a_detour():
    """Lazy imports count: graphlib raises CycleError, naming the circle."""
    names = {".".join(("advdmd", *f.relative_to(ROOT).with_suffix("").parts)): f for f in SOURCES}
    graph = {}
    for name, file in names.items():
        found = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
        wanted = {n.module for n in found} | {f"{n.module}.{a.name}" for n in found for a in n.names}
        graph[name] = wanted & set(names)
    assert sum(map(len, graph.values())) > 50
    list(graphlib.TopologicalSorter(graph).static_order())


def test_shipped_teachers_name_no_folder_of_the_machine_they_were_made_on():
    configs = [f for f in (ROOT / "mini/teachers").rglob("*.json") if not f.name.startswith("tokenizer")]
    assert len(configs) > 10
    assert [f for f in configs if "_name_or_path" in f.read_text()] == []
