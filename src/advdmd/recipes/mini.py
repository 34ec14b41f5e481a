"""Recipes of the miniature: how its teachers were made, and how they are distilled."""

from dataclasses import replace
from functools import partial
from typing import Any

from advdmd.algorithms.advdmd import AdvDMD
from advdmd.algorithms.dmd2 import DMD2
from advdmd.algorithms.twinflow import TwinFlow, guidance_strength
from advdmd.mini import pipelines
from advdmd.mini.checker_scorer import CheckerScorer
from advdmd.mini.pretraining import AutoencoderTraining, FlowMatching, PretrainingStage
from advdmd.mini.training_data import MiniData
from advdmd.models.discriminator import DiscriminatorConfig
from advdmd.recipes.overrides import override
from advdmd.recipes.recipe import Recipe
from advdmd.recipes.reinforcement import reinforcement
from advdmd.rewards.registry import register_scorer
from advdmd.training.optimizer import OptimizerConfig

register_scorer("checker", lambda where, device: CheckerScorer())


def autoencoder() -> PretrainingStage:
    """15 minutes of one thread; reconstructions score .98 or more (docs/log.md)."""
    return PretrainingStage(
        model="autoencoder",
        algorithm=AutoencoderTraining(),
        optimizer=OptimizerConfig(lr=2e-3, betas=(0.9, 0.99), warmup_steps=100, decay_steps=7000),
        world="full",
        batch=16,
        steps=7000,
        num_prompts=30000,
        ema_decay=0.998,
        save_every=500,
    )


def qwen_autoencoder(**changes: Any) -> PretrainingStage:
    """15 minutes of one thread, and as long again: of its own it stays at 28 dB, a second cycle is needed (docs/log.md)."""
    optimizer = replace(autoencoder().optimizer, decay_steps=5000)
    return replace(autoencoder(), model="qwen-autoencoder", steps=5000, optimizer=optimizer, **changes)


def teacher() -> PretrainingStage:
    """45 minutes of one thread. Small batches: at this budget more updates beat cleaner ones (docs/log.md)."""
    return PretrainingStage(
        model="mini-sd35",
        origin="autoencoder",
        algorithm=FlowMatching(),
        optimizer=OptimizerConfig(lr=3e-3, betas=(0.9, 0.99), warmup_steps=200, decay_steps=16000),
        batch=32,
        steps=16000,
        num_prompts=50000,
        ema_decay=0.999,
        save_every=1000,
        sample_every=2000,
    )


def cycle(lr: float, steps: int, seed: int, origin: Any = "mini-sd35", **changes: Any) -> PretrainingStage:
    """The learning rate up once more and down to nothing, on fresh scenes."""
    optimizer = OptimizerConfig(lr=lr, betas=(0.9, 0.99), warmup_steps=200, decay_steps=steps)
    return replace(teacher(), origin=origin, optimizer=optimizer, steps=steps, seed=seed, **changes)


STAGES = {
    "autoencoder": autoencoder,
    "mini-sd35": teacher,
    "mini-sd35-stage2": lambda: cycle(2e-3, 5500, seed=1),
    "mini-sd35-stage3": lambda: cycle(2e-3, 10000, seed=2, add_text_layer=True),
    "mini-sd3": lambda: cycle(1e-3, 12000, seed=3, model="mini-sd3"),
    "qwen-autoencoder": qwen_autoencoder,
    "qwen-autoencoder-stage2": lambda: qwen_autoencoder(origin="qwen-autoencoder", world="half", seed=1),
    "mini-qwen": lambda: cycle(3e-3, 16000, 0, "qwen-autoencoder", model="mini-qwen", size=pipelines.MiniConfig(text_layers=2)),
    "mini-qwen-stage2": lambda: cycle(2e-3, 10000, seed=4, model="mini-qwen", origin="mini-qwen"),
    "mini-qwen-stage3": lambda: cycle(2e-3, 20000, seed=5, model="mini-qwen", origin="mini-qwen"),
}


# The free parts of distillation, as measured here (docs/log.md).
SHIFT = 1.2  # 256 latent numbers drown in less noise than a large image does, so the grid leans less towards it than SD3's 3
PROMPTS = 8  # x 4 samples: at equal time 32 samples an iteration beat 64
SHARED = {"group_size": 4, "fake_score_updates": 2, "shift": SHIFT}
FAKE_SCORE_OPTIMIZER = OptimizerConfig(lr=2e-3, betas=(0.0, 0.999))
# A trunk that learns, from mismatched captions too, rewards what the prompt says. The correlation of its logit with correctness
# within a prompt is .17 for final images, .08 without mismatched captions, 0 when the trunk is frozen.
DISCRIMINATOR = DiscriminatorConfig(trunk="own", feature_depths=(0.25, 0.5, 0.75, 1.0), hidden_size=96)
# A fifth of the fake score's learning rate, for heads and trunk. At that of the fake score the discriminator of mini-sd3
# forgets what it knew of correctness: in 300 iterations its correlation falls from .17 to .12, at a fifth it rises to .26. A
# student of mini-sd35 scores less with it (docs/log.md).
SLOW_DISCRIMINATOR = {"mini-sd3": {"discriminator_lr_scale": 0.2, "trunk_lr_scale": 0.2}}
# Half of the samples and half of the trunk's blocks: the same score for a third fewer forwards, over seeds of the short recipe
# (docs/log.md). On other teachers it was not measured.
CHEAPER_DISCRIMINATOR = {
    "mini-sd35": {"algorithm.discriminator_every_nth_sample": 2, "discriminator.feature_depths": (0.25, 0.5)}
}
FROZEN_DISCRIMINATOR = replace(DISCRIMINATOR, trunk="teacher")  # DMD2's: features that hold still beat the fake score's


def advdmd(name: str, guidance: float, iterations: int = 580) -> Recipe:
    """A result in minutes on two cores."""
    return override(_advdmd(name, guidance, iterations), CHEAPER_DISCRIMINATOR.get(name, {}))


def _advdmd(
    name: str,
    guidance: float,
    iterations: int,
    gan: float = 0.03,
    rate: float = 1e-3,
    policy: float = 2e-5,
    alone: float = 3 / 4,
) -> Recipe:
    """What the recipes of AdvDMD share.

    gan: weight of the GAN loss. rate, policy: learning rates of distribution matching and policy loss; a rate of 2e-3 is too
    fast for the fake score, a policy rate of 2e-4 lowers the score at once. alone: share of the run, in [0, 1], without policy
    updates, which then come ever more often. Three quarters keep the cost below 25 forward passes per sample.
    """
    warmup = int(iterations * alone)
    algorithm = AdvDMD(
        **SHARED,
        dm_only_iterations=warmup,
        policy_ramp_iterations=iterations - warmup,
        dm_every=1,
        mismatched_caption_weight=1.0,
        gan_loss_weight=gan,
        action="projected",
        final_noise_levels=(0.1,),
    )
    return Recipe(
        teacher=name,
        algorithm=algorithm,
        guidance_scale=guidance,
        iterations=iterations,
        dm_optimizer=OptimizerConfig(lr=rate, decay_steps=iterations),
        policy_optimizer=OptimizerConfig(lr=policy, decay_steps=sum(algorithm.updates_at(i).policy for i in range(iterations))),
        fake_score_optimizer=FAKE_SCORE_OPTIMIZER,
        discriminator_lr_scale=1.0,
        discriminator=DISCRIMINATOR,
        ema_decay=0.98,
        prompts_per_step=PROMPTS,
        data=MiniData(),
    )


def advdmd_paper(name: str, guidance: float, iterations: int = 1200) -> Recipe:
    """The paper's plain form in the schedule of the long recipe (docs/papers.md): no GAN loss, no mismatched captions, no gate.

    The discriminator is DMD2's, on the fake score's features. Each step has its own reward and the next state as its action,
    from starts of their own. Not measured as a whole; its parts are in the ablations.
    """
    changes: dict[str, object] = {
        "algorithm.gan_loss_weight": 0.0,
        "algorithm.mismatched_caption_weight": 0.0,
        "algorithm.auc_gating": False,
        "algorithm.credit": "step",
        "algorithm.action": "sample",
        "algorithm.shared_start": False,
        "algorithm.final_noise_levels": (0.02, 0.1, 0.3),
        "discriminator.trunk": "fake",
        "discriminator.trunk_grad_scale": 0.01,
    }
    return override(advdmd_long(name, guidance, iterations), changes)


def advdmd_reinforce(name: str, guidance: float, iterations: int = 800) -> Recipe:
    """Reinforcement of a student that exists (`student=`), by policy updates on the forward process.

    Fake score and discriminator learn alone at first. A student of mini-sd35 that goes on so passes its teacher on mini-dpg by
    .036, and by .034 without policy updates, at equal forwards; with them it keeps its teacher's diversity (.86, without .80).
    With the exact checker as the reward policy updates are worth .14 on mini-geneval, on mini-sd3 (docs/log.md).
    """
    rates: dict[str, object] = {"dm_optimizer.lr": 2e-4, "policy_optimizer.lr": 3e-4}
    return override(advdmd_long(name, guidance, iterations), reinforcement(iterations) | rates)


def dmd2(name: str, guidance: float, iterations: int = 860, rate: float = 1e-3) -> Recipe:
    """The baseline on the same batches; about as many forwards as `advdmd`, where its discriminator is the whole one."""
    return _dmd2(DMD2(**SHARED), name, guidance, iterations, rate)


def _dmd2(algorithm: DMD2, name: str, guidance: float, iterations: int, rate: float) -> Recipe:
    return Recipe(
        teacher=name,
        algorithm=algorithm,
        guidance_scale=guidance,
        iterations=iterations,
        dm_optimizer=OptimizerConfig(lr=rate, decay_steps=iterations * algorithm.dm_updates // algorithm.dm_every),
        fake_score_optimizer=FAKE_SCORE_OPTIMIZER,
        discriminator_lr_scale=1.0,
        discriminator=FROZEN_DISCRIMINATOR,
        ema_decay=0.98,
        prompts_per_step=PROMPTS,
        data=MiniData(),
    )


def twinflow(name: str, guidance: float, iterations: int = 1300, rate: float = 1e-3) -> Recipe:
    """TwinFlow at two steps, tuned on mini-sd35 (docs/log.md): other rates and a slower average score less. It learns from
    real images, so it gets as many as the long recipes."""
    return Recipe(
        teacher=name,
        algorithm=TwinFlow(guidance_strength=guidance_strength(guidance)),
        guidance_scale=1.0,
        iterations=iterations,
        dm_optimizer=OptimizerConfig(lr=rate, betas=(0.9, 0.99), decay_steps=iterations),
        ema_decay=0.95,
        prompts_per_step=PROMPTS,
        data=MiniData(num_prompts=6000),
    )


def _longer(short: Recipe, iterations: int, **algorithm: object) -> Recipe:
    """Two updates of the student on each trajectory, more prompts, a wider discriminator, a slower EMA."""
    changes = {
        **{f"algorithm.{k}": v for k, v in algorithm.items()},
        "algorithm.dm_updates": 2,
        "dm_optimizer.decay_steps": 2 * iterations,
        "ema_decay": 0.99,
        "data.num_prompts": 6000,
        "discriminator.hidden_size": 256,
    }
    return override(short, changes)


def advdmd_long(name: str, guidance: float, iterations: int = 1200) -> Recipe:
    """Where quality counts: longer, more prompts for the discriminator, guidance that keeps diversity.

    Two updates of the student on each trajectory and half of the samples shown to the discriminator are worth .05 on
    mini-geneval at equal forward passes (docs/log.md).
    """
    short = _advdmd(name, guidance, iterations, gan=GAN_LOSS_WEIGHT[name], rate=7e-4, policy=5e-5, alone=2 / 3)
    longer = _longer(short, iterations, discriminator_every_nth_sample=2)
    return override(longer, SLOW_DISCRIMINATOR.get(name, {}))


def dmd2_long(name: str, guidance: float, iterations: int = 1380) -> Recipe:
    """The baseline with the prompts, guidance and updates per trajectory of `advdmd_long`, at as many forward passes."""
    return _longer(dmd2(name, guidance, iterations, rate=7e-4), iterations)


def dmd2_paper(name: str, guidance: float, iterations: int = 1365, rate: float = 1e-3) -> Recipe:
    """The baseline with its paper's schedule: five updates of fake score and discriminator, each on samples of its own, to one
    of the student (2405.14867, Sec. 4.2). As many forwards as `dmd2`, a third as many updates of the student."""
    schedule = replace(DMD2(**SHARED), fake_score_updates=1, dm_every=5)
    return _dmd2(schedule, name, guidance, iterations, rate)


def dmd2_paper_long(name: str, guidance: float, iterations: int = 3250) -> Recipe:
    """The paper's schedule with the prompts and guidance of `advdmd_long`, at as many forward passes."""
    short = dmd2_paper(name, guidance, iterations)
    return override(short, {"ema_decay": 0.99, "data.num_prompts": 6000, "discriminator.hidden_size": 256})


# In the long recipes: it keeps diversity, but of mini-qwen, which has enough, it draws too many objects (docs/log.md).
GAN_LOSS_WEIGHT = {"mini-sd35": 0.1, "mini-sd3": 0.1, "mini-qwen": 0.03}
# Of the teacher in distribution matching: more is faster and costs diversity.
GUIDANCE_SHORT = {"mini-sd35": 4.8, "mini-sd3": 4.0, "mini-qwen": 4.8}
GUIDANCE_LONG = {"mini-sd35": 4.0, "mini-sd3": 3.0, "mini-qwen": 4.0}
RECIPES = {
    f"{name}-{make.__name__.replace('_', '-')}": partial(make, name, guidance)
    for makers, guidances in (
        ((advdmd, dmd2, dmd2_paper, twinflow), GUIDANCE_SHORT),
        ((advdmd_long, advdmd_paper, dmd2_long, dmd2_paper_long), GUIDANCE_LONG),
        ((advdmd_reinforce,), {k: GUIDANCE_LONG[k] for k in ("mini-sd35", "mini-sd3")}),
    )
    for name, guidance in guidances.items()
    for make in makers
}
