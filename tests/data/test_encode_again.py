"""A cache after its source has changed, a run after its cache has, and a run in another place."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from advdmd.commands import train
from advdmd.commands.encode import encode
from advdmd.commands.export import export
from advdmd.data import aspect_buckets, embedding_cache
from advdmd.mini import pipelines
from advdmd.mini.world.caption import VOCABULARY
from advdmd.models import fingerprints, loading
from advdmd.recipes.registry import resolve
from tests.conftest import TINY
from tests.data.test_cache import CAPTIONS, WORDS
from tests.tiny_pipelines import save_teacher, sd3_with_t5

RECIPE = "sd35-medium-dmd2-2step-24gb"
DMD2_WORDS = [w for w in WORDS if "dm_only" not in w and "ramp" not in w]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("t5") / "sd3")


@pytest.fixture
def photos(tmp_path):
    """Five captions, the first with two images."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for n, caption in enumerate([*CAPTIONS, CAPTIONS[0]]):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(caption)
    return folder


@pytest.fixture
def counted(monkeypatch):
    """How many prompts and images the encoders have encoded."""
    torch.set_num_threads(1)
    counts, load = {"prompts": 0, "images": 0}, loading.load

    def counting(*args, **more):
        backbone, sampler = load(*args, **more)
        text, image = backbone.encode_text, backbone.encode

        def encode_text(ids):
            counts["prompts"] += len(ids)
            return text(ids)

        def encode_images(pixels):
            counts["images"] += len(pixels)
            return image(pixels)

        backbone.encode_text, backbone.encode = encode_text, encode_images
        return backbone, sampler

    monkeypatch.setattr(loading, "load", counting)
    return counts


def recipe(teacher, cache, *more):
    return resolve(RECIPE, [f"teacher={teacher}", f"data.folder={cache}", *DMD2_WORDS, *more])


def test_one_more_image_is_all_that_is_encoded(teacher, photos, tmp_path, counted):
    cache = tmp_path / "c"
    assert encode(photos, str(teacher), cache)
    assert counted == {"prompts": 6, "images": 6}, "five prompts and the empty one"
    before = aspect_buckets.BucketedCache(cache)
    kept = {p: before.parts[0].cond([n]).embeds for n, p in enumerate(before.prompts)}
    Image.new("RGB", (40, 40), "red").save(photos / "a.png")
    (photos / "a.txt").write_text("a new lamp")
    Image.new("RGB", (40, 40), "blue").save(photos / "b.png")
    (photos / "b.txt").write_text(CAPTIONS[1])
    counted.update(prompts=0, images=0)
    assert encode(photos, str(teacher), cache)
    assert counted == {"prompts": 1, "images": 2}
    after = aspect_buckets.BucketedCache(cache)
    assert sorted(after.prompts) == sorted([*CAPTIONS, "a new lamp"])
    assert after.parts[0].num_images(after.prompts.index(CAPTIONS[1])) == 2
    assert all(torch.equal(after.parts[0].cond([after.prompts.index(p)]).embeds, e) for p, e in kept.items())
    assert after.contents["content"] != before.contents["content"]


def test_moved_photos_are_known_by_their_bytes_and_removed_ones_are_dropped(teacher, photos, tmp_path, counted):
    cache = tmp_path / "c"
    encode(photos, str(teacher), cache)
    files = {f.name: f.read_bytes() for f in cache.iterdir() if f.suffix == ".safetensors"}
    content = aspect_buckets.BucketedCache(cache).contents["content"]
    counted.update(prompts=0, images=0)
    moved = photos.rename(tmp_path / "elsewhere")
    assert encode(moved, str(teacher), cache)
    assert counted == {"prompts": 0, "images": 0}
    assert {f.name: f.read_bytes() for f in cache.iterdir() if f.suffix == ".safetensors"} == files
    assert aspect_buckets.BucketedCache(cache).contents["content"] == content
    (moved / "2.png").unlink()
    assert encode(moved, str(teacher), cache)
    assert CAPTIONS[2] not in aspect_buckets.BucketedCache(cache).prompts
    assert counted == {"prompts": 0, "images": 0}


def test_a_prompt_belongs_to_one_shard_however_many_there_are(teacher, tmp_path, monkeypatch, counted):
    """So one more prompt changes one shard, also where it comes first in the source."""
    monkeypatch.setattr(embedding_cache, "PROMPTS_PER_SHARD", 2)
    prompts = [f"a picture of a red circle {n}" for n in range(12)]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    assert encode(tmp_path / "p.txt", str(teacher), tmp_path / "c", real_images="teacher")
    found = embedding_cache.EmbeddingCache(tmp_path / "c")
    assert sorted(found.prompts) == sorted(prompts)
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "c").glob("shard-*.safetensors")}
    latents = {p: found.real(n, 0) for n, p in enumerate(found.prompts)}
    (tmp_path / "p.txt").write_text("\n".join(["a star", *prompts]))
    assert encode(tmp_path / "p.txt", str(teacher), tmp_path / "c", real_images="teacher")
    changed = [n for n, t in before.items() if (tmp_path / "c" / n).stat().st_mtime_ns != t]
    assert len(changed) <= 1
    again = embedding_cache.EmbeddingCache(tmp_path / "c")
    assert all(torch.equal(again.real(again.prompts.index(p), 0), z) for p, z in latents.items())


def test_images_of_one_caption_go_to_the_buckets_of_their_shapes(tmp_path):
    pipe = sd3_with_t5()
    pipe.register_modules(transformer=type(pipe.transformer).from_config({**pipe.transformer.config, "pos_embed_max_size": 8}))
    pipe.save_pretrained(tmp_path / "t")
    (tmp_path / "t/advdmd.json").write_text(json.dumps({"sampling": {"steps": 2, "guidance": 2.0}, "t5_length": 6}))
    (tmp_path / "p").mkdir()
    for n, (caption, size) in enumerate([(CAPTIONS[0], (50, 50)), (CAPTIONS[0], (100, 60)), (CAPTIONS[1], (50, 50))]):
        Image.new("RGB", size, (60 * n, 9, 9)).save(tmp_path / f"p/{n}.png")
        (tmp_path / f"p/{n}.txt").write_text(caption)
    assert encode(tmp_path / "p", str(tmp_path / "t"), tmp_path / "c", resolution=32, by_aspect=True)
    found = {p.folder.name: p.prompts for p in aspect_buckets.BucketedCache(tmp_path / "c").parts}
    assert found == {"24x40": [CAPTIONS[0]], "32x32": [CAPTIONS[0], CAPTIONS[1]]}
    Image.new("RGB", (60, 100), "red").save(tmp_path / "p/3.png")
    (tmp_path / "p/3.txt").write_text(CAPTIONS[2])
    assert encode(tmp_path / "p", str(tmp_path / "t"), tmp_path / "c", resolution=32, by_aspect=True)
    assert len(aspect_buckets.BucketedCache(tmp_path / "c").parts) == 3, "a shape that was not there before"


def test_sizes_that_a_model_cannot_take_are_refused_before_any_work(teacher, photos, tmp_path):
    Image.new("RGB", (30, 60), "red").save(photos / "0.png")
    with pytest.raises(ValueError, match="this transformer takes images with sides of a multiple of 8 up to 32"):
        encode(photos, str(teacher), tmp_path / "c", by_aspect=True)
    assert not (tmp_path / "c").exists()


def test_captions_that_are_cut_are_reported(teacher, photos, tmp_path, capsys):
    long = ["circle " * 30 + color for color in ("red", "blue", "green")]
    for n, text in enumerate(long):
        (photos / f"{n}.txt").write_text(text)
    encode(photos, str(teacher), tmp_path / "c")
    printed = capsys.readouterr().err
    prompts = [*CAPTIONS[3:], *long, CAPTIONS[0]]
    longer = sum(n > 6 for n in loading.load(str(teacher))[0].text_lengths(prompts))
    assert (
        f"{longer} of {len(prompts)} captions are longer than the 6 tokens that this model reads, and are cut there" in printed
    )
    assert "'circle circle" in printed


@pytest.mark.parametrize("family", ["qwen", "sd3"])
def test_long_captions_are_counted_by_the_models_own_tokens(family, tmp_path):
    pipe = pipelines.qwen_image(VOCABULARY, TINY) if family == "qwen" else pipelines.sd3(VOCABULARY, TINY, sd35=False)
    backbone = loading.backbone_from_pipeline(pipe, {"t5_length": 0, "side": 8})
    short, long = "a red circle", "circle " * 2000
    lengths = backbone.text_lengths([short, long])
    assert lengths[0] <= backbone.max_text_length < lengths[1]
    ids = backbone.tokenize([long])
    cut = "circle " * (backbone.max_text_length // 2)
    assert torch.equal(backbone.tokenize([long + " star"]), ids), "text after the limit is not read"
    assert not torch.equal(backbone.tokenize([cut]), backbone.tokenize([cut + " star"])) or family == "sd3"


def test_one_caption_trains(teacher, tmp_path):
    """DreamBooth: six images, one caption; a step that takes two prompts takes it twice, with other images."""
    (tmp_path / "p").mkdir()
    for n in range(6):
        Image.new("RGB", (40, 40), (40 * n, 9, 9)).save(tmp_path / f"p/{n}.png")
        (tmp_path / f"p/{n}.txt").write_text("a star")
    encode(tmp_path / "p", str(teacher), tmp_path / "c")
    cache = embedding_cache.EmbeddingCache(tmp_path / "c")
    from advdmd.data.loader import BatchConfig, make_batch_fn

    batch, _ = make_batch_fn(1, BatchConfig(2, 2, 0), cache.cond, cache.real)(0)
    assert len({z.flatten()[0].item() for z in batch.real_latents}) > 1
    words = [f"teacher={teacher}", f"data.folder={tmp_path / 'c'}", *WORDS]
    train.train(*resolve("sd35-medium-advdmd-4step-24gb", words), tmp_path / "run")


def test_the_same_pipeline_saved_again_is_the_same_teacher(teacher, tmp_path):
    """In shards, with other bookkeeping in its files, and with tokenizers written anew: what they mean decides."""
    from diffusers import StableDiffusion3Pipeline

    want = fingerprints.encoder_fingerprint(teacher)
    pipe = StableDiffusion3Pipeline.from_pretrained(teacher)
    pipe.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    shutil.copy(teacher / "advdmd.json", tmp_path / "again")
    assert len(list((tmp_path / "again/text_encoder").glob("*.safetensors"))) > 1
    for file in (tmp_path / "again").rglob("config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "_name_or_path": "x", "transformers_version": "4.57.0"}))
    assert fingerprints.encoder_fingerprint(tmp_path / "again") == want
    file = loading.weight_files(tmp_path / "again/vae")[0]
    state = load_file(file)
    name = sorted(state)[0]
    save_file({**state, name: state[name] + 1}, file)
    changed = fingerprints.encoder_fingerprint(tmp_path / "again")
    assert [k for k in want if want[k] != changed[k]] == ["vae"]
    config = json.loads((tmp_path / "again/tokenizer/tokenizer.json").read_text())
    words = config["model"]["vocab"]
    a, b = list(words)[-2:]
    words[a], words[b] = words[b], words[a]
    (tmp_path / "again/tokenizer/tokenizer.json").write_text(json.dumps(config))
    changed = fingerprints.encoder_fingerprint(tmp_path / "again")
    assert [k for k in want if want[k] != changed[k]] == ["tokenizer", "vae"]


def test_a_student_is_a_teacher_for_the_cache_that_it_learned_from(teacher, photos, tmp_path):
    encode(photos, str(teacher), tmp_path / "c")
    student = train.train(*recipe(teacher, tmp_path / "c"), tmp_path / "r")
    for part in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        for f in (teacher / part).iterdir():
            assert (student / part / f.name).read_bytes() == f.read_bytes(), "unchanged"
    train.train(*recipe(student, tmp_path / "c"), tmp_path / "r2")


def test_exports_have_the_tokenizer_files_that_older_libraries_read(teacher, photos, tmp_path):
    from transformers import CLIPTokenizer

    encode(photos, str(teacher), tmp_path / "c")
    student = train.train(*recipe(teacher, tmp_path / "c"), tmp_path / "r")
    (tmp_path / "old").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(student / "tokenizer" / name, tmp_path / "old")
    old, new = (CLIPTokenizer.from_pretrained(f) for f in (tmp_path / "old", student / "tokenizer"))
    assert all(old(c).input_ids == new(c).input_ids for c in CAPTIONS)
    assert not [f for f in student.rglob("*") if f.is_file() and f.stat().st_mode & 0o044 != 0o044], "others can read all"


def test_a_snapshot_of_the_hub_keeps_its_name_on_the_card(teacher, photos, tmp_path):
    snapshot = tmp_path / "hub/models--someone--a-model/snapshots/0123456789abcdef"
    shutil.copytree(teacher, snapshot)
    encode(photos, str(snapshot), tmp_path / "c")
    student = train.train(*recipe(snapshot, tmp_path / "c"), tmp_path / "r")
    assert "\nbase_model: someone/a-model\n" in (student / "README.md").read_text()


def test_a_run_goes_on_after_its_cache_has_moved_and_with_more_iterations(teacher, photos, tmp_path, capsys, monkeypatch):
    encode(photos, str(teacher), tmp_path / "c")
    name, r = recipe(teacher, tmp_path / "c")
    train.train(name, r, tmp_path / "run")
    (tmp_path / "c").rename(tmp_path / "moved")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="is not a cache"):
        train.train(name, r, tmp_path / "run")
    _, longer = recipe(teacher, "~/moved", "iterations=5")
    train.train(name, longer, tmp_path / "run")
    printed = capsys.readouterr().err
    assert "goes on with changes" in printed
    assert "iterations: 3 -> 5" in printed
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]
    assert (tmp_path / "run/checkpoints/step-0000005.json").is_file()
    with pytest.raises(ValueError, match=r"holds another run \(.*seed: 0 -> 1"):
        train.train(*recipe(teacher, "~/moved", "iterations=5", "seed=1"), tmp_path / "run")
    (tmp_path / "moved").rename(tmp_path / "again")
    with pytest.raises(ValueError, match="is not a cache"):
        export(tmp_path / "run", tmp_path / "out")
    assert export(tmp_path / "run", tmp_path / "out", changes=[f"data.folder={tmp_path / 'again'}"]).is_dir()


def test_a_lengthened_run_equals_a_run_of_that_length_from_the_start(teacher, photos, tmp_path):
    """Where nothing of its schedule depends on the length."""
    encode(photos, str(teacher), tmp_path / "c")
    train.train(*recipe(teacher, tmp_path / "c", "iterations=2"), tmp_path / "cut")
    train.train(*recipe(teacher, tmp_path / "c", "iterations=4"), tmp_path / "cut")
    train.train(*recipe(teacher, tmp_path / "c", "iterations=4"), tmp_path / "whole")
    a, b = (load_file(tmp_path / x / "checkpoints/step-0000004.safetensors") for x in ("cut", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_goes_on_after_one_more_image_and_reports_it(teacher, photos, tmp_path, capsys):
    encode(photos, str(teacher), tmp_path / "c")
    train.train(*recipe(teacher, tmp_path / "c"), tmp_path / "run")
    Image.new("RGB", (40, 40), "red").save(photos / "a.png")
    (photos / "a.txt").write_text("a new lamp")
    encode(photos, str(teacher), tmp_path / "c")
    train.train(*recipe(teacher, tmp_path / "c", "iterations=5"), tmp_path / "run")
    assert "5 prompts then, 6 now; the run goes on with them" in capsys.readouterr().err
