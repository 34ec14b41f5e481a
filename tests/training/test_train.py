"""Learner, checkpoints, trainer and logger: what is learned, what is kept, and what stops a run."""

import importlib.util
import json
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from advdmd.algorithms.advdmd import AdvDMD
from advdmd.commands.train import train
from advdmd.files import write_atomically, write_text
from advdmd.progress import Progress, duration
from advdmd.recipes.registry import resolve
from advdmd.rng import Rng
from advdmd.training import checkpoint, logger, trainer
from advdmd.training.efficiency import EfficiencyMeter
from advdmd.training.learner import Learner
from advdmd.training.logger import MetricsLogger
from advdmd.training.optimizer import OptimizerConfig, ParamGroup
from tests.toy import Mixture, Net, flat, make_models, toy_batch_fn


def learner(ema_decay=0.9, **config):
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    return Learner(
        "net",
        net,
        net,
        {"main": (OptimizerConfig(**({"lr": 0.1} | config)), [ParamGroup(net.parameters())])},
        ema_decay=ema_decay,
    )


def test_losses_that_arrive_in_parts_give_the_update_of_one(gen):
    x, out = torch.randn(12, 3, generator=gen()), []
    for parts in (12, 5, 1):
        one = learner()
        log = one.update(one(p)[:, 0].square() for p in x.split(parts))
        out.append((flat(one.net), log["net/loss"], log["net/grad_norm"]))
    for other in out[1:]:
        torch.testing.assert_close(out[0][0], other[0])
        assert out[0][1:] == pytest.approx(other[1:], rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing_and_names_the_network(bad):
    one = learner()
    before = flat(one.net)
    with pytest.raises(FloatingPointError, match="net/main"):
        one.update([one(torch.ones(2, 3))[:, 0] * bad])
    assert torch.equal(flat(one.net), before)
    assert torch.equal(torch.cat([v.flatten() for v in one.ema.values()]), before)


def test_a_gradient_that_is_not_finite_stops_too():
    one = learner()
    with pytest.raises(FloatingPointError, match="gradient norm"):
        one.update([(one(torch.zeros(2, 3))[:, 0] - one.net.bias).sqrt()])


@pytest.mark.parametrize("max_grad_norm", [0.1, 1e9])
def test_the_mean_gradient_is_what_adam_is_given_clipped_as_a_whole(monkeypatch, max_grad_norm):
    torch.manual_seed(0)
    net, x = nn.Linear(3, 1), torch.randn(8, 3)
    one = Learner(
        "net", net, net, {"main": (OptimizerConfig(lr=0.1, max_grad_norm=max_grad_norm), [ParamGroup(list(net.parameters()))])}
    )
    given = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: given.extend(p.grad.clone() for p in net.parameters()))
    wanted = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
    norm = torch.cat([g.flatten() for g in wanted]).norm()
    log = one.update(net(part)[:, 0].square() for part in (x[:6], x[6:]))
    torch.testing.assert_close(log["net/grad_norm"], norm.item())
    torch.testing.assert_close(given, [g * min(1, max_grad_norm / norm) for g in wanted])


def test_learning_rates_follow_the_schedule():
    assert OptimizerConfig(lr=1.0, warmup_steps=4).learning_rate(0) == 0.25
    assert OptimizerConfig(lr=1.0, warmup_steps=4).learning_rate(10) == 1.0
    assert OptimizerConfig(lr=1.0, decay_steps=10).learning_rate(0) == 1.0
    assert OptimizerConfig(lr=1.0, decay_steps=10).learning_rate(10) == pytest.approx(0.02)
    assert OptimizerConfig(lr=1.0, decay_steps=10).learning_rate(99) == pytest.approx(0.02)


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"betas": (1.0, 0.9)}, {"max_grad_norm": 0.0}, {"warmup_steps": -1}])
def test_bad_optimizer_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimizerConfig(**({"lr": 0.1} | bad))


def test_the_ema_follows_with_a_warm_start():
    one = learner(ema_decay=0.9)
    start = flat(one.net)
    one.update([one(torch.ones(2, 3))[:, 0]])
    ema = torch.cat([v.flatten() for v in one.ema_state_dict().values()])
    torch.testing.assert_close(ema, start.lerp(flat(one.net), 0.9))  # decay min(.9, 1 / 10) after one update


def test_two_optimizers_of_a_network_log_the_cosine_and_ratio_of_their_gradients():
    torch.manual_seed(0)
    net = nn.Linear(3, 1, bias=False)
    optim = OptimizerConfig(lr=0.01, max_grad_norm=1e9)
    one = Learner("net", net, net, {k: (optim, [ParamGroup(list(net.parameters()))]) for k in ("dm", "policy")})
    x = torch.eye(3)
    assert "net/policy_dm_cosine" not in one.update([one(x[:1])[:, 0]], optimizer="dm")  # the other has not moved yet
    log = one.update([3 * one(x[1:2])[:, 0]], optimizer="policy")
    assert (log["net/policy_dm_cosine"], log["net/policy_dm_ratio"]) == pytest.approx((0, 3), abs=1e-6)
    for _ in range(200):  # along one line, the second twice as long and the other way
        one.update([one(x[:1])[:, 0]], optimizer="dm")
        log = one.update([-2 * one(x[:1])[:, 0]], optimizer="policy")
    assert (log["net/policy_dm_cosine"], log["net/policy_dm_ratio"]) == pytest.approx((-1, 2), abs=1e-4)


def test_efficiency_is_what_an_iteration_must_cost_over_what_it_does_cost(monkeypatch):
    clock = [0.0]  # the machine's clock is too irregular for a test

    def take(seconds):
        clock[0] += seconds

    monkeypatch.setattr("advdmd.training.efficiency._now", lambda: clock[0])
    meter = EfficiencyMeter(lambda: take(0.02), 4, lambda step: 3.0 + step, batch=8)
    for step in range(3):
        meter.start(step)
        seconds = (3 + step) * 2 * 0.02 * 1.25  # 8 samples are two forwards of 4; a fifth of the time goes elsewhere
        take(seconds)
        wanted = {"cost/forwards_per_sample": 3 + step, "cost/seconds": seconds, "cost/efficiency": 0.8}
        assert meter.stop(step) == pytest.approx(wanted)
    meter.forward = lambda: take(0.03)  # the machine becomes slower: measured at step 50, not before
    for step, efficiency in ((49, 0.02 / 0.03), (50, 1.0)):
        meter.start(step)
        take((3 + step) * 2 * 0.03)
        assert meter.stop(step)["cost/efficiency"] == pytest.approx(efficiency)


def test_state_round_trips_and_state_of_another_kind_is_refused():
    a, b = learner(), learner()
    for _ in range(3):
        a.update([a(torch.ones(2, 3))[:, 0]])
    b.load_state_dict(*a.state_dict())
    for one in (a, b):
        one.update([one(torch.ones(2, 3))[:, 0]])
    assert torch.equal(flat(a.net), flat(b.net))
    tensors, counters = a.state_dict()
    with pytest.raises(ValueError, match="saved EMA"):
        learner(ema_decay=None).load_state_dict(tensors, counters)


def run(folder, steps, models=None, algorithm=None, **kw):
    models = models or make_models(Mixture(), seeded_net(), 4)
    algorithm = algorithm or AdvDMD(dm_only_iterations=1, policy_ramp_iterations=2, micro_batch_size=512)
    settings = {"seed": 0, "iterations": steps, "save_every": 2, "extra_state": algorithm.extra_state(models)} | kw
    settings = {"batch_fn": toy_batch_fn(Mixture())} | settings
    trainer.Trainer(algorithm=algorithm, models=models, folder=folder, **settings).run()
    return models


def seeded_net():
    torch.manual_seed(1)
    return Net(2)


def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(tmp_path):
    whole = run(tmp_path / "a", 7)
    run(tmp_path / "b", 4)
    resumed = run(tmp_path / "b", 7)
    assert torch.equal(flat(whole.student.net), flat(resumed.student.net))
    assert torch.equal(flat(whole.fake_score.net), flat(resumed.fake_score.net))
    assert torch.equal(whole.discriminator_auc, resumed.discriminator_auc)
    assert all(torch.equal(v, resumed.student.ema[k]) for k, v in whole.student.ema.items())
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()


def test_a_run_that_prepares_its_iterations_ahead_is_the_same_run(tmp_path, monkeypatch):
    """What the second last iteration drew is there, and a policy update's draws are made where they are asked for."""
    made, make = [], Rng._made

    def recorded(rng, draw):
        made.append((rng.step, threading.current_thread() is threading.main_thread()))
        return make(rng, draw)

    whole = run(tmp_path / "a", 7)
    monkeypatch.setattr(Rng, "_made", recorded)
    ahead = run(tmp_path / "b", 7, prefetch=True)
    assert torch.equal(flat(whole.student.net), flat(ahead.student.net))
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()
    on_main_thread = [sum(step == n and main for step, main in made) for n in range(7)]
    assert on_main_thread[0] > 0
    assert on_main_thread[5:] == [0, 0], "the schedule no longer changes"


def test_a_fault_of_the_data_stops_a_run_that_prepares_them_ahead(tmp_path):
    def batch_fn(step):
        if step == 2:
            raise ValueError("damaged")
        return toy_batch_fn(Mixture())(step)

    with pytest.raises(ValueError, match="damaged"):
        run(tmp_path, 4, prefetch=True, batch_fn=batch_fn)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_steps_after_the_last_checkpoint_are_done_again_and_written_once(tmp_path):
    class Stop(Exception):
        pass

    def save_samples(step):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path, 8, save_samples=save_samples, sample_every=1)
    run(tmp_path, 8)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(8))


def test_the_health_summary_is_printed_every_tenth_after_the_first_quarter(tmp_path, capsys):
    def lines():
        return len((tmp_path / "metrics.jsonl").read_text().splitlines())

    run(tmp_path, 40, health=lambda: f"{lines()} are written")
    printed = [line for line in capsys.readouterr().err.splitlines() if "written" in line]
    assert printed == [f"train after {n}: {n} are written" for n in (20, 30)]


def test_a_long_runs_metrics_are_bounded_and_end_with_the_last_step(tmp_path, monkeypatch):
    monkeypatch.setattr(logger, "MAX_LINES", 4)
    run(tmp_path, 12, validate=lambda step: {"eval/score": 0.5}, eval_every=5)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 4, 8, 9, 11], "one in three, those with a validation, and the last"


def test_a_non_finite_number_stops_the_run_naming_iteration_and_network(tmp_path):
    models = make_models(Mixture(), seeded_net(), 4)
    teacher = lambda x, t, c: torch.full_like(x, float("nan"))  # noqa: E731
    with pytest.raises(FloatingPointError, match=r"iteration 0, student/dm"):
        run(tmp_path, 3, models=models._replace(teacher=teacher))


def test_damaged_checkpoints_are_passed_over(tmp_path):
    run(tmp_path, 4)
    folder = tmp_path / "checkpoints"
    newest = folder / "step-0000004.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    messages = []
    path, record = checkpoint.latest(folder, messages.append)
    assert record["step"] == 2
    assert "step-0000004" in messages[0]
    path.unlink()
    assert checkpoint.latest(folder, messages.append) is None
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        checkpoint.resume(folder, {}, {})
    assert "cannot be read" in messages[-1]


def test_a_run_killed_within_its_first_checkpoint_begins_again(tmp_path):
    """Tensors come before their record; without one they are no checkpoint, and the next one deletes them."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-0000001.safetensors").write_bytes(b"half")
    run(tmp_path, 2)
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["step-0000002.json", "step-0000002.safetensors"]


def test_old_checkpoints_are_dropped(tmp_path):
    run(tmp_path, 9)
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("*.json"))] == ["step-0000008.json", "step-0000009.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    write_text(path, "old")

    def broken(p):
        p.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, broken)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, {"net": learner()}, {})
    with pytest.raises(ValueError, match="holds"):
        checkpoint.resume(tmp_path, {"student": learner()}, {})
    assert checkpoint.resume(tmp_path / "none", {"net": learner()}, {}) == 0


def test_progress_says_how_long_is_left(tmp_path):
    with open(tmp_path / "log", "w") as out:
        say = Progress("train", 10, out=out, every=0)
        say(5, "loss 1")
    assert "train 5/10" in (tmp_path / "log").read_text()
    assert "left" in (tmp_path / "log").read_text()
    assert [duration(s) for s in (5, 65, 3700)] == ["5s", "1m05s", "1h01m"]


def test_tensorboard_has_the_runs_numbers_once_after_a_stop(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop in ((0, 4), (2, 5)):  # stopped after step 3, but the last checkpoint was at 2
        metrics_logger = MetricsLogger(tmp_path, "run", 5, start, trackers=("tensorboard",))
        for step in range(start, stop):
            metrics_logger.write(step, {"fake_score/loss": 10.0 * start + step})
        metrics_logger.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("fake_score/loss")] == [(0, 0), (1, 1), (2, 22), (3, 23), (4, 24)]


@pytest.mark.parametrize(
    ("kind", "message"), [("tensorbord", "one of tensorboard, wandb, trackio"), ("wandb", r"pip install 'advdmd\[wandb\]'")]
)
def test_a_tracker_that_is_not_there_is_refused_at_once(tmp_path, kind, message):
    if kind == "wandb" and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    with pytest.raises(ValueError, match=message):
        train(*resolve("mini-sd35-advdmd", []), tmp_path / "run", trackers=(kind,))
    assert not (tmp_path / "run").exists()


def test_trackers_are_imported_only_when_asked_for():
    code = "import advdmd.commands.train, sys; assert not {'tensorboard', 'wandb', 'trackio', 'gradio'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_torn_last_line_of_the_metrics_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "a": 1}\n{"step": 1, "a')
    metrics_logger = MetricsLogger(tmp_path, "x", 3, start=1)
    metrics_logger.write(1, {"a": 2.0})
    metrics_logger.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 0, "a": 1},
        {"step": 1, "a": 2.0},
    ]
