"""Recipes, command line, runs and exports, as a user meets them."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from advdmd.cli.main import main
from advdmd.commands import mini, pretrain, train
from advdmd.commands.evaluate import evaluate, make_suite, score
from advdmd.commands.export import export
from advdmd.commands.sample import sample as sample_prompts
from advdmd.distillation import validation
from advdmd.mini.suites import CheckerJudge, MiniSuite
from advdmd.models import loading
from advdmd.models.sampler import SamplerConfig
from advdmd.monitoring import health
from advdmd.monitoring.reward_hacking import reward_hacking_step
from advdmd.recipes.overrides import diff, dump, override, parse_overrides
from advdmd.recipes.registry import known_recipes, resolve
from advdmd.training import checkpoint

SMALL = [
    "iterations=4", "algorithm.dm_only_iterations=1", "algorithm.policy_ramp_iterations=2", "algorithm.group_size=4",
    "prompts_per_step=2",
    "data.num_prompts=6", "data.images_per_prompt=2", "save_every=2", "sample_every=4", "threads=1",
]  # fmt: skip


def cli(*words):
    """The command, in this process: to import all again takes longer than most of what is tested."""
    out, err, before = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["advdmd", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as e:
            code = e.code or 0
        finally:
            signal.signal(signal.SIGINT, before)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def in_new_process(*words):
    """The command in a new process."""
    command = [sys.executable, "-m", "advdmd", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "adv"
    train.train(*resolve("mini-sd35-advdmd", [*SMALL, f"teacher={tiny_folder}"]), folder)
    return folder


def test_a_run_logs_what_the_diagnostics_need(trained):
    """All but what needs a validation; by the last step both optimizers have moved."""
    logged = set().union(*(json.loads(x) for x in (trained / "metrics.jsonl").read_text().splitlines()))
    others = {"eval/diversity", "discriminator/auc", "student/loss", "student/grad_norm"}  # validation, DMD2, TwinFlow
    others |= {"policy/agreement", "policy/step_share"}  # policy_step=agreement
    assert {d.key for d in health.DIAGNOSTICS} - logged == others


def test_the_student_of_a_run_with_validation_is_its_best(tiny_folder, trained, tmp_path):
    """The tiny teacher's scores are nearly alike: the first of the best stays the best, whatever comes after it."""
    from safetensors.torch import load_file, save_file

    name, r = resolve("mini-sd35-advdmd", [*SMALL, f"teacher={tiny_folder}", "eval_every=1", "eval_images=2"])
    student = train.train(name, r, tmp_path / "a")
    metrics = [json.loads(x) for x in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    scores = [m["eval/score"] for m in metrics]
    assert [m["eval/forwards_per_sample"] for m in metrics] == [r.forwards_until(k) for k in (1, 2, 3, 4)]
    found = {"step": scores.index(max(scores)) + 1, "score": pytest.approx(max(scores), rel=1e-5), "last": 4}
    best = validation.read_best(tmp_path / "a")
    assert best == found | {"sha256": best["sha256"], "file": best["file"]}
    assert [f.name for f in (tmp_path / "a").glob("best*.safetensors")] == [best["file"]], "and no other is kept"
    exported_files = (loading.weights_file(f) for f in (student, trained / "student"))
    kept, exported, last = (load_file(f) for f in (tmp_path / "a" / best["file"], *exported_files))
    assert all(torch.equal(kept[k], exported[k]) for k in kept)
    assert all(torch.equal(kept[k], last[k]) for k in kept) == (best["step"] == 4), "the last, only where it is the best"
    assert json.loads((student / "advdmd.json").read_text())["iterations"] == scores.index(max(scores)) + 1
    newest = load_file(loading.weights_file(export(tmp_path / "a", tmp_path / "last", changes=["eval_every=0"])))
    assert all(torch.equal(newest[k], last[k]) for k in newest), "without its validations the last student is exported"

    file = tmp_path / "a" / best["file"]
    good = file.read_bytes()
    for damaged in (good[:-1] + bytes([good[-1] ^ 1]), good[:100]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"best-\d+\.safetensors is damaged .*delete best.json"):
            validation.load_best(tmp_path / "a", torch.nn.Linear(1, 1))

    net = torch.nn.Linear(1, 1)  # a run of an earlier version, whose record names neither file nor hash
    save_file(net.state_dict(), tmp_path / "best.safetensors")
    (tmp_path / "best.json").write_text('{"step": 3, "strict": 0.5, "last": 4}')
    assert validation.load_best(tmp_path, net) == 3


def test_overwriting_deletes_what_runs_write_and_nothing_else(tiny_folder, tmp_path):
    r = resolve("mini-sd35-advdmd", [*SMALL, f"teacher={tiny_folder}", "iterations=1"])
    train.train(*r, tmp_path / "r")
    for ours in ("best-0000001.safetensors", "best.json", ".left"):
        (tmp_path / "r" / ours).write_text("{}")
    train.train(*r, tmp_path / "r", overwrite=True)
    assert not (tmp_path / "r/best.json").exists()
    (tmp_path / "r/best_of_my_pictures.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds what no run of advdmd wrote \(best_of_my_pictures.txt\)"):
        train.train(*r, tmp_path / "r", overwrite=True)
    assert (tmp_path / "r/best_of_my_pictures.txt").read_text() == "mine"


def test_a_students_flipped_bit_is_noticed_before_anything_is_sampled(trained, tmp_path):
    shutil.copytree(trained / "student", tmp_path / "student")
    loading.load(str(tmp_path / "student"))
    file = loading.weights_file(tmp_path / "student")
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"transformer is damaged \(its weights have not the hash in advdmd.json\): export"):
        loading.load(str(tmp_path / "student"))


def test_a_run_out_of_patience_ends_early_and_stays_ended(tiny_folder, tmp_path):
    """The tiny teacher never improves: with patience=1 the second validation is the last."""
    words = [*SMALL, f"teacher={tiny_folder}", "eval_every=1", "eval_images=2", "patience=1", "dm_optimizer.lr=1e-9"]
    name, r = resolve("mini-sd35-advdmd", words)
    student = train.train(name, r, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == validation.read_best(tmp_path)["step"] + 1 < 4
    assert json.loads((student / "advdmd.json").read_text())["iterations"] == validation.read_best(tmp_path)["step"]
    assert train.train(name, r, tmp_path) == student
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines
    with pytest.raises(ValueError, match="patience=1: counts validations"):
        resolve("mini-sd35-advdmd", ["patience=1"])


def test_reward_hacking_is_found_where_the_reward_rises_while_the_score_falls():
    def run_of(scores, rewards):
        return [{"step": i, "reward/final": r, "eval/score": s} for i, (s, r) in enumerate(zip(scores, rewards))]

    assert reward_hacking_step(run_of([0.3, 0.4, 0.5, 0.45, 0.44], [0, 1, 2, 3, 4])) == 4
    assert reward_hacking_step(run_of([0.3, 0.4, 0.5, 0.45, 0.44], [0, 1, 2, 1, 1])) is None, "the reward fell too"
    assert reward_hacking_step(run_of([0.3, 0.4, 0.5, 0.47, 0.51], [0, 1, 2, 3, 4])) is None, "one bad validation is chance"
    assert reward_hacking_step(run_of([0.3, 0.4], [0, 1])) is None
    late = run_of([0.5, 0.45, 0.44, 0.43], [0, 1, 2, 3])
    del late[0]["reward/final"]
    assert reward_hacking_step(late) == 3, "rewarded only after the best validation"


def test_overrides_are_typed_and_reach_every_level():
    _, r = resolve(
        "mini-sd35-advdmd",
        ["algorithm.steps=2", "dm_optimizer.lr=3e-5", "discriminator.feature_depths=[0.5, 1.0]", "algorithm.credit=final"],
    )
    assert (r.algorithm.steps, r.dm_optimizer.lr, r.discriminator.feature_depths, r.algorithm.credit) == (
        2,
        3e-5,
        (0.5, 1.0),
        "final",
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("algorithm.step=2", r"unknown key algorithm\.step.*mean algorithm\.steps"),
        ("colour=red", "unknown key colour.*Recipe has: teacher"),
        ("algorithm.steps=two", r"algorithm\.steps='two'.*integer"),
        ("algorithm.steps=0", r"AdvDMD\(steps=0\)"),
        ("algorithm.eta=2", r"eta=2"),
        ("algorithm.credit=some", r"algorithm\.credit='some'"),
        ("dm_optimizer=3", "group of settings"),
        ("match.lr=3", r"match\.lr is now called dm_optimizer\.lr"),
        ("algorithm.action=seen", "seen is now called projected"),
        ("guidance=3", "guidance is now called guidance_scale"),
        ("seed.x=3", "plain value"),
        ("guidance_scale=0.5", r"guidance_scale=0\.5"),
        ("iterations=0", "iterations=0"),
        ("threads", "write key=value"),
        ("seed=[1", "not a value"),
        ("data.num_prompts=0", "prompts=0"),
        ("ema_decay=1", "ema_decay=1"),
        ("seed=-1", "seed=-1"),
        ("discriminator_lr_scale=-3", "discriminator_lr_scale=-3"),
        ("guidance_scale=.nan", "guidance_scale=nan.*finite"),
        ("dm_optimizer.lr=.inf", "lr=inf.*finite"),
        ("iterations=true", "iterations=True"),
        ("algorithm.shift=-1", "shift=-1"),
        ("algorithm.auc_decay=2", "auc_decay=2"),
        ("save_every=-1", "save_every"),
    ],
)
def test_bad_overrides_name_key_value_and_what_to_do(word, message):
    with pytest.raises(ValueError, match=message):
        resolve("mini-sd35-advdmd", [word])


def test_unknown_recipes_name_the_nearest_and_the_table():
    with pytest.raises(ValueError, match=r"mini-sd36.*Did you mean mini-sd3.*advdmd show prints a table of all"):
        resolve("mini-sd36-advdmd")


def test_a_resolved_recipe_reads_back_as_itself(tmp_path):
    for name in known_recipes():
        _, r = resolve(name, ["seed=3", "dm_optimizer.lr=1e-5"])
        (tmp_path / "r.yaml").write_text(dump(name, r))
        assert resolve(str(tmp_path / "r.yaml")) == (name, r)
    assert diff(r, replace(r, seed=4)) == ["seed: 3 -> 4"]


@pytest.mark.parametrize("text", ["", "- a", "seed: 3", "recipe: [", "recipe: mini-sd35-advdmd\nsede: 3"])
def test_bad_recipe_files_are_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"recipe file|unknown key sede"):
        resolve(str(path))
    with pytest.raises(ValueError, match="No such file"):
        resolve(str(tmp_path / "none.yaml"))


def test_overrides_parse_as_yaml():
    assert parse_overrides(["a.b=1e-3", "c=[1, 2]", "d=true", "e=x=y"]) == {"a.b": "1e-3", "c": [1, 2], "d": True, "e": "x=y"}
    assert override(SamplerConfig(steps=4), {"guidance_scale": "2"}).guidance_scale == 2.0


def test_a_run_leaves_recipe_metrics_samples_and_student(trained):
    for name in ("recipe.yaml", "metrics.jsonl", "samples/step-000004.png", "student/model_index.json", "student/README.md"):
        assert (trained / name).is_file(), name
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [0, 1, 2, 3]
    assert {"fake_score/loss", "discriminator/auc_1", "student/dm_loss"} <= set(lines[0])
    assert "policy/max_ratio_error" in lines[-1]
    grid = np.asarray(Image.open(trained / "samples/step-000004.png"))
    assert grid.std() > 1


def test_a_finished_run_is_resumed_at_no_cost_and_another_recipe_is_refused_with_the_difference(trained, tiny_folder):
    before = (trained / "metrics.jsonl").read_text()
    train.train(*resolve("mini-sd35-advdmd", [*SMALL, f"teacher={tiny_folder}"]), trained)
    assert (trained / "metrics.jsonl").read_text() == before
    with pytest.raises(ValueError, match=r"seed: 0 -> 1.*--overwrite"):
        train.train(*resolve("mini-sd35-advdmd", [*SMALL, f"teacher={tiny_folder}", "seed=1"]), trained)


def test_a_folder_that_is_no_run_is_never_overwritten(tmp_path, tiny_folder):
    (tmp_path / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="another --out"):
            train.train(*resolve("mini-sd35-advdmd", [*SMALL, f"teacher={tiny_folder}"]), tmp_path, overwrite)
    assert (tmp_path / "precious").read_text() == "x"


def test_export_equals_the_student_of_the_run(trained, tmp_path):
    folder = export(trained, tmp_path / "out")
    shift = resolve(str(trained / "recipe.yaml"))[1].algorithm.shift
    assert loading.load(str(folder))[1] == SamplerConfig(steps=4, shift=shift, eta=1.0)
    ours, theirs = (loading.load(str(f))[0].net.state_dict() for f in (folder, trained / "student"))
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    with pytest.raises(ValueError, match="not empty"):
        export(trained, tmp_path / "out")
    with_paths = [f for f in folder.rglob("*.json") if "_name_or_path" in f.read_text()]
    assert with_paths == []  # a published student does not name the teacher's folder on its maker's disk
    with pytest.raises(ValueError, match="not a training run"):
        export(tmp_path, tmp_path / "out2")


FRESH = """
import sys, torch
from diffusers import DiffusionPipeline
assert not any(m.startswith("advdmd") for m in sys.modules)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], text_encoder_3=None, tokenizer_3=None)
pipe.set_progress_bar_config(disable=True)
for n, s in ((4, [1.0, 0.75, 0.5, 0.25]), (2, [1.0, 0.5])):
    first = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(11)
    image = pipe("a picture of a red circle", sigmas=s, guidance_scale=1.0, height=32, width=32, latents=first,
                 max_sequence_length=0, output_type="latent").images
    torch.save(image, f"{sys.argv[2]}/{n}.pt")
"""


def test_the_export_runs_in_a_fresh_stock_process_and_equals_our_sampler_to_the_bit(trained, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(trained / "student"), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    from advdmd import flow
    from advdmd.rollout import rollout
    from advdmd.transitions import cps

    backbone, sampler = loading.load(str(trained / "student"))
    cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle"]))
    for n in (4, 2):
        first = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        torch.manual_seed(11)
        noise = torch.stack([first, *(torch.randn(1, 4, 8, 8) for _ in range(n - 1))])
        trajectory = rollout(
            lambda x, t, c: backbone.velocity(backbone.net, x, t, c), cond, noise, flow.grid(n, sampler.shift), cps(1.0)
        )
        assert torch.equal(trajectory.x[-1], torch.load(tmp_path / f"{n}.pt", weights_only=True))


def test_the_grid_given_to_a_stock_pipeline_is_the_one_before_the_shift(backbone):
    assert backbone.pipeline_call_kwargs(4)["sigmas"] == [1.0, 0.75, 0.5, 0.25]
    assert backbone.pipeline_call_kwargs(2)["sigmas"] == [1.0, 0.5]


def test_students_that_stock_schedulers_cannot_run_are_sampled_natively_but_not_exported(tiny_folder, tmp_path):
    words = [*SMALL, f"teacher={tiny_folder}", "algorithm.eta=0.9", "iterations=1"]
    student = train.train(*resolve("mini-sd35-advdmd", words), tmp_path / "run")
    assert loading.load(str(student))[1].eta == 0.9
    assert "stock schedulers cannot" in (student / "README.md").read_text()
    with pytest.raises(ValueError, match=r"eta=0\.9"):
        export(tmp_path / "run", tmp_path / "out")


def test_export_never_replaces_what_it_did_not_write(trained, tmp_path):
    (tmp_path / "x").write_text("precious")
    for out in (tmp_path, trained):
        with pytest.raises(ValueError, match="not empty"):
            export(trained, out, overwrite=True)
    assert (tmp_path / "x").read_text() == "precious"
    assert (trained / "checkpoints").is_dir()


def test_a_run_that_is_asked_for_less_than_it_has_done_stays_as_it_is(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    before, done = (copy / "recipe.yaml").read_text(), checkpoint.latest(copy / "checkpoints")[1]["step"]
    with pytest.raises(ValueError, match=f"has already run {done} iterations, 1 are asked for: choose another --out"):
        train.train(*resolve(str(copy / "recipe.yaml"), ["iterations=1"]), copy)
    assert (copy / "recipe.yaml").read_text() == before


def test_an_export_of_an_unfinished_run_has_the_iterations_that_were_made(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    done = checkpoint.latest(copy / "checkpoints")[1]["step"]
    (copy / "recipe.yaml").write_text((copy / "recipe.yaml").read_text().replace(f"iterations: {done}", "iterations: 50", 1))
    found = json.loads((export(copy, tmp_path / "student") / "advdmd.json").read_text())
    assert found["iterations"] == done


def test_reinforcement_needs_a_student(tmp_path):
    with pytest.raises(ValueError, match="mini-sd35-advdmd-reinforce goes on from a few-step student: set student="):
        train.train(*resolve("mini-sd35-advdmd-reinforce"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_text_is_no_list_of_prompts_and_no_images_are_none(tmp_path):
    with pytest.raises(ValueError, match="'a star' is one text: give a list of prompts"):
        sample_prompts("mini-sd35", "a star", tmp_path / "out")
    with pytest.raises(ValueError, match="0"):
        make_suite("mini-geneval", images=0)


def test_a_checkpoint_of_another_recipe_is_refused(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    text = (copy / "recipe.yaml").read_text().replace("seed: 0", "seed: 9")
    (copy / "recipe.yaml").write_text(text)
    shutil.rmtree(copy / "student")
    with pytest.raises(ValueError, match="checkpoint of another recipe"):
        train.train(*resolve(str(copy / "recipe.yaml"), ["iterations=4"]), copy)


def test_broken_pipelines_are_refused_in_one_line(tiny_folder, tmp_path):
    for break_it in (lambda f: (f / "transformer/config.json").unlink(), lambda f: (f / "model_index.json").write_text("[]")):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_folder, folder)
        break_it(folder)
        with pytest.raises(ValueError, match="broken"):
            loading.load(str(folder))


def test_new_weights_in_an_old_evaluation_folder_are_noticed(tiny_folder, trained, tmp_path):
    suite = MiniSuite("mini-dpg", 2, 2)
    evaluate(str(tiny_folder), suite, tmp_path / "e", SamplerConfig(steps=1))
    with pytest.raises(ValueError, match="weights differ"):
        evaluate(str(trained / "student"), suite, tmp_path / "e", SamplerConfig(steps=1))


def test_prompts_that_would_be_cut_are_refused(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="longer than the 23 words"):
        sample_prompts(str(tiny_folder), ["a picture of " + "a circle and " * 12 + "a circle"], tmp_path)


def test_a_stage_folder_belongs_to_its_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "STAGES", {k: lambda k=k: small_stage(k) for k in pretrain.STAGES})
    pretrain.pretrain("autoencoder", tmp_path / "ae", None, None, 1)
    pretrain.pretrain("mini-sd35", tmp_path / "t", tmp_path / "ae/vae", None, 1)
    with pytest.raises(ValueError, match="another stage"):
        pretrain.pretrain("mini-sd35-stage2", tmp_path / "t", tmp_path / "t/pipeline", None, 1)
    for stage in ("mini-sd35-stage2", "mini-sd35-stage3", "mini-sd3"):
        pretrain.pretrain(stage, tmp_path / stage, tmp_path / "t/pipeline", None, 1)
        assert loading.load(str(tmp_path / stage / "pipeline"))[0].t5_length == 0
        assert list((tmp_path / stage / "samples").glob("*.png"))
    pretrain.pretrain("qwen-autoencoder", tmp_path / "qae", None, None, 1)
    pretrain.pretrain("mini-qwen", tmp_path / "q", tmp_path / "qae/vae", None, 1)
    pretrain.pretrain("mini-qwen-stage2", tmp_path / "q2", tmp_path / "q/pipeline", None, 1)
    assert loading.load(str(tmp_path / "q2/pipeline"))[0].latent_shape == (4, 8, 8)
    for stage, start in (("mini-qwen-stage2", "t/pipeline"), ("mini-sd3", "q/pipeline"), ("mini-qwen", "ae/vae")):
        with pytest.raises(ValueError, match=r"not a .*needs --start"):
            pretrain.pretrain(stage, tmp_path / "wrong", tmp_path / start, None, 1)
    with pytest.raises(ValueError, match="needs --start"):
        pretrain.pretrain("mini-sd35", tmp_path / "t3", tmp_path, None, 1)
    with pytest.raises(ValueError, match="steps=0"):
        pretrain.pretrain("autoencoder", tmp_path / "ae2", None, 0, 1)


def test_a_stage_that_was_stopped_goes_on_with_the_same_tokenizer(tmp_path, monkeypatch):
    """The tokenizer's trainer numbers tokens differently each time: a second one would read another text."""
    monkeypatch.setattr(pretrain, "STAGES", {k: lambda k=k: small_stage(k) for k in pretrain.STAGES})
    pretrain.pretrain("autoencoder", tmp_path / "ae", None, None, 1)
    plan = pretrain.STAGES["mini-sd35"]()
    first, again = (pretrain._pipeline(plan, tmp_path / "ae/vae", tmp_path / "t/start") for _ in range(2))
    assert first.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    other = pretrain._pipeline(plan, tmp_path / "ae/vae", tmp_path / "other")
    assert first.tokenizer.get_vocab() != other.tokenizer.get_vocab(), "if they are equal now, the tokenizer need not be kept"
    for k, v in first.transformer.state_dict().items():
        assert torch.equal(v, again.transformer.state_dict()[k])
    shutil.rmtree(tmp_path / "t/start")
    (tmp_path / "t/checkpoints").mkdir()
    (tmp_path / "t/checkpoints/step-0000001.json").touch()
    with pytest.raises(ValueError, match="begun by an earlier version"):
        pretrain._pipeline(plan, tmp_path / "ae/vae", tmp_path / "t/start")


def small_stage(name):
    from advdmd.mini import pipelines
    from advdmd.recipes.mini import STAGES

    size = pipelines.MiniConfig(width=32, layers=2, text_width=32, vae_channels=(4, 4, 8))
    return replace(STAGES[name](), size=size, steps=3, num_prompts=8, batch=4, save_every=2)


def test_evaluation_scores_from_disk_and_compares_pairs(trained, tiny_folder, tmp_path):
    suite = MiniSuite("mini-geneval", 6, 3)
    a = evaluate(str(trained / "student"), suite, tmp_path / "a")
    assert a["images"] == 36
    assert a["nfe"] == 4
    assert set(a["strict"]) == {"overall", *suite.tasks}
    again = score(suite, tmp_path / "a", CheckerJudge())
    assert again == a
    done = in_new_process(
        "eval", tiny_folder, "mini-geneval", "--images", 6, "--steps", 2, "--out", tmp_path / "b", "--threads", 1
    )
    assert done.returncode == 0, done.stderr
    assert "| **overall** |" in done.stdout
    evaluate(str(tiny_folder), suite, tmp_path / "b2", SamplerConfig(steps=2))
    done = cli(
        "compare", tmp_path / "a", tmp_path / "a", "--against", tmp_path / "b2", "--out", tmp_path / "c.json", "--commit", "x"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "c.json").read_text())
    assert [found[k] for k in ("suite", "split", "images", "commit")] == ["mini-geneval", "test", 36, "x"]
    assert [m["recipe"] for m in found["ours"]["models"]] == ["mini-sd35-advdmd"] * 2
    assert found["theirs"]["models"][0]["steps"] == 2
    gap = a["strict"]["overall"]["mean"] - found["theirs"]["strict"][0]
    assert found["difference"]["strict"]["overall"]["mean"] == pytest.approx(gap)


def test_the_main_job_writes_table_grid_and_pipeline(tiny_folder, tmp_path):
    out = mini.mini(tmp_path / "m", [*SMALL, f"teacher={tiny_folder}"], images=4)
    assert "AdvDMD, 4 steps" in out["table"]
    for name in ("table.md", "table.json", "comparison.png", "run/student/model_index.json"):
        assert (tmp_path / "m" / name).is_file()


def test_the_main_job_trains_in_as_many_processes_as_can_share_its_batch(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)

    def processes(*words):
        return mini._processes(resolve(mini.RECIPE, words)[1])

    assert processes() == mini.PROCESSES == 2
    assert processes("prompts_per_step=3") == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes() == 1, "torchrun has started two"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    assert processes() == 1


def test_help_is_quick_and_imports_nothing_heavy():
    began = time.monotonic()
    done = in_new_process("--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("show", "pretrain", "train", "sample", "eval", "export", "mini"))
    assert time.monotonic() - began < 5  # 1.5 s alone on a quiet machine (benchmarks); here beside other tests
    code = "import sys, advdmd.cli; print([m for m in ('torch', 'diffusers', 'transformers', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "nothing"), "recipe 'nothing' is unknown"),
        (("train", "mini-sd35-advdmd", "algorithm.group_size=x"), "algorithm.group_size='x'"),
        (("train", "mini-sd35-advdmd", "teacher=/nowhere"), "neither a shipped model"),
        (("sample", "TINY", "a picture of a dog"), "does not know 'dog'"),
        (("sample", "TINY", "a picture of a circle", "--steps", "0"), "steps=0"),
        (("eval", "TINY", "mini-other"), "mini-other"),
        (("eval", "TINY", "--guidance", "0.2"), "guidance_scale=0.2"),
        (("export", "/nowhere"), "not a training run"),
        (("pretrain", "mini-sd4"), "stage 'mini-sd4'"),
        (("pretrain", "mini-sd3"), "needs --start"),
        (("pretrain", "mini-sd35-stage2"), "needs --start"),
    ],
)
def test_user_mistakes_get_one_line_and_exit_code_two(words, message, tiny_folder, tmp_path):
    words = [str(tiny_folder) if w == "TINY" else w for w in words]
    done = cli(*words, *([] if words[0] == "show" else ["--out", tmp_path / "out"]))
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_samples_are_repeatable(tiny_folder, tmp_path):
    for call, out in ((cli, "a"), (in_new_process, "b")):
        done = call(
            "sample",
            tiny_folder,
            "a picture of a red circle",
            "a picture of two squares",
            "--out",
            tmp_path / out,
            "--threads",
            1,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a/001.png").read_bytes() == (tmp_path / "b/001.png").read_bytes()


def test_show_prints_the_recipe_and_its_cost():
    done = cli("show", "mini-sd35-advdmd", "algorithm.steps=2")
    assert "steps: 2" in done.stdout
    assert "forwards per sample" in done.stdout
    table = cli("show").stdout
    assert len(table.splitlines()) <= 40
    assert re.search(r"sd35-medium +advdmd, dmd2, twinflow +4, 2 +24gb, 80gb, 8x80gb", table)
    assert all(re.search(rf"^(.*, )?{name}[ ,]", table, re.M) for name in ("mini-sd3", "mini-sd35", "mini-qwen", "qwen-image"))


def test_show_says_before_anything_is_loaded_whether_a_published_model_fits_the_gpu_its_preset_is_named_after():
    done = cli("show", "sd35-large-advdmd-4step-24gb", "--resolution", "1024")
    assert "transformer: 8.06 B parameters, 53 M in each of 3 adapters" in done.stdout
    assert "frozen base 16.1" in done.stdout
    assert "22.6 GB of a 24 GB GPU can be used: base_bits=4" in done.stdout
    assert "fits a 24 GB GPU" in cli("show", "sd35-large-advdmd-4step-24gb").stdout, "of 512 pixels"
    assert "cannot be shared by 3 processes" in cli("show", "sd35-medium-advdmd-4step-80gb", "--gpus", "3").stderr
    many = cli("show", "qwen-image-advdmd-4step-32x80gb").stdout
    assert "each of 32 GPUs at 1024 pixels" in many
    assert "more during sampling" in many
    assert "fits a 80 GB GPU" in many
    assert "fits a 141 GB GPU" in cli("show", "qwen-image-advdmd-4step-80gb", "--gpu-memory", "141").stdout


def test_a_recipes_schedules_fit_the_iterations_it_is_given():
    long, short = (resolve("mini-sd35-advdmd", [f"iterations={n}"])[1] for n in (900, 90))
    assert (short.dm_optimizer.decay_steps, short.algorithm.dm_only_iterations, short.algorithm.policy_ramp_iterations) == (
        90,
        67,
        23,
    )
    assert (long.dm_optimizer.decay_steps, long.algorithm.dm_only_iterations, long.algorithm.policy_ramp_iterations) == (
        900,
        675,
        225,
    )
    assert short.policy_optimizer.decay_steps == sum(short.algorithm.updates_at(i).policy for i in range(90))
    assert resolve("mini-sd35-advdmd", ["iterations=90", "algorithm.dm_only_iterations=7"])[1].algorithm.dm_only_iterations == 7


def test_a_run_recorded_before_an_option_existed_goes_on(trained, tiny_folder):
    record = trained / "recipe.yaml"
    text = record.read_text()
    older = text.replace("  discriminator_online: true\n", "").replace("  group_size:", "  group:")
    assert older != text
    try:
        record.write_text(older)
        assert train.train(*resolve("mini-sd35-advdmd", [*SMALL, f"teacher={tiny_folder}"]), trained) == trained / "student"
        assert record.read_text() == older
    finally:
        record.write_text(text)
