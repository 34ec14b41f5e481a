"""What an audit asks of AdvDMD: the discriminator's logits of a trajectory, and the student's gradients by estimator."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from advdmd import flow, losses
from advdmd.algorithms.advdmd import FINAL_NOISE_RANGE, AdvDMD
from advdmd.algorithms.base import DistillationModels
from advdmd.algorithms.objectives import student_loss
from advdmd.rng import Rng
from advdmd.rollout import Trajectory, sample_exit_steps
from advdmd.types import Batch, micro_batches

ESTIMATORS = ("policy", "distribution matching", "GAN")


class Auditor:
    """Reads an AdvDMD run's models and changes nothing.

    images: samples of a prompt that the reward is judged on. seed: of all draws. Raises ValueError on another algorithm.
    """

    def __init__(self, algorithm: object, models: DistillationModels, images: int, seed: int):
        if not isinstance(algorithm, AdvDMD):
            raise ValueError(f"audit is for AdvDMD, whose discriminator is the reward, not for {type(algorithm).__name__}")
        self.algorithm, self.models, self.seed = algorithm, models, seed
        self.judged = replace(algorithm, group_size=images)

    def rollout(self, prompts: Batch) -> Trajectory:
        """Trajectories of prompts with `images` samples each, always from the same noise."""
        return self.judged.rollout(self.models, prompts, self._rng(prompts, 0))

    @torch.no_grad()
    def logits(self, trajectory: Trajectory, prompts: Batch, levels: Sequence[float]) -> dict[str, Tensor]:
        """Logits [N] of the states after each stochastic step and of final images at noise levels in (0, 1), by names.

        The samples of a prompt have the same noise.
        """
        n, device = len(prompts), prompts.real_latents.device
        e = self._rng(prompts, 0).normal("reward.e", trajectory.x.shape[2:])[self.judged.first_of_group(n, device)]
        inputs = {
            f"state {k}, t = {float(trajectory.t[k]):.2f}": (trajectory.x[k], trajectory.t[k].expand(n))
            for k in range(1, trajectory.num_steps)
        }
        for level in levels:
            u = torch.full((n,), level, device=device)
            inputs[final_image_at(level)] = (flow.interpolate(trajectory.x[-1], e, u), u)
        parts = micro_batches(n, self.algorithm.samples_of_a_pass)
        return {
            name: torch.cat([self.models.discriminator(x[i], t[i], prompts.cond[i]).float() for i in parts])
            for name, (x, t) in inputs.items()
        }

    def gradients(
        self, batches: Sequence[Batch], first: int, progress: Callable[[int], object] = lambda done: None
    ) -> dict[str, Tensor]:
        """Mean gradients [D] of the student by ESTIMATORS over batches of training data, with draws number `first` and on."""
        params = self.student_parameters()
        totals = {name: torch.zeros(sum(p.numel() for p in params), device=params[0].device) for name in ESTIMATORS}
        for i, batch in enumerate(batches):
            for name, part in self._losses(batch, self._rng(batch, first + i)):
                found = torch.autograd.grad(part, params, allow_unused=True, materialize_grads=True)
                totals[name] += torch.cat([g.flatten().float() for g in found]) / len(batches)
            progress(first + i)
        return totals

    def student_parameters(self) -> list[torch.nn.Parameter]:
        """The student's parameters, in the order of gradients [D]."""
        return [p for p in self.models.student.net.parameters() if p.requires_grad]

    def _rng(self, batch: Batch, number: int) -> Rng:
        return Rng(self.seed, number, range(len(batch)), device=batch.real_latents.device)

    def _losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
        """Each estimator's loss on a batch, micro-batch by micro-batch, as shares of the batch's mean."""
        algorithm, models = self.algorithm, self.models
        trajectory = algorithm.rollout(models, batch, rng, algorithm.shares_start)
        shape, n = trajectory.x.shape[2:], len(batch)
        advantage = algorithm.advantages(models, trajectory, batch, rng).by_step
        policy_loss, draws = algorithm.policy_loss(models, trajectory, batch, advantage, rng)
        k = sample_exit_steps(rng, "match.k", trajectory.num_steps)
        x, t = trajectory.at(k)
        u, e = rng.uniform("match.u", *algorithm.renoise_range), rng.normal("match.e", shape)
        w = torch.where(k + 1 < algorithm.steps, trajectory.t[k + 1], rng.uniform("match.w", *FINAL_NOISE_RANGE))
        for i in micro_batches(n, algorithm.samples_of_a_pass):
            cond = batch.cond[i]
            for draw in range(draws if algorithm.has_policy_updates else 0):
                loss, _ = policy_loss(i, draw)
                yield "policy", loss.sum() / (n * draws)
            loss, _ = student_loss(models, x[i], t[i], cond, k[i], u[i], e[i], w[i], 0.0)
            yield "distribution matching", loss.sum() / n
            x0 = flow.x0_from_velocity(x[i], models.student(x[i], t[i], cond), t[i])
            logit = models.discriminator.generator_logit(flow.interpolate(x0, e[i], w[i]), w[i], cond)
            yield "GAN", losses.gan_generator(logit).sum() / n


def final_image_at(level: float) -> str:
    """The name of final images at a noise level in (0, 1)."""
    return f"final image, u = {level:g}"
