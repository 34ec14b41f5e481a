"""algorithm.micro_batch_size=auto: counted, proven by an iteration that is undone, and without a trace in the result."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from advdmd.algorithms.advdmd import AdvDMD
from advdmd.commands import train
from advdmd.commands.show import describe
from advdmd.distillation import memory
from advdmd.distillation.micro_batch import FILL, fitted, with_micro_batch
from advdmd.models import loading
from advdmd.recipes.registry import resolve
from tests.test_product import SMALL

AUTO = "algorithm.micro_batch_size=auto"
AGREEMENT = ["algorithm.policy=forward", "algorithm.policy_step=agreement", "algorithm.policy_ramp_iterations=0"]


def weights(folder):
    return load_file(loading.weights_file(folder))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [("mini-sd35-advdmd", []), ("mini-sd35-advdmd", [*AGREEMENT, "lora_rank=2"]), ("mini-sd35-dmd2", [])],
    ids=["advdmd", "agreement", "dmd2"],
)
def test_a_tried_iteration_leaves_no_trace(recipe, words, tiny_folder, tmp_path, capsys):
    """The student of a run that tried an iteration first is bit for bit that of a run with as many samples a pass."""
    small = SMALL if "advdmd" in recipe else [w for w in SMALL if "dm_only" not in w and "policy" not in w]
    asked = [*small, f"teacher={tiny_folder}", *words]
    name, r = resolve(recipe, [*asked, AUTO])
    ours = weights(train.train(name, r, tmp_path / "auto"))
    assert f"algorithm.micro_batch_size=auto: {r.batch} samples a pass" in capsys.readouterr().err
    theirs = weights(train.train(*resolve(recipe, [*asked, f"algorithm.micro_batch_size={r.batch}"]), tmp_path / "fixed"))
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())


def test_samples_are_halved_until_an_iteration_fits_and_the_number_is_reported(tiny_folder, tmp_path, monkeypatch, capsys):
    """A GPU that holds three samples: the run is that of two a pass, to rounding, and nothing else."""
    step, tried = AdvDMD.train_step, []

    def small_gpu(self, *args):
        tried.append(self.samples_of_a_pass)
        if self.samples_of_a_pass > 3:
            step(replace(self, micro_batch_size=2), *args)  # it fails late: everything has moved
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *args)

    asked = [*SMALL, f"teacher={tiny_folder}", "algorithm.group_size=4"]
    monkeypatch.setattr(AdvDMD, "train_step", small_gpu)
    name, r = resolve("mini-sd35-advdmd", [*asked, AUTO])
    ours = weights(train.train(name, r, tmp_path / "auto"))
    assert tried[:3] == [8, 4, 2]
    assert "algorithm.micro_batch_size=auto: 2 samples a pass" in capsys.readouterr().err
    monkeypatch.setattr(AdvDMD, "train_step", step)
    two = weights(train.train(*resolve("mini-sd35-advdmd", [*asked, "algorithm.micro_batch_size=2"]), tmp_path / "two"))
    assert all(torch.equal(ours[k], v) for k, v in two.items())
    all_at_once = weights(
        train.train(*resolve("mini-sd35-advdmd", [*asked, "algorithm.micro_batch_size=8"]), tmp_path / "eight")
    )
    for k, v in all_at_once.items():
        torch.testing.assert_close(ours[k], v, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("gpu_memory", [24, 48, 80])
@pytest.mark.parametrize("name", ["sd35-medium-advdmd-4step-24gb", "flux2-klein-4b-dmd2-4step-80gb"])
def test_a_gpu_is_filled_and_not_more(name, gpu_memory):
    _, r = resolve(name, [AUTO, "lora_rank=16"])
    found = fitted(r, 1024, 1, gpu_memory)
    n = found.algorithm.micro_batch_size
    share = memory.estimate(found, 1024).total / memory.GB / gpu_memory
    assert share <= FILL
    if n < r.batch:
        fewer = -(-r.batch // n) - 1  # passes
        assert memory.estimate(with_micro_batch(r, -(-r.batch // fewer)), 1024).total / memory.GB / gpu_memory > FILL
    assert f"auto: {n} samples a pass" in describe(name, r, gpu_memory, 1, 1024)


def test_without_a_gpu_all_samples_go_in_one_pass_and_a_number_is_kept():
    _, r = resolve("mini-sd35-advdmd", [AUTO])
    assert fitted(r, None, 2, None).algorithm.micro_batch_size == r.batch // 2
    fixed = with_micro_batch(r, 5)
    assert fitted(fixed, None, 1, None) is fixed
    with pytest.raises(ValueError, match=r"AdvDMD\(micro_batch_size=0\): must be at least 1"):
        with_micro_batch(r, 0)
    with pytest.raises(ValueError, match="micro_batch_size='many'"):
        resolve("mini-sd35-dmd2", ["algorithm.micro_batch_size=many"])


def test_a_run_may_go_on_with_another_micro_batch_size(tiny_folder, tmp_path, capsys):
    asked = [*SMALL, f"teacher={tiny_folder}"]
    name, r = resolve("mini-sd35-advdmd", [*asked, "algorithm.micro_batch_size=2"])
    train.train(name, replace(r, iterations=2), tmp_path / "run")
    train.train(*resolve("mini-sd35-advdmd", [*asked, AUTO]), tmp_path / "run")
    assert "algorithm.micro_batch_size: 2 -> auto" in capsys.readouterr().err
