"""Every kept run of an earlier version is still read, and old names on the command line are errors that name the new ones."""

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from advdmd.monitoring import health
from advdmd.recipes import registry, renamed
from advdmd.recipes.overrides import flatten

RESULTS = Path(__file__).parent.parent / "results"
RECIPES = sorted(RESULTS.rglob("recipe.yaml"))
METRICS = sorted(RESULTS.rglob("metrics.jsonl"))
OLD = [k for k in renamed.KEYS if "policy.betas" not in k]


def test_there_are_kept_runs():
    assert len(RECIPES) >= 60
    assert len(METRICS) >= 35


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: str(f.parent.relative_to(RESULTS)))
def test_a_kept_recipe_reads_as_it_was_written(file):
    """The recipe has the settings of the file, under today's names."""
    recipe = registry.resolve(str(file))[1]
    now = flatten(json.loads(json.dumps(_plain(recipe))))
    written = renamed.new_settings(flatten(yaml.safe_load(file.read_text())))
    written.pop("recipe", None)
    for key, value in written.items():
        assert now.get(key) == value, key


def _plain(x):
    return {f.name: _plain(getattr(x, f.name)) for f in fields(x)} if is_dataclass(x) else x


@pytest.mark.parametrize("file", METRICS, ids=lambda f: str(f.parent.relative_to(RESULTS)))
def test_kept_metrics_read_under_todays_names(file):
    run = health.read_metrics(file.parent)
    keys = {k for m in run for k in m}
    assert len(run) >= 5
    assert {renamed.new_metric(k) for k in keys} == keys, "no old name is left"
    assert keys & {d.key for d in health.DIAGNOSTICS}


@pytest.mark.parametrize("key", OLD)
def test_an_old_key_on_the_command_line_is_an_error_that_names_the_new_one(key):
    name = "mini-sd35-twinflow" if "TwinFlow" in key else "mini-sd35-advdmd"
    with pytest.raises(ValueError, match=renamed.KEYS[key].rpartition(".")[2]):
        registry.resolve(name, [f"{key}=1"])


OPTIONS = {
    "--track": ("train mini-sd35-advdmd --track tensorboard", "--report-to"),
    "--card": ("show mini-sd35-advdmd --card 24", "--gpu-memory"),
    "--cards": ("show mini-sd35-advdmd --cards 8", "--gpus"),
    "--reals": ("encode prompts.txt mini-sd35 --out c --reals teacher", "--real-images"),
    "--by-shape": ("encode photos mini-sd35 --out c --by-shape", "--aspect-buckets"),
    "--shard": ("eval mini-sd35 --shard 0/2", "--worker"),
}


@pytest.mark.parametrize("old", OPTIONS)
def test_an_old_option_is_an_error_that_names_the_new_one(old):
    words, new = OPTIONS[old]
    done = subprocess.run([sys.executable, "-m", "advdmd", *words.split()], capture_output=True, text=True)
    assert done.returncode == 2
    assert new in done.stderr
