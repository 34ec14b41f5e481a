"""The method's identities, on real tiny networks and on a 2-D world known exactly."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch

from advdmd import flow, losses
from advdmd.algorithms.advdmd import AdvDMD, Updates
from advdmd.algorithms.base import Costs
from advdmd.algorithms.dmd2 import DMD2
from advdmd.algorithms.objectives import (
    DiscriminatorInputs,
    discriminator_logits,
    discriminator_rewards,
    fake_score_loss,
    policy_loss,
    student_loss,
)
from advdmd.distillation.build import Builder
from advdmd.mini.training_data import MiniData
from advdmd.recipes.mini import RECIPES
from advdmd.recipes.recipe import Recipe
from advdmd.rng import Rng
from advdmd.rollout import rollout, sample_euler
from advdmd.training.optimizer import OptimizerConfig
from advdmd.transitions import Gaussian, cps, renoise
from advdmd.types import Batch
from tests.toy import Mixture, Net, as_cond, flat, pretrained, run_iterations, toy_batch_fn
from tests.toy import make_models as toy_models

ADV = {"dm_only_iterations": 0, "policy_ramp_iterations": 0, "dm_every": 1, "auc_gating": False}


def models_for(r, backbone):
    with torch.no_grad():
        return Builder(r, backbone, backbone.encode_text(backbone.tokenize([""]))).build()


def tiny_recipe(folder, algorithm, **changes):
    return Recipe(teacher=str(folder), algorithm=algorithm, guidance_scale=2.0, iterations=4, data=MiniData(), **changes)


def tiny_batch(backbone, prompts=2, group=4):
    cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle", "a picture of two squares"][:prompts]))
    i = torch.arange(prompts).repeat_interleave(group)
    real = torch.randn(prompts * group, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    return Batch(type(cond)(cond.embeds[i].detach(), cond.pooled[i].detach()), real)


@pytest.mark.parametrize("eta", [0.9, 1.0])
def test_ratio_is_one_before_any_update(eta):
    world = Mixture()
    models, c = toy_models(world, Net(2), 4), torch.arange(16) % 2
    trajectory = rollout(models.student, c, torch.randn(4, 16, 2), flow.grid(4, 3.0), cps(eta))
    loss, aux = policy_loss(models, trajectory, c, torch.ones(3, 16), cps(eta), 1e-3)
    assert (aux["ratio_error"] == 0).all()
    torch.testing.assert_close(loss, -torch.ones(16))


def test_the_ratio_check_fails_when_the_trajectory_is_not_sampled_from_the_policy():
    world, algorithm = Mixture(), AdvDMD(**ADV)
    models = toy_models(world, Net(2), 4)

    class DriftingStudent:
        """A student whose answers drift from one call to the next, as in a low-precision replay."""

        calls = 0

        def __call__(self, x, t, c):
            DriftingStudent.calls += 1
            return models.student(x, t, c) + 1e-2 * DriftingStudent.calls

        def update(self, losses, optimizer="main", lr_scale=1.0):
            return models.student.update(losses, optimizer, lr_scale)

    with pytest.raises(FloatingPointError, match="ratio"):
        run_iterations(algorithm, models._replace(student=DriftingStudent()), toy_batch_fn(world), 1)


def test_a_replay_error_above_the_tolerance_stops_the_run(backbone, tiny_folder):
    """An error below it is rounding, and is not clipped on one side either: the ratio itself is 1."""
    models = models_for(tiny_recipe(tiny_folder, algorithm := AdvDMD(**ADV, group_size=4)), backbone)

    class InexactReplay:
        """A student whose replay differs from the rollout in the last digits."""

        def __call__(self, x, t, c):
            return models.student(x, t, c) * (1 + 3e-5 * torch.is_grad_enabled())

        def update(self, losses, optimizer="main", lr_scale=1.0):
            return models.student.update(losses, optimizer, lr_scale)

    batch, rng = tiny_batch(backbone), Rng(0, 0, range(8))
    inexact = models._replace(student=InexactReplay())
    error = algorithm.train_step(inexact, batch, 0, rng)["policy/max_ratio_error"]
    assert 1e-8 < error < 1e-5
    with pytest.raises(FloatingPointError, match=r"policy: \|ratio - 1\|"):
        algorithm.train_step(inexact._replace(ratio_tolerance=error / 2), batch, 0, rng)
    trajectory, c = algorithm.rollout(models, batch, rng), batch.cond
    found = [policy_loss(m, trajectory, c, torch.ones(3, 8), cps(1.0), 1e-12)[0] for m in (models, inexact)]
    torch.testing.assert_close(*found, msg="an error within the tolerance is clipped, though the ratio is 1 by construction")


def test_a_bfloat16_replay_of_a_float32_trajectory_is_stopped(tiny_folder, backbone):
    """Sampling in one precision and learning in another, on the real network: no injected error."""
    models = models_for(tiny_recipe(tiny_folder, algorithm := AdvDMD(**ADV, group_size=4)), backbone)

    class MixedPrecision:
        def __call__(self, x, t, c):
            with torch.autocast("cpu", torch.bfloat16, enabled=torch.is_grad_enabled()):
                return models.student(x, t, c)

        def update(self, losses, optimizer="main", lr_scale=1.0):
            return models.student.update(losses, optimizer, lr_scale)

    batch, rng = tiny_batch(backbone), Rng(0, 0, range(8))
    with pytest.raises(FloatingPointError, match=r"policy: \|ratio - 1\|"):
        algorithm.train_step(models._replace(student=MixedPrecision()), batch, 0, rng)
    assert "policy/max_ratio_error" in algorithm.train_step(models, batch, 0, rng), "and one precision goes through"


def test_advantages_sum_to_zero_and_are_zero_when_the_discriminator_is_at_chance():
    world, algorithm = Mixture(), AdvDMD(**(ADV | {"auc_gating": True}))
    models, c = toy_models(world, Net(2), 4), torch.arange(64) // 8 % 2
    trajectory = rollout(models.student, c, torch.randn(4, 64, 2), flow.grid(4, 3.0), cps(1.0))
    rng = Rng(0, 0, range(64))
    models.discriminator_auc.fill_(0.9)
    advantage, gate, _ = algorithm.advantages(models, trajectory, Batch(c, c), rng)
    torch.testing.assert_close(advantage.unflatten(-1, (8, 8)).sum(-1), torch.zeros(3, 8), atol=1e-4, rtol=0)
    assert advantage.abs().max() > 0.5
    models.discriminator_auc.fill_(0.5)
    assert gate == 1
    advantage, gate, _ = algorithm.advantages(models, trajectory, Batch(c, c), rng)
    assert gate == 0
    assert (advantage == 0).all()


@pytest.mark.parametrize("gates", [(0.0, 0.0), (0.05, 0.05), (0.5, 0.5), (1.0, 1.0), (1.0, 0.0)], ids=str)
def test_the_mean_gate_scales_what_twenty_updates_move_under_adam(gates):
    """Adam divides a common factor of the advantages out again; the student moves by the mean gate all the same."""
    world = Mixture()
    algorithm = AdvDMD(**(ADV | {"auc_gating": True, "steps": 3, "credit": "step"}))

    def moved(auc):
        models, c = toy_models(world, Net(2), 3, policy_lr=1e-5), torch.arange(64) // 8 % 2
        start = flat(models.student.net).clone()
        for i in range(20):
            models.discriminator_auc.copy_(torch.tensor([*auc, 0.5]))
            rng = Rng(0, i, range(64))
            trajectory = algorithm.rollout(models, Batch(as_cond(c), torch.zeros(64, 2)), rng)
            log = algorithm.update_policy(models, trajectory, Batch(as_cond(c), torch.zeros(64, 2)), rng)
            assert log["policy/gate"] == pytest.approx(sum(gates if auc is not full else (1, 1)) / 2, abs=1e-5)
        return (flat(models.student.net) - start).norm().item()

    full = (0.9, 0.9)
    assert moved([0.55 + 0.1 * g for g in gates]) == pytest.approx(sum(gates) / 2 * moved(full), rel=0.15, abs=1e-9)


def test_gates_that_differ_between_levels_scale_their_advantages():
    models, c = toy_models(Mixture(), Net(2), 4), torch.arange(64) // 8 % 2
    trajectory = rollout(models.student, c, torch.randn(4, 64, 2), flow.grid(4, 3.0), cps(1.0))

    def found(auc):
        models.discriminator_auc.copy_(torch.tensor(auc))
        algorithm = AdvDMD(**(ADV | {"auc_gating": True, "credit": "step"}))
        return algorithm.advantages(models, trajectory, Batch(c, c), Rng(0, 0, range(64)))

    (even, gate, _), (uneven, less, _) = found([0.9] * 4), found([0.9, 0.6, 0.5, 0.9])
    assert (gate, less) == (1, pytest.approx(0.5))
    for level, share in enumerate((1.0, 0.5, 0.0)):
        torch.testing.assert_close(less * uneven[level], share * even[level])


def test_a_reward_of_the_start_alone_moves_nothing_where_groups_share_it():
    """With a start for each sample such a reward moves the projected policy; no step of the policy chose the start."""
    torch.manual_seed(0)
    models, c = toy_models(Mixture(), pretrained(Mixture(), steps=100), 4), torch.arange(512) // 8 % 2
    batch, rng = Batch(as_cond(c), torch.zeros(512, 2)), Rng(0, 0, range(512))

    def gradient(shared):
        algorithm = AdvDMD(**ADV, shared_start=shared, action="projected")
        trajectory = algorithm.rollout(models, batch, rng, shared)
        starts = trajectory.x[0].unflatten(0, (64, 8))
        assert (starts == starts[:, :1]).all() == shared, "a group has one start"
        assert trajectory.x[1].unique(dim=0).shape[0] == 512, "and every sample takes other steps"
        advantage = losses.group_advantage((trajectory.x[0].sum(1) > 0).float()[None], 8).expand(3, -1)
        loss, _ = policy_loss(models, trajectory, batch.cond, advantage, cps(1.0), 1e9, projected=True)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss.mean(), list(models.student.net.parameters()))]).norm()

    assert gradient(shared=True) == 0
    assert gradient(shared=False) > 1e-3


def test_only_iterations_with_a_policy_update_share_their_starts():
    """Distribution matching learns from as many starts as there are samples."""
    models = toy_models(Mixture(), Net(2), 4)
    algorithm = AdvDMD(**(ADV | {"dm_only_iterations": 1}))
    log = run_iterations(algorithm, models, toy_batch_fn(Mixture()), 1)
    assert {k for k in log if "within_group" in k} == {"student/within_group_std"}
    log = run_iterations(algorithm, models, toy_batch_fn(Mixture()), 2, start=1)
    assert {k for k in log if "within_group" in k} == {"student/within_group_std_shared_start"}


def test_dmd2_as_its_paper_updates_the_fake_score_five_times_for_a_student_update():
    """Each update is on new samples; a rollout that is used five times has none."""
    models = toy_models(Mixture(), Net(2), 4)
    algorithm, counts = DMD2(fake_score_updates=1, dm_every=5), Counter()
    for name in ("fake_score", "student"):
        learner = getattr(models, name)

        def counted(losses, *args, name=name, real=learner.update, **more):
            counts[name] += 1
            return real(losses, *args, **more)

        learner.update = counted
    run_iterations(algorithm, models, toy_batch_fn(Mixture()), 10)
    assert counts == {"fake_score": 10, "student": 2}
    cost = [sum(algorithm.forwards_per_sample(i, Costs()).values()) for i in range(5)]
    assert cost == [9, 9, 9, 9, 17], "rollout 4, fake score 3, discriminator 2; student 3, teacher 2, fake score 1, GAN 2"


@pytest.mark.parametrize(("credit", "check"), [("step", 0), ("final", 1), ("both", 2)])
def test_credit_is_what_its_name_says(credit, check):
    world = Mixture()
    models, c = toy_models(world, Net(2), 4), torch.arange(64) // 8 % 2
    trajectory = rollout(models.student, c, torch.randn(4, 64, 2), flow.grid(4, 3.0), cps(1.0))
    advantages = {
        k: AdvDMD(**ADV, credit=k).advantages(models, trajectory, Batch(c, c), Rng(0, 0, range(64)))[0]
        for k in ("step", "final", "both")
    }
    torch.testing.assert_close(advantages["both"], 0.5 * (advantages["step"] + advantages["final"]))
    assert (advantages["final"][0] == advantages["final"][1]).all()
    assert not torch.equal(advantages["step"][0], advantages["step"][1])
    assert advantages[credit].shape == (3, 64)


def test_policy_gradient_of_a_linear_reward_is_autograd_in_expectation(gen):
    """E[gradient of neg_mse x reward] = d E[reward] / d mean x 2 std^2 / D for a Gaussian step and r = <w, x>."""
    n, d, std = 200_000, 3, 0.5
    mean, w = torch.zeros(d, requires_grad=True), torch.tensor([1.0, -2.0, 0.5])
    step = Gaussian(mean.expand(n, d), torch.full((n, 1), std))
    x = (mean + std * torch.randn(n, d, generator=gen())).detach()
    (losses.ppo_clip(step.neg_mse(x), step.neg_mse(x).detach(), x @ w, 1e9).mean()).backward()
    expected = -w * 2 * std**2 / d
    torch.testing.assert_close(mean.grad, expected, atol=0.02, rtol=0)


def test_projected_actions_from_one_start_give_the_gradient_times_the_response_of_the_next_step(gen):
    """With x0 = W x and r = <w, x0> the expected gradient on the step's mean is W W^T w, and the old mean is recovered."""
    n, d, W = 200_000, 3, torch.tensor([[0.9, 0.2, 0.0], [0.0, 0.1, 0.0], [0.3, 0.0, 0.1]])
    w, s = torch.tensor([1.0, -2.0, 0.5]), 0.5

    def velocity(x, t, c):
        return (x - x @ W.T) / t[:, None]

    start, grid = torch.randn(d, generator=gen()), torch.tensor([1.0, s, 0.0])
    noise = torch.stack([start.expand(n, d), torch.randn(n, d, generator=gen(1))])
    trajectory = rollout(velocity, torch.zeros(n), noise, grid, renoise)
    mean = ((1 - s) * W @ start).requires_grad_()
    actions, old = trajectory.projected_actions(renoise)
    step = Gaussian(mean.expand(n, d), torch.full((n, 1), s))
    torch.testing.assert_close(step.neg_mse(actions[0]), old[0])
    reward = trajectory.x[-1] @ w
    losses.ppo_clip(step.neg_mse(actions[0]), old[0], reward - reward.mean(), 1e9).mean().backward()
    torch.testing.assert_close(mean.grad, -2 / d * (1 - s) * s**2 * W @ W.T @ w, atol=0.005, rtol=0)


def test_distribution_matching_has_no_gradient_when_the_fake_score_equals_the_teacher():
    net = pretrained(Mixture(), steps=20)
    models = toy_models(net, net, 4)
    x, t, c = torch.randn(8, 2), torch.full((8,), 0.75), torch.zeros(8, dtype=torch.long)
    k = torch.zeros(8, dtype=torch.long)
    loss, _ = student_loss(models, x, t, c, k, torch.rand(8), torch.randn(8, 2), torch.rand(8), 0.0)
    grads = torch.autograd.grad(loss.sum(), list(models.student.net.parameters()), allow_unused=True)
    assert all(g is None or g.abs().max() < 1e-6 for g in grads)


@pytest.mark.parametrize(
    "make",
    [lambda m: AdvDMD(micro_batch_size=m, mismatched_caption_weight=0.5, **ADV), lambda m: DMD2(micro_batch_size=m)],
    ids=["advdmd", "dmd2"],
)
def test_micro_batch_size_does_not_change_the_update(make):
    world, net, out = Mixture(), Net(2), []
    for micro in (5, 64):
        models = toy_models(world, net, 4)
        run_iterations(make(micro), models, toy_batch_fn(world), 3)
        out.append((flat(models.student.net), flat(models.fake_score.net), models.discriminator_auc))
    for a, b in zip(*out):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=0)


@pytest.mark.parametrize("algorithm", [AdvDMD(group_size=4, **ADV), DMD2()], ids=["advdmd", "dmd2"])
def test_training_leaves_the_teacher_untouched_and_changes_every_trained_network(tiny_folder, backbone, algorithm):
    before, models = copy.deepcopy(backbone.net.state_dict()), models_for(tiny_recipe(tiny_folder, algorithm), backbone)
    start = {
        k: flat(p)
        for k, p in [
            ("student", models.student.net),
            ("score", models.fake_score.net.score),
            ("heads", models.fake_score.net.heads),
        ]
    }
    for step in range(2):
        algorithm.train_step(models, tiny_batch(backbone), step, Rng(0, step, range(8)))
    assert all(torch.equal(v, before[k]) for k, v in backbone.net.state_dict().items())
    assert all(p.grad is None for p in backbone.net.parameters())
    for k, net in [
        ("student", models.student.net),
        ("score", models.fake_score.net.score),
        ("heads", models.fake_score.net.heads),
    ]:
        assert not torch.equal(flat(net), start[k]), k


def test_gan_back_propagation_reaches_the_student_and_no_other_network(tiny_folder, backbone):
    models, b = models_for(tiny_recipe(tiny_folder, DMD2()), backbone), tiny_batch(backbone)
    t = torch.full((8,), 0.75)
    x, k = b.real_latents, torch.arange(8) % 4
    loss, parts = student_loss(models, x, t, b.cond, k, t, torch.randn_like(x), t, 1.0)
    torch.testing.assert_close(loss.detach(), parts["dm_loss"] + parts["gan_loss"])
    loss.sum().backward()
    assert all(p.grad is None for p in models.fake_score.net.parameters())
    assert any(p.grad is not None for p in models.student.net.parameters())
    assert all(p.requires_grad for p in models.fake_score.net.parameters())


def test_the_fake_score_is_conditioned_on_the_step_and_equals_the_teacher_at_the_start(tiny_folder, backbone):
    models, b = models_for(tiny_recipe(tiny_folder, DMD2()), backbone), tiny_batch(backbone)
    t, k = torch.full((8,), 0.5), torch.arange(8) % 4
    assert torch.equal(
        models.fake_score(b.real_latents, t, b.cond, k), backbone.velocity(backbone.net, b.real_latents, t, b.cond)
    )
    fake_score_loss(models, b.real_latents, b.cond, t, torch.randn_like(b.real_latents), k[:4].repeat(2)).sum().backward()
    assert (models.fake_score.net.exit_embedding.grad.abs().sum(1) > 0).all()
    without_pooled = models.fake_score.net.with_exit_embedding(
        replace(b.cond, pooled=None, embeds=b.cond.pooled[:, None].expand(-1, 3, -1)), k
    )
    assert without_pooled.embeds.shape == (8, 3, b.cond.pooled.shape[1])


def test_discriminator_logits_of_a_joint_pass_equal_those_of_single_passes(tiny_folder, backbone):
    """Rewards of a trajectory for any size of a pass; logits of real, generated and mismatched samples as in three passes."""
    models, b = models_for(tiny_recipe(tiny_folder, AdvDMD()), backbone), tiny_batch(backbone)
    start, e = torch.randn(3, *b.real_latents.shape), torch.randn_like(b.real_latents)
    trajectory = rollout(models.student, b.cond, start, flow.grid(3, 1.0), cps(1.0))
    step_rewards, final_reward = discriminator_rewards(models, trajectory, b.cond, (0.02, 0.3), e, 5)
    single = torch.stack([models.discriminator(trajectory.x[k], trajectory.t[k].expand(8), b.cond) for k in (1, 2)])
    torch.testing.assert_close(step_rewards, single.detach())
    levels = [torch.full((8,), u) for u in (0.02, 0.3)]
    final = [models.discriminator(flow.interpolate(trajectory.x[-1], e, u), u, b.cond) for u in levels]
    torch.testing.assert_close(final_reward, torch.stack(final).mean(0).detach())

    t, wrong = torch.full((8,), 0.4), b.cond[torch.arange(8).flip(0)]
    image = flow.interpolate(b.real_latents, e, t)
    for together in (False, True):
        inputs = DiscriminatorInputs(b.real_latents, trajectory.x[1], t, e, b.cond, wrong, torch.ones(8))
        for logits, x, cond in zip(
            discriminator_logits(models, inputs, together),
            (image, trajectory.x[1], image),
            (b.cond, b.cond, wrong),
            strict=True,
        ):
            torch.testing.assert_close(logits, models.discriminator(x, t, cond))


def test_the_discriminators_gradient_enters_the_trunk_times_trunk_grad_scale(tiny_folder, backbone):
    def trunk_norm(weight):
        r = tiny_recipe(tiny_folder, AdvDMD(), discriminator=discriminator_config(trunk_grad_scale=weight))
        models, b = models_for(r, backbone), tiny_batch(backbone)
        models.discriminator(b.real_latents, torch.full((8,), 0.5), b.cond).sum().backward()
        grads = [p.grad for p in models.fake_score.net.score.parameters() if p.grad is not None]
        return torch.cat([g.flatten() for g in grads]).norm() if grads else torch.tensor(0.0)

    assert trunk_norm(0.0) == 0
    torch.testing.assert_close(trunk_norm(0.5) / trunk_norm(0.01), torch.tensor(50.0), atol=0.01, rtol=1e-3)


def test_a_separate_discriminator_trunk_trains_with_the_heads(tiny_folder, backbone):
    models, b = (
        models_for(tiny_recipe(tiny_folder, AdvDMD(), discriminator=discriminator_config(trunk="own")), backbone),
        tiny_batch(backbone),
    )
    before = flat(models.fake_score.net.trunk)
    assert torch.equal(before, flat(backbone.net))
    AdvDMD(group_size=4, dm_only_iterations=9).train_step(models, b, 0, Rng(0, 0, range(8)))
    assert not torch.equal(before, flat(models.fake_score.net.trunk))
    models.discriminator.generator_logit(b.real_latents.requires_grad_(), torch.full((8,), 0.5), b.cond).sum().backward()
    assert b.real_latents.grad is not None
    assert all(p.grad is None for p in models.fake_score.net.trunk.parameters())


def discriminator_config(**kw):
    from advdmd.models.discriminator import DiscriminatorConfig

    return DiscriminatorConfig(**kw)


@pytest.mark.parametrize("updates", [Updates(True, True), Updates(False, True), Updates(True, False)])
@pytest.mark.parametrize(("mismatch", "gan"), [(0.0, 0.0), (0.5, 0.0), (0.5, 5e-3)])
def test_forwards_are_as_declared(tiny_folder, backbone, monkeypatch, updates, mismatch, gan):
    """Network passes with and without gradient of one AdvDMD iteration, per sample, against AdvDMD.forwards_per_sample."""
    algorithm = AdvDMD(group_size=4, mismatched_caption_weight=mismatch, gan_loss_weight=gan, **ADV)
    monkeypatch.setattr(AdvDMD, "updates_at", lambda self, iteration: updates)
    depth = 0.5
    counted = count_passes(tiny_folder, backbone, algorithm)
    declared = algorithm.forwards_per_sample(0, Costs(0.0, depth))
    passes = (
        sum(declared.values()) - bool(gan) * updates.distribution_matching * depth
    )  # the pass back through the trunk is no pass forward
    assert counted == pytest.approx(passes)
    if updates == Updates(True, True) and not mismatch:
        parts = algorithm.forwards_per_sample(0, Costs(2.0, depth))
        # The table for one shared rollout: 21 with all steps, and the discriminator's half-depth passes on top.
        assert parts["rollout"] + parts["policy"] + parts["distribution matching"] == 19
        assert sum(algorithm.forwards_per_sample(0, Costs(1.0, depth)).values()) <= 22


@pytest.mark.parametrize(("dm_updates", "every_nth"), [(2, 1), (1, 2), (3, 4)])
def test_more_dm_updates_and_fewer_discriminator_samples_cost_as_declared(tiny_folder, backbone, dm_updates, every_nth):
    algorithm = AdvDMD(
        group_size=4,
        mismatched_caption_weight=0.5,
        dm_only_iterations=9,
        dm_updates=dm_updates,
        discriminator_every_nth_sample=every_nth,
        fake_score_updates=2,
    )
    declared = algorithm.forwards_per_sample(5, Costs(0.0, 0.5))
    assert count_passes(tiny_folder, backbone, algorithm) == pytest.approx(sum(declared.values()))
    assert declared["distribution matching"] == dm_updates * 4
    assert declared["discriminator"] == pytest.approx(1.5 / every_nth)
    dmd2 = DMD2(gan_loss_weight=0.0, dm_updates=dm_updates)
    assert count_passes(tiny_folder, backbone, dmd2) == pytest.approx(
        sum(dmd2.forwards_per_sample(5, Costs(0.0, 0.5)).values())
    )


def test_dm_updates_on_one_trajectory_draw_new_random_numbers(tiny_folder, backbone):
    """Two updates are not one update twice: the second draws other steps, levels and noise."""
    times = []
    algorithm = DMD2(gan_loss_weight=0.0, dm_updates=2)
    models, b = models_for(tiny_recipe(tiny_folder, algorithm), backbone), tiny_batch(backbone)

    def teacher(x, t, c):
        times.append(t.clone())
        return models.teacher(x, t, c)

    algorithm.train_step(models._replace(teacher=teacher), b, 0, Rng(0, 0, range(len(b))))
    assert len(times) == 2
    assert not torch.equal(*times)


def test_a_mismatched_caption_that_equals_the_prompt_is_no_negative(tiny_folder, backbone):
    """With one prompt twice in the batch, mismatched captions change nothing; with two prompts they do."""

    def trained_heads(mismatch, prompts):
        algorithm = AdvDMD(
            group_size=4, mismatched_caption_weight=mismatch, dm_only_iterations=9, micro_batch_size=8
        )  # too small for all three in one pass
        models, b = models_for(tiny_recipe(tiny_folder, algorithm), backbone), tiny_batch(backbone)
        cond = b.cond if prompts == 2 else b.cond[torch.arange(8) % 4]
        algorithm.train_step(models, Batch(cond, b.real_latents), 0, Rng(0, 0, range(8)))
        return flat(models.fake_score.net.heads)

    assert torch.equal(trained_heads(0.0, 1), trained_heads(0.5, 1))
    assert not torch.equal(trained_heads(0.0, 2), trained_heads(0.5, 2))


@pytest.mark.parametrize("gan", [0.0, 5e-3])
def test_dmd2_forwards_are_as_declared(tiny_folder, backbone, gan):
    algorithm = DMD2(gan_loss_weight=gan)
    declared = algorithm.forwards_per_sample(0, Costs(0.0, 0.5))
    passes = sum(declared.values()) - bool(gan) * 0.5  # the pass back through the trunk is no pass forward
    assert count_passes(tiny_folder, backbone, algorithm) == pytest.approx(passes)


def count_passes(folder, backbone, algorithm):
    """Block passes per sample divided by depth, over all three networks."""
    models = models_for(tiny_recipe(folder, algorithm), backbone)
    passes, handles = Counter(), []
    for net in (backbone.net, models.student.net, models.fake_score.net.score):
        for block in backbone.blocks(net):
            handles.append(
                block.register_forward_pre_hook(lambda m, a, kw: passes.update(n=len(kw["hidden_states"])), with_kwargs=True)
            )
    b = tiny_batch(backbone)
    algorithm.train_step(models, b, 5, Rng(0, 5, range(len(b))))
    for h in handles:
        h.remove()
    return passes["n"] / len(b) / len(backbone.blocks(backbone.net))


def test_the_schedule_delays_policy_updates_and_then_makes_one_every_iteration():
    a = AdvDMD(dm_only_iterations=10, policy_ramp_iterations=40, dm_every=2)
    updates = [a.updates_at(i) for i in range(80)]
    assert not any(t.policy for t in updates[:10])
    assert all(t.distribution_matching for t in updates[:50])
    early, late = (sum(t.policy for t in updates[i : i + 20]) for i in (10, 30))
    assert 0 < early < late < 20
    assert all(t.policy for t in updates[50:])
    assert [t.distribution_matching for t in updates[50:54]] == [True, False, True, False]
    assert all(AdvDMD(steps=1).updates_at(i) == Updates(False, True) for i in (0, 500))


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"eta": 1.5},
        {"eta": 0.0},
        {"group_size": 1},
        {"fake_score_updates": 0},
        {"dm_only_iterations": -1},
        {"final_noise_levels": ()},
        {"renoise_range": (0.5, 0.2)},
    ],
)
def test_bad_hyperparameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdvDMD(**bad)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"gan_loss_weight": -1.0}, {"renoise_range": (0.0, 0.2)}])
def test_bad_hyperparameters_of_dmd2_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DMD2(**bad)


def test_a_group_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match=r"AdvDMD\(group_size=7\): 64 samples"):
        run_iterations(AdvDMD(group_size=7), toy_models(Mixture(), Net(2), 4), toy_batch_fn(Mixture()), 1)


@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_two_steps_run(steps):
    log = run_iterations(AdvDMD(steps=steps, **ADV), toy_models(Mixture(), Net(2), steps), toy_batch_fn(Mixture()), 2)
    assert ("policy/max_ratio_error" in log) == (steps > 1)


def kl_to_data(x, c, data):
    """KL(model || data) from samples, by a two-dimensional histogram of each class."""
    total = 0.0
    edges = torch.linspace(-2.5, 2.5, 41)
    centers = (edges[:-1] + edges[1:]) / 2
    yy, xx = torch.meshgrid(centers, centers, indexing="ij")
    cells = torch.stack([yy, xx], -1).reshape(-1, 2)
    for k in (0, 1):
        samples = x[c == k].clamp(-2.49, 2.49)
        p = torch.histogramdd(samples, bins=[edges, edges]).hist.flatten() / len(samples)
        logq = data.log_prob(cells, torch.full((len(cells),), k)) + 2 * (edges[1] - edges[0]).log()
        total += (p * (p.clamp(min=1e-12).log() - logq.clamp(min=-25)))[p > 0].sum().item() / 2
    return total


def test_a_student_surpasses_a_teacher_that_is_worse_than_the_data():
    """The teacher is shifted, the discriminator is not: KL(student | data) < KL(teacher | data)."""
    data, teacher = Mixture(std=0.3), Mixture(std=0.3, shift=0.35)
    models = toy_models(teacher, pretrained(teacher, 1500), 4, lr=1e-3, policy_lr=1e-3, decay=120)
    run_iterations(
        AdvDMD(dm_only_iterations=50, policy_ramp_iterations=30, fake_score_updates=4, micro_batch_size=512),
        models,
        toy_batch_fn(data, prompts=16, group=16),
        120,
    )
    models.student.net.load_state_dict(models.student.ema_state_dict())
    g = torch.Generator().manual_seed(5)
    c = torch.arange(8000) % 2
    student_samples = rollout(models.student, c, torch.randn(4, 8000, 2, generator=g), flow.grid(4, 3.0), cps(1.0)).x[-1]
    teacher_samples = sample_euler(teacher, c, torch.randn(8000, 2, generator=g), flow.grid(40, 3.0))
    assert kl_to_data(student_samples, c, data) < kl_to_data(teacher_samples, c, data)


def test_recipes_of_the_miniature_are_valid_and_differ():
    made = {k: f() for k, f in RECIPES.items()}
    assert len(set(made.values())) == len(made)
    assert isinstance(made["mini-sd35-dmd2"].algorithm, DMD2)
    assert isinstance(made["mini-sd35-advdmd"].dm_optimizer, OptimizerConfig)


def test_a_frozen_discriminator_stops_training_after_dm_only_iterations_and_the_fake_score_does_not(tiny_folder, backbone):
    algorithm = AdvDMD(group_size=4, dm_only_iterations=1, policy_ramp_iterations=0, discriminator_online=False)
    models, b = models_for(tiny_recipe(tiny_folder, algorithm), backbone), tiny_batch(backbone)
    algorithm.train_step(models, b, 0, Rng(0, 0, range(8)))
    heads, score, auc = flat(models.fake_score.net.heads), flat(models.fake_score.net.score), models.discriminator_auc.clone()
    algorithm.train_step(models, b, 1, Rng(0, 1, range(8)))
    assert torch.equal(heads, flat(models.fake_score.net.heads))
    assert torch.equal(auc, models.discriminator_auc)
    assert not torch.equal(score, flat(models.fake_score.net.score))

    def forwards(i):
        return algorithm.forwards_per_sample(i, Costs(2.0, 0.5))["discriminator"]

    assert forwards(0) > 0 == forwards(1)
