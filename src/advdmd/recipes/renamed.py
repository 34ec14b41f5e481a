"""Names of before 27 November 2026, so that kept runs are still read: recipe keys and values, and keys of metrics.

Applied when files are read, and only then. On the command line an old key is an error that names the new one.
"""

import re
from collections.abc import Mapping

from advdmd.types import Json

_OPTIMIZERS = {"match": "dm_optimizer", "policy": "policy_optimizer", "fake": "fake_score_optimizer"}
_OPTIMIZER_FIELDS = {"clip": "max_grad_norm", "warmup": "warmup_steps", "decay": "decay_steps", "bits": "state_bits"}
_ALGORITHM = {
    "group": "group_size",
    "critic_steps": "fake_score_updates",
    "micro": "micro_batch_size",
    "warmup": "dm_only_iterations",
    "ramp": "policy_ramp_iterations",
    "match_every": "dm_every",
    "match_turns": "dm_updates",
    "judge_every": "discriminator_every_nth_sample",
    "final_levels": "final_noise_levels",
    "mismatch": "mismatched_caption_weight",
    "gan": "gan_loss_weight",
    "gated": "auc_gating",
    "online": "discriminator_online",
    "clip": "clip_range",
    "u_range": "renoise_range",
    "auc_memory": "auc_decay",
    "gap": "last_time",
    "guidance": "guidance_strength",
    "near": "near_fraction",
    "rectify": "rectification_weight",
}
KEYS = {
    "guidance": "guidance_scale",
    "heads_rate": "discriminator_lr_scale",
    "trunk_rate": "trunk_lr_scale",
    "exits_rate": "exit_embedding_lr_scale",
    "critic.blocks": "discriminator.feature_depths",
    "critic.trunk": "discriminator.trunk",
    "critic.trunk_weight": "discriminator.trunk_grad_scale",
    "critic.hidden": "discriminator.hidden_size",
    "shard": "fsdp",
    "checkpointing": "gradient_checkpointing",
    "ema": "ema_decay",
    "look_every": "sample_every",
    "exam_every": "eval_every",
    "exam_images": "eval_images",
    "data.prompts": "data.num_prompts",
    "data.reals": "data.images_per_prompt",
    **{f"algorithm.{old}": f"algorithm.{new}" for old, new in _ALGORITHM.items()},
    **{
        f"{old}.{field}": f"{new}.{_OPTIMIZER_FIELDS.get(field, field)}"
        for old, new in _OPTIMIZERS.items()
        for field in ("lr", "betas", *_OPTIMIZER_FIELDS)
    },
}
VALUES = {("algorithm.action", "seen"): "projected", ("algorithm.action", "landed"): "sample"}
# Two losses were sums: they keep names of their own.
_METRICS = (
    (r"fake/(loss|norm)", {"loss": "fake_score/loss_with_discriminator", "norm": "fake_score/grad_norm"}),
    (r"student/match/(loss|norm)", {"loss": "student/dm_and_gan_loss", "norm": "student/dm_grad_norm"}),
    (r"student/policy/(loss|norm)", {"loss": "policy/loss", "norm": "policy/grad_norm"}),
    (r"student/(cosine|ratio)", {"cosine": "student/policy_dm_cosine", "ratio": "student/policy_dm_ratio"}),
    (r"student/(loss|norm)", {"loss": "student/loss", "norm": "student/grad_norm"}),
    (r"path/(group_spread)", {"group_spread": "student/within_group_std"}),
    (r"policy/(zero_share|ratio_off)", {"zero_share": "policy/frac_zero_advantage", "ratio_off": "policy/max_ratio_error"}),
    (r"cost/(forwards|eta)", {"forwards": "cost/forwards_per_sample", "eta": "cost/efficiency"}),
    (
        r"twin/(end|near|any|own|rectify)",
        {
            "end": "twinflow/one_step_loss",
            "near": "twinflow/near_loss",
            "any": "twinflow/any_step_loss",
            "own": "twinflow/fake_trajectory_loss",
            "rectify": "twinflow/rectification_loss",
        },
    ),
    (r"exam/(forwards)", {"forwards": "eval/forwards_per_sample"}),
    (r"(?:exam|eval)/(strict)", {"strict": "eval/score"}),
)


def new_key(key: str) -> str:
    """The new name of an old recipe key, or "" if the key is not an old one."""
    return KEYS.get(key, "")


def new_value(key: str, value: object) -> object:
    """The new name of an old value under a (new) recipe key; other values as they are."""
    return VALUES.get((key, value), value) if isinstance(value, str) else value


def new_settings(settings: Mapping[str, object]) -> Json:
    """Settings of a recipe file, dotted keys, under their new names."""
    found = {new_key(k) or k: v for k, v in settings.items()}
    return {k: new_value(k, v) for k, v in found.items()}


def new_metric(key: str) -> str:
    """The new name of a metric's key; others as they are."""
    for pattern, names in _METRICS:
        if found := re.fullmatch(pattern, key):
            return names[found[1]]
    key = re.sub(r"^exam/", "eval/", key)
    key = re.sub(r"^critic/gap", "discriminator/logit_gap", key)
    key = re.sub(r"^critic/", "discriminator/", key)
    return re.sub(r"_spread$", "_std", re.sub(r"^reward/end", "reward/final", key)) if key.startswith("reward/") else key


def new_metrics(line: Mapping[str, float]) -> dict[str, float]:
    """A line of metrics.jsonl under the new names."""
    return {new_metric(k): v for k, v in line.items()}
