"""Stream names are seeds: one golden draw of each, and no name in the source that the table lacks."""

import ast
from pathlib import Path

import pytest

from advdmd.rng import Rng, generator

SOURCE = Path(__file__).parent.parent / "src/advdmd"
# First uniform number of seed 1, step 2, sample 3. A name or a number here never changes: results depend on them.
GOLDEN = {
    "rollout": 0.792215,
    "fake.k": 0.536853,
    "fake.k/2": 0.261265,
    "fake.u": 0.777126,
    "fake.e": 0.880903,
    "critic.k": 0.010614,
    "critic.u": 0.306749,
    "critic.fake": 0.333601,
    "critic.real": 0.452493,
    "critic.order": 0.381152,
    "match.k": 0.348315,
    "match.k/2": 0.867559,
    "match.u": 0.182535,
    "match.e": 0.752501,
    "match.w": 0.545111,
    "match1.k": 0.625516,
    "match1.k/2": 0.377429,
    "match1.u": 0.143954,
    "match1.w": 0.870503,
    "match1.e": 0.600741,
    "reward.e": 0.153691,
    "forward.k": 0.628068,
    "forward.e": 0.891493,
    "forward1.k": 0.309646,
    "forward1.e": 0.869805,
    "t": 0.630338,
    "r": 0.177479,
    "z": 0.555133,
    "fake": 0.798031,
    "again": 0.395289,
    "again.t": 0.66678,
    "posterior": 0.148499,
    "e": 0.597746,
    "drop": 0.786646,
}
# Generators that are made from whole keys: their first part the seed of one example.
KEYS = {
    ("image", ("exam", "colors-000", 0)): 13403702504907443,
    ("image", ("look", 0)): 46905376350331410,
    ("image", ("sample", 0, 0)): 10280346291588063,
    ("hops", "k"): 41716453422614915,
    (0, "epoch", 1): 33874158023488269,
    (0, "bucket", 1): 54955718969753124,
}


def first(name):
    return round(Rng(1, 2, [3]).uniform(name).item(), 6)


@pytest.mark.parametrize("name", GOLDEN)
def test_every_stream_draws_the_numbers_that_it_always_drew(name):
    assert first(name) == GOLDEN[name]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_gives_the_seed_that_it_always_gave(key):
    assert generator(*key).initial_seed() == KEYS[key]


def names_in(file):
    """Patterns of stream names in a file: * where the name of a loop or an update is put in."""
    for call in (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)):
        method = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = getattr(getattr(call.func, "value", None), "id", "")
        if method in ("normal", "uniform", "integers", "minibatches") and owner == "rng":
            yield call.args[0]
        if method == "sample_exit_steps":
            yield call.args[1]


def test_every_stream_in_the_source_is_in_the_table():
    numpy_generators = ("scene.py", "statistics.py", "geneval.py")
    found = set()
    for file in SOURCE.rglob("*.py"):
        if file.name in numpy_generators:
            continue
        for name in names_in(file):
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                found.add(name.value)
            elif isinstance(name, ast.JoinedStr):
                found.add("*" + name.values[-1].value)
    assert len(found) >= 20
    for name in found:
        assert name in GOLDEN or any(name[0] == "*" and g.endswith(name[1:]) for g in GOLDEN), f"{name} has no golden draw"


def test_no_two_streams_are_the_same():
    assert len(set(GOLDEN.values())) == len(GOLDEN)
