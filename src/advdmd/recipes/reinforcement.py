"""What changes in AdvDMD's recipes where a student that exists is reinforced."""


def reinforcement(iterations: int) -> dict[str, object]:
    """Overrides of an AdvDMD recipe: policy updates on the forward process, as long as their gradients agree.

    Fake score and discriminator learn alone in the first quarter of `iterations`. The discriminator is shown every sample, and
    its reward is read where it knows most, at u = .3 and .5. Distribution matching goes on in every fourth iteration
    (docs/log.md, 2026-11-28). Learning rates are left to the recipe.
    """
    warmup = iterations // 4
    return {
        "algorithm.warmup_iterations": warmup,
        "algorithm.dm_only_iterations": warmup,
        "algorithm.policy_ramp_iterations": 0,
        "algorithm.dm_every": 4,
        "algorithm.dm_updates": 1,
        "algorithm.discriminator_every_nth_sample": 1,
        "algorithm.policy": "forward",
        "algorithm.forward_draws": 2,
        "algorithm.policy_step": "agreement",
        "algorithm.max_policy_rollouts": 16,
        "algorithm.min_agreement": 0.3,
        "algorithm.final_noise_levels": (0.3, 0.5),
        "dm_optimizer.warmup_steps": 0,
        "dm_optimizer.decay_steps": 0,
        "policy_optimizer.betas": (0.8, 0.999),
        "policy_optimizer.decay_steps": 0,
    }
