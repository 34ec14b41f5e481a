"""From images on disk to a table: nothing lost, nothing silent."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from advdmd.commands import evaluate
from advdmd.evaluation import judging, results, tables
from advdmd.evaluation.generate import generate, image_jobs, image_path
from advdmd.evaluation.geneval import GenEval
from advdmd.mini.suites import CheckerJudge, MiniSuite
from tests.evaluation import tiny
from tests.evaluation.test_evaluation import true_sampler

SUITE = MiniSuite("mini-geneval", 8, 4)


@pytest.fixture
def generated(tmp_path):
    """True images, but the last one of each task is white."""
    folder = tmp_path / "generated"
    generate(SUITE, true_sampler(SUITE), folder, 3, {"model": {"name": "renderer"}, "nfe": 7})
    for item in {i.task: i for i in SUITE.items()}.values():
        Image.new("RGB", (32, 32), "white").save(image_path(folder, item, item.n_images - 1))
    return folder


def judgements(folder):
    return [r for f in folder.glob("perceptions-*.jsonl") for r in tiny.loads(f.read_text())]


def test_two_workers_equal_one_run(generated, tmp_path):
    whole = evaluate.score(SUITE, generated, CheckerJudge())
    records = {(r["item"], r["k"]): r for r in tiny.loads((generated / "verdicts.jsonl").read_text())}
    for f in generated.glob("perceptions-*"):
        f.unlink()
    with pytest.raises(ValueError, match=r"only \d+/48 images have a verdict.*run the other workers"):
        evaluate.score(SUITE, generated, CheckerJudge(), evaluate.ScoringOptions(worker=(0, 2)))
    assert evaluate.score(SUITE, generated, CheckerJudge(), evaluate.ScoringOptions(worker=(1, 2))) == whole
    assert {(r["item"], r["k"]): r for r in tiny.loads((generated / "verdicts.jsonl").read_text())} == records
    assert len(list(generated.glob("perceptions-*.jsonl"))) == 2
    assert len(judgements(generated)) == len(image_jobs(SUITE)) == whole["images"] == 48
    assert whole["strict"]["overall"]["mean"] == pytest.approx(1 - 6 / 48)


def test_workers_partition_the_items():
    parts = [{i.id for i, _ in image_jobs(SUITE, (i, 3))} for i in range(3)]
    assert set.union(*parts) == {i.id for i in SUITE.items()}
    assert sum(map(len, parts)) == len(SUITE.items())


SLOW = """
import sys, time
from pathlib import Path
from advdmd.evaluation import judging
from advdmd.mini.suites import CheckerJudge, MiniSuite

class Slow(CheckerJudge):
    batch = 1
    def judge(self, items, images):
        time.sleep(0.02)
        return super().judge(items, images)

judging.run_judge(MiniSuite("mini-geneval", 8, 4), Path(sys.argv[1]), Slow())
"""


def test_a_killed_run_goes_on_and_judges_no_image_twice(generated):
    """SIGKILL in the middle, and a last line cut in two, as a kill during a write leaves it."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(generated)])
    record = generated / "perceptions-0of1.jsonl"
    deadline = time.monotonic() + 60
    while not (record.exists() and record.read_bytes().count(b"\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = record.read_bytes()
    assert 5 <= before.count(b"\n") < 48
    with open(record, "ab") as f:
        f.write(b'{"item": "single_obj')
    killed = evaluate.score(SUITE, generated, CheckerJudge())
    found = judgements(generated)
    assert record.read_bytes().startswith(before)
    assert len(found) == len({(r["item"], r["k"]) for r in found}) == 48
    for f in generated.glob("perceptions-*"):
        f.unlink()
    assert evaluate.score(SUITE, generated, CheckerJudge()) == killed


def test_an_image_generated_again_is_judged_again(generated):
    low = evaluate.score(SUITE, generated, CheckerJudge())["strict"]["overall"]["mean"]
    images = dict(
        zip([(i.id, k) for i, k in image_jobs(SUITE)], true_sampler(SUITE)([], [(0, i.id, k, 0) for i, k in image_jobs(SUITE)]))
    )
    for item, k in image_jobs(SUITE):
        Image.fromarray(images[item.id, k]).save(image_path(generated, item, k))
    assert evaluate.score(SUITE, generated, CheckerJudge())["strict"]["overall"]["mean"] == 1 > low
    assert len(judgements(generated)) == 48 + 6


def test_a_damaged_line_is_named(generated):
    evaluate.score(SUITE, generated, CheckerJudge())
    record = generated / "perceptions-0of1.jsonl"
    text = record.read_bytes().split(b"\n")
    text[4] = text[4][:-9]
    record.write_bytes(b"\n".join(text))
    with pytest.raises(ValueError, match=r"perceptions-0of1\.jsonl, line 5 is damaged"):
        evaluate.score(SUITE, generated, CheckerJudge())


class FailsOnWhite(CheckerJudge):
    """A judge that fails on all-white images."""

    batch = 1

    def judge(self, items, images):
        if np.min(images[0]) == 255:
            raise RuntimeError("out of memory")
        return super().judge(items, images)


def test_a_failing_judge_ends_the_run_or_is_counted_and_a_table_is_written_only_as_partial(generated):
    with pytest.raises(ValueError, match="checker: RuntimeError: out of memory; what was judged before is kept"):
        evaluate.score(SUITE, generated, FailsOnWhite())
    with pytest.raises(ValueError, match=r"only 42/48.*0 images missing; 6 failed.*out of memory"):
        evaluate.score(SUITE, generated, FailsOnWhite(), evaluate.ScoringOptions(tolerant=True))
    assert not (generated / "table.md").exists()
    summary = evaluate.score(SUITE, generated, FailsOnWhite(), evaluate.ScoringOptions(tolerant=True, allow_partial=True))
    assert (summary["images"], summary["of"], summary["errors"]) == (42, 48, 6)
    assert "partial 42/48" in (generated / "table.md").read_text()
    assert evaluate.score(SUITE, generated, CheckerJudge())["errors"] == 0, "a later run tries them again"


def test_a_broken_image_is_named_and_takes_no_other_of_its_batch_with_it(generated):
    item = SUITE.items()[3]
    image_path(generated, item, 0).write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=rf"{item.id}/0\.png: checker: .*cannot be read as an image"):
        evaluate.score(SUITE, generated, CheckerJudge())
    summary = evaluate.score(SUITE, generated, CheckerJudge(), evaluate.ScoringOptions(tolerant=True, allow_partial=True))
    assert (summary["images"], summary["errors"]) == (47, 1)


def test_scores_of_different_judges_are_never_in_one_table_or_comparison(generated, tmp_path):
    a = evaluate.score(SUITE, generated, CheckerJudge())
    with pytest.raises(ValueError, match="different judges"):
        tables.markdown({"a": a, "b": a | {"judge": "another"}})
    other = json.loads((generated / "scores.json").read_text()) | {"judge_hash": "other"}
    (tmp_path / "b.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"b\.json is damaged .what it says has another hash"):
        results.compare([generated], [tmp_path / "b.json"])
    del other["sha256"]
    (tmp_path / "b.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="different judges"):
        results.compare([generated], [tmp_path / "b.json"])


def test_a_model_is_not_scored_by_its_own_reward_unless_the_table_says_so(tmp_path):
    generate(SUITE, true_sampler(SUITE), tmp_path, 3, {"model": {"rewards": {"checker": 0.5}}})
    with pytest.raises(ValueError, match="trained with checker as a reward"):
        evaluate.score(SUITE, tmp_path, CheckerJudge())
    summary = evaluate.score(SUITE, tmp_path, CheckerJudge(), evaluate.ScoringOptions(allow_training_reward=True))
    assert "| **trained on this judge** | yes |" in tables.markdown({"x": summary})


def test_scoring_again_keeps_the_record_of_the_model(generated):
    summary = evaluate.score(SUITE, generated, CheckerJudge())
    assert (summary["nfe"], summary["model"]["name"], summary["seed"]) == (7, "renderer", 3)


def test_the_gallery_shows_failures_with_boxes_reasons_and_the_other_model(generated, tmp_path):
    evaluate.score(SUITE, generated, CheckerJudge())
    page = (generated / "gallery.html").read_text()
    assert page.count("<article>") == 6
    assert "expected" in page
    assert "http" not in page.replace("http-equiv", "")
    other = tmp_path / "other"
    generate(SUITE, true_sampler(SUITE), other, 3, {"model": {"name": "renderer"}, "nfe": 7})
    evaluate.score(SUITE, other, CheckerJudge())
    evaluate.write_comparison_gallery(generated, other)
    page = (generated / "gallery.html").read_text()
    assert page.count("<figure>") == 12
    assert "<rect" in page
    assert ">other</b>" in page


def test_text_from_prompts_cannot_become_markup(tmp_path):
    from advdmd.evaluation import failure_gallery

    row = {"item": "x", "k": 0, "task": "t", "prompt": "<script>alert(1)</script>", "loose": 0, "strict": 0, "reason": "<em>"}
    row["details"] = {"objects": [{"label": "<i>", "box": [0, 0, 1, 1], "confidence": 1.0}]}
    path = tmp_path / "images/x/0.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (600, 900)).save(path)
    page = failure_gallery.failure_page([("<u>", tmp_path, [row])])
    assert not any(tag in page for tag in ("<script>", "<em>", "<i>", "<u>"))
    assert all(shown in page for shown in ("&lt;script&gt;", "&lt;em&gt;", "&lt;i&gt;", "&lt;u&gt;"))


def test_genevals_folder_layout_is_read(tmp_path):
    """ITEM/samples/0000K.png, and images of any size."""
    suite = GenEval(1)
    item = suite.items()[0]
    (tmp_path / item.id / "samples").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(tmp_path / item.id / "samples/00000.png")
    assert image_path(tmp_path, item, 0).is_file()
    assert judging.read_image(image_path(tmp_path, item, 0)).shape == (30, 40, 3)


def test_images_with_an_exif_orientation_are_upright(tmp_path):
    image = Image.new("RGB", (40, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert judging.read_image(tmp_path / "x.jpg").shape == (40, 30, 3)
