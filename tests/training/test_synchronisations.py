"""How often an iteration waits for the device: once for each optimizer step, and where a policy update checks its rewards.

The device is torch's "meta", which holds no numbers: whoever asks for one gets an error.
"""

import inspect
import traceback
from itertools import chain

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from advdmd.algorithms import policy, twinflow
from advdmd.distillation.build import setup
from advdmd.mini import pipelines
from advdmd.mini.world.caption import VOCABULARY
from advdmd.models import networks
from advdmd.models.loading import backbone_from_pipeline
from advdmd.recipes.registry import resolve
from advdmd.rng import Rng
from advdmd.training import gradient_halves, learner, trainer
from advdmd.types import Columns, Cond
from tests.conftest import TINY
from tests.tiny_pipelines import flux, flux2, qwen_image_edit, z_image

WITHOUT_NUMBERS = torch.device("meta")
ALMOST_NOTHING = 1e-9  # what the host reads: a loss that is finite, an error of the ratio that is small enough


class CopiesThatWait(TorchDispatchMode):
    """Where tensors of the host are copied to the device, and the host waits until they are there."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        source = args[1] if str(func).startswith("aten.copy_") else args[0] if str(func).startswith("aten._to_copy") else None
        if source is not None and source.device.type == "cpu" and out.device == WITHOUT_NUMBERS:
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            place = next(f for f in reversed(traceback.extract_stack()) if "/src/advdmd/" in f.filename)
            self.found += [f"{place.filename.rpartition('/')[2]}: {place.line}"] if waits else []
        return out


def on_meta(models):
    """The same networks, optimizers and tensors on the device without numbers, which has no fused Adam."""
    learners = [m for m in models if isinstance(m, learner.Learner)]
    nets = [*(m.net for m in learners), models.teacher.net]
    if hasattr(models, "ema"):
        nets += [v for v in inspect.getclosurevars(models.ema.__wrapped__).nonlocals.values() if isinstance(v, torch.nn.Module)]
    held = chain(*(chain(n.parameters(), n.buffers()) for n in nets), *(m.ema.values() for m in learners))
    for p in {id(p): p for p in held if p.device != WITHOUT_NUMBERS}.values():
        other = p.detach().to(WITHOUT_NUMBERS)
        torch.utils.swap_tensors(p, torch.nn.Parameter(other, p.requires_grad) if isinstance(p, torch.nn.Parameter) else other)
    for m in learners:
        for o in m._optimizers.values():
            groups = [{"params": g["params"]} for g in o.adam.param_groups]
            o.adam = torch.optim.Adam(groups, betas=o.config.betas, foreach=True)
    if isinstance(models.teacher, networks.Teacher):
        models.teacher.null = models.teacher.null.to(WITHOUT_NUMBERS)
    moved = {k: v.to(WITHOUT_NUMBERS) for k, v in models._asdict().items() if isinstance(v, torch.Tensor | Columns)}
    return models._replace(**moved)


FULL = [
    "algorithm.dm_only_iterations=0",
    "algorithm.policy_ramp_iterations=0",
    "algorithm.dm_every=1",
    "algorithm.steps=2",
    "algorithm.fake_score_updates=1",
]
SEVERAL = "algorithm.micro_batch_size=4"
AGREEMENT = ["algorithm.policy=forward", "algorithm.policy_step=agreement", "algorithm.max_policy_rollouts=1"]


@pytest.mark.parametrize(
    ("recipe", "words", "updates", "more"),
    [
        # finite rewards and gate; ratios
        ("mini-sd35-advdmd", [*FULL, SEVERAL, "algorithm.discriminator_every_nth_sample=1"], 1 + 1 + 1, 2),
        ("mini-sd35-advdmd", [*FULL, SEVERAL, "algorithm.discriminator_every_nth_sample=2"], 1 + 1 + 1, 2),
        ("mini-sd35-advdmd", [*FULL, "lora_rank=2"], 1 + 1 + 1, 2),
        ("mini-sd35-advdmd", [*FULL, SEVERAL, "algorithm.policy=forward"], 1 + 1 + 1, 1),  # which has no ratio
        # an update of two halves; finite rewards, agreement
        ("mini-sd35-advdmd", [*FULL, SEVERAL, *AGREEMENT], 1 + 2 + 1, 2),
        ("mini-sd35-dmd2", [SEVERAL], 2 + 1, 0),
        ("mini-sd35-twinflow", [], 1, 1),  # finite targets
    ],
    ids=["advdmd", "every second sample", "adapters", "forward", "agreement", "dmd2", "twinflow"],
)
def test_an_iteration_waits_once_for_each_update(recipe, words, updates, more, tiny_folder, monkeypatch):
    small = ["prompts_per_step=2", "data.num_prompts=8", "data.images_per_prompt=1"]
    _, r = resolve(recipe, [f"teacher={tiny_folder}", *small, *words])
    ready = setup(r, r.data.open(r.teacher))
    batches = [ready.data.batch_fn(iteration) for iteration in (0, 1)]  # in the second iteration optimizers have moments
    models, asked = on_meta(ready.models), []

    def counted(values):
        asked.append(len(values))
        return [ALMOST_NOTHING] * len(values)

    for module in (gradient_halves, learner, trainer, policy, twinflow):
        monkeypatch.setattr(module, "as_floats", counted)
    for iteration, (batch, ids) in enumerate(batches):
        asked.clear()
        with CopiesThatWait() as copies:
            moved = batch.to(WITHOUT_NUMBERS)
            metrics = r.algorithm.train_step(models, moved, iteration, Rng(0, iteration, ids, device=WITHOUT_NUMBERS))
        assert not copies.found
        assert len(asked) == updates + more
    trainer.as_numbers(metrics)
    assert len(asked) == updates + more + 1, "all numbers of an iteration in one transfer"


@pytest.mark.parametrize(
    "pipeline",
    [
        lambda: pipelines.sd3(VOCABULARY, TINY, sd35=True),
        lambda: pipelines.qwen_image(VOCABULARY, TINY),
        lambda: qwen_image_edit(VOCABULARY, TINY, zero_cond_t=True),
        lambda: flux(VOCABULARY, TINY),
        lambda: flux2(VOCABULARY, TINY),
        lambda: flux2(VOCABULARY, TINY, dev=True),
        lambda: z_image(VOCABULARY, TINY),
    ],
    ids=["sd3", "qwen", "edit", "flux", "flux2", "flux2-dev", "z-image"],
)
def test_a_pass_of_any_backbone_waits_for_nothing(pipeline):
    """After the first, in which libraries move their tables; prompts have different lengths."""
    one = backbone_from_pipeline(pipeline(), {"side": 8})
    with torch.no_grad():
        if one.edits:  # whose prompts are encoded with pictures
            mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
            cond = Cond(
                torch.zeros(2, 3, one.net.config.joint_attention_dim), mask=mask, source=torch.zeros(2, 2, *one.latent_shape)
            )
        else:
            cond = one.encode_text(one.tokenize(["a red circle", "a small blue square above a green triangle"]))
        net, x = one.net.to(WITHOUT_NUMBERS), torch.empty(2, *one.latent_shape, device=WITHOUT_NUMBERS)
        for _ in range(2):
            with CopiesThatWait() as copies:
                v = one.velocity(net, x, x[:, 0, 0, 0], cond.to(WITHOUT_NUMBERS))
    assert v.shape == x.shape
    assert not copies.found


def test_what_was_not_measured_is_left_out():
    found = trainer.as_numbers({"a": torch.tensor(1.5), "b": torch.tensor(float("nan")), "c": 2})
    assert found == {"a": 1.5, "c": 2.0}
