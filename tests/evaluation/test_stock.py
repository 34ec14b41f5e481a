"""Any diffusers pipeline is evaluated through its own call."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from advdmd.commands import evaluate
from advdmd.evaluation.benchmark import suite_hash
from advdmd.evaluation.dpg import DPG
from advdmd.evaluation.generate import image_jobs, image_path
from advdmd.evaluation.geneval import GenEval
from advdmd.evaluation.judges import vqa
from advdmd.models import loading
from advdmd.models.diffusers_pipeline import DiffusersModel, DiffusersSampling
from advdmd.models.hub import download
from advdmd.models.pretrained import load_tokenizer
from tests.evaluation import tiny
from tests.test_product import cli


@pytest.fixture(scope="module")
def stock_folder(tiny_folder, tmp_path_factory):
    """A stock SD3 folder without T5 and without this package's metadata."""
    folder = tmp_path_factory.mktemp("stock") / "pipe"
    shutil.copytree(tiny_folder, folder)
    (folder / "advdmd.json").unlink()
    return folder


def test_settings_become_the_arguments_of_the_pipelines_call(stock_folder):
    model = DiffusersModel(str(stock_folder), DiffusersSampling(steps=2, guidance_scale=3.0, height=32, width=32))
    assert model.call_kwargs == {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32}
    assert model.nfe == 4
    assert DiffusersModel(str(stock_folder), DiffusersSampling(steps=3, guidance_scale=1.0)).nfe == 3
    assert DiffusersModel(str(stock_folder), DiffusersSampling()).nfe == 80, "40 guided steps, as SD3.5 Medium has on its card"
    a, b = (model.sample(["a picture"], [("s", k)]) for k in (0, 1))
    assert a.shape == (1, 32, 32, 3)
    assert not np.array_equal(a, b)
    assert np.array_equal(model.sample(["a picture"] * 2, [("s", 0), ("s", 1)]), np.concatenate([a, b])), "no batch in it"
    with pytest.raises(ValueError, match="steps=0"):
        DiffusersSampling(steps=0)


def test_a_name_may_pin_a_revision(monkeypatch):
    import diffusers
    import huggingface_hub

    asked = []

    def refuse(model, revision=None, **options):
        asked.append((model, revision))
        raise OSError("no network here")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for name, revision in (("owner/name@v1", None), ("owner/name", "v2"), ("owner/name", None)):
        with pytest.raises(ValueError, match="no network here"):
            DiffusersModel(name, DiffusersSampling(), revision)
    for name in ("owner/name@v1", "owner/name"):
        with pytest.raises(ValueError, match="no network here"):
            download(name)
    assert [revision for _, revision in asked] == ["v1", "v2", None, "v1", None]
    assert {model for model, _ in asked} == {"owner/name"}


def test_pickled_weights_are_not_loaded(stock_folder, tmp_path):
    """A folder whose transformer is a .bin: refused by what evaluates and by what trains, although it holds tensors alone."""
    shutil.copytree(stock_folder, tmp_path / "pipe")
    file = tmp_path / "pipe/transformer/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    for read in (
        lambda: DiffusersModel(str(tmp_path / "pipe"), DiffusersSampling()),
        lambda: loading.load_pipeline(tmp_path / "pipe"),
    ):
        with pytest.raises(ValueError, match="is a pickle, which could run code"):
            read()


def test_a_tokenizer_with_custom_code_is_refused_without_a_question(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "strange"}')
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="holds no tokenizer that can be loaded"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_pipeline_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="nor a diffusers pipeline folder"):
        DiffusersModel(str(tmp_path), DiffusersSampling())


def test_geneval_from_the_command_line_with_a_stock_pipeline(stock_folder, tmp_path):
    """One prompt of the 553: generated, judged, named partial, resumed without generating again, refused without the flag."""
    suite = GenEval(1)
    n = next(n for n in range(400, 2000) if len(image_jobs(suite, (0, n))) == 1)
    tiny.detector().save_pretrained(tmp_path / "det")
    tiny.save_clip(tmp_path / "clip", names=("red", "blue"))
    tiny.save_clip(tmp_path / "unable", names=("blue", "red"))
    args = ["eval", stock_folder, "geneval", "--images", 1, "--steps", 1, "--guidance", 1]
    args += ["--worker", f"0/{n}", "--out", tmp_path / "out", "--threads", 1, "--clip", tmp_path / "unable"]
    done = cli(*args)
    assert done.returncode == 2
    assert "geneval needs --detector" in done.stderr
    assert not (tmp_path / "out").exists()
    args += ["--detector", tmp_path / "det"]
    done = cli(*args)
    assert done.returncode == 2
    assert "self-test: a drawn" in done.stderr
    assert not (tmp_path / "out").exists()
    args += ["--clip", tmp_path / "clip"]
    done = cli(*args)
    assert done.returncode == 2, done.stdout
    assert "only 1/553 images have a verdict" in done.stderr
    ((item, k),) = image_jobs(suite, (0, n))
    when = image_path(tmp_path / "out", item, k).stat().st_mtime
    done = cli(*args, "--allow-partial")
    assert done.returncode == 0, done.stderr
    assert "geneval[mask2former-swin-s + clip (other weights than GenEval's: not comparable)] official" in done.stdout
    assert "partial 1/553" in done.stdout
    assert image_path(tmp_path / "out", item, k).stat().st_mtime == when
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert (table["nfe"], table["suite_hash"], table["images"]) == (1, suite_hash(suite.items()), 1)


def test_dpg_with_a_judge_gives_categories_and_its_name(tmp_path):
    """Every image red, so that the question about red holds; answers are kept and not asked for twice."""
    csv = tiny.save_dpg(tmp_path / "dpg.csv")
    suite, asked = DPG(str(csv), 2), []
    for item, k in image_jobs(suite):
        image_path(tmp_path, item, k).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(image_path(tmp_path, item, k))

    def answer(picture, question):
        asked.append(question)
        return float("blue" not in question and "barking" not in question)

    judge = vqa.VQAJudge("some-judge", "f1", answer)
    summary = evaluate.score(suite, tmp_path, judge)
    assert summary["loose"]["overall"]["mean"] == pytest.approx((1 + 2 / 3) / 2)
    assert summary["strict"]["overall"]["mean"] == 0.5
    assert summary["breakdown"]["entity - state"] == 0
    assert summary["breakdown"]["attribute"] == 1
    assert "dpg[some-judge] official" in (tmp_path / "table.md").read_text()
    n = len(asked)
    assert evaluate.score(suite, tmp_path, judge) == summary
    assert len(asked) == n


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dpg"], "dpg needs --csv"),
        (["dpg", "--csv", "{csv}"], "needs --judge qwen-vl"),
        (["dpg", "--csv", "{csv}", "--judge", "gpt"], "judge 'gpt'"),
        (["geneval", "--csv", "{csv}"], "--csv is dpg's"),
        (["mini-geneval", "--worker", "2/2"], "--worker '2/2'"),
        (["dpg", "--csv", "nobody/nothing/dpg.csv"], "not to be had from the hub"),
        (["geneval", "--detector", "no/where/at/all", "--clip", "x"], "no such folder, and no hub id"),
        (["geneval", "--detector", "no/where", "--clip", "x"], "cannot be had from the hub"),
        (["imagenet"], "suite 'imagenet': one of mini-geneval"),
        (["mini-geneval", "--split", "validation"], "only mini-dpg"),
    ],
)
def test_wrong_suites_judges_and_workers_end_with_one_line(words, message, tmp_path, tiny_folder):
    csv = tiny.save_dpg(tmp_path / "dpg.csv")
    done = cli("eval", tiny_folder, *[w.replace("{csv}", str(csv)) for w in words], "--out", tmp_path / "o")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_a_reward_beside_the_discriminators_changes_the_policy_update_and_is_recorded(tiny_folder, tmp_path):
    """AdvDMD with and without a scorer: the first policy update differs, and the student's metadata name the scorer."""
    from advdmd.commands import train
    from advdmd.recipes.registry import resolve
    from tests.test_product import SMALL

    weights = tiny.save_clip(tmp_path / "clip")
    words = [*SMALL, f"teacher={tiny_folder}", "algorithm.dm_only_iterations=0", "algorithm.auc_gating=false", "iterations=1"]
    logs = {}
    for name, more in {"plain": [], "rewarded": [f"rewards=[2*clipscore:{weights}]"]}.items():
        student = train.train(*resolve("mini-sd35-advdmd", [*words, *more]), tmp_path / name)
        logs[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text())
        metadata = json.loads((student / "advdmd.json").read_text())
        assert metadata.get("rewards", {}) == ({"clipscore": 2.0} if more else {})
    assert "reward/clipscore[clip]_std" in logs["rewarded"]
    assert logs["rewarded"]["policy/grad_norm"] != logs["plain"]["policy/grad_norm"]
    assert logs["rewarded"]["reward/final"] == logs["plain"]["reward/final"]
    with pytest.raises(ValueError, match="dmd2 has no policy updates"):
        resolve("mini-sd35-dmd2", [f"rewards=[1*clipscore:{weights}]"])
