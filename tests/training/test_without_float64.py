"""Apple's GPUs have no float64: an iteration of every algorithm, and what is around it, works without."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from advdmd.algorithms.dmd2 import DMD2
from advdmd.commands import train
from advdmd.models import devices
from advdmd.recipes.registry import resolve
from advdmd.training import distributed

AGREEMENT = ["algorithm.policy_step=agreement", "algorithm.policy=forward", "algorithm.max_policy_rollouts=1"]


class NoFloat64(TorchDispatchMode):
    """Refuses every operation that reads or makes float64 while an iteration runs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            assert not (isinstance(x, torch.Tensor) and x.dtype == torch.float64), func
        return out


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("mini-sd35-advdmd", []),
        (
            "mini-sd35-advdmd",
            ["algorithm.policy_step=agreement", "algorithm.policy=forward", "algorithm.max_policy_rollouts=1"],
        ),
        ("mini-sd35-dmd2", ["lora_rank=2"]),
        ("mini-sd35-twinflow", []),
    ],
    ids=["advdmd", "agreement", "dmd2", "twinflow"],
)
def test_an_iteration_needs_no_float64(recipe, words, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "widest_float", lambda device: torch.float32)
    common = [f"teacher={tiny_folder}", "data.num_prompts=6", "data.images_per_prompt=1", "iterations=3", "prompts_per_step=4"]
    few = [] if "twinflow" in recipe else ["algorithm.steps=2", "algorithm.group_size=2"]
    at_once = ["algorithm.dm_only_iterations=1", "algorithm.policy_ramp_iterations=0"] if "advdmd" in recipe else []
    name, r = resolve(recipe, [*common, *few, *at_once, *words])
    step = type(r.algorithm).train_step
    ran = []

    def recorded(self, *args):
        ran.append(1)
        with NoFloat64():
            return step(self, *args)

    monkeypatch.setattr(type(r.algorithm), "train_step", recorded)
    train.train(name, r, tmp_path / "run")
    assert len(ran) == 3


def test_a_device_that_is_not_there_is_named():
    for device in ("mps", "cuda"):
        if not {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}[device]:
            with pytest.raises(ValueError, match=f"device={device}: torch sees no such GPU here"):
                devices.resolve_device(device)
    with pytest.raises(ValueError, match="device=tpu: one of auto, cpu, cuda, mps"):
        devices.resolve_device("tpu")


def test_a_type_that_a_device_lacks_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(devices, "has_dtype", lambda device, dtype: dtype != torch.bfloat16)
    devices.check_dtype("cpu", "float32")
    with pytest.raises(ValueError, match="dtype=bfloat16: device=cpu has no such numbers here; use dtype=float32"):
        devices.check_dtype("cpu", "bfloat16")


@pytest.mark.parametrize(("dtype", "products"), [("float32", "highest"), ("bfloat16", "high")])
def test_a_runs_products_in_float32_are_exact_where_the_run_is(dtype, products, tiny_folder, tmp_path, monkeypatch):
    step, found = DMD2.train_step, []

    def recorded(self, *args):
        found.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return step(self, *args)

    monkeypatch.setattr(DMD2, "train_step", recorded)
    small = [
        "data.num_prompts=6",
        "data.images_per_prompt=1",
        "iterations=1",
        "prompts_per_step=2",
        f"dtype={dtype}",
        "lora_rank=2",
    ]
    train.train(*resolve("mini-sd35-dmd2", [f"teacher={tiny_folder}", *small]), tmp_path / "run")
    assert found == [(products, False)]
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", True)
