"""The two updates that AdvDMD and DMD2 share, with their random draws: of fake score and discriminator, and of the
student.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advdmd import losses
from advdmd.algorithms.base import Aux, DistillationModels
from advdmd.algorithms.objectives import DiscriminatorInputs, discriminator_loss, fake_score_loss, student_loss
from advdmd.rng import Rng
from advdmd.rollout import Trajectory, sample_exit_steps
from advdmd.types import Columns, Cond, StepMetrics, micro_batches, moved


@dataclass(frozen=True)
class _FakeScoreInputs(Columns):
    """Predictions x0 [N, ...] at steps k [N], their conditions, and the noise levels u [N] and noise e [N, ...] to match flow
    at.
    """

    x0: Tensor
    cond: Cond
    u: Tensor
    e: Tensor
    k: Tensor


def update_fake_score(
    models: DistillationModels,
    trajectory: Trajectory,
    cond: Cond,
    rng: Rng,
    discriminator: DiscriminatorInputs | None,
    *,
    updates: int,
    micro_batch_size: int,
    renoise_range: tuple[float, float],
    every_nth: int = 1,
    mismatched_weight: float = 0.0,
    one_pass: bool = False,
) -> tuple[StepMetrics, Aux]:
    """One pass over the trajectory's N samples in `updates` minibatches, one optimizer step each, so that the fake score
    follows the student.

    The fake score learns the predictions at random steps, and which step each is from. The discriminator learns from its own
    inputs [N], if there are any, of every n-th sample, in the same optimizer steps. Logs means over the N samples. Also returns
    "real_logit" and "fake_logit" [N] of the discriminator, each from before the optimizer step on its minibatch.
    """
    exits, shape = sample_exit_steps(rng, "fake.k", trajectory.num_steps), trajectory.x.shape[2:]
    u, e = rng.uniform("fake.u", *renoise_range), rng.normal("fake.e", shape)
    inputs = _FakeScoreInputs(trajectory.x0_at(exits), cond, u, e, exits)

    def loss_of(i: Tensor) -> tuple[Tensor, Aux]:
        """Losses of samples i [n], indices on the host.

        If this rank has none, of one sample that counts for nothing: sharded networks need as many passes on every rank.
        """
        j = i if len(i) else i.new_zeros(1)
        fake_loss = fake_score_loss(models, **vars(inputs[j]))
        loss, aux = fake_loss, {"index": moved(j, fake_loss.device), "fake_score/loss": fake_loss.detach()}
        if discriminator is not None:
            shown = (j % every_nth == 0).nonzero()[:, 0]
            d_loss, logits = discriminator_loss(models, discriminator[j], shown, every_nth, mismatched_weight, one_pass)
            loss, aux = fake_loss + d_loss, aux | {"discriminator/loss": d_loss.detach()} | logits
        return loss[: len(i)], {k: v[: len(i)] for k, v in aux.items()}

    logs: list[StepMetrics] = []
    found: list[Aux] = []
    for minibatch, passes in rng.minibatches("critic.order", updates, micro_batch_size):
        parts = [minibatch[k * micro_batch_size : (k + 1) * micro_batch_size] for k in range(passes)]
        metrics, aux = models.fake_score.update(loss_of(i) for i in parts)
        logs.append(metrics)
        found.append(aux)
    aux = _in_order(found)
    logged: StepMetrics = {k: v.mean() for k, v in aux.items() if "/" in k}
    return mean_metrics(logs) | logged, {k: v for k, v in aux.items() if "/" not in k}


def update_student(
    models: DistillationModels,
    trajectory: Trajectory,
    cond: Cond,
    rng: Rng,
    *,
    updates: int,
    micro_batch_size: int,
    renoise_range: tuple[float, float],
    gan_loss_weight: float = 0.0,
    gan_levels: Callable[[str, Tensor, Tensor], Tensor],
) -> StepMetrics:
    """`updates` optimizer steps of the student on distribution matching.

    The gradient flows through one random step of the trajectory.

    A trajectory costs half as much as an update with its teacher and fake score, and its states stay the student's own for a
    few small optimizer steps. With gan_loss_weight > 0 the discriminator's gradient is added, at the noise levels
    gan_levels(prefix of stream names, k, u) [N]. Logs means over the updates.
    """
    logs: list[StepMetrics] = []
    for update in range(updates):
        name = f"match{update or ''}"  # every update has draws of its own
        k = sample_exit_steps(rng, f"{name}.k", trajectory.num_steps)
        x, t = trajectory.at(k)
        u, e = rng.uniform(f"{name}.u", *renoise_range), rng.normal(f"{name}.e", trajectory.x.shape[2:])
        w = gan_levels(name, k, u)
        parts = micro_batches(len(x), micro_batch_size)
        metrics, aux = models.student.update(
            (student_loss(models, x[i], t[i], cond[i], k[i], u[i], e[i], w[i], gan_loss_weight) for i in parts), "dm"
        )
        logs.append(metrics | {f"student/{name}": v.mean() for name, v in aux.items()})
    return mean_metrics(logs)


def update_auc(models: DistillationModels, real: Tensor, fake: Tensor, at: Tensor, level: int, decay: float) -> Tensor:
    """Move the running AUC of a level (1..K) by the logits [N] of real and generated samples where `at` [N] is true.

    Returns the AUC []. decay in [0, 1). If `at` is true nowhere the AUC stays as it was.
    """
    before = models.discriminator_auc[level - 1].clone()
    now = torch.where(at.any(), losses.auc(real, fake, at), before)
    models.discriminator_auc[level - 1] = decay * before + (1 - decay) * now
    return models.discriminator_auc[level - 1].clone()


def logit_gap(real: Tensor, fake: Tensor, at: Tensor) -> Tensor:
    """The mean logit [N] of real images minus that of generated ones where `at` [N] is true, []; nan if nowhere."""
    return torch.where(at, real - fake, torch.zeros_like(real)).sum() / at.sum()


def mean_metrics(logs: Sequence[StepMetrics]) -> StepMetrics:
    """The mean of each number over several updates."""
    return {k: sum(log[k] for log in logs) / len(logs) for k in logs[0]} if logs else {}


def _in_order(found: Sequence[Aux]) -> Aux:
    """Values of several minibatches, each with the "index" [n] of its samples, as columns [N] in the order of the samples."""
    index = torch.cat([aux["index"] for aux in found])
    columns = {k: torch.cat([aux[k] for aux in found]) for k in found[0] if k != "index"}
    return {k: torch.empty_like(v).index_copy_(0, index, v) for k, v in columns.items()}
