"""The doctor: healthy runs pass, runs broken on purpose are named with a remedy."""

import json
import shutil
from pathlib import Path

import pytest

from advdmd.monitoring import health
from advdmd.recipes.registry import resolve

GOOD = [
    {"step": i, "fake_score/loss": 2 + 0.01 * (i % 7), "student/dm_loss": 0.7, "discriminator/logit_gap": 0.5 + 0.1 * (i % 3)}
    for i in range(40)
]


def test_a_run_is_healthy_beside_itself_and_a_lagging_fake_score_is_not():
    ranges = health.ranges_of_runs([GOOD])
    assert health.summarize(GOOD, health.diagnose(GOOD, ranges)) == "healthy"
    lagging = [m | {"fake_score/loss": 9.0} for m in GOOD]
    summary = health.summarize(lagging, health.diagnose(lagging, ranges))
    assert summary.startswith("fake_score/loss 9, range 2 to 2.06: it lags")


def test_only_the_late_part_of_a_run_is_judged_and_a_harmless_side_is_not_flagged():
    ranges = health.ranges_of_runs([GOOD])
    early = [m | {"fake_score/loss": 9.0} if m["step"] < 20 else m for m in GOOD]
    assert health.summarize(early, health.diagnose(early, ranges)) == "healthy"
    better = [m | {"fake_score/loss": 0.1} for m in GOOD]
    assert health.summarize(better, health.diagnose(better, ranges)) == "healthy"


def test_a_number_that_is_not_finite_is_out_of_range():
    run = [m | {"fake_score/loss": float("nan")} for m in GOOD]
    assert "start again from the last checkpoint" in health.summarize(run, health.diagnose(run, health.ranges_of_runs([GOOD])))


def test_every_shipped_range_belongs_to_a_diagnostic_and_every_diagnostic_has_a_remedy():
    shipped = health.shipped_ranges()
    for ranges in shipped.values():
        assert set(ranges) <= {d.key for d in health.DIAGNOSTICS}
        assert all(low <= high for low, high in ranges.values())
    assert len(shipped["advdmd/4"]) >= 12
    assert all(d.meaning and (d.low or d.high) for d in health.DIAGNOSTICS)


def test_ranges_are_only_used_on_runs_like_those_they_were_measured_on():
    assert health.ranges_for(resolve("mini-sd3-dmd2")[1]) == health.shipped_ranges()["dmd2/4"]
    for name, words in (
        ("mini-sd35-advdmd", ["algorithm.steps=8"]),
        ("sd3-medium-dmd2-4step-80gb", []),
    ):
        r = resolve(name, words)[1]
        assert health.ranges_for(r) == {}
        assert "compare with a good run" in health.summary(GOOD, r)


def test_the_main_jobs_folder_is_read_as_its_run(tmp_path):
    kept = Path(__file__).parent.parent / "results" / "main_job"
    shutil.copytree(kept, tmp_path / "job/run")
    assert health.read_metrics(tmp_path / "job") == health.read_metrics(kept)


KEPT = Path(__file__).parent.parent / "results"
GOOD_RUNS = sorted(p.parent for p in (KEPT / "healthy").glob("*/metrics.jsonl"))


def ranges_of(folder):
    return health.ranges_for(resolve(str(folder / "recipe.yaml"))[1])


@pytest.mark.parametrize("folder", GOOD_RUNS, ids=lambda f: f.name)
def test_a_good_run_is_called_healthy_while_it_goes_on(folder):
    run, ranges = health.read_metrics(folder), ranges_of(folder)
    assert len(ranges) >= 4
    for tenths in range(3, 11):
        so_far = run[: len(run) * tenths // 10]
        assert health.summarize(so_far, health.diagnose(so_far, ranges)) == "healthy", f"at {tenths}/10"


@pytest.mark.parametrize("folder", sorted((KEPT / "unhealthy").glob("*/")), ids=lambda f: f.name)
def test_an_unhealthy_run_is_named_while_it_goes_on(folder):
    run = health.read_metrics(folder)
    for tenths in range(3, 11):
        so_far = run[: len(run) * tenths // 10]
        assert any(f.remedy for f in health.diagnose(so_far, ranges_of(folder))), f"at {tenths}/10"


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a training run"):
        health.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        health.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "fake_score/loss": 1.0}) + '\n{"step": 1, "fake')
    assert health.read_metrics(tmp_path) == [{"step": 0, "fake_score/loss": 1.0}]
