"""The architecture, read from the source: folders are layers, and a file imports its own layer and lower ones only."""

import ast
import graphlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import advdmd

ROOT = Path(advdmd.__file__).parent
MATHS = ("flow", "transitions", "losses", "rng", "rollout")  # what people come to read
FLAT = {*MATHS, "types", "files", "progress"}
LAYERS = (
    "models", "data", "algorithms", "rewards", "training", "evaluation", "exporters", "mini", "recipes", "distillation",
    "monitoring", "commands", "cli",
)  # fmt: skip
SOURCES = [f for f in ROOT.rglob("*.py") if f.name != "__init__.py"]


def layer(name):
    """Of a folder, or of a module beside them, all of which are the lowest layer."""
    return LAYERS.index(name) + 1 if name in LAYERS else 0


def top_level(file):
    return file.relative_to(ROOT).with_suffix("").parts[0]


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "advdmd":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names]


def test_folders_and_modules_are_those_of_the_architecture():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(LAYERS)
    assert {p.stem for p in ROOT.glob("*.py")} == FLAT | {"__init__", "__main__"}
    assert len(FLAT) <= 8


def test_files_import_their_own_layer_and_lower_ones_only():
    for file in SOURCES:
        if top_level(file) == "__main__":
            continue
        for name in imports(file):
            assert layer(name) <= layer(top_level(file)), f"{file.relative_to(ROOT)} imports advdmd.{name} from a higher layer"


def test_only_the_learner_calls_backward():
    assert [f.name for f in SOURCES if ".backward(" in f.read_text()] == ["learner.py"]


def test_the_maths_uses_no_modules_and_no_files():
    for name in MATHS:
        text = (ROOT / f"{name}.py").read_text()
        assert not any(word in text for word in ("nn.Module", "import os", "pathlib", "open(")), name


def test_the_world_needs_no_torch():
    assert not any("torch" in f.read_text() for f in (ROOT / "mini/world").glob("*.py"))


def test_no_file_has_more_than_350_lines():
    assert {f.name: n for f in SOURCES if (n := len(f.read_text().splitlines())) > 350} == {}


def test_no_import_is_circular():
    """Lazy imports count: graphlib raises CycleError, which names the circle."""
    names = {".".join(("advdmd", *f.relative_to(ROOT).with_suffix("").parts)): f for f in SOURCES}
    graph = {}
    for name, file in names.items():
        found = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
        wanted = {n.module for n in found} | {f"{n.module}.{a.name}" for n in found for a in n.names}
        graph[name] = wanted & set(names)
    assert sum(map(len, graph.values())) > 50
    list(graphlib.TopologicalSorter(graph).static_order())


def test_no_code_outside_of_algorithms_asks_which_algorithm_it_is():
    """An algorithm says itself what it needs: no isinstance on algorithms, no getattr, no import of one but by recipes."""
    kinds = r"(AdvDMD|DMD2|TwinFlow)\b"
    for file in SOURCES:
        text = file.read_text()
        if top_level(file) in ("algorithms",):
            continue
        assert not re.search(rf"isinstance\([^)]*{kinds}", text), file
        assert not re.search(r"getattr\([^)]*algorithm", text), file
        if top_level(file) != "recipes":
            assert not re.search(rf"^\s*from advdmd\.algorithms\.\w+ import .*{kinds}", text, re.M), file


def test_no_closure_writes_into_the_frame_around_it():
    """In algorithms: a function inside a function assigns to its local names only, not to items of outer objects."""
    for file in (ROOT / "algorithms").glob("*.py"):
        for outer in ast.walk(ast.parse(file.read_text())):
            if not isinstance(outer, ast.FunctionDef):
                continue
            for inner in (n for b in outer.body for n in ast.walk(b) if isinstance(n, ast.FunctionDef)):
                local_names = {a.arg for a in inner.args.args}
                local_names |= {n.id for n in ast.walk(inner) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
                assert not any(isinstance(n, ast.Nonlocal) for n in ast.walk(inner)), (file.name, inner.name)
                for node in ast.walk(inner):
                    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                        assert isinstance(node.value, ast.Name), (file.name, inner.name)
                        assert node.value.id in local_names, (file.name, inner.name)
                    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                    if (
                        called
                        and node.func.attr in ("append", "extend", "update", "add")
                        and isinstance(node.func.value, ast.Name)
                    ):
                        assert node.func.value.id in local_names, (file.name, inner.name)


def test_train_steps_fit_on_one_page_and_say_what_the_method_does():
    for name in ("advdmd", "dmd2", "twinflow"):
        tree = ast.parse((ROOT / f"algorithms/{name}.py").read_text())
        (step,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "train_step"]
        assert step.end_lineno - step.lineno <= 60, name
        assert "arXiv" in ast.get_docstring(step), name


def test_shipped_teachers_name_no_folder_of_the_machine_they_were_made_on():
    configs = [f for f in (ROOT / "mini/teachers").rglob("*.json") if not f.name.startswith("tokenizer")]
    assert len(configs) > 10
    assert [f for f in configs if "_name_or_path" in f.read_text()] == []


WITHOUT_MINI = """
import json, sys
sys.modules["advdmd.mini"] = None  # importing the miniature fails
from pathlib import Path
from advdmd.cli.main import app
folder, out = sys.argv[1], Path(sys.argv[2])
def advdmd(*words): app([str(w) for w in words], standalone_mode=False)
words = json.loads(sys.argv[3])
advdmd("encode", out / "photos", folder, "--resolution", 32, "--out", out / "cache", "--device", "cpu", "--threads", 1)
advdmd("show")
own = (f"teacher={folder}", f"data.folder={out / 'cache'}")
advdmd("train", "sd35-medium-advdmd-4step-24gb", *own, *words, "--out", out / "run")
advdmd("doctor", out / "run")
advdmd("report", out / "run", "--out", out / "report.html")
advdmd("export", out / "run", "--out", out / "student")
advdmd("sample", out / "student", "a lamp", "--out", out / "pictures", "--threads", 1)
from advdmd.commands.evaluate import evaluate, suite_names
from advdmd.evaluation.benchmark import Verdict
from advdmd.evaluation.dpg import DPG
class Yes:
    name, fingerprint, batch = "yes", "yes-1", 8
    def self_test(self): pass
    def judge(self, items, images): return [{"answers": {str(q.id): 1.0 for q in i.meta["questions"]}} for i in items]
assert suite_names() == ("geneval", "dpg")
summary = evaluate(str(out / "student"), DPG(str(out / "dpg.csv"), 1), out / "scores", judge=Yes())
assert summary["loose"]["overall"]["mean"] == 1.0
assert not any(m.startswith("advdmd.mini.") for m in sys.modules)
"""


def test_the_library_trains_a_real_pipeline_without_the_miniature(tmp_path):
    """advdmd.mini is hidden, as if it were deleted.

    Encode, train, diagnose, export, sample, evaluate on a pipeline made here.
    """
    from PIL import Image

    from tests.evaluation.tiny import save_dpg
    from tests.tiny_pipelines import sd3_with_t5

    model, photos = tmp_path / "model", tmp_path / "photos"
    sd3_with_t5().save_pretrained(model)
    metadata = {"sampling": {"steps": 2, "guidance": 2.0}, "t5_length": 6}
    (model / "advdmd.json").write_text(json.dumps(metadata))
    photos.mkdir()
    lines = []
    for i, text in enumerate(("a lamp", "a chair", "a red door", "two cups")):
        Image.new("RGB", (40, 32), (60 * i, 0, 0)).save(photos / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    save_dpg(tmp_path / "dpg.csv")
    words = [
        "iterations=2", "prompts_per_step=2", "algorithm.group_size=2", "algorithm.dm_only_iterations=1", "threads=1",
        "algorithm.policy_ramp_iterations=1", "lora_rank=4", "dtype=float32", "device=cpu", "discriminator.hidden_size=8",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MINI, str(model), str(tmp_path), json.dumps(words)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "student/pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "pictures/000.png").is_file()
