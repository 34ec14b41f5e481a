"""Identities of flow, transitions, losses, rng and rollout."""

import pytest
import torch

from advdmd import flow, losses
from advdmd.rng import Rng
from advdmd.rollout import rollout, sample_euler
from advdmd.transitions import Gaussian, cps, ode, renoise, transition
from tests.toy import Mixture


def test_grid_of_four_shifted_steps_is_the_sd3_grid():
    torch.testing.assert_close(flow.grid(4, 3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0]))


@pytest.mark.parametrize(("steps", "a"), [(0, 3.0), (4, 0.0), (4, -1.0)])
def test_grid_refuses_what_makes_no_grid(steps, a):
    with pytest.raises(ValueError, match=r"step|shift"):
        flow.grid(steps, a)


def test_clean_and_noise_undo_interpolation(gen):
    x0, e, t = torch.randn(5, 3, 2, generator=gen()), torch.randn(5, 3, 2, generator=gen(1)), torch.rand(5, generator=gen(2))
    x, v = flow.interpolate(x0, e, t), e - x0
    torch.testing.assert_close(flow.x0_from_velocity(x, v, t), x0)
    torch.testing.assert_close(flow.noise_from_velocity(x, v, t), e)


def test_guidance_of_one_is_the_conditional_velocity(gen):
    v, n = torch.randn(2, 4, generator=gen()), torch.randn(2, 4, generator=gen(1))
    torch.testing.assert_close(flow.guide(v, n, 1.0), v)
    torch.testing.assert_close(flow.guide(v, n, 3.0), v + 2 * (v - n))


def test_logit_normal_times_are_inside_the_unit_interval(gen):
    t = flow.logit_normal(torch.randn(1000, generator=gen()))
    assert ((t > 0) & (t < 1)).all()
    assert abs(t.mean() - 0.5) < 0.03


def test_cps_runs_from_ode_to_renoise():
    t, s = torch.tensor([0.9, 0.5]), torch.tensor([0.6, 0.2])
    for a, b in [(cps(0.0), ode), (cps(1.0), renoise)]:
        for u, v in zip(a(t, s), b(t, s)):
            torch.testing.assert_close(u, v)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 0.9, 1.0])
def test_cps_keeps_the_marginal_exactly(eta):
    grid = flow.grid(4, 3.0)
    c, d = cps(eta)(grid[:-2], grid[1:-1])
    torch.testing.assert_close(c**2 + d**2, grid[1:-1] ** 2)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_outside_its_range_is_refused(eta):
    with pytest.raises(ValueError, match=f"eta={eta}"):
        cps(eta)


def test_cps_keeps_marginals_for_an_oracle(gen):
    """With the true x0 in hand, x_s has mean (1 - s) x0 and std s whatever eta is."""
    x0, e, e2 = (
        torch.randn(1, 2, generator=gen()).expand(40000, 2),
        torch.randn(40000, 2, generator=gen(1)),
        torch.randn(40000, 2, generator=gen(2)),
    )
    t, s = torch.full((40000,), 0.9), torch.full((40000,), 0.5)
    for eta in (0.0, 0.5, 1.0):
        x = transition(cps(eta), flow.interpolate(x0, e, t), e - x0, t, s).sample(e2)
        torch.testing.assert_close(x.mean(0), 0.5 * x0[0], atol=0.01, rtol=0)
        torch.testing.assert_close(x.std(0), torch.tensor([0.5, 0.5]), atol=0.01, rtol=0)


def test_full_noise_is_diffusers_stochastic_step_to_the_bit(gen):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    grid = flow.grid(4, 3.0)
    assert torch.equal(scheduler.sigmas, grid)
    x = torch.randn(2, 4, 8, 8, generator=gen())
    for k, t in enumerate(scheduler.timesteps):
        v = torch.randn(x.shape, generator=gen(k))
        theirs = scheduler.step(v, t, x, generator=gen(50 + k), return_dict=False)[0]
        step = transition(renoise if k < 3 else ode, x, v, grid[k].expand(2), grid[k + 1].expand(2))
        x = step.sample(torch.randn(x.shape, generator=gen(50 + k))) if k < 3 else step.mean
        assert torch.equal(x, theirs)


def test_neg_mse_is_highest_at_the_mean(gen):
    g = Gaussian(torch.randn(3, 4, generator=gen()), torch.ones(3, 1))
    assert (g.neg_mse(g.mean) == 0).all()
    assert (g.neg_mse(g.mean + 1) == -1).all()


def test_flow_matching_loss_vanishes_at_the_target(gen):
    x0, e = torch.randn(3, 5, generator=gen()), torch.randn(3, 5, generator=gen(1))
    assert (losses.flow_matching(e - x0, x0, e) == 0).all()
    assert losses.flow_matching(torch.zeros(3, 5), x0, e).shape == (3,)


def test_dmd_gradient_is_the_normalised_score_difference(gen):
    x0 = torch.randn(3, 5, generator=gen()).requires_grad_()
    teacher, fake_score = torch.randn(3, 5, generator=gen(1)), torch.randn(3, 5, generator=gen(2))
    losses.dmd(x0, teacher, fake_score).sum().backward()
    torch.testing.assert_close(x0.grad, ((fake_score - teacher) / (x0 - teacher).abs().mean(1, keepdim=True) / 5).detach())


def test_dmd_gradient_vanishes_when_the_fake_score_equals_the_teacher(gen):
    x0, same = torch.randn(3, 5, generator=gen()).requires_grad_(), torch.randn(3, 5, generator=gen(1))
    losses.dmd(x0, same, same).sum().backward()
    assert (x0.grad == 0).all()


def test_advantages_sum_to_zero_in_every_group_and_step(gen):
    a = losses.group_advantage(torch.randn(3, 24, generator=gen()), 8)
    torch.testing.assert_close(a.unflatten(-1, (3, 8)).sum(-1), torch.zeros(3, 3), atol=1e-5, rtol=0)


def test_advantage_does_not_blow_up_a_group_without_signal(gen):
    reward = torch.randn(1, 16, generator=gen())
    reward[:, 8:] = 3 + 1e-4 * torch.randn(8, generator=gen(1))
    assert losses.group_advantage(reward, 8)[:, 8:].abs().max() < 1e-3
    assert (losses.group_advantage(torch.full((1, 16), 2.0), 8) == 0).all()


def test_advantage_is_clipped_and_refuses_broken_groups():
    reward = torch.zeros(1, 1024)
    reward[0, 0] = 100.0
    assert losses.group_advantage(reward, 1024).max() == 5
    with pytest.raises(ValueError, match="group_size=7"):
        losses.group_advantage(reward, 7)


def test_gate_opens_between_its_bounds():
    torch.testing.assert_close(losses.auc_gate(torch.tensor([0.5, 0.55, 0.6, 0.65, 0.9])), torch.tensor([0, 0, 0.5, 1, 1]))


def test_within_group_std_is_the_deviation_within_prompts_whatever_the_difference_between_them(gen):
    x = 3 * torch.randn(4096, 5, generator=gen())
    between = 100 * torch.randn(512, 5, generator=gen()).repeat_interleave(8, 0)
    assert losses.within_group_std(x + between, 8).item() == pytest.approx(3, rel=0.06)
    assert losses.within_group_std(between, 8).item() == pytest.approx(0, abs=1e-4)


def test_auc_is_the_probability_of_the_right_order(gen):
    every = torch.ones(2000, dtype=torch.bool)
    assert losses.auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]), every[:2]) == 1
    assert losses.auc(torch.tensor([1.0]), torch.tensor([1.0]), every[:1]) == 0.5
    a, b = torch.randn(2000, generator=gen()) + 1, torch.randn(2000, generator=gen(1))
    assert abs(losses.auc(a, b, every) - 0.760) < 0.02  # Phi(1 / sqrt 2)
    some = torch.arange(2000) % 7 == 3
    assert losses.auc(a, b, some) == losses.auc(a[some], b[some], every[: int(some.sum())])
    assert losses.auc(a, b, ~every).isnan()


def test_policy_gradient_is_reinforce_at_ratio_one_and_stops_outside_the_clip_range():
    old = torch.zeros(3)
    new = torch.tensor([0.0, 0.5, -0.5]).requires_grad_()
    losses.ppo_clip(new, old, torch.tensor([2.0, 2.0, -2.0]), 0.1).sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([-2.0, 0.0, 0.0]))


def test_discriminator_losses_are_the_cross_entropies(gen):
    a, b = torch.randn(4, generator=gen()), torch.randn(4, generator=gen(1))
    expected = -torch.sigmoid(a).log() - (1 - torch.sigmoid(b)).log()
    torch.testing.assert_close(losses.gan_discriminator(a, b), expected)
    torch.testing.assert_close(losses.gan_generator(b), -torch.sigmoid(b).log())
    torch.testing.assert_close(losses.gan_mismatched_caption(b), -(1 - torch.sigmoid(b)).log())


def test_a_split_of_the_samples_draws_the_same_numbers():
    whole, halves = Rng(3, 7, range(8)), [Rng(3, 7, range(4)), Rng(3, 7, range(4, 8))]
    for draw in (lambda r: r.normal("x", (2,)), lambda r: r.uniform("u", 1, 2), lambda r: r.integers("i", 0, 9)):
        assert torch.equal(draw(whole), torch.cat([draw(h) for h in halves]))


def test_streams_differ_by_name_step_seed_and_sample():
    draws = [
        Rng(*k).normal(n, (4,))[0]
        for k, n in [((0, 0, [0]), "a"), ((0, 0, [0]), "b"), ((0, 1, [0]), "a"), ((1, 0, [0]), "a"), ((0, 0, [1]), "a")]
    ]
    assert len({tuple(d.tolist()) for d in draws}) == 5


def test_rollout_with_an_exact_velocity_reaches_the_data(gen):
    world, c = Mixture(), torch.arange(4000) % 2
    noise = torch.randn(30, 4000, 2, generator=gen())
    for x0 in (rollout(world, c, noise, flow.grid(30), cps(0.5)).x[-1], sample_euler(world, c, noise[0], flow.grid(30))):
        truth = world.sample(c, gen(1))
        torch.testing.assert_close(x0[c == 0].abs().mean(0), truth[c == 0].abs().mean(0), atol=0.08, rtol=0)


def test_a_trajectory_can_be_read_at_another_index_for_each_sample(gen):
    trajectory = rollout(
        Mixture(), torch.zeros(6, dtype=torch.long), torch.randn(4, 6, 2, generator=gen()), flow.grid(4, 3.0), cps(1.0)
    )
    k = torch.tensor([0, 1, 2, 3, 4, 0])
    x, t = trajectory.at(k)
    assert torch.equal(x[3], trajectory.x[3, 3])
    assert torch.equal(t, trajectory.t[k])
    assert trajectory.neg_mse.shape == (3, 6)
    assert trajectory[torch.tensor([5, 1])].x.shape == (5, 2, 2)


def test_one_step_has_no_action(gen):
    trajectory = rollout(
        Mixture(), torch.zeros(6, dtype=torch.long), torch.randn(1, 6, 2, generator=gen()), flow.grid(1), cps(1.0)
    )
    assert trajectory.neg_mse.shape == (0, 6)


def test_a_rollout_in_micro_batches_is_the_rollout_in_one_pass():
    from advdmd.rollout import rollout
    from advdmd.transitions import cps

    velocity = lambda x, t, cond: x * t[:, None] + cond  # noqa: E731
    cond, noise, grid = torch.randn(7, 3), torch.randn(4, 7, 3), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
    whole, parts = (
        rollout(velocity, cond, noise, grid, cps(1.0)),
        rollout(velocity, cond, noise, grid, cps(1.0), micro_batch_size=3),
    )
    for name in ("x", "t", "x0", "neg_mse"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
