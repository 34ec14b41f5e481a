"""Recipes of the miniature: how its teachers were made, and how they are distilled."""

from dataclasses import replace
from typing import Any

from advdmd.algorithms.advdmd import AdvDMD
from advdmd.algorithms.dmd2 import DMD2
from advdmd.algorithms.pretrain import Autoencode, FlowMatch
from advdmd.models.critic import CriticConfig
from advdmd.recipe import Recipe
from advdmd.train.learner import Optim
from advdmd.train.pretraining import GUIDANCE, Stage


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


def cycle(lr: float, steps: int, seed: int, **changes: Any) -> Stage:
    """The learning rate up once more and down to nothing, on fresh scenes."""
    optim = Optim(lr=lr, betas=(0.9, 0.99), warmup=200, decay=steps)
    return replace(teacher(), origin="mini-sd35", optim=optim, steps=steps, seed=seed, **changes)


STAGES = {
    "autoencoder": autoencoder,
    "mini-sd35": teacher,
    "mini-sd35-again": lambda: cycle(2e-3, 5500, seed=1),
    "mini-sd35-deep": lambda: cycle(2e-3, 10000, seed=2, deepen=True),
    "mini-sd3": lambda: cycle(1e-3, 12000, seed=3, model="mini-sd3"),
}


# Rates of tiny full networks: at a tenth of them the student is far from done in this time, at a policy rate of 1e-4 it gets
# worse with every turn (docs/log.md). `decay` counts updates; the iterations below make about 90 of distribution matching.
MATCH = Optim(lr=2e-3, decay=100)
FAKE = Optim(lr=2e-3, betas=(0.0, 0.999))
POLICY = Optim(lr=2e-5)
U_RANGE = (0.3, 0.98)  # below .3 the guided teacher has little to say here, and the difference is mostly noise


def advdmd(name: str) -> Recipe:
    """A result in minutes on two cores."""
    algorithm = AdvDMD(warmup=30, ramp=30, critic_steps=2, u_range=U_RANGE)
    return Recipe(teacher=name, algorithm=algorithm, guidance=GUIDANCE, iterations=120, match=MATCH, fake=FAKE, policy=POLICY)


def dmd2(name: str) -> Recipe:
    """The baseline on the same batches; about as many forwards as `advdmd` in 160 iterations."""
    critic = CriticConfig(trunk_weight=1e-2)
    return Recipe(
        teacher=name,
        algorithm=DMD2(critic_steps=2, u_range=U_RANGE),
        guidance=GUIDANCE,
        iterations=160,
        match=Optim(lr=2e-3, decay=160),
        fake=FAKE,
        critic=critic,
    )


RECIPES = {
    "mini-sd35-advdmd": lambda: advdmd("mini-sd35"),
    "mini-sd35-dmd2": lambda: dmd2("mini-sd35"),
    "mini-sd3-advdmd": lambda: advdmd("mini-sd3"),
    "mini-sd3-dmd2": lambda: dmd2("mini-sd3"),
}
