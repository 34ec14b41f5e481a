"""Policy updates: the loss on the forward process, and steps whose size follows the agreement of two halves."""

import math
from dataclasses import replace

import pytest
import torch

from advdmd import flow, losses
from advdmd.algorithms.advdmd import AdvDMD, Updates
from advdmd.algorithms.base import Costs
from advdmd.algorithms.objectives import forward_policy_loss
from advdmd.algorithms.policy import halves_of_groups
from advdmd.mini.checker_scorer import CheckerScorer
from advdmd.monitoring import health
from advdmd.recipes.registry import resolve
from advdmd.rewards.registry import parse_reward
from advdmd.rng import Rng
from advdmd.training.gradient_halves import GradientHalves, damped
from advdmd.types import Ranks
from tests.algorithms.test_algorithms import count_passes
from tests.toy import Mixture, Net, as_cond, flat, run_iterations, toy_batch_fn
from tests.toy import make_models as toy_models

BEGIN = {"dm_only_iterations": 0, "policy_ramp_iterations": 0, "dm_every": 10**6, "auc_gating": False}
GATHERED = {**BEGIN, "policy_step": "agreement"}


def gradient(models, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(models.student.net.parameters()))])


def test_the_forward_loss_has_the_gradient_of_diffusion_nft_where_the_student_is_its_own_old_policy():
    """2509.16117: r |v+ - target|^2 + (1 - r) |v- - target|^2 with v+- = (1 -+ b) v_old +- b v, at v_old = v."""
    torch.manual_seed(0)
    models, b, n = toy_models(Mixture(), Net(2), 4), 0.7, 6
    x0, e, t, r = torch.randn(n, 2), torch.randn(n, 2), torch.rand(n) * 0.8 + 0.1, torch.rand(n)
    cond, x = as_cond(torch.arange(n) % 2), flow.interpolate(x0, e, t)
    for i in range(n):
        one = slice(i, i + 1)
        v = models.student(x[one], t[one], cond[one])
        old, target = v.detach(), (e - x0)[one]
        nft = [losses.mean_flat(((1 - s * b) * old + s * b * v - target).square()) for s in (1, -1)]
        theirs = gradient(models, (r[i] * nft[0] + (1 - r[i]) * nft[1]).sum())
        ours, aux = forward_policy_loss(models, x0[one], cond[one], (2 * r[one] - 1), t[one], e[one])
        assert aux == {}
        torch.testing.assert_close(2 * b * gradient(models, ours.sum()), t[i] ** 2 * theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_policy_moves_towards_images_with_an_advantage_also_for_one_step(steps):
    """The reward is the first coordinate: after updates on the forward process alone the student samples larger ones."""
    torch.manual_seed(0)
    world, algorithm = Mixture(), AdvDMD(**GATHERED, steps=steps, policy="forward", max_policy_rollouts=4)
    models = toy_models(world, Net(2), steps, policy_lr=3e-3)._replace(extra_rewards=lambda x0, i: {"right": (1.0, x0[:, 0])})
    algorithm = replace(algorithm, discriminator_reward_weight=0.0, dm_only_iterations=0)
    data, before, after = toy_batch_fn(world), [], []
    for i in range(80):
        batch, ids = data(i)
        rng = Rng(0, i, ids)
        trajectory = algorithm.rollout(models, batch, rng)
        (before if i < 8 else after).append(trajectory.x[-1][:, 0].mean().item())
        log = algorithm.update_policy(models, trajectory, batch, rng)
    assert log["policy/gate"] == 1, "the recipe's own reward is not gated"
    assert "reward/right" in log
    assert sum(after[-8:]) / 8 > sum(before) / 8 + 0.1


def test_updates_of_one_step_are_on_the_forward_process_only():
    forward = AdvDMD(**(BEGIN | {"dm_every": 1}), steps=1, policy="forward")
    assert forward.updates_at(3) == Updates(True, True)
    assert not AdvDMD(**(BEGIN | {"dm_every": 1}), steps=1).updates_at(3).policy
    models = toy_models(Mixture(), Net(2), 1)
    log = run_iterations(forward, models, toy_batch_fn(Mixture()), 1)
    assert {"policy/loss", "reward/final", "student/within_group_std"} <= set(log)
    assert "policy/max_ratio_error" not in log


def test_a_group_shares_its_noise_and_draws_differ():
    algorithm = AdvDMD(**BEGIN, policy="forward", forward_draws=2)
    models, batch, rng = toy_models(Mixture(), Net(2), 4), toy_batch_fn(Mixture())(0)[0], Rng(0, 0, range(64))
    inputs = []
    trajectory = algorithm.rollout(models, batch, rng)

    def student(x, t, cond):
        inputs.append((x, t))
        return models.student(x, t, cond)

    recorded = models._replace(student=student)
    loss_of, draws = algorithm.policy_loss(recorded, trajectory, batch, torch.ones(1, len(batch)), rng)
    for draw in range(draws):
        loss_of(torch.arange(len(batch)), draw)
    (x, t), (_, t2) = inputs
    assert (t.unflatten(0, (-1, 8)) == t.unflatten(0, (-1, 8))[:, :1]).all()
    e = (x - (1 - t[:, None]) * trajectory.x[-1]) / t[:, None]
    torch.testing.assert_close(e.unflatten(0, (-1, 8)), e.unflatten(0, (-1, 8))[:, :1].expand(-1, 8, -1), rtol=1e-3, atol=1e-4)
    assert not torch.equal(t, t2)
    assert set(t.tolist()) <= set(trajectory.t[:-1].tolist()), "levels of the student's grid"


@pytest.mark.parametrize("draws", [1, 3])
def test_forwards_on_the_forward_process_are_as_declared(tiny_folder, backbone, draws):
    algorithm = AdvDMD(group_size=4, policy="forward", forward_draws=draws, **(BEGIN | {"dm_every": 1}))
    declared = algorithm.forwards_per_sample(5, Costs(0.0, 0.5))
    assert declared["policy"] == draws
    assert declared["reward"] == 1.5, "three levels of half a network, and no reward of a step"
    assert count_passes(tiny_folder, backbone, algorithm) == pytest.approx(sum(declared.values()))


# Agreement


@pytest.mark.parametrize(("prompts", "processes"), [(4, 1), (4, 2), (8, 4), (3, 1)])
def test_halves_are_the_same_groups_for_any_number_of_processes(prompts, processes):
    group = 3
    for rollouts_before in range(2):
        parts = [set(), set()]
        local = prompts * group // processes
        for rank in range(processes):
            for half, samples in enumerate(halves_of_groups(local, group, Ranks(rank, processes), rollouts_before)):
                parts[half] |= {rank * local + int(i) for i in samples}
        assert parts[0] | parts[1] == set(range(prompts * group))
        assert not parts[0] & parts[1]
        assert all(i // group % 2 == rollouts_before % 2 for i in parts[0])


def halves_with(gradients):
    """GradientHalves of one parameter that were given gradients [rollouts, 2, D]."""
    p = torch.nn.Parameter(torch.zeros(gradients.shape[-1]))
    halves = GradientHalves([p])
    for pair in gradients:
        for h in range(2):
            p.grad = pair[h].clone()
            halves.add(h)
        halves.end_rollout()
    return p, halves


def test_agreement_is_the_cosine_of_the_halves_sums_under_their_scales():
    g = torch.randn(5, 2, 40, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(40) + 0.1
    a, b = g.sum(0) / scale
    found = halves_with(g)[1].step([scale], [0.0])[0]
    assert found == pytest.approx(torch.cosine_similarity(a, b, dim=0).item(), abs=1e-6)
    assert halves_with(g[:, :1].expand(-1, 2, -1))[1].step(None, [0.0])[0] == pytest.approx(1)
    assert halves_with(torch.stack([g[:, 0], -g[:, 0]], 1))[1].step(None, [0.0])[0] == pytest.approx(-1)


def test_a_steps_length_is_its_learning_rate_times_the_share_of_signal():
    """The share estimates the cosine of the sum with the true gradient; halves that oppose each other move nothing."""
    torch.manual_seed(1)
    d, truth = 20000, torch.randn(20000)
    for noise in (0.5, 2.0, 8.0):
        g = truth + noise * torch.randn(4, 2, d)
        p, halves = halves_with(g)
        _, share = halves.step(None, [1e-3])
        assert share == pytest.approx(torch.cosine_similarity(g.sum((0, 1)), truth, dim=0).item(), abs=0.05)
        assert p.detach().square().mean().sqrt() == pytest.approx(1e-3 * share, rel=1e-3)
        assert torch.cosine_similarity(-p.detach(), g.sum((0, 1)), dim=0) > 0.999
        assert (halves.weight, halves.rollouts, halves.state_dict("x")) == (0, 0, {})
    p, halves = halves_with(torch.stack([truth, -truth])[None])
    assert halves.step(None, [1e-3])[1] == 0
    assert (p == 0).all()


def test_parameters_that_hardly_move_get_no_huge_steps():
    scales = [torch.tensor([1e-12, 1.0, 1.0, 2.0])]
    assert damped(scales, scales)[0][0] == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("policy", ["grpo", "forward"])
def test_gathered_rollouts_become_a_step_where_they_agree_or_at_the_limit(policy):
    torch.manual_seed(0)
    world = Mixture()
    models = toy_models(world, Net(2), 4)
    never = AdvDMD(**GATHERED, policy=policy, min_agreement=1.0, max_policy_rollouts=3)
    start, logs = flat(models.student.net).clone(), []
    for i in range(6):
        batch, ids = toy_batch_fn(world)(i)
        rng = Rng(0, i, ids)
        logs.append(never.update_policy(models, never.rollout(models, batch, rng, never.shares_start), batch, rng))
        assert torch.equal(start, flat(models.student.net)) == (i < 2)
    assert [log["policy/rollouts"] for log in logs] == [1, 2, 3, 1, 2, 3]
    assert ["policy/step_share" in log for log in logs] == [False, False, True] * 2
    always = replace(never, min_agreement=0.0, max_policy_rollouts=100)
    assert "policy/step_share" in run_iterations(always, models, toy_batch_fn(world), 1)
    assert "policy/step_share" not in run_iterations(replace(always, min_agreement=0.99), models, toy_batch_fn(world), 1)


def test_a_micro_batch_size_changes_nothing_that_is_gathered():
    found = []
    for size in (64, 5):
        torch.manual_seed(0)
        models = toy_models(Mixture(), Net(2), 4)
        run_iterations(
            AdvDMD(**GATHERED, policy="forward", min_agreement=1.0, micro_batch_size=size), models, toy_batch_fn(Mixture()), 3
        )
        found.append(models.student.state_dict()[0])
    sums = [k for k in found[0] if k.startswith("halves/policy")]
    assert sums
    for k in sums:
        torch.testing.assert_close(found[0][k], found[1][k], rtol=1e-4, atol=1e-6)


def test_gathered_gradients_survive_a_stop():
    torch.manual_seed(0)
    world, algorithm = (
        Mixture(),
        AdvDMD(**(GATHERED | {"dm_every": 2}), policy="forward", min_agreement=1.0, max_policy_rollouts=4),
    )
    whole, stopped, resumed = (toy_models(world, Net(2), 4, seed=3) for _ in range(3))
    for models in (stopped, resumed):
        models.student.load_state_dict(*whole.student.state_dict())
        models.fake_score.load_state_dict(*whole.fake_score.state_dict())
    run_iterations(algorithm, whole, toy_batch_fn(world), 6)
    run_iterations(algorithm, stopped, toy_batch_fn(world), 3)
    assert stopped.student.accumulated_rollouts("policy") == 3
    for name in ("student", "fake_score"):
        tensors, counters = getattr(stopped, name).state_dict()
        assert set(tensors) <= set(getattr(stopped, name).state_template())
        getattr(resumed, name).load_state_dict({k: v.clone() for k, v in tensors.items()}, counters)
    resumed.discriminator_auc.copy_(stopped.discriminator_auc)
    run_iterations(algorithm, resumed, toy_batch_fn(world), 6, start=3)
    assert torch.equal(flat(whole.student.net), flat(resumed.student.net))


# Schedule and rewards


def test_the_gan_fades_as_the_policy_takes_over():
    a = AdvDMD(dm_only_iterations=10, policy_ramp_iterations=20, gan_loss_weight=0.1, gan_fade=1.0)
    weights = [a.gan_weight_at(i) for i in range(40)]
    assert weights[:10] == [0.1] * 10
    assert weights[9:30] == sorted(set(weights[9:30]), reverse=True)
    assert weights[29:] == [0.0] * 11
    cost = [a.forwards_per_sample(i, Costs(2.0, 0.5))["distribution matching"] for i in (0, 30)]
    assert cost[0] - cost[1] == 1, "a weight of 0 makes no pass"
    assert all(replace(a, gan_fade=0.0).gan_weight_at(i) == 0.1 for i in range(40))
    assert replace(a, policy_ramp_iterations=0).gan_weight_at(9) == 0.1
    assert replace(a, policy_ramp_iterations=0).gan_weight_at(10) == 0


def test_the_checker_is_a_reward_of_the_miniature(tiny_folder):
    assert parse_reward("2*checker") == (2.0, "checker", "")
    with pytest.raises(ValueError, match=r"checker:x.*write NAME:FOLDER"):
        parse_reward("1*checker:x")
    with pytest.raises(ValueError, match="discriminator_reward_weight=0 leaves no reward"):
        resolve("mini-sd35-advdmd", ["algorithm.discriminator_reward_weight=0"])
    _, r = resolve("mini-sd35-advdmd", ["algorithm.discriminator_reward_weight=0", "rewards=[1*checker]"])
    assert r.rewards == ("1*checker",)
    with pytest.raises(ValueError, match="cat"):
        CheckerScorer().score([torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()], ["a photo of a cat"])


def test_halves_need_an_even_number_of_prompts_on_each_process():
    gathered = AdvDMD(policy_step="agreement")
    gathered.check_batch(1, 1)
    gathered.check_batch(4, 2)
    with pytest.raises(ValueError, match="must be a multiple of 4"):
        gathered.check_batch(2, 2)
    AdvDMD().check_batch(2, 2)


@pytest.mark.parametrize(
    "bad",
    [{"policy": "ppo"}, {"policy_step": "sgd"}, {"min_agreement": 1.5}, {"min_agreement": math.nan}, {"max_policy_rollouts": 0},
     {"forward_draws": 0}, {"discriminator_reward_weight": -1.0}, {"gan_fade": 2.0}],
)  # fmt: skip
def test_values_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdvDMD(**bad)


def test_step_lengths_follow_the_running_mean_of_the_agreement():
    """Single agreements scatter about the true one, and half of them are below it: evidence is not thrown away."""
    torch.manual_seed(2)
    d, truth, noise = 400, torch.randn(400), 20.0
    p = torch.nn.Parameter(torch.zeros(d))
    halves, shares, single = GradientHalves([p]), [], []
    for _ in range(200):
        for _ in range(8):
            for h in range(2):
                p.grad = truth + noise * torch.randn(d)
                halves.add(h)
            halves.end_rollout()
        agreement, share = halves.step(None, [0.0])
        single.append(agreement)
        shares.append(share)
    expected = 8 / noise**2 / (1 + 8 / noise**2)
    assert sum(single) / 200 == pytest.approx(expected, abs=0.01)
    assert sum(c < 0 for c in single) > 50
    assert sum(s == 0 for s in shares[20:]) < 20
    true_share = math.sqrt(2 * expected / (1 + expected))
    assert sum(shares[20:]) / 180 == pytest.approx(true_share, abs=0.05)
    assert halves.expected_agreement(8) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("momentum", [0.5, 0.8])
def test_momentum_keeps_a_part_of_the_gathered_gradients(momentum):
    """The share is what gradients of decaying weights are worth; the direction is their weighted sum."""
    torch.manual_seed(3)
    d, noise = 4000, 12.0
    truth, p = torch.randn(d), torch.nn.Parameter(torch.zeros(d))
    halves, shares, cosines, kept = GradientHalves([p], momentum), [], [], torch.zeros(d)
    for _ in range(80):
        kept *= momentum
        for _ in range(4):
            for h in range(2):
                p.grad = truth + noise * torch.randn(d)
                kept += p.grad
                halves.add(h)
            halves.end_rollout()
        before = p.detach().clone()
        shares.append(halves.step(None, [1e-3])[1])
        moved = before - p.detach()
        cosines.append(torch.cosine_similarity(kept, truth, dim=0).item())
        if shares[-1]:
            torch.testing.assert_close(moved / moved.norm(), kept / kept.norm(), rtol=1e-3, atol=1e-4)
    assert sum(shares[20:]) / 60 == pytest.approx(sum(cosines[20:]) / 60, abs=0.04)


def test_healthy_ranges_hold_for_the_policy_loss_that_they_were_measured_on():
    assert health.ranges_for(resolve("mini-sd3-advdmd-long")[1])
    assert health.ranges_for(resolve("mini-sd3-advdmd-reinforce")[1]) == {}


def test_one_prompt_alternates_between_the_halves():
    """A half of a rollout is then empty; two rollouts hold both."""
    torch.manual_seed(0)
    world = Mixture()
    models, logs = toy_models(world, Net(2), 4), []
    algorithm = AdvDMD(**GATHERED, policy="forward", min_agreement=1.0, max_policy_rollouts=2)
    for i in range(2):
        batch, ids = toy_batch_fn(world, prompts=1)(i)
        rng = Rng(0, i, ids)
        logs.append(algorithm.update_policy(models, algorithm.rollout(models, batch, rng), batch, rng))
    assert all(math.isfinite(v) for log in logs for v in log.values())
    assert "policy/agreement" in logs[1]
    assert logs[1]["policy/agreement"] != 0
