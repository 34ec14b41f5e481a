"""Recipes of the miniature: how its teachers were made, and how they are distilled."""

from dataclasses import replace
from functools import partial
from typing import Any

from advdmd.algorithms.advdmd import AdvDMD
from advdmd.algorithms.dmd2 import DMD2
from advdmd.algorithms.pretrain import Autoencode, FlowMatch
from advdmd.models import mini
from advdmd.models.critic import CriticConfig
from advdmd.recipe import Recipe
from advdmd.train.learner import Optim
from advdmd.train.pretraining import Stage


def autoencoder() -> Stage:
    """15 minutes of one thread; reconstructions score .98 or more (docs/log.md)."""
    return Stage(
        model="autoencoder",
        algorithm=Autoencode(),
        optim=Optim(lr=2e-3, betas=(0.9, 0.99), warmup=100, decay=7000),
        world="full",
        batch=16,
        steps=7000,
        pool=30000,
        ema=0.998,
        save_every=500,
    )


def teacher() -> Stage:
    """45 minutes of one thread. Small batches: at this budget more updates beat cleaner ones (docs/log.md)."""
    return Stage(
        model="mini-sd35",
        origin="autoencoder",
        algorithm=FlowMatch(),
        optim=Optim(lr=3e-3, betas=(0.9, 0.99), warmup=200, decay=16000),
        batch=32,
        steps=16000,
        pool=50000,
        ema=0.999,
        save_every=1000,
        look_every=2000,
    )


def cycle(lr: float, steps: int, seed: int, origin: Any = "mini-sd35", **changes: Any) -> Stage:
    """The learning rate up once more and down to nothing, on fresh scenes."""
    optim = Optim(lr=lr, betas=(0.9, 0.99), warmup=200, decay=steps)
    return replace(teacher(), origin=origin, optim=optim, steps=steps, seed=seed, **changes)


STAGES = {
    "autoencoder": autoencoder,
    "mini-sd35": teacher,
    "mini-sd35-again": lambda: cycle(2e-3, 5500, seed=1),
    "mini-sd35-deep": lambda: cycle(2e-3, 10000, seed=2, deepen=True),
    "mini-sd3": lambda: cycle(1e-3, 12000, seed=3, model="mini-sd3"),
    "qwen-autoencoder": lambda: replace(autoencoder(), model="qwen-autoencoder"),
    "mini-qwen": lambda: replace(teacher(), model="mini-qwen", origin="qwen-autoencoder", size=mini.Size(text_layers=2)),
    "mini-qwen-again": lambda: cycle(2e-3, 10000, seed=4, model="mini-qwen", origin="mini-qwen"),
}


# The free parts of distillation, as measured here (docs/log.md).
SHIFT = 1.2  # 256 latent numbers drown in less noise than a large image does, so the grid leans less towards it than SD3's 3
BATCH = {"prompts_per_step": 8, "ema": 0.98}  # x 4 samples: at equal time 32 samples an iteration beat 64
FOLLOW = {"group": 4, "critic_steps": 6, "shift": SHIFT}  # a fake score that lags costs diversity first
FAKE = Optim(lr=2e-3, betas=(0.0, 0.999))
CRITIC = CriticConfig(trunk="teacher", blocks=(0.25, 0.5, 0.75, 1.0), hidden=256)  # features that hold still: AUC .64, not .58
MATCHING = 7e-4  # at 2e-3 the fake score cannot follow
POLICY = 5e-5  # at 2e-4 and more the gradient's noise costs more than its direction brings


def advdmd(name: str, guidance: float, iterations: int = 360) -> Recipe:
    """A result in minutes on two cores. Matching and critic alone for 240 iterations, then policy turns, denser and denser.

    The critic is also back-propagated, a little: the best of three short runs had it; neither its share of the score nor the
    policy turns' has been isolated yet (log).
    """
    return Recipe(
        teacher=name,
        algorithm=AdvDMD(**FOLLOW, warmup=240, ramp=120, match_every=1, gan=1e-2, final_levels=(0.1,)),
        guidance=guidance,
        iterations=iterations,
        match=Optim(lr=MATCHING, decay=iterations),
        policy=Optim(lr=POLICY),
        fake=FAKE,
        heads_rate=1.0,
        critic=CRITIC,
        **BATCH,
    )


def dmd2(name: str, guidance: float, iterations: int = 360) -> Recipe:
    """The baseline on the same batches, with the same critic; about as many forwards as `advdmd`."""
    return Recipe(
        teacher=name,
        algorithm=DMD2(**FOLLOW),
        guidance=guidance,
        iterations=iterations,
        match=Optim(lr=MATCHING, decay=iterations),
        fake=FAKE,
        heads_rate=1.0,
        critic=CRITIC,
        **BATCH,
    )


GUIDANCES = {"mini-sd35": 4.5, "mini-sd3": 4.0}  # in distribution matching; more costs diversity
RECIPES = {
    f"{name}-{make.__name__}": partial(make, name, guidance) for name, guidance in GUIDANCES.items() for make in (advdmd, dmd2)
}
