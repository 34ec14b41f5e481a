"""Validation on a user's prompts: the same images every time, for any number of processes, and any scorers."""

import json

import pytest
import torch

from advdmd.commands import train
from advdmd.commands.encode import encode
from advdmd.distillation.prompt_validation import prompt_validation, read_prompts
from advdmd.distillation.validation import read_best
from advdmd.models import loading
from advdmd.recipes.registry import resolve
from advdmd.types import Ranks
from tests.data.test_cache import photos, save_teacher, teacher  # noqa: F401
from tests.evaluation import tiny
from tests.test_product import SMALL
from tests.training.test_parallel import metrics_agree, train_in_processes

PROMPTS = ("a picture of a red circle", "a picture of two squares", "a picture of a blue star")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n\n")
    return file


def logged(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_prompts_are_read_from_every_source_that_encode_reads(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone lamp \r\n\n two lamps\none lamp\n".encode())
    assert read_prompts(tmp_path / "a.txt") == ["one lamp", "two lamps"], "each once"
    (tmp_path / "a.jsonl").write_text('{"prompt": "one lamp", "more": 1}\n{"text": "two"}\n')
    assert read_prompts(tmp_path / "a.jsonl") == ["one lamp", "two"]
    (tmp_path / "b.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"validation\.prompts: .*holds no prompts"):
        read_prompts(tmp_path / "b.txt")
    (tmp_path / "c.jsonl").write_text('{"prompt": 3}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_prompts(tmp_path / "c.jsonl")


class Brightness:
    name, fingerprint = "brightness", "x"

    def score(self, images, prompts):
        return torch.tensor([float(i.mean()) + len(p) for i, p in zip(images, prompts, strict=True)])


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_that_share_the_images_get_the_mean_of_all(processes):
    """Also where a process has fewer images than others, or none."""

    def generate(texts, keys):
        return torch.stack([torch.full((2, 2, 3), 10 * key[1] + key[2]) for key in keys]).float().numpy()

    whole = prompt_validation(PROMPTS, {"brightness": Brightness()}, 2, Ranks(), "cpu")(generate)
    found, rows = [], {}
    for complete in range(2):  # first every process's values are recorded, then each gets the values of all
        for rank in range(processes):

            def gather(x, rank=rank, complete=complete):
                rows[rank] = x
                return torch.cat([rows[k] for k in range(processes)], -1) if complete else torch.cat([x] * processes, -1)

            ranks = Ranks(rank, processes, gather)
            scores = prompt_validation(PROMPTS, {"brightness": Brightness()}, 2, ranks, "cpu")(generate)
            if complete:
                found.append(scores)
    for scores in found:
        assert scores == pytest.approx(whole)
    assert whole["score"] == whole["brightness"]


def test_the_best_student_by_a_scorer_is_kept_in_a_run_without_text_encoders(teacher, photos, prompts, tmp_path):  # noqa: F811
    """A published recipe as users run it: a cache, adapters, a scorer with weights; prompts are encoded once."""
    encode(photos, str(teacher), tmp_path / "cache")
    clip = tiny.save_clip(tmp_path / "tiny-clip")
    words = [
        f"teacher={teacher}", f"data.folder={tmp_path / 'cache'}", "iterations=3", "prompts_per_step=2",
        "algorithm.group_size=2", "dtype=float32", "device=cpu", "lora_rank=2",
        "discriminator.hidden_size=8", "save_every=1", "threads=1", "eval_every=1",
        f"validation.prompts={prompts}", f"validation.scorers=[clipscore:{clip}]", "validation.images=2",
    ]  # fmt: skip
    name, r = resolve("sd35-medium-advdmd-4step-24gb", words)
    student = train.train(name, r, tmp_path / "run")
    scores = [line["eval/score"] for line in logged(tmp_path / "run")]
    assert len(scores) == 3
    assert scores == [line["eval/clipscore"] for line in logged(tmp_path / "run")]
    best = read_best(tmp_path / "run")
    assert best["score"] == pytest.approx(max(scores), rel=1e-4)
    assert json.loads((student / "advdmd.json").read_text())["iterations"] == best["step"] == scores.index(max(scores)) + 1
    assert (tmp_path / "run/validation.safetensors").is_file()

    original, loads = loading.load, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", lambda *a, **k: loads.append(k.get("encoders", True)) or original(*a, **k))
        train.train(name, resolve(name, [*words, "iterations=4"])[1], tmp_path / "run")
    assert loads == [False], "the text encoders stay on disk when the run goes on"
    assert logged(tmp_path / "run")[3]["eval/score"] > 0


def test_the_checker_is_a_scorer_and_processes_share_the_images(tiny_folder, prompts, tmp_path):
    words = [
        "iterations=4", "algorithm.group_size=2", "prompts_per_step=4", "data.num_prompts=8", "data.images_per_prompt=2",
        "save_every=2", "sample_every=0", "threads=1", "discriminator.hidden_size=8", "algorithm.dm_only_iterations=99",
        "seed=3", "eval_every=2", f"validation.prompts={prompts}", "validation.scorers=[checker]",
    ]  # fmt: skip
    one, two = (train_in_processes(tmp_path / str(n), tiny_folder, n, words) for n in (1, 2))
    metrics_agree(one, two)
    assert {"eval/checker", "eval/score"} <= set(logged(one)[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["validation.prompts=a.txt", "eval_every=1"], "need each other"),
        (["validation.scorers=[checker]", "eval_every=1"], "need each other"),
        (["validation.prompts=a.txt", "validation.scorers=[beauty]", "eval_every=1"], "beauty"),
        (["validation.prompts=a.txt", "validation.scorers=[checker,checker]", "eval_every=1"], "a scorer once"),
        (["validation.prompts=a.txt", "validation.scorers=[checker]"], "set eval_every"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        resolve("mini-sd35-advdmd", words)


def test_a_missing_file_of_prompts_is_named_before_anything_is_made(tiny_folder, tmp_path):
    words = [*SMALL, f"teacher={tiny_folder}", "eval_every=1", "validation.prompts=no.txt", "validation.scorers=[checker]"]
    with pytest.raises(ValueError, match=r"validation\.prompts: no\.txt: no such file"):
        train.train(*resolve("mini-sd35-advdmd", words), tmp_path / "r")
    assert not (tmp_path / "r").exists()
