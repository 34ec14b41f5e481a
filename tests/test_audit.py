"""The audit of a run: what a reward knows, whether a gradient is signal, and that the run is left as it was."""

import json
import shutil

import numpy as np
import pytest
import torch

from advdmd.algorithms.advdmd import AdvDMD
from advdmd.algorithms.audit import Auditor
from advdmd.commands import audit, doctor, train
from advdmd.distillation.audit import AuditConfig, agreement, effects, reward_knowledge, stepped
from advdmd.evaluation.reward_knowledge import best_of_n, paired_change, within_prompt_correlation
from advdmd.monitoring.html_report import write_report
from advdmd.recipes.registry import resolve
from advdmd.types import Batch
from tests.test_product import SMALL
from tests.toy import Mixture, as_cond, flat, pretrained, toy_batch_fn
from tests.toy import make_models as toy_models

ALGORITHM = AdvDMD(dm_only_iterations=0, group_size=8, auc_gating=False)


def test_correlation_is_within_prompts_and_ignores_what_prompts_differ_in():
    rng = np.random.default_rng(0)
    score = rng.normal(size=(400, 8))
    noise = rng.normal(size=(400, 8))
    assert within_prompt_correlation(score, score)["mean"] == pytest.approx(1)
    assert within_prompt_correlation(-2 * score + 5, score)["mean"] == pytest.approx(-1)
    offsets = 100 * rng.normal(size=(400, 1))
    assert within_prompt_correlation(score + offsets, score)["mean"] == pytest.approx(1)
    half = within_prompt_correlation(score + noise, score)
    assert half["mean"] == pytest.approx(0.5**0.5, abs=0.03)
    assert half["interval"][0] < half["mean"] < half["interval"][1]
    low, high = within_prompt_correlation(noise, score)["interval"]
    assert low < 0 < high
    assert within_prompt_correlation(score, np.ones_like(score))["mean"] is None


def test_best_of_n_is_the_oracle_for_a_perfect_reward_and_chance_for_a_random_one():
    rng = np.random.default_rng(0)
    score = (rng.random((500, 8)) < 0.4).astype(float)
    assert best_of_n(score, score)["mean"] == score.max(1).mean()
    assert best_of_n(rng.random((500, 8)), score)["mean"] == pytest.approx(0.4, abs=0.06)
    change = paired_change(score + 0.1, score)
    assert change["mean"] == pytest.approx(0.1)
    assert change["interval"] == pytest.approx((0.1, 0.1))


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    models, batch_fn = toy_models(Mixture(), pretrained(Mixture(), steps=200), 4), toy_batch_fn(Mixture())
    for step in range(20):  # the discriminator learns something, Adam has moments
        from advdmd.rng import Rng

        batch, ids = batch_fn(step)
        ALGORITHM.train_step(models, batch, step, Rng(0, step, ids))
    return models, batch_fn


def test_mean_gradients_are_means_and_agree_with_themselves(toy):
    models, batch_fn = toy
    batches, auditor = [batch_fn(100 + i)[0] for i in range(4)], Auditor(ALGORITHM, models, 8, 0)
    both = auditor.gradients(batches[:2], 1)
    one, two = (auditor.gradients([b], 1 + i) for i, b in enumerate(batches[:2]))
    for kind, g in both.items():
        torch.testing.assert_close(g, (one[kind] + two[kind]) / 2, atol=1e-6, rtol=1e-4)
    assert agreement(both, both) == pytest.approx(dict.fromkeys(both, 1.0), abs=1e-5)
    found = agreement(both, auditor.gradients(batches[2:], 3))
    assert found["GAN"] > found["policy"], "back-propagation is less noisy than a score-function estimator"


def test_steps_have_their_size_raise_their_objective_and_are_undone(toy):
    models, batch_fn = toy
    auditor, before = Auditor(ALGORITHM, models, 8, 0), flat(models.student.net).clone()
    with stepped(auditor, torch.randn_like(before), 0.01):
        assert (flat(models.student.net) - before).norm() / before.norm() == pytest.approx(0.01, rel=1e-3)
    assert torch.equal(flat(models.student.net), before)
    prompts = Batch(as_cond(torch.arange(512) // 8 % 2), torch.zeros(512, 2))
    scores = lambda x0: x0[:, 0].reshape(-1, 8).numpy()  # noqa: E731
    trajectory = auditor.rollout(prompts)
    knows = reward_knowledge(auditor, trajectory, prompts, scores)
    assert next(iter(knows["levels"])) == "state 1, t = 0.90"
    assert len(knows["levels"]) == 7
    mean = auditor.gradients([batch_fn(200 + i)[0] for i in range(4)], 1)
    found = effects(auditor, prompts, scores, mean, trajectory, 0.02, models.student.second_moments("dm"))
    assert found["GAN"]["reward"]["interval"][0] > 0, "a step along the discriminator's own gradient raises its logit"
    assert torch.equal(flat(models.student.net), before)


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audited") / "run"
    train.train(*resolve("mini-sd35-advdmd", [*SMALL, f"teacher={tiny_folder}"]), folder)
    return folder


def test_the_command_writes_what_doctor_and_report_show(run, tmp_path):
    before = (run / "checkpoints").stat().st_mtime_ns
    found = audit.audit(run, AuditConfig(images=2, batches=1), prompts=12)
    assert json.loads((run / "audit.json").read_text())["reward"]["prompts"] == found["reward"]["prompts"] > 2
    assert set(found["agreement"]) == {"policy", "distribution matching", "GAN"}
    assert (run / "checkpoints").stat().st_mtime_ns == before
    printed = doctor.doctor(run)
    assert "correlation within a prompt" in printed
    assert "agreement: cosine of the mean gradients of two halves" in printed
    assert "Audit: what the reward knows" in write_report([run], [], tmp_path / "a.html").read_text()
    assert audit.audit(run, AuditConfig(images=2, batches=1), prompts=12) == found, "the same draws again"


def test_what_cannot_be_audited_is_refused(run, tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="is not a training run"):
        audit.audit(tmp_path)
    with pytest.raises(ValueError, match="images=1"):
        AuditConfig(images=1)
    with pytest.raises(ValueError, match="write NAME:FOLDER"):
        audit.audit(run, scorer="pickscore")
    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(other / "checkpoints")
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        audit.audit(other)
    (other / "recipe.yaml").write_text("recipe: mini-sd35-dmd2\n")
    with pytest.raises(ValueError, match="is a run of dmd2"):
        audit.audit(other)
