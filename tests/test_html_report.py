"""The report: one file that needs no other, with the values of the runs' files."""

import json
import re
import shutil
from pathlib import Path

import pytest

from advdmd.monitoring import charts, health, html_report

RESULTS = Path(__file__).parent.parent / "results"
CLAIM = RESULTS / "claims/h2"
RUNS = [CLAIM / "advdmd-0", CLAIM / "dmd2-0"]
ROWS = [json.loads(line) for line in (CLAIM / "scores.jsonl").read_text().splitlines()]
SCORES = {row["run"]: row for row in ROWS if row["suite"] == "mini-geneval"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder, scores = tmp_path_factory.mktemp("page"), []
    for name in ("teacher", "advdmd-0", "dmd2-0"):
        scores.append(folder / name / "scores.json")
        scores[-1].parent.mkdir()
        scores[-1].write_text(json.dumps({k: v for k, v in SCORES[name].items() if k != "run"}))
    return html_report.write_report(RUNS, scores, folder / "deep/report.html").read_text()


def test_the_page_loads_nothing_from_other_files_or_servers(report):
    assert not re.search(r"https?://|<script|<link|@import|url\(", report)
    assert all(s.startswith("data:image/") for s in re.findall(r'src="([^"]*)"', report))
    assert 'name="viewport"' in report
    assert "color-scheme: light dark" in report
    assert len(report) < 1_000_000


def test_the_page_shows_the_values_of_the_runs_and_scores(report):
    kept = json.loads((CLAIM / "comparisons.json").read_text())["mini-geneval-test-advdmd-teacher"]
    one = SCORES["advdmd-0"]
    assert f"{one['strict']['overall']['mean']:.3f} [" in report
    assert kept["theirs"]["strict"][0] == pytest.approx(
        float(re.search(r"<b>overall</b></td><td>([.0-9]+)", report)[1]), abs=6e-4
    )
    assert report.count("healthy") == 2
    assert "algorithm.gan_loss_weight: " in report  # the recipes' differences
    logged = {k for r in RUNS for m in health.read_metrics(r) for k in m}
    for diagnostic in health.DIAGNOSTICS:
        assert (f"<h3>{diagnostic.key}</h3>" in report) == (diagnostic.key in logged)
    assert report.count('class="band"') >= 10


def test_the_main_jobs_folder_is_a_run_too(tmp_path):
    text = html_report.write_report([RESULTS / "main_job"], [], tmp_path / "a.html").read_text()
    assert 'alt="comparison"' in text
    assert "AdvDMD, 4 steps" in text
    shutil.copytree(RESULTS / "main_job", tmp_path / "job/run")
    assert "580 of 580 iterations" in html_report.write_report([tmp_path / "job"], [], tmp_path / "b.html").read_text()


def test_teacher_beside_student_comes_first_and_the_difference_is_the_students(tmp_path):
    """In the main job's folder the evaluations lie in the order of their names, the student's before the teacher's."""
    job = shutil.copytree(RESULTS / "main_job", tmp_path / "job")
    shutil.copytree(RESULTS / "main_job", job / "run")
    for name, run in (("AdvDMD-4-steps", "advdmd-0"), ("teacher-4-steps", "dmd2-0"), ("teacher-40-steps", "teacher")):
        (job / name).mkdir()
        (job / name / "scores.json").write_text(json.dumps({k: v for k, v in SCORES[run].items() if k != "run"}))
    text = html_report.write_report([job], [], tmp_path / "a.html").read_text()
    heads = re.findall(r'<h2 class="part">([^<]*)', text)
    assert heads[0] == "Teacher beside student"
    assert heads.index("mini-geneval, test") < heads.index("Score and reward") < heads.index("Diagnostics")
    ours, theirs = (SCORES[k]["strict"]["overall"]["mean"] for k in ("advdmd-0", "teacher"))
    assert f"AdvDMD-4-steps - teacher-40-steps: {ours - theirs:+.3f} [" in text
    assert re.search(
        r"<th>teacher-40-steps</th>|<td>teacher-40-steps</td><td>teacher-4-steps</td><td>AdvDMD-4-steps</td>", text
    )


def test_runs_with_another_teacher_get_no_ranges(tmp_path):
    shutil.copytree(RUNS[0], tmp_path / "run")
    text = (tmp_path / "run/recipe.yaml").read_text()
    (tmp_path / "run/recipe.yaml").write_text(text.replace("teacher: mini-sd3\n", "teacher: some/model\n"))
    text = html_report.write_report([tmp_path / "run"], [], tmp_path / "a.html").read_text()
    assert "no ranges for this teacher" in text
    assert 'class="band"' not in text


@pytest.mark.parametrize(
    ("runs", "scores", "message"),
    [
        ([RESULTS], [], "is not a training run"),
        ([RUNS[0], RUNS[0]], [], "the same folder is named twice"),
        ([RUNS[0]], [RESULTS / "h2"], "holds no scores.json"),
        ([RESULTS / f"x{i}" for i in range(9)], [], "9 runs: at most 5"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_is_written(tmp_path, runs, scores, message):
    with pytest.raises(ValueError, match=message):
        html_report.write_report(runs, scores, tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_runs_are_named_by_what_tells_them_apart():
    assert html_report.labels([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert html_report.labels([Path("/a/x")]) == ["x"]


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(0, 1, [0, 0.5, 1]), (-0.3, 0.31, [-0.2, 0, 0.2]), (3, 2400, [1000, 2000]), (0.441, 0.448, [0.442, 0.444, 0.446, 0.448])],
)
def test_ticks_are_round_and_inside(low, high, found):
    assert charts.ticks(low, high) == pytest.approx(found)


def test_a_chart_shows_every_curve_and_leaves_out_what_is_not_a_number():
    many = (list(range(1000)), [float(i % 7) for i in range(1000)])
    chart = charts.line_chart([many, ([5], [1.0]), ([], [])], band=(2, 99))
    assert chart.count("<path class=") - chart.count('"grid"') == 1
    assert 'class="c1"' in chart
    assert len(re.search(r'class="c0" d="M([^"]*)"', chart)[1].split()) == 2 * len(charts.thin(many)[0]) <= 2 * charts.POINTS
    assert charts.thin(([1, 2, 3], [1.0, float("nan"), 3.0])) == ([1, 3], [1.0, 3.0])
    assert charts.line_chart([([], [])]) == ""


def test_panels_share_one_x_axis(report):
    """Those of a metric that is logged from the middle of a run on too."""
    axes = {tuple(re.findall(r'class="mid"[^>]*>([^<]*)<', svg)) for svg in re.findall(r'<svg class="chart".*?</svg>', report)}
    assert len(axes) == 1
    gates = [m["step"] for m in health.read_metrics(RUNS[0]) if "policy/gate" in m]
    assert gates[0] > 100, "or nothing would differ"
