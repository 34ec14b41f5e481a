"""The documentation's commands are run here, the names in it exist, and its links lead to files."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from advdmd.cli import main
from advdmd.mini.suites import MiniSuite
from advdmd.recipes import registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = typer.main.get_command(main.app)
# What makes a command small enough to run here: the same settings with smaller numbers.
TINY = [
    "iterations=2",
    "prompts_per_step=2",
    "algorithm.group_size=4",
    "algorithm.dm_only_iterations=1",
    "algorithm.policy_ramp_iterations=1",
    "threads=1",
]
DATASET = ["data.num_prompts=8", "data.images_per_prompt=2"]
PUBLISHED = [
    "dtype=float32",
    "device=cpu",
    "lora_rank=4",
    "discriminator.hidden_size=8",
    "save_every=2",
]  # of a published model's recipe
SMALLER = {
    "audit": ["--prompts", "12", "--images", "2", "--batches", "1"],
    "mini": [*TINY, *DATASET, "--images", "1"],
    "eval": ["--images", "2", "--prompts", "2", "--threads", "1"],
}
# What needs weights, GPUs or hours, and is tested elsewhere: parsed only.
APART = ("demo", "pretrain", "score", "metric", "convert-detector", "convert-hps")


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
def test_every_command_in_the_documentation_exists(page, words):
    """Its options exist, its arguments are as many and of the kind; its recipe and overrides resolve."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    args = ours(words)
    assert args is not None, f"{page}: {words[0]} is not tested"
    name, command, rest = COMMAND.resolve_command(COMMAND.make_context("advdmd", [], resilient_parsing=True), args)
    params = command.make_context(name, list(rest)).params
    if name in ("train", "show") and params["recipe"]:
        registry.resolve(params["recipe"], params["changes"] or [])


@pytest.fixture
def stand_ins(tmp_path):
    """What the pages call by a name that cannot be had here: a published model, photos."""
    from PIL import Image

    from tests.evaluation import tiny
    from tests.tiny_pipelines import sd3_with_t5

    model, photos = tmp_path / "sd3", tmp_path / "photos"
    sd3_with_t5().save_pretrained(model)
    (model / "advdmd.json").write_text(json.dumps({"sampling": {"steps": 2, "guidance": 2.0}, "t5_length": 6}))
    photos.mkdir()
    for i in range(4):
        Image.new("RGB", (40, 32), (60 * i, 0, 0)).save(photos / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"a picture of {n} circles"}) for i, n in enumerate(("two", "three"))]
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    for name in ("style", "turbo-lora"):
        layer = "transformer.transformer_blocks.0.attn.to_q"
        width = load_file(model / "transformer/diffusion_pytorch_model.safetensors")[f"{layer[12:]}.weight"].shape[0]
        pair = {f"{layer}.lora_A.weight": torch.zeros(2, width), f"{layer}.lora_B.weight": torch.zeros(width, 2)}
        save_file(pair, tmp_path / f"{name}.safetensors")
    (tmp_path / "prompts.txt").write_text("a picture of two circles")
    tiny.save_clip(tmp_path / "CLIP")
    return {"stabilityai/stable-diffusion-3.5-medium": str(model), "MODEL": str(model), "512": "32", "250": "1"}


def shrunk(args, stand_ins):
    """The same command on stand-ins and with smaller numbers."""
    for name, stand_in in stand_ins.items():
        args = [re.sub(rf"(^|=){re.escape(name)}$", rf"\g<1>{stand_in}", w) for w in args]
    if args[0] != "train":
        return [*args, *SMALLER.get(args[0], [])]
    published = args[1].startswith("sd35-medium")
    return [*args, *TINY, *([*PUBLISHED, f"teacher={stand_ins['MODEL']}"] if published else DATASET)]


def test_the_documentations_commands_run_in_their_order(tmp_path, monkeypatch, stand_ins):
    """One new folder, page after page, as someone would who reads them all."""
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for page in ("docs/index.md", "README.md", "docs/own-model.md", "docs/evaluation.md"):
        for words in commands(ROOT / page):
            args = ours(words)
            if args is None or words[0] == "torchrun" or args[0] in APART or "PATH_OR_HUB_ID" in args:
                continue
            COMMAND.main(shrunk(args, stand_ins), standalone_mode=False)
            ran += 1
    assert ran >= 28
    made = (
        "runs/mini/table.md",
        "runs/mini.html",
        "two.html",
        "report.html",
        "pictures/000.png",
        "my-student/model_index.json",
    )
    for file in (*made, "cache/manifest.json", "runs/mine/student/pytorch_lora_weights.safetensors", "scores/mini/scores.json"):
        assert (tmp_path / file).is_file(), file
    assert list((tmp_path / "runs/two/tensorboard").iterdir())


def test_the_readmes_example_in_python_runs(tmp_path, monkeypatch):
    """As it stands, but with smaller numbers and a small suite."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    words = ", ".join(f'"{w}"' for w in [*TINY[1:], *DATASET])
    assert '"iterations=100", "seed=1"' in code
    code = code.replace('"iterations=100", "seed=1"', f'"iterations=2", "seed=1", {words}')
    assert '"mini-geneval",' in code
    code = code.replace('"mini-geneval",', "SUITE,")
    monkeypatch.chdir(tmp_path)
    exec(code, {"SUITE": MiniSuite("mini-geneval", images_per_task=2, prompts_per_task=2)})
    for file in ("pictures/000.png", "python-student/model_index.json", "runs/python-scores/scores.json"):
        assert (tmp_path / file).is_file(), file


def test_the_public_functions_are_imported_when_they_are_first_used():
    code = "import sys, advdmd; assert 'torch' not in sys.modules; print(*[getattr(advdmd, n) for n in advdmd.__all__])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        importlib.import_module("advdmd").trian  # noqa: B018


def symbols(page):
    """Back-ticked dotted names of Python in a page, such as `losses.dmd` or `algorithms.advdmd.AdvDMD.advantages`."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for name in re.findall(r"`((?:advdmd\.)?[a-z_0-9]+(?:\.[A-Za-z_0-9]+)+)(?:\(\))?`", text):
        parts = name.removeprefix("advdmd.").split(".")
        top = ROOT / "src/advdmd" / parts[0]
        if (top.is_dir() or top.with_suffix(".py").is_file()) and parts[-1] not in ("py", "json", "yaml", "md"):
            yield ".".join(parts)


NAMES = sorted({(page.name, name) for page in PAGES if page.name != "log.md" for name in symbols(page)})


def test_pages_name_enough_symbols():
    assert len(NAMES) >= 45


@pytest.mark.parametrize(("page", "name"), NAMES)
def test_every_symbol_in_the_documentation_exists(page, name):
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["advdmd", *parts[:n]]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            fields = getattr(found, "__dataclass_fields__", {})
            found = getattr(found, part, fields.get(part))
            assert found is not None, f"{page}: {name}"
        return
    raise AssertionError(f"{page}: {name}")


def test_the_readmes_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_the_site_builds_without_a_warning_and_loads_nothing_from_other_servers(tmp_path):
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
        page_text = (tmp_path / "site" / f"{page.stem}.html").read_text()
        assert not re.search(r'(src|href)="https?://[^"]+\.(js|css|woff2?|png)', page_text), page
