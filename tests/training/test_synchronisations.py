"""How often an iteration waits for the device: once for each optimizer step, and where a policy update checks its rewards."""

import collections
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from advdmd.algorithms import policy
from advdmd.distillation.build import setup
from advdmd.recipes.registry import resolve
from advdmd.rng import Rng
from advdmd.training import learner, trainer
from advdmd.types import as_floats

WAITING = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default", "aten.equal.default")


class Waits(TorchDispatchMode):
    """Counts operations whose result the host needs, on a GPU a wait; rng.py draws on the CPU whatever the device is."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        index = args[1] if str(func).startswith(("aten.index.Tensor", "aten.index_put")) else []
        masked = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index)
        if str(func) in WAITING or masked:
            place = next(f for f in reversed(traceback.extract_stack()) if "/src/advdmd/" in f.filename)
            if not place.filename.endswith("rng.py"):
                self.found[f"{func} in {place.filename.rpartition('/')[2]}: {place.line}"] += 1
        return func(*args, **(kwargs or {}))


FULL = [
    "algorithm.dm_only_iterations=0",
    "algorithm.policy_ramp_iterations=0",
    "algorithm.dm_every=1",
    "algorithm.dm_updates=2",
]


@pytest.mark.parametrize(
    ("recipe", "words", "updates", "more"),
    [
        ("mini-sd35-advdmd", [*FULL, "algorithm.micro_batch_size=2"], 2 + 1 + 2, 2),  # finite rewards and gate; ratios
        ("mini-sd35-advdmd", [*FULL, "lora_rank=2"], 2 + 1 + 2, 2),
        ("mini-sd35-dmd2", ["algorithm.micro_batch_size=2"], 2 + 1, 0),
    ],
    ids=["advdmd", "adapters", "dmd2"],
)
def test_an_iteration_waits_once_for_each_update(recipe, words, updates, more, tiny_folder, monkeypatch):
    _, r = resolve(recipe, [f"teacher={tiny_folder}", "data.num_prompts=8", "data.images_per_prompt=1", *words])
    ready = setup(r, r.data.open(r.teacher))
    asked = []

    def counted(values):
        asked.append(len(values))
        return as_floats(values)

    for module in (learner, trainer, policy):
        monkeypatch.setattr(module, "as_floats", counted)
    listed, tolist = [], torch.Tensor.tolist  # which a tensor of the CPU does without an operation

    def counted_list(values):
        place = traceback.extract_stack()[-2].filename
        listed.extend([place] if "/src/advdmd/" in place and not place.endswith(("types.py", "rng.py")) else [])
        return tolist(values)

    monkeypatch.setattr(torch.Tensor, "tolist", counted_list)
    for iteration in (0, 1):  # in the second the student's optimizers have moments, whose alignment is logged
        batch, ids = ready.data.batch_fn(iteration)
        asked.clear()
        listed.clear()
        with Waits() as waits:
            metrics = r.algorithm.train_step(ready.models, batch, iteration, Rng(0, iteration, ids))
        assert not waits.found
        assert not listed
        assert len(asked) == updates + more
    numbers = trainer.as_numbers(metrics)
    assert len(asked) == updates + more + 1, "all numbers of an iteration in one transfer"
    assert all(isinstance(v, float) for v in numbers.values())


def test_what_was_not_measured_is_left_out():
    found = trainer.as_numbers({"a": torch.tensor(1.5), "b": torch.tensor(float("nan")), "c": 2})
    assert found == {"a": 1.5, "c": 2.0}
