"""Recipes for the published models, trained on the prompts and images of `advdmd encode`.

A preset of one GPU trains adapters on one frozen base; presets of 8 and 32 GPUs train whole networks, sharded.

None of these has been run on published weights. Schedules and discriminator are what worked in the miniature (docs/results.md).
Learning rates are those of published few-step adapters, and the guidance scale is that of the model card.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from advdmd.algorithms.advdmd import AdvDMD
from advdmd.algorithms.dmd2 import DMD2
from advdmd.algorithms.twinflow import TwinFlow, guidance_strength
from advdmd.data.aspect_buckets import CachedData
from advdmd.models.discriminator import DiscriminatorConfig
from advdmd.recipes.overrides import override
from advdmd.recipes.recipe import Recipe
from advdmd.recipes.reinforcement import reinforcement
from advdmd.training.optimizer import OptimizerConfig
from advdmd.types import Json


@dataclass(frozen=True)
class PublishedModel:
    """A published model: where it is, the guidance its card samples with, its transformer and how long its prompts are."""

    hub: str
    guidance: float
    transformer: str  # class of diffusers
    config: Json = field(default_factory=dict)  # where it differs from the class's defaults
    text: int = 333  # tokens the transformer sees of a prompt, at most
    edits: bool = False  # whether prompts are about source images


SD3 = {
    **{"sample_size": 128, "patch_size": 2, "in_channels": 16, "attention_head_dim": 64, "num_attention_heads": 24},
    **{"num_layers": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    **{"joint_attention_dim": 4096, "pooled_projection_dim": 2048},
}
SD35 = SD3 | {"qk_norm": "rms_norm"}
MEDIUM = {"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}
LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
KLEIN = {
    **{"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    "guidance_embeds": False,
}
MODELS = {
    "sd3-medium": PublishedModel("stabilityai/stable-diffusion-3-medium-diffusers", 7.0, "SD3Transformer2DModel", SD3),
    "sd35-medium": PublishedModel("stabilityai/stable-diffusion-3.5-medium", 4.5, "SD3Transformer2DModel", SD35 | MEDIUM),
    "sd35-large": PublishedModel("stabilityai/stable-diffusion-3.5-large", 3.5, "SD3Transformer2DModel", SD35 | LARGE),
    "qwen-image": PublishedModel("Qwen/Qwen-Image", 4.0, "QwenImageTransformer2DModel", text=1024),
    # 14 x 14 tokens of the source image, and the prompt, which is not cut; 2511's source images have time 0.
    "qwen-image-edit": PublishedModel(
        "Qwen/Qwen-Image-Edit-2511", 4.0, "QwenImageTransformer2DModel", {"zero_cond_t": True}, text=512, edits=True
    ),
    # The guidance of both dev models is a number that the transformer takes, so classifier-free guidance is off.
    "flux-dev": PublishedModel("black-forest-labs/FLUX.1-dev", 1.0, "FluxTransformer2DModel", {"guidance_embeds": True}, 512),
    "flux2-klein-4b": PublishedModel("black-forest-labs/FLUX.2-klein-base-4B", 4.0, "Flux2Transformer2DModel", KLEIN, 512),
    "flux2-dev": PublishedModel("black-forest-labs/FLUX.2-dev", 1.0, "Flux2Transformer2DModel", text=512),
    "z-image": PublishedModel("Tongyi-MAI/Z-Image", 5.0, "ZImageTransformer2DModel", text=512),
}


class Preset(NamedTuple):
    """What makes a model fit: the rank of its adapters (0: whole networks, sharded over the GPUs), samples a pass, GB of a
    GPU and how many of them, bits of the frozen base, side of the images in pixels. `advdmd show` says what that takes.
    Rank 64 is TwinFlow's (2512.05150), lower ones are what fits. Samples a pass fill up to 88 % of the GPU by the estimate,
    whose error was below 12 % (docs/performance.md): one sample takes as many launches of kernels as eight."""

    rank: int
    samples: int
    gpu_memory: int  # GB
    gpus: int = 1
    base_bits: Literal[4, 8, 32] = 32
    resolution: int = 1024  # pixels


PRESETS = {
    ("sd3-medium", "24gb"): Preset(32, 8, 24),
    ("sd35-medium", "24gb"): Preset(32, 8, 24),
    ("sd35-large", "24gb"): Preset(16, 1, 24, resolution=512),
    ("qwen-image", "24gb"): Preset(16, 1, 24, base_bits=4, resolution=512),  # of 16 bits the base alone would take 41 GB
    ("sd3-medium", "80gb"): Preset(64, 32, 80),
    ("sd35-medium", "80gb"): Preset(64, 32, 80),
    ("sd35-large", "80gb"): Preset(64, 12, 80),
    ("qwen-image", "80gb"): Preset(32, 2, 80),
    ("qwen-image-edit", "24gb"): Preset(4, 1, 24, base_bits=4, resolution=512),  # sources have 1024 pixels
    ("qwen-image-edit", "80gb"): Preset(32, 1, 80),
    ("flux-dev", "24gb"): Preset(16, 6, 24, base_bits=4, resolution=512),
    ("flux-dev", "80gb"): Preset(64, 6, 80),
    ("flux2-klein-4b", "24gb"): Preset(16, 2, 24),
    ("flux2-klein-4b", "80gb"): Preset(64, 16, 80),
    ("flux2-dev", "80gb"): Preset(32, 2, 80, base_bits=8),  # of 16 bits the base alone would take 64 GB
    ("z-image", "24gb"): Preset(16, 4, 24, resolution=512),
    ("z-image", "80gb"): Preset(64, 10, 80),
    ("sd3-medium", "8x80gb"): Preset(0, 8, 80, gpus=8),
    ("sd35-medium", "8x80gb"): Preset(0, 8, 80, gpus=8),
    ("sd35-large", "8x80gb"): Preset(0, 2, 80, gpus=8),
    ("qwen-image", "32x80gb"): Preset(0, 1, 80, gpus=32),
}


class NameParts(NamedTuple):
    """What the name of a recipe is made of."""

    model: str
    method: str
    steps: str
    preset: str


def name_parts(name: str) -> NameParts | None:
    """The parts of the name of a recipe of these; None for other recipes."""
    if name not in RECIPES:
        return None
    model = max((model for model, _ in PRESETS if name.startswith(f"{model}-")), key=len)
    found = re.fullmatch(r"(.+)-(\d)step-(\w+)", name.removeprefix(f"{model}-"))
    assert found
    return NameParts(model, found[1], found[2], found[3])


def preset_from_name(name: str) -> Preset | None:
    """What a recipe of these is named after."""
    found = name_parts(name)
    return PRESETS[found.model, found.preset] if found else None


ITERATIONS = 2000  # 64,000 samples, the miniature's long recipes have 38,400; one to five days of an H200 (docs/own-model.md)
GROUP, PROMPTS = 8, 4  # 32 samples an iteration: the fewest with which group advantages meant something in the miniature
# A trunk that learns pays for what the prompt says, a frozen one for nothing (docs/log.md); here it is one more adapter. It
# reads the first half of the network, so that the second is not run.
DISCRIMINATOR = DiscriminatorConfig(trunk="own", feature_depths=(0.25, 0.5), hidden_size=256)
DM_OPTIMIZER = OptimizerConfig(
    lr=1e-4, betas=(0.9, 0.99), warmup_steps=100
)  # TwinFlow's adapters, 2512.05150; whole networks take a tenth
POLICY_OPTIMIZER = OptimizerConfig(lr=1e-5)  # a tenth of matching: in the miniature 2e-4 against 1e-3 lowered the score at once
FAKE_SCORE_OPTIMIZER = OptimizerConfig(lr=2e-4, betas=(0.0, 0.999))  # twice the student's: the fake score must follow it


def _recipe(name: str, preset: str, algorithm: Any, **more: Any) -> Recipe:
    fit = PRESETS[name, preset]
    slower = 1.0 if fit.rank else 0.1
    common = {
        "teacher": MODELS[name].hub,
        "algorithm": algorithm,
        "prompts_per_step": max(PROMPTS, fit.gpus),  # a prompt per GPU at least, for groups stay together
        **{
            k: replace(v, lr=slower * v.lr)
            for k, v in {
                "dm_optimizer": DM_OPTIMIZER,
                "policy_optimizer": POLICY_OPTIMIZER,
                "fake_score_optimizer": FAKE_SCORE_OPTIMIZER,
            }.items()
        },
        "discriminator": DISCRIMINATOR,
        "lora_rank": fit.rank,
        "base_bits": fit.base_bits,
        "fsdp": not fit.rank,
        "dtype": "bfloat16",
        "device": "auto",
        "gradient_checkpointing": True,
        "data": CachedData(),
        "ema_decay": 0.99,  # as in the miniature's long recipes: an average of the last hundred updates
        "save_every": 50,
        # Pictures are decoded on the CPU: with these threads, if all help, two minutes at 1024 pixels (10.5 TFLOP an image).
        "sample_every": 500,
        "threads": 8,
    }
    return Recipe(**common | more)


def advdmd(name: str, preset: str, steps: int, iterations: int = ITERATIONS) -> Recipe:
    """AdvDMD: policy updates in the last fifth of the run, ever more often (2604.28126: DMD first).

    They begin later than in the miniature, which keeps adapters without checkpointing below 20 forward passes; the effect was
    not measured. The rest is the miniature's long recipe (docs/log.md): two updates of the fake score and two of the student
    on each trajectory, half of the samples shown to the discriminator, mismatched captions at full weight, GAN loss .1 for
    diversity.
    """
    warmup = iterations * 4 // 5
    algorithm = AdvDMD(
        steps=steps,
        group_size=GROUP,
        micro_batch_size=PRESETS[name, preset].samples,
        fake_score_updates=2,
        dm_only_iterations=warmup,
        policy_ramp_iterations=iterations - warmup,
        dm_every=1,
        dm_updates=2,
        discriminator_every_nth_sample=2,
        mismatched_caption_weight=1.0,
        gan_loss_weight=0.1,
        final_noise_levels=(0.1,),
    )
    return _recipe(name, preset, algorithm, guidance_scale=MODELS[name].guidance, iterations=iterations)


def advdmd_reinforce(name: str, preset: str, steps: int, iterations: int = ITERATIONS // 2) -> Recipe:
    """Reinforcement of a student that exists (`student=`), with the miniature's schedule and its ratios of learning rates.

    In the miniature that keeps the teacher's diversity, and raises the score only where `rewards` know more than the
    discriminator does (docs/results.md). Each GPU's prompts are halved, so there are recipes of one GPU.
    """
    rates: dict[str, object] = {"dm_optimizer.lr": 3e-5, "policy_optimizer.lr": 4e-5}
    return override(advdmd(name, preset, steps, iterations), reinforcement(iterations) | rates)


def dmd2(name: str, preset: str, steps: int, iterations: int = ITERATIONS) -> Recipe:
    """The baseline on the same batches, with DMD2's weights (2405.14867) and a discriminator on the frozen teacher."""
    algorithm = DMD2(
        steps=steps, group_size=GROUP, micro_batch_size=PRESETS[name, preset].samples, fake_score_updates=2, dm_updates=2
    )
    discriminator = DiscriminatorConfig(
        trunk="teacher", feature_depths=DISCRIMINATOR.feature_depths, hidden_size=DISCRIMINATOR.hidden_size
    )
    return _recipe(
        name, preset, algorithm, guidance_scale=MODELS[name].guidance, iterations=iterations, discriminator=discriminator
    )


def twinflow(name: str, preset: str, steps: int, iterations: int = ITERATIONS) -> Recipe:
    """With adapters TwinFlow integrates in one step (2512.05150, its LoRA code), and its targets are made without an EMA: by
    the student itself or, for Qwen-Image, guided by the frozen teacher. Whole networks of the miniature learn nothing in one
    step (docs/log.md), adapters were not tried: see algorithm.order. A batch goes in one piece, so a GPU has 16 samples, or 4
    where no more fit, and as many iterations cost one GPU a 9th, or a 35th, of AdvDMD's: to compare at equal cost ask for
    more. Many GPUs are as many replicas with the adapters of one."""
    scale, one = MODELS[name].guidance, preset.rpartition("x")[2]
    target, w = ("teacher", scale - 1) if name == "qwen-image" else ("student", guidance_strength(scale))
    algorithm = TwinFlow(
        steps=steps,
        last_time=0.6 if steps == 2 else 0.5,
        order=1,
        target_network=target,
        guidance_strength=w,
        group_size=2,
    )
    prompts = (8 if one == "80gb" and name.startswith("sd3") else 2) * PRESETS[name, preset].gpus
    return _recipe(name, one, algorithm, guidance_scale=1.0, iterations=iterations, prompts_per_step=prompts)


METHODS: dict[str, Callable[..., Recipe]] = {
    "advdmd": advdmd,
    "advdmd-reinforce": advdmd_reinforce,
    "dmd2": dmd2,
    "twinflow": twinflow,
}
RECIPES = {
    f"{name}-{method}-{steps}step-{preset}": partial(make, name, preset, steps)
    for (name, preset), fit in PRESETS.items()
    for method, make in METHODS.items()
    for steps in (4, 2)
    # TwinFlow's batch in one piece does not fit beside a base that had to be of few bits, nor with source images.
    if make is not twinflow or (fit.base_bits == 32 and not MODELS[name].edits)
    if make is not advdmd_reinforce or fit.gpus == 1
}
