"""Suites, verdicts, tables and diversity."""

import json
from dataclasses import replace

import numpy as np
import pytest

from advdmd.evaluation import results, statistics
from advdmd.evaluation.benchmark import Verdict
from advdmd.evaluation.generate import generate, image_jobs, read_images
from advdmd.evaluation.geneval_rule import Detection, geneval_correct, relative_position
from advdmd.mini.suites import MiniSuite, metadata, questions
from advdmd.mini.world.render import render, to_uint8
from advdmd.mini.world.scene import COLORS, SHAPES, WORLDS, Group, Scene, SceneObject, Spec, draw_scene

SUITES = [
    MiniSuite("mini-geneval", 16, 8),
    MiniSuite("mini-dpg", 24, 12),
    MiniSuite("mini-geneval", 16, 8, "pairs"),
    MiniSuite("mini-geneval", 12, 6, world="full"),
]


def true_images(suite, seed=0):
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(suite.specs[i.id], rng, WORLDS[suite.world], pairs=True) for i, _ in image_jobs(suite)]
    return to_uint8(render(scenes))


@pytest.mark.parametrize("suite", SUITES, ids=lambda s: f"{s.name}-{s.split}-{s.world}")
def test_true_images_score_one_and_shuffled_captions_score_nothing(suite):
    items, images = [i for i, _ in image_jobs(suite)], true_images(suite)
    assert all(v.official == v.strict == 1 for v in suite.judge_images(items, images))
    if suite.name == "mini-geneval":
        rolled = np.roll(images, suite.images_per_task + 3, axis=0)
        assert np.mean([v.strict for v in suite.judge_images(items, rolled)]) <= 0.08


def test_suites_have_equal_images_per_task_and_distinct_prompts():
    suite = MiniSuite("mini-geneval", 20, 10)
    for task in suite.tasks:
        items = [i for i in suite.items() if i.task == task]
        assert sum(i.n_images for i in items) == 20
        assert len({i.prompt for i in items}) == len(items) <= 10
    assert suite.items() == MiniSuite("mini-geneval", 20, 10).items()


def test_splits_share_no_prompt_where_there_are_enough():
    test, train = (MiniSuite("mini-dpg", 24, 24, s).items() for s in ("test", "train"))
    assert not {i.prompt for i in test} & {i.prompt for i in train}
    pairs = WORLDS["half"].held_out_pairs
    for spec in MiniSuite("mini-geneval", 16, 8, "pairs").specs.values():
        assert any((g.shape, g.color) in pairs for g in spec.groups)
    for spec in MiniSuite("mini-geneval", 16, 8).specs.values():
        assert not any((g.shape, g.color) in pairs for g in spec.groups)


@pytest.mark.parametrize("bad", [{"name": "geneval"}, {"split": "valid"}, {"world": "flat"}, {"images_per_task": 0}])
def test_suites_that_do_not_exist_are_refused(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        MiniSuite(**({"name": "mini-geneval"} | bad))


def test_one_image_of_all_shapes_passes_the_official_rule_but_not_the_strict_one():
    things = [
        SceneObject(s, c, "small", 4.5 + 7.6 * (i % 4), 9 + 14 * (i // 4), 2.9, COLORS[c])
        for i, (s, c) in enumerate(zip(SHAPES, COLORS))
    ]
    image = to_uint8(render([Scene("black", tuple(things))]))
    suite = MiniSuite("mini-geneval", 24, 24, world="full")
    items = [i for i, _ in image_jobs(suite)]
    verdicts = suite.judge_images(items, np.repeat(image, len(items), 0))
    assert np.mean([v.official for v in verdicts]) > 0.2
    assert max(v.strict for v in verdicts) == 0


def box(x, y, r=4):
    return (x - r, y - r, x + r, y + r)


def test_verdict_checks_class_count_colour_and_position():
    red, blue = Detection("circle", "red", box(8, 16), 0.9), Detection("star", "blue", box(24, 16), 0.8)
    meta = {"include": [{"class": "star", "count": 1}, {"class": "circle", "count": 1, "position": ("left of", 0)}]}
    assert geneval_correct(meta, [red, blue]) == (True, "")
    assert not geneval_correct(meta, [red])[0]
    assert not geneval_correct(meta, [replace(red, box=box(24, 16)), replace(blue, box=box(8, 16))])[0]
    assert geneval_correct({"include": [{"class": "circle", "count": 1, "color": "red"}]}, [red])[0]
    assert "found 0" in geneval_correct({"include": [{"class": "circle", "count": 1, "color": "blue"}]}, [red])[1]
    counting = {"include": [{"class": "circle", "count": 2}], "exclude": [{"class": "circle", "count": 3}]}
    assert [geneval_correct(counting, [red] * n)[0] for n in (1, 2, 3)] == [False, True, False]


def test_the_most_confident_objects_are_judged():
    sure, doubtful = Detection("circle", "blue", box(8, 8), 0.9), Detection("circle", "red", box(20, 20), 0.3)
    assert not geneval_correct({"include": [{"class": "circle", "count": 1, "color": "red"}]}, [doubtful, sure])[0]


def test_relative_position_has_a_dead_zone_and_may_be_diagonal():
    a = Detection("circle", None, box(16, 16), 1)
    assert relative_position(a, replace(a, box=box(17, 16))) == set()
    assert relative_position(a, replace(a, box=box(26, 16))) == {"left of"}
    assert relative_position(a, replace(a, box=box(26, 26))) == {"left of", "above"}
    assert relative_position(a, replace(a, box=box(16, 4))) == {"below"}


def test_a_failed_parent_takes_its_questions_with_it():
    spec = Spec((Group("circle", 1, "red", "small"), Group("square", 1, "blue", "large")), (0, "above", 1), "gray")
    meta = metadata("dense", spec) | {"questions": questions(spec)}
    assert len(meta["questions"]) == 10
    suite, rng = MiniSuite("mini-dpg", 1, 1), np.random.default_rng(0)
    item = replace(suite.items()[0], meta=meta)
    full = draw_scene(spec, rng)
    without = Scene(full.background, full.things[1:])
    whole, missing = suite.judge_images([item, item], to_uint8(render([full, without])))
    assert whole == Verdict(1.0, 1.0, "", whole.details)
    assert missing.official == pytest.approx(5 / 10)  # the square's four and the background
    assert missing.strict == 0
    assert "is there a circle?" in missing.reason
    assert missing.details["by_kind"]["relation/spatial"] == 0


def true_sampler(suite):
    truth = dict(zip([(i.id, k) for i, k in image_jobs(suite)], true_images(suite)))
    return lambda prompts, keys: np.stack([truth[(item, k)] for _, item, k, _ in keys])


def test_generation_resumes_and_refuses_a_folder_of_another_run(tmp_path):
    suite, calls = MiniSuite("mini-dpg", 12, 6), []
    sampler = true_sampler(suite)

    def counted(prompts, keys):
        calls.extend(keys)
        return sampler(prompts, keys)

    generate(suite, counted, tmp_path, 0, {"model": "x"}, batch=5)
    (tmp_path / "images" / suite.items()[0].id / "0.png").unlink()
    with pytest.raises(ValueError, match="11/12"):
        read_images(suite, tmp_path)
    generate(suite, counted, tmp_path, 0, {"model": "x"})
    assert len(calls) == 13
    assert (read_images(suite, tmp_path) == true_images(suite)).all()
    with pytest.raises(ValueError, match=r"seed.*differ"):
        generate(suite, counted, tmp_path, 1, {"model": "x"})


def table(scores, task="colors"):
    return [
        {"item": f"i{n // 2}", "k": n % 2, "prompt": "p", "task": task, "strict": s, "loose": s} for n, s in enumerate(scores)
    ]


def test_means_are_over_images_then_tasks():
    rows = table([1, 1, 0, 0]) + table([1, 1], "position")
    out = statistics.summarize(rows, "strict")
    assert out["colors"]["mean"] == 0.5
    assert out["overall"]["mean"] == 0.75
    low, high = out["overall"]["interval"]
    assert low <= 0.75 <= high


def test_intervals_cluster_by_prompt():
    """Two images of one prompt that always agree are one observation, not two."""
    rng = np.random.default_rng(0)
    p = rng.integers(0, 2, 60).astype(float)
    width = lambda rows: np.ptp(statistics.summarize(rows, "strict")["overall"]["interval"])  # noqa: E731
    agreeing = table(np.repeat(p, 2).tolist())
    independent = [r | {"item": str(i)} for i, r in enumerate(agreeing)]
    assert width(agreeing) == pytest.approx(np.sqrt(2) * width(independent), rel=0.15)


def test_paired_differences_cancel_what_is_common():
    g = np.random.default_rng(1)
    hard = g.random(200)
    a = [{"task": "t", "item": f"{i // 2}", "k": i % 2, "prompt": "", "strict": float(h > 0.3)} for i, h in enumerate(hard)]
    b = [r | {"strict": float(h > 0.4)} for r, h in zip(a, hard)]
    d = statistics.paired_difference([a], [b])["overall"]
    assert d["mean"] == pytest.approx(np.mean([x["strict"] - y["strict"] for x, y in zip(a, b)]))
    assert 0 < d["interval"][0] < d["mean"] < d["interval"][1] < 0.25
    with pytest.raises(ValueError, match="same images"):
        statistics.paired_difference([a], [b[:-2]])
    with pytest.raises(ValueError, match="seeds"):
        statistics.paired_difference([a], [[r | {"seed": 1} for r in b]])


def test_training_seeds_widen_the_interval_as_far_as_they_disagree():
    table = [{"task": "t", "item": f"{i}", "k": 0, "prompt": "", "strict": 0.5} for i in range(100)]
    up = lambda by: [r | {"strict": 0.5 + by} for r in table]  # noqa: E731
    alike, apart = (
        statistics.paired_difference([up(0.1)] * 3, [table])["t"],
        statistics.paired_difference([up(-0.2), up(0.1), up(0.4)], [table])["t"],
    )
    assert alike["mean"] == pytest.approx(apart["mean"]) == pytest.approx(0.1)
    assert alike["interval"] == pytest.approx((0.1, 0.1))
    assert apart["interval"][0] < -0.1
    assert apart["interval"][1] > 0.3
    assert statistics.paired_difference([up(0.1), up(0.2)], [up(0.0), up(0.1)])["t"]["interval"] == pytest.approx((0.1, 0.1))
    with pytest.raises(ValueError, match="3 results against 2"):
        statistics.paired_difference([table] * 3, [table] * 2)


def test_results_are_written_and_read_back(tmp_path):
    rows = table([1, 0])
    same = {"suite": "s", "suite_hash": "h", "seed": 7}
    summary = {"strict": statistics.summarize(rows, "strict"), "loose": statistics.summarize(rows, "loose"), "nfe": 4, **same}
    results.write_results(tmp_path, rows, summary)
    for place in (tmp_path, tmp_path / "scores.json"):
        about, read = results.read_scores(place)
        assert about == json.loads(json.dumps(summary))
        assert read == [{k: r[k] for k in ("task", "item", "k", "loose", "strict")} | same for r in rows]
    assert json.loads((tmp_path / "table.json").read_text())["nfe"] == 4
    assert "| **overall** | 0.500" in (tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match=r"no scores\.json"):
        results.read_scores(tmp_path / "none")
    with pytest.raises(ValueError, match="scores missing"):
        results.read_scores(tmp_path / "table.json")


def test_the_renderer_is_as_diverse_as_itself_and_a_constant_is_not():
    suite = MiniSuite("mini-geneval", 48, 12)
    ids = [i.id for i, _ in image_jobs(suite)]
    assert suite.spread(true_images(suite, 1), ids)["mean"] == pytest.approx(1, abs=0.12)
    first = {}
    collapsed = np.stack([first.setdefault(i, im) for i, im in zip(ids, true_images(suite, 1))])
    assert suite.spread(collapsed, ids)["mean"] < 1e-9
