"""The world and its checker: what is drawn is read back exactly, and every change is noticed."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from advdmd.mini.dataset import DENSE, caption_for, held_out, make_dataset
from advdmd.mini.world import caption, checker
from advdmd.mini.world.render import coverage, render, to_uint8
from advdmd.mini.world.scene import (
    COLORS,
    EXTENTS,
    FULL,
    GAP,
    HALF,
    MARGIN,
    RADII,
    SHAPES,
    SIZE,
    TASKS,
    Group,
    Scene,
    SceneObject,
    Spec,
    World,
    draw_scene,
    random_spec,
    specs,
)

N = 10_000


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(20261122)
    streams = [specs(t, rng, pairs=None) for t in (*TASKS, DENSE)]
    return [draw_scene(next(streams[i % 7]), rng, pairs=True) for i in range(N)]


@pytest.fixture(scope="module")
def images(scenes):
    return np.concatenate([to_uint8(render(scenes[i : i + 1000])) for i in range(0, N, 1000)])


def exact(scenes, images):
    return np.mean([checker.same_scene(a, b) for a, b in zip(checker.read_scene(images), scenes)])


def test_the_checker_reads_ten_thousand_scenes_exactly(scenes, images):
    assert exact(scenes, images) >= 0.999


def test_the_checker_degrades_monotonically_with_blur_and_noise(scenes, images):
    x, rng = images[:700] / 255.0, np.random.default_rng(0)
    blurred = [exact(scenes[:700], ndimage.gaussian_filter(x, (0, s, s, 0))) for s in (0, 0.7, 1.3, 2.0, 3.0)]
    noisy = [exact(scenes[:700], (x + s * rng.normal(size=x.shape)).clip(0, 1)) for s in (0, 0.1, 0.2, 0.4)]
    for curve in (blurred, noisy):
        assert all(b <= a + 0.005 for a, b in itertools.pairwise(curve)), curve
        assert curve[-1] < 0.5
    assert blurred[1] >= 0.998
    assert noisy[1] >= 0.99


def test_every_mutation_of_a_scene_is_noticed(scenes):
    rng = np.random.default_rng(1)
    originals, mutants = [], []
    for scene in scenes[:600]:
        things = list(scene.things)
        i = int(rng.integers(len(things)))
        t = things[i]
        other = lambda names, own: str(rng.choice([n for n in names if n != own]))  # noqa: E731
        color = other(COLORS, t.color)
        mutations = [
            things[:i] + things[i + 1 :],
            [*things[:i], replace(t, color=color, rgb=COLORS[color]), *things[i + 1 :]],
        ]
        if t.size == "large":  # a smaller shape always fits where a larger one was
            shape = other(SHAPES, t.shape)
            mutations.append([*things[:i], replace(t, shape=shape, radius=4.5, size="small"), *things[i + 1 :]])
        if len(things) > 1 and things[0].color != things[1].color:
            a, b = things[:2]
            mutations.append([replace(a, color=b.color, rgb=b.rgb), replace(b, color=a.color, rgb=a.rgb), *things[2:]])
        for m in mutations:
            if m:
                originals.append(scene)
                mutants.append(Scene(scene.background, tuple(m)))
    assert len(mutants) > 1200
    assert exact(originals, to_uint8(render(mutants))) == 0


def test_shapes_are_drawn_with_the_area_and_extent_they_claim():
    for shape in SHAPES:
        thing = SceneObject(shape, "red", "large", 16, 16, 10, COLORS["red"])
        cover = coverage([thing])[0]
        assert 0.89 <= np.sqrt(cover.sum() / np.pi) / 10 <= 1.01, shape
        ys, xs = np.nonzero(cover > 0.5)
        left, up, right, down = EXTENTS[shape]
        found = (16 - xs.min(), 16 - ys.min(), xs.max() + 1 - 16, ys.max() + 1 - 16)
        np.testing.assert_allclose(found, np.array([left, up, right, down]) * 10, atol=2.5)
    assert max(RADII["small"]) * 1.0 < checker.LARGE_RADIUS < min(RADII["large"]) * 0.89


def test_scenes_keep_their_margins_gaps_and_relations(scenes):
    for scene in scenes[:1500]:
        boxes = np.array(
            [np.array([t.x, t.y, t.x, t.y]) + np.array(EXTENTS[t.shape]) * t.radius * (-1, -1, 1, 1) for t in scene.things]
        )
        assert boxes.min() >= MARGIN - 1e-6
        assert boxes.max() <= SIZE - MARGIN + 1e-6
        for i in range(len(boxes)):
            for j in range(i):
                gap = np.maximum(boxes[i, :2] - boxes[j, 2:], boxes[j, :2] - boxes[i, 2:]).max()
                assert gap >= GAP - 1e-6


def test_a_stated_relation_is_never_borderline():
    rng = np.random.default_rng(2)
    for spec, _ in zip(specs("position", rng), range(100)):
        a, b = draw_scene(spec, rng).things
        d = np.array([a.x - b.x, a.y - b.y])
        along = np.abs(d).max()
        assert along >= 9
        assert along >= 1.6 * np.abs(d).min()


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="5 objects"):
        draw_scene(Spec((Group("circle", 5),)), np.random.default_rng(0))
    bars = Spec((Group("bar", 2, size="large"), Group("star", 2, size="large")), (0, "left of", 1))
    with pytest.raises(ValueError, match="no room"):
        draw_scene(bars, np.random.default_rng(0), attempts=5)


def test_drawing_is_a_function_of_its_seed():
    spec = random_spec(DENSE, np.random.default_rng(3))
    assert draw_scene(spec, np.random.default_rng(4)) == draw_scene(spec, np.random.default_rng(4))
    assert draw_scene(spec, np.random.default_rng(4)) != draw_scene(spec, np.random.default_rng(5))


@pytest.mark.parametrize("world", [FULL, HALF])
def test_each_shape_and_colour_has_at_most_one_held_out_pair(world):
    pairs = world.held_out_pairs
    assert len(pairs) == len(world.shapes)
    assert max(Counter(s for s, _ in pairs).values()) == 1
    assert max(Counter(c for _, c in pairs).values()) == 1


def test_a_world_of_unknown_words_is_refused():
    with pytest.raises(ValueError, match="hexagon"):
        World(("circle", "square", "hexagon"))
    with pytest.raises(ValueError, match="at least three"):
        World(("circle",), ("red",))


def test_training_never_shows_a_held_out_prompt_or_pair():
    dataset = make_dataset(400, seed=0)
    for scene in checker.read_scene(dataset.images[:, 0]):
        assert not {(b.shape, b.color) for b in scene.blobs} & FULL.held_out_pairs
    for i, prompt in enumerate(dataset.prompts):
        assert not held_out(TASKS[i // 2 % 6] if i % 2 else DENSE, prompt)


def test_a_dataset_is_a_function_of_its_seed_and_has_several_images_of_a_prompt():
    a, b = make_dataset(30, seed=1, images_per_prompt=2), make_dataset(30, seed=1, images_per_prompt=2)
    assert a.prompts == b.prompts
    assert (a.images == b.images).all()
    assert (a.images[:, 0] != a.images[:, 1]).any(axis=(1, 2, 3)).mean() > 0.9
    with pytest.raises(ValueError, match="0 prompts with 1 images each"):
        make_dataset(0, seed=1)


def test_a_dataset_is_the_same_for_any_number_of_processes_that_draw_it():
    a, b = make_dataset(257, seed=1), make_dataset(257, seed=1, workers=2)
    assert a.prompts == b.prompts
    assert (a.images == b.images).all()


def test_captions_use_known_words_only_and_fit_the_tokenizer():
    rng, longest = np.random.default_rng(0), 0
    for task in (*TASKS, DENSE):
        for spec, _ in zip(specs(task, rng, pairs=None), range(150)):
            text = caption_for(task, spec)
            caption.check_prompt(text)
            longest = max(longest, len(text.replace(".", " .").split()) + 2)
    assert longest <= 25


def test_a_prompt_is_read_back_as_what_it_asks_for():
    rng = np.random.default_rng(0)
    for task in (*TASKS, DENSE):
        for spec in itertools.islice(specs(task, rng, FULL, pairs=None), 200):
            assert caption.parse(caption_for(task, spec)) == spec, caption_for(task, spec)
    assert caption.parse("A  red circle, ") == Spec((Group("circle", color="red"),))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a picture of", "'a picture of' is no phrase"),
        ("Gray background.", "names no shape"),
        ("a red red circle", "'a red red circle' is no phrase"),
        ("Circle above square.", "named once before it"),
        ("a circle above a square left of a star", "one relation"),
    ],
)
def test_a_prompt_of_neither_style_is_not_read(prompt, message):
    caption.check_prompt(prompt)
    with pytest.raises(ValueError, match=message):
        caption.parse(prompt)


def test_captions_read_as_english():
    red = Group("circle", color="red", size="small")
    assert caption.short(Spec((Group("bar", color="orange"),))) == "a picture of an orange bar"
    assert caption.short(Spec((red, Group("cross")), (0, "left of", 1))) == "a picture of a small red circle left of a cross"
    assert caption.short(Spec((Group("cross", 3),))) == "a picture of three crosses"
    spec = Spec((Group("circle", 2, "red", "small"), Group("star", 1, "blue", "large")), (0, "above", 1), "gray")
    assert caption.dense(spec) == "Two small red circles. A large blue star. Circles above star. Gray background."


@pytest.mark.parametrize(("prompt", "words"), [("a picture of a dog", ["dog"]), ("ein roter Kreis", ["ein", "roter", "kreis"])])
def test_unknown_words_are_named_with_the_vocabulary(prompt, words):
    assert caption.unknown_words(prompt) == words
    with pytest.raises(ValueError, match=r"(?s)" + words[0] + ".*It knows: .*circle"):
        caption.check_prompt(prompt)
    with pytest.raises(ValueError, match="empty"):
        caption.check_prompt(" . ")


def test_the_checker_refuses_other_sizes_and_reads_empty_images():
    with pytest.raises(ValueError, match="expected"):
        checker.read_scene(np.zeros((1, 16, 16, 3), np.uint8))
    blank = np.full((2, 32, 32, 3), 242, np.uint8)
    assert checker.read_scene(blank) == [checker.ObservedScene("white", ()), checker.ObservedScene("white", ())]
    assert checker.read_scene(np.full((1, 32, 32, 3), 200, np.uint8))[0].background is None


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="'texture'"):
        random_spec("texture", np.random.default_rng(0))
