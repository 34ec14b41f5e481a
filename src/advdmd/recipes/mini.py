"""Recipes of the miniature: how its teachers were made, and how they are distilled."""

from dataclasses import replace
from functools import partial
from typing import Any

from advdmd.algorithms.advdmd import AdvDMD
from advdmd.algorithms.dmd2 import DMD2
from advdmd.algorithms.twinflow import TwinFlow, guidance_strength
from advdmd.mini import pipelines
from advdmd.mini.pretraining import AutoencoderTraining, FlowMatching, PretrainingStage
from advdmd.models.discriminator import DiscriminatorConfig
from advdmd.recipes.recipe import MiniData, Recipe
from advdmd.training.optimizer import OptimizerConfig


def autoencoder() -> PretrainingStage:
    """15 minutes of one thread; reconstructions score .98 or more (docs/log.md)."""
    return PretrainingStage(
        model="autoencoder",
        algorithm=AutoencoderTraining(),
        optim=OptimizerConfig(lr=2e-3, betas=(0.9, 0.99), warmup=100, decay=7000),
        world="full",
        batch=16,
        steps=7000,
        pool=30000,
        ema=0.998,
        save_every=500,
    )


def qwen_autoencoder(**changes: Any) -> PretrainingStage:
    """15 minutes of one thread, and as long again: of its own it stays at 28 dB, a second cycle is needed (docs/log.md)."""
    optim = replace(autoencoder().optim, decay=5000)
    return replace(autoencoder(), model="qwen-autoencoder", steps=5000, optim=optim, **changes)


def teacher() -> PretrainingStage:
    """45 minutes of one thread. Small batches: at this budget more updates beat cleaner ones (docs/log.md)."""
    return PretrainingStage(
        model="mini-sd35",
        origin="autoencoder",
        algorithm=FlowMatching(),
        optim=OptimizerConfig(lr=3e-3, betas=(0.9, 0.99), warmup=200, decay=16000),
        batch=32,
        steps=16000,
        pool=50000,
        ema=0.999,
        save_every=1000,
        look_every=2000,
    )


def cycle(lr: float, steps: int, seed: int, origin: Any = "mini-sd35", **changes: Any) -> PretrainingStage:
    """The learning rate up once more and down to nothing, on fresh scenes."""
    optim = OptimizerConfig(lr=lr, betas=(0.9, 0.99), warmup=200, decay=steps)
    return replace(teacher(), origin=origin, optim=optim, steps=steps, seed=seed, **changes)


STAGES = {
    "autoencoder": autoencoder,
    "mini-sd35": teacher,
    "mini-sd35-again": lambda: cycle(2e-3, 5500, seed=1),
    "mini-sd35-deep": lambda: cycle(2e-3, 10000, seed=2, deepen=True),
    "mini-sd3": lambda: cycle(1e-3, 12000, seed=3, model="mini-sd3"),
    "qwen-autoencoder": qwen_autoencoder,
    "qwen-autoencoder-again": lambda: qwen_autoencoder(origin="qwen-autoencoder", world="half", seed=1),
    "mini-qwen": lambda: cycle(3e-3, 16000, 0, "qwen-autoencoder", model="mini-qwen", size=pipelines.MiniConfig(text_layers=2)),
    "mini-qwen-again": lambda: cycle(2e-3, 10000, seed=4, model="mini-qwen", origin="mini-qwen"),
    "mini-qwen-more": lambda: cycle(2e-3, 20000, seed=5, model="mini-qwen", origin="mini-qwen"),
}


# The free parts of distillation, as measured here (docs/log.md).
SHIFT = 1.2  # 256 latent numbers drown in less noise than a large image does, so the grid leans less towards it than SD3's 3
PROMPTS = 8  # x 4 samples: at equal time 32 samples an iteration beat 64
SHARED = {"group": 4, "critic_steps": 2, "shift": SHIFT}
FAKE_SCORE_OPTIMIZER = OptimizerConfig(lr=2e-3, betas=(0.0, 0.999))
# A trunk that learns, from wrong captions too, pays for what the prompt says: its logit's correlation with correctness within a
# prompt is .17 for final images, .08 without wrong captions, 0 when the trunk is frozen.
DISCRIMINATOR = DiscriminatorConfig(trunk="own", blocks=(0.25, 0.5, 0.75, 1.0), hidden=96)
FROZEN_DISCRIMINATOR = replace(DISCRIMINATOR, trunk="teacher")  # DMD2's: features that hold still beat the fake score's


def advdmd(
    name: str,
    guidance: float,
    iterations: int = 580,
    gan: float = 0.03,
    rate: float = 1e-3,
    policy: float = 2e-5,
    alone: float = 3 / 4,
) -> Recipe:
    """A result in minutes on two cores: matching and critic `alone` for a share of it, then policy turns, ever denser. Three
    quarters keep it below 25 forwards a sample; the long recipes are as their claims were run.

    At a rate of 2e-3 the fake score cannot follow; a policy rate of 2e-4 lowers the score at once.
    """
    warmup = int(iterations * alone)
    algorithm = AdvDMD(
        **SHARED,
        warmup=warmup,
        ramp=iterations - warmup,
        match_every=1,
        mismatch=1.0,
        gan=gan,
        action="seen",
        final_levels=(0.1,),
    )
    return Recipe(
        teacher=name,
        algorithm=algorithm,
        guidance=guidance,
        iterations=iterations,
        match=OptimizerConfig(lr=rate, decay=iterations),
        policy=OptimizerConfig(lr=policy, decay=sum(algorithm.turn(i).policy for i in range(iterations))),
        fake=FAKE_SCORE_OPTIMIZER,
        heads_rate=1.0,
        critic=DISCRIMINATOR,
        ema=0.98,
        prompts_per_step=PROMPTS,
    )


def dmd2(name: str, guidance: float, iterations: int = 860, rate: float = 1e-3) -> Recipe:
    """The baseline on the same batches; about as many forwards as `advdmd`."""
    return Recipe(
        teacher=name,
        algorithm=DMD2(**SHARED),
        guidance=guidance,
        iterations=iterations,
        match=OptimizerConfig(lr=rate, decay=iterations),
        fake=FAKE_SCORE_OPTIMIZER,
        heads_rate=1.0,
        critic=FROZEN_DISCRIMINATOR,
        ema=0.98,
        prompts_per_step=PROMPTS,
    )


def twinflow(name: str, guidance: float, iterations: int = 1300, rate: float = 1e-3) -> Recipe:
    """TwinFlow at two steps, tuned on mini-sd35 (docs/log.md): other rates and a slower average score less. It learns from
    real images, so it gets as many as the long recipes."""
    return Recipe(
        teacher=name,
        algorithm=TwinFlow(guidance=guidance_strength(guidance)),
        guidance=1.0,
        iterations=iterations,
        match=OptimizerConfig(lr=rate, betas=(0.9, 0.99), decay=iterations),
        ema=0.95,
        prompts_per_step=PROMPTS,
        data=MiniData(prompts=6000),
    )


def advdmd_long(name: str, guidance: float, iterations: int = 1200) -> Recipe:
    """Where quality counts: longer, more prompts for the critic to learn from, guidance that keeps diversity; two matching
    turns on each path and half of the samples judged, which at equal forwards is worth .05 on mini-geneval (docs/log.md)."""
    short = advdmd(name, guidance, iterations, gan=GAN_LOSS_WEIGHT[name], rate=7e-4, policy=5e-5, alone=2 / 3)
    algorithm = replace(short.algorithm, match_turns=2, judge_every=2)
    match = replace(short.match, decay=2 * iterations)
    more = {"ema": 0.99, "data": MiniData(prompts=6000), "critic": replace(short.critic, hidden=256)}
    return replace(short, algorithm=algorithm, match=match, **more)


def dmd2_long(name: str, guidance: float, iterations: int = 1380) -> Recipe:
    """The baseline at the same prompts, guidance and turns on a path; as many forwards as `advdmd_long`."""
    short = dmd2(name, guidance, iterations, rate=7e-4)
    algorithm, match = replace(short.algorithm, match_turns=2), replace(short.match, decay=2 * iterations)
    more = {"ema": 0.99, "data": MiniData(prompts=6000), "critic": replace(short.critic, hidden=256)}
    return replace(short, algorithm=algorithm, match=match, **more)


# In the long recipes: it keeps diversity, but of mini-qwen, which has enough, it draws too many objects (docs/log.md).
GAN_LOSS_WEIGHT = {"mini-sd35": 0.1, "mini-sd3": 0.1, "mini-qwen": 0.03}
# Of the teacher in distribution matching: more is faster and costs diversity.
GUIDANCE_SHORT = {"mini-sd35": 4.8, "mini-sd3": 4.0, "mini-qwen": 4.8}
GUIDANCE_LONG = {"mini-sd35": 4.0, "mini-sd3": 3.0, "mini-qwen": 4.0}
RECIPES = {
    f"{name}-{make.__name__.replace('_', '-')}": partial(make, name, guidance)
    for makers, guidances in (((advdmd, dmd2, twinflow), GUIDANCE_SHORT), ((advdmd_long, dmd2_long), GUIDANCE_LONG))
    for name, guidance in guidances.items()
    for make in makers
}
