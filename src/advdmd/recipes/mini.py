"""Recipes of the miniature: how its teachers were made, and how they are distilled."""

from dataclasses import replace

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


def teacher(model: str) -> Stage:
    """45 minutes of one thread each. Small batches: at this budget more updates beat cleaner ones (docs/log.md)."""
    return Stage(
        model=model,  # type: ignore[arg-type]
        algorithm=FlowMatch(),
        optim=Optim(lr=3e-3, betas=(0.9, 0.99), warmup=200, decay=16000),
        world="half",
        batch=32,
        steps=16000,
        pool=50000,
        ema=0.999,
        save_every=1000,
    )


def second_cycle(model: str) -> Stage:
    """The learning rate up once more and down to nothing, on fresh scenes: twenty minutes of one thread."""
    optim = Optim(lr=2e-3, betas=(0.9, 0.99), warmup=200, decay=5500)
    return replace(teacher(model), optim=optim, steps=5500, seed=1)


STAGES = {
    "autoencoder": autoencoder,
    "mini-sd3": lambda: teacher("mini-sd3"),
    "mini-sd35": lambda: teacher("mini-sd35"),
    "mini-sd3-again": lambda: second_cycle("mini-sd3"),
    "mini-sd35-again": lambda: second_cycle("mini-sd35"),
}


def advdmd(name: str) -> Recipe:
    return Recipe(teacher=name, algorithm=AdvDMD(), guidance=GUIDANCE, iterations=160)


def dmd2(name: str) -> Recipe:
    return Recipe(teacher=name, algorithm=DMD2(), guidance=GUIDANCE, iterations=160, critic=CriticConfig(trunk_weight=1e-2))


RECIPES = {
    "mini-sd35-advdmd": lambda: advdmd("mini-sd35"),
    "mini-sd35-dmd2": lambda: dmd2("mini-sd35"),
    "mini-sd3-advdmd": lambda: advdmd("mini-sd3"),
    "mini-sd3-dmd2": lambda: dmd2("mini-sd3"),
}
