"""The compare page: its images and messages, its refusals, and the page in a browser."""

import json
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from advdmd.commands import demo, train
from advdmd.mini.world.render import render, to_uint8
from advdmd.mini.world.scene import COLORS, Scene, SceneObject
from advdmd.models import loading
from advdmd.models.sampler import SamplerConfig
from advdmd.recipes.registry import resolve
from tests.test_product import SMALL

PROMPT = "a picture of a red circle"


@pytest.fixture(scope="module")
def models(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    student = train.train(*resolve("mini-sd35-advdmd", [*SMALL, f"teacher={tiny_folder}", "algorithm.steps=2"]), folder)
    return [str(tiny_folder), str(student)]


def test_a_teacher_takes_the_given_steps_and_a_student_those_of_its_training(models):
    shown = demo.compare([demo.DemoModel.read(m) for m in models], PROMPT, 6, 0, 5)
    assert [line.partition(":")[2].partition(" evaluations")[0] for _, line in shown] == [" 6 steps, 12", " 2 steps, 2"]
    assert all("of 5 right" in line for _, line in shown)
    assert all(2 * im.width == 3 * im.height for im, _ in shown)  # five on a sheet of three columns


def test_the_same_seed_gives_the_same_images_and_another_seed_others(models):
    model = demo.DemoModel.read(models[1])
    a, b, c = (model.sample(PROMPT, seed, 2)[0] for seed in (1, 1, 2))
    assert (a == b).all()
    assert (a != c).any()
    assert (a[0] != a[1]).any()


def test_where_there_is_no_picture_the_sheet_is_transparent():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    found = np.asarray(demo.sheet(pictures))
    scale = 512 // 16
    alpha = found[..., 3].reshape(20, scale, 20, scale)[:, 0, :, 0]
    assert alpha[1:9, 1:9].min() == alpha[1:9, 11:19].min() == alpha[11:19, 1:9].min() == 255
    assert not alpha[10:].reshape(10, 2, 10)[:, 1].any(), "the fourth is missing"
    assert not alpha[0].any(), "nor is there a frame"
    assert (found[..., :3].reshape(20, scale, 20, scale, 3)[1:9, 0, 11:19, 0] == pictures[1]).all()


def test_two_students_of_one_recipe_have_different_names(models, tmp_path):
    other = shutil.copytree(models[1], tmp_path / "other")
    names = [models[1], str(other)]
    shown = [m.label for m in demo.distinct([demo.DemoModel.read(n) for n in names], names)]
    assert shown == ["student of mini-sd35-advdmd (student)", "student of mini-sd35-advdmd (other)"]
    assert [m.label for m in demo.distinct([demo.DemoModel.read(m) for m in models], models)][
        1
    ] == "student of mini-sd35-advdmd"


def test_an_error_is_shown_and_clears_old_pictures(models):
    shown = [demo.DemoModel.read(m) for m in models]
    for asked, message in ((("a dog", 4, 0, 1), "dog"), ((PROMPT, 4, -3, 1), "seed=-3"), ((PROMPT, 4, 2**31, 1), "seed=2")):
        status, *rest = demo.answers(shown, *asked)
        assert message in status
        assert rest == [None, "", None, ""]
    status, *rest = demo.answers(shown, PROMPT, 4, 0, 1)
    assert (status, [type(x).__name__ for x in rest]) == ("", ["Image", "str"] * 2)


def test_empty_boxes_of_the_page_have_their_models_names(models):
    pytest.importorskip("gradio")
    script = """
import json, sys
from advdmd.commands import demo
config = demo.page([demo.DemoModel.read(m) for m in sys.argv[1:]]).get_config_file()
images = [c["props"] for c in config["components"] if c["type"] == "image"]
print(json.dumps([[p["label"], p["elem_classes"]] for p in images]))
"""
    done = subprocess.run([sys.executable, "-c", script, *models], capture_output=True, text=True)
    want = [["teacher tiny", ["picture", "small"]], ["student of mini-sd35-advdmd", ["picture", "small"]]]
    assert [
        [label.replace(models[0].rpartition("/")[2], "tiny"), css_classes] for label, css_classes in json.loads(done.stdout)
    ] == want


def test_the_verdict_is_the_checkers():
    backbone, _ = loading.load("mini-sd35")
    red = SceneObject("circle", "red", "large", 16.0, 16.0, 6.0, COLORS["red"])
    images = to_uint8(render([Scene("black", (red,)), Scene("black", ())]))
    verdict = demo.DemoModel("teacher", backbone, SamplerConfig(steps=4)).check_result
    assert verdict(PROMPT, images).startswith("1 of 2 right; first miss: is there a circle?; is the number of circles 1?;")
    assert "not checked" in verdict("circle circle", images)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("a picture of a dog", 4, 0, 1), "does not know 'dog'. It knows: a, above"),
        (("x" * 500, 4, 0, 1), "500 characters: at most 400"),
        ((PROMPT, 51, 0, 1), "steps=51: a whole number from 1 to 50"),
        ((PROMPT, 4, -1, 1), "seed=-1: a whole number from 0"),
        ((PROMPT, 4, 0, 17), "images=17: a whole number from 1 to 16"),
        ((PROMPT, 4, None, 1), "one of them is empty"),
        ((PROMPT, 4, float("inf"), 1), "seed=inf: a whole number"),
    ],
)  # fmt: skip
def test_what_is_outside_of_the_limits_is_refused(models, asked, message):
    with pytest.raises(ValueError, match=message):
        demo.compare([demo.DemoModel.read(models[1])], *asked)


def test_only_this_machine_is_served_and_the_queue_is_limited(models):
    pytest.importorskip("gradio")
    script = """
import json, sys, gradio
from advdmd.commands import demo
def launch(b, **how): print(json.dumps([how["server_name"], how["server_port"], how["share"], b._queue.max_size]))
gradio.Blocks.launch = launch
demo.serve([sys.argv[1]], 7777, 1)
"""
    done = subprocess.run([sys.executable, "-c", script, models[1]], capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == ["127.0.0.1", 7777, False, demo.QUEUE], done.stderr


def test_a_browser_sees_pictures_change_and_requests_nothing_from_other_servers(models, tmp_path):
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium here")
    port = "17861"
    server = subprocess.Popen([sys.executable, "-m", "advdmd", "demo", *models, "--port", port, "--threads", "1"])
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1100, "height": 900})
            requested: list[str] = []
            page.on("request", lambda r: requested.append(r.url))
            page.goto(f"http://127.0.0.1:{port}")

            def pictures() -> list[str]:
                return page.evaluate("[0, 1].map(i => document.querySelector(`#picture-${i} img`)?.src ?? '')")

            def new_pictures(seed: int) -> list[str]:
                before = pictures()
                page.fill("#seed input", str(seed))
                page.click("#draw")
                for _ in range(120):
                    now = pictures()
                    if all(b and a != b for a, b in zip(before, now, strict=True)):
                        return now
                    page.wait_for_timeout(500)
                raise AssertionError("the pictures did not change")

            first = new_pictures(0)
            assert "evaluations an image" in page.inner_text("#line-1")
            top = page.locator("#picture-1 img").bounding_box()["y"]
            for above in ("[data-testid=block-label]", ".icon-button-wrapper"):  # what would hide a part of the picture
                box = page.locator(f"#picture-1 {above}").bounding_box()
                assert box["y"] + box["height"] <= top + 1, above
            second = new_pictures(1)
            assert all(a != b for a, b in zip(first, second, strict=True))
            page.screenshot(path=tmp_path / "demo.png")
            page.fill("#prompt textarea", "a picture of a dog")
            page.click("#draw")
            page.wait_for_function("document.querySelector('#status').innerText.includes('It knows')", timeout=60_000)
            browser.close()
        outside = [u for u in requested if not u.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:"))]
        assert not outside
        assert np.asarray(Image.open(tmp_path / "demo.png")).std() > 10
    finally:
        server.terminate()
        server.wait()
