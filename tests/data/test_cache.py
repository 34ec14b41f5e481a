"""A user's prompts and images: read, encoded once, batched, trained on, exported."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import advdmd
from advdmd.cli import main
from advdmd.commands import train
from advdmd.commands.encode import encode
from advdmd.data import aspect_buckets, embedding_cache
from advdmd.data.captioned_images import CaptionedImage, ImagePlace, group_by_prompt, load_image, prompt_hash
from advdmd.data.loader import BatchConfig, make_batch_fn
from advdmd.data.sources import read_captioned_images
from advdmd.data.tables import saved_dataset
from advdmd.distillation import memory
from advdmd.distillation.build import setup
from advdmd.distillation.sample_grids import save_sample_grid
from advdmd.mini import pipelines
from advdmd.mini.world.caption import VOCABULARY
from advdmd.models import fingerprints, loading
from advdmd.models.sampler import SamplerConfig
from advdmd.recipes.registry import resolve
from advdmd.rng import Rng
from advdmd.types import Cond
from tests.conftest import TINY
from tests.tiny_pipelines import save_teacher, sd3_with_t5

CAPTIONS = ["a picture of a red circle", "a picture of two stars", "a blue square", "three green crosses", "a star"]
WORDS = [
    "algorithm.group_size=2", "prompts_per_step=2", "iterations=3", "algorithm.dm_only_iterations=1",
    "algorithm.policy_ramp_iterations=1", "lora_rank=4",
    "dtype=float32", "device=cpu", "save_every=2", "sample_every=0", "discriminator.hidden_size=8", "threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """SD3 with T5: the real families' layout, padding and all."""
    return save_teacher(tmp_path_factory.mktemp("t5") / "sd3")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with metadata.jsonl; the first caption has two images."""
    folder = tmp_path_factory.mktemp("photos")
    rng, lines = np.random.default_rng(0), []
    for n, caption in enumerate([*CAPTIONS, CAPTIONS[0]]):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / f"{n}.png")
        lines.append(json.dumps({"file_name": f"{n}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def encoded(teacher, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "c"
    torch.set_num_threads(1)  # the last digit depends on it
    assert encode(photos, str(teacher), folder)
    return folder


def test_embeddings_with_t5_are_the_stock_pipelines(teacher):
    backbone, _ = loading.load(str(teacher))
    with torch.no_grad():
        cond = backbone.encode_text(backbone.tokenize(CAPTIONS[:2]))
        theirs, _, pooled, _ = backbone.pipe.encode_prompt(
            CAPTIONS[:2], None, None, do_classifier_free_guidance=False, max_sequence_length=6
        )
    assert torch.equal(cond.embeds, theirs)
    assert torch.equal(cond.pooled, pooled)
    assert cond.embeds[:, -6:].abs().min() > 0


def test_a_cache_holds_the_encoders_outputs(teacher, encoded, photos):
    backbone, _ = loading.load(str(teacher))
    found = embedding_cache.EmbeddingCache(encoded)
    assert found.prompts == CAPTIONS
    assert [found.num_images(n) for n in range(5)] == [2, 1, 1, 1, 1]
    with torch.no_grad():
        cond = backbone.encode_text(backbone.tokenize([CAPTIONS[3], CAPTIONS[0]]))
        image = torch.from_numpy(load_image(ImagePlace(photos / "5.png"), 32, 32))[None]
        latent = backbone.encode(image)[0]
    assert torch.equal(found.cond([3, 0]).embeds, cond.embeds.bfloat16())
    assert torch.equal(found.cond([3, 0]).pooled, cond.pooled.bfloat16())
    assert torch.equal(found.real(0, 1), latent.bfloat16().float())


def test_a_batch_groups_prompts_with_their_images_and_takes_other_images_each_epoch(encoded):
    found = embedding_cache.EmbeddingCache(encoded)
    batch_fn = make_batch_fn(5, BatchConfig(2, 2, 0), found.cond, found.real)
    first, ids = batch_fn(0)
    again, _ = batch_fn(0)
    assert torch.equal(first.real_latents, again.real_latents)
    assert ids == [0, 1, 2, 3]
    assert first.prompt_index[0] == first.prompt_index[1] != first.prompt_index[2]
    prompts = set()
    for step in range(5):
        batch, _ = batch_fn(step)
        for n, z in zip(batch.prompt_index.tolist(), batch.real_latents, strict=True):
            prompts.add(n)
            assert any(torch.equal(z, found.real(n, r)) for r in range(found.num_images(n)))
    assert prompts == set(range(5))


def test_encoding_goes_on_where_it_stopped_and_workers_parts_make_one_cache(teacher, photos, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_cache, "PROMPTS_PER_SHARD", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert encode(photos, str(teacher), whole)
    assert not encode(photos, str(teacher), parts, worker=(0, 2))
    with pytest.raises(ValueError, match="not finished: run advdmd encode again"):
        embedding_cache.EmbeddingCache(parts)
    assert encode(photos, str(teacher), parts, worker=(1, 2))
    shards = sorted(f.name for f in whole.glob("shard-*.safetensors"))
    assert shards == sorted(f.name for f in parts.glob("shard-*.safetensors"))
    assert len(shards) > 1
    for name in shards:
        a, b = (load_file(f / name) for f in (whole, parts))
        assert all(torch.equal(a[x], b[x]) for x in a)
    before = (whole / shards[0]).stat().st_mtime_ns
    (whole / shards[1]).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"{shards[1]}.*damaged"):
        embedding_cache.EmbeddingCache(whole).cond(range(5))
    assert encode(photos, str(teacher), whole)
    assert embedding_cache.EmbeddingCache(whole).cond(range(5)).embeds.shape[0] == 5
    assert (whole / shards[0]).stat().st_mtime_ns == before


def test_broken_images_are_listed_and_only_the_shard_of_a_repaired_one_is_encoded_again(teacher, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_cache, "PROMPTS_PER_SHARD", 2)
    folder = shutil.copytree(photos, tmp_path / "photos")
    good = {name: (folder / name).read_bytes() for name in ("2.png", "3.png")}
    for name, data in good.items():
        (folder / name).write_bytes(data[:50])
    with pytest.raises(ValueError, match=r"2 images cannot be used(?s:.*)2\.png cannot be read(?s:.*)3\.png cannot be read"):
        encode(folder, str(teacher), tmp_path / "c")
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "c").glob("shard-*.safetensors")}
    assert before, "what has no broken image is encoded"
    for name, data in good.items():
        (folder / name).write_bytes(data)
    assert encode(folder, str(teacher), tmp_path / "c")
    assert all((tmp_path / "c" / name).stat().st_mtime_ns == t for name, t in before.items())

    words = [f"teacher={teacher}", f"data.folder={tmp_path / 'c'}", *WORDS]
    r = resolve(
        "sd35-medium-dmd2-2step-24gb",
        [w for w in words if not w.startswith(("algorithm.dm_only_iterations", "algorithm.policy_ramp_iterations"))],
    )
    train.train(*r, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/student")
    shutil.rmtree(tmp_path / "c")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(s.replace('"text": "', '"text": "not ') for s in lines))
    assert encode(folder, str(teacher), tmp_path / "c")
    (tmp_path / "run/checkpoints/step-0000003.json").unlink()  # else the run is over and reads nothing
    with pytest.raises(ValueError, match="held 5 prompts, now they are others"):
        train.train(*r, tmp_path / "run")


def test_a_damaged_empty_prompt_is_named_and_written_again(teacher, photos, tmp_path):
    encode(photos, str(teacher), tmp_path)
    embedding_cache.null_path(tmp_path).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"null\.safetensors is missing or damaged"):
        _ = embedding_cache.EmbeddingCache(tmp_path).null
    assert encode(photos, str(teacher), tmp_path)
    assert len(embedding_cache.EmbeddingCache(tmp_path).null) == 1


@pytest.mark.parametrize(
    ("name", "text"), [("plan.json", "[]"), ("plan.json", "{}"), ("manifest.json", "3"), ("prompts.jsonl", "{")]
)
def test_damaged_records_are_named(encoded, tmp_path, name, text):
    folder = shutil.copytree(encoded, tmp_path / "c")
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        embedding_cache.EmbeddingCache(folder)


def test_real_images_of_another_teacher_or_sampler_are_not_mixed_in(teacher, tmp_path):
    (tmp_path / "p.txt").write_text(CAPTIONS[0])
    assert encode(tmp_path / "p.txt", str(teacher), tmp_path / "c", real_images="teacher")
    other = shutil.copytree(teacher, tmp_path / "other")
    metadata = json.loads((other / "advdmd.json").read_text())
    (other / "advdmd.json").write_text(json.dumps(metadata | {"sampling": {"steps": 2, "guidance": 3.0}}))
    with pytest.raises(ValueError, match=r"cache of something else \(reals differ\)"):
        encode(tmp_path / "p.txt", str(other), tmp_path / "c", real_images="teacher")


def test_another_teacher_length_or_source_is_refused(teacher, encoded, photos, tmp_path):
    found = embedding_cache.EmbeddingCache(encoded)
    found.check_teacher(fingerprints.encoder_fingerprint(teacher))
    other = shutil.copytree(teacher, tmp_path / "other")
    metadata = json.loads((other / "advdmd.json").read_text())
    (other / "advdmd.json").write_text(json.dumps(metadata | {"t5_length": 7}))
    with pytest.raises(ValueError, match=r"another teacher \(t5_length differ\)"):
        found.check_teacher(fingerprints.encoder_fingerprint(other))
    config = json.loads((other / "text_encoder/config.json").read_text())
    (other / "text_encoder/config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    with pytest.raises(ValueError, match="t5_length, text_encoder differ"):
        found.check_teacher(fingerprints.encoder_fingerprint(other))
    prompts = tmp_path / "p.txt"
    prompts.write_text("a picture of a red circle\n")
    with pytest.raises(ValueError, match=r"cache of something else \(reals differ\)"):
        encode(prompts, str(teacher), encoded, real_images="teacher")


def test_without_images_the_teacher_can_generate_them(teacher, tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(CAPTIONS[:3]) + "\n\n" + CAPTIONS[0])
    with pytest.raises(ValueError, match="--real-images teacher"):
        encode(prompts, str(teacher), tmp_path / "c")
    assert encode(prompts, str(teacher), tmp_path / "c", real_images="teacher", per_prompt=2)
    found = embedding_cache.EmbeddingCache(tmp_path / "c")
    del found.manifest["content"]
    assert found.manifest == {"format": 2, "prompts": 3, "images": 6, "prompts_without_image": 0, "shards": [3]}
    assert not torch.equal(found.real(0, 0), found.real(0, 1))
    words = [f"teacher={teacher}", f"data.folder={tmp_path / 'c'}", *WORDS]
    capsys.readouterr()
    train.train(*resolve("sd35-medium-advdmd-4step-24gb", words), tmp_path / "run")
    assert "expect the student to come close to the teacher, not past it" in capsys.readouterr().err


def test_another_resolution_reaches_latents_and_student(teacher, photos, tmp_path):
    assert encode(photos, str(teacher), tmp_path / "c", resolution=16)
    assert embedding_cache.EmbeddingCache(tmp_path / "c").real(0, 0).shape[-2:] == torch.Size([4, 4])
    with pytest.raises(ValueError, match="a multiple of 4"):
        encode(photos, str(teacher), tmp_path / "d", resolution=18)


def test_images_of_several_aspect_ratios_are_cropped_batched_and_trained_on_by_bucket(tmp_path):
    pipe = sd3_with_t5()
    pipe.register_modules(transformer=type(pipe.transformer).from_config({**pipe.transformer.config, "pos_embed_max_size": 8}))
    pipe.save_pretrained(tmp_path / "t")
    (tmp_path / "t/advdmd.json").write_text(json.dumps({"sampling": {"steps": 2, "guidance": 2.0}, "t5_length": 6}))
    (tmp_path / "p").mkdir()
    lines, image_sizes = [], [(60, 100), (50, 50), (100, 60), (51, 49), (64, 99)]
    for n, (caption, (h, w)) in enumerate(zip(CAPTIONS, image_sizes, strict=True)):
        camera = Image.Exif()
        camera[0x0112] = 6 if n == 2 else 1  # the third is stored in landscape and shown in portrait
        Image.new("RGB", (h, w) if n == 2 else (w, h), (40 * n, 9, 9)).save(tmp_path / f"p/{n}.jpg", exif=camera)
        lines.append(json.dumps({"file_name": f"{n}.jpg", "text": caption}))
    (tmp_path / "p/metadata.jsonl").write_text("\n".join(lines))
    assert aspect_buckets.bucket_sizes(32, 8) == [(24, 40), (32, 32), (40, 24)]
    assert encode(tmp_path / "p", str(tmp_path / "t"), tmp_path / "c", resolution=32, by_aspect=True)
    found = aspect_buckets.BucketedCache(tmp_path / "c")
    got = {part.folder.name: (part.prompts, tuple(part.real(0, 0).shape)) for part in found.parts}
    assert got == {
        "24x40": ([CAPTIONS[0], CAPTIONS[4]], (4, 6, 10)),
        "32x32": ([CAPTIONS[1], CAPTIONS[3]], (4, 8, 8)),
        "40x24": ([CAPTIONS[2]], (4, 10, 6)),
    }
    words = [f"teacher={tmp_path / 't'}", f"data.folder={tmp_path / 'c'}", *WORDS, "iterations=6"]
    name, r = resolve("sd35-medium-advdmd-4step-24gb", words)
    _, data, _ = setup(r, found)
    batches = [data.batch_fn(k)[0] for k in range(60)]
    latent_sizes = [tuple(b.real_latents.shape[-2:]) for b in batches]
    assert set(latent_sizes) == {(6, 10), (8, 8), (10, 6)}
    assert latent_sizes == [tuple(data.batch_fn(k)[0].real_latents.shape[-2:]) for k in range(60)], "pure in the step"
    prompts_of = {(6, 10): {0, 1}, (8, 8): {2, 3}, (10, 6): {4}}
    for batch, latent_size in zip(batches, latent_sizes, strict=True):
        assert set(batch.prompt_index.tolist()) <= prompts_of[latent_size], "prompts are numbered through all buckets"
    assert (train.train(name, r, tmp_path / "run") / "model_index.json").is_file()
    shutil.rmtree(tmp_path / "c/40x24")
    with pytest.raises(ValueError, match="40x24' is not a cache"):
        train.train(name, r, tmp_path / "again")
    plan = json.loads((tmp_path / "c/plan.json").read_text())
    for sizes in (5, "24x40", []):
        (tmp_path / "c/plan.json").write_text(json.dumps(plan | {"sizes": sizes}))
        with pytest.raises(ValueError, match=r"plan\.json is damaged"):
            aspect_buckets.BucketedCache(tmp_path / "c")


@pytest.mark.parametrize("name", ["sd35-medium-advdmd-4step-24gb", "sd35-medium-dmd2-2step-24gb"])
def test_a_published_models_recipe_trains_adapters_from_a_cache_and_exports_for_stock_tools(name, teacher, encoded, tmp_path):
    words = [f"teacher={teacher}", f"data.folder={encoded}", *WORDS]
    if "dmd2" in name:
        words = [w for w in words if not w.startswith(("algorithm.dm_only_iterations", "algorithm.policy_ramp_iterations"))]
    r = resolve(name, words)
    student = train.train(*r, tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    saved = load_file(max((tmp_path / "run/checkpoints").glob("*.safetensors")))
    assert not any("base_layer" in k for k in saved), "adapters only"

    # In a fresh process: the fused folder, and the adapter file on the stock base, generate the same image.
    code = f"""
import torch
from diffusers import StableDiffusion3Pipeline
def generate(pipe):
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(3)
    call = {json.loads((student / "advdmd.json").read_text())["stock_call"]!r}
    return pipe("a picture of a red circle", output_type="pt", **call).images
fused = StableDiffusion3Pipeline.from_pretrained({str(student)!r})
base = StableDiffusion3Pipeline.from_pretrained({str(teacher)!r}, scheduler=fused.scheduler)
plain = generate(base)
base.load_lora_weights({str(student)!r})
a, b = generate(fused), generate(base)
print((a - b).abs().max().item(), (a - plain).abs().max().item())
torch.save(a, {str(tmp_path / "a.pt")!r})
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    difference, change = map(float, out.stdout.split())
    assert difference < 1e-5, "float32 sums in another order"
    assert change > 10 * difference
    workflow = json.loads((student / "comfyui_workflow.json").read_text())
    assert workflow["tokens"]["inputs"] == {"clip": ["clip", 0], "min_padding": 0, "min_length": 6}, (
        "the text length of training"
    )
    assert workflow["prompt"]["inputs"]["clip"] == workflow["none"]["inputs"]["clip"] == ["tokens", 0]
    config = json.loads((student / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    assert "transformer_blocks.0.attn.to_q" in config["target_modules"]
    assert workflow["sample"]["inputs"]["steps"] == r[1].algorithm.steps
    assert all(v[0] in workflow for n in workflow.values() for v in n["inputs"].values() if isinstance(v, list))


def test_processes_that_torchrun_starts_share_the_work(teacher, encoded, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, message in (("1", "process 1 of 2 are done, others are missing"), ("0", "cache: ")):
        monkeypatch.setenv("RANK", rank)
        main.encode(photos, str(teacher), tmp_path / "c", device="cpu", threads=1)
        assert message in capsys.readouterr().out
    for f in ("shard-000000.safetensors", "null.safetensors", "manifest.json"):
        assert (tmp_path / "c" / f).read_bytes() == (encoded / f).read_bytes()


def test_encoding_goes_on_in_a_folder_that_another_process_creates_meanwhile(tmp_path, monkeypatch):
    plan, original = {"format": 2}, Path.is_file

    def is_file(path):  # another process writes the file between two checks
        found = original(path)
        if path.name == "plan.json" and not found:
            embedding_cache.write_text(path, json.dumps(plan))
        return found

    (tmp_path / "c").mkdir()
    monkeypatch.setattr(Path, "is_file", is_file)
    embedding_cache.create_or_resume(tmp_path / "c", plan)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cache of something else"):
        embedding_cache.create_or_resume(tmp_path / "c", plan | {"format": 3})


@pytest.fixture(scope="module")
def qwen(photos, tmp_path_factory):
    """A tiny real QwenImagePipeline and its cache."""
    folder = tmp_path_factory.mktemp("qwen")
    pipelines.qwen_image(VOCABULARY, TINY).save_pretrained(folder / "t")
    (folder / "t/advdmd.json").write_text(json.dumps({"sampling": {"steps": 2, "guidance": 2.0}, "side": 8}))
    assert encode(photos, str(folder / "t"), folder / "c")
    return folder


@pytest.mark.parametrize(
    "name", ["sd35-large-twinflow-2step-80gb", "qwen-image-advdmd-4step-80gb", "sd35-large-advdmd-2step-8x80gb"]
)
def test_presets_of_every_kind_train_in_the_type_they_are_given(name, teacher, encoded, qwen, tmp_path):
    """Adapters of TwinFlow and of Qwen-Image on bfloat16, whole networks."""
    words = [
        w
        for w in WORDS
        if not w.startswith(("dtype", "lora_rank", "algorithm.dm_only_iterations", "algorithm.policy_ramp_iterations"))
    ]
    words += ["algorithm.dm_only_iterations=1", "algorithm.policy_ramp_iterations=1"] if "advdmd" in name else []
    words += [] if name.endswith("8x80gb") else ["lora_rank=4"]
    where = (qwen / "t", qwen / "c") if name.startswith("qwen") else (teacher, encoded)
    student = train.train(*resolve(name, [f"teacher={where[0]}", f"data.folder={where[1]}", *words]), tmp_path / "run")
    assert loading.load(str(student))[1].steps == int(name.split("step")[0][-1])
    assert (student / "samples.png").is_file()
    assert (student / "comfyui_workflow.json").is_file() == ("twinflow" not in name), (
        "no node of ComfyUI samples TwinFlow's students"
    )


def test_conditions_are_in_the_transformers_type_and_velocities_the_same(qwen):
    """A cache has bfloat16 numbers: float32 on a bfloat16 transformer would be twice the memory for nothing."""
    backbone, _ = loading.load(str(qwen / "t"), dtype=torch.bfloat16)
    data = aspect_buckets.BucketedCache(qwen / "c").load(backbone, BatchConfig(2, 2, 0))
    batch, _ = data.batch_fn(0)
    wide = Cond.cat([embedding_cache.EmbeddingCache(qwen / "c").cond([n]) for n in batch.prompt_index.tolist()]).trimmed()
    wide = wide.to(torch.float32)
    assert {c.embeds.dtype for c in (batch.cond, data.null, data.sample_cond)} == {torch.bfloat16}
    assert (wide.embeds.dtype, batch.real_latents.dtype) == (torch.float32, torch.float32)
    x, t = batch.real_latents, torch.full((4,), 0.5)
    with torch.no_grad():
        assert torch.equal(backbone.velocity(backbone.net, x, t, batch.cond), backbone.velocity(backbone.net, x, t, wide))


@pytest.mark.parametrize(("shown", "size"), [(1, (130, 130)), (4, (260, 260)), (5, (650, 130))])
def test_sample_grids_of_large_images_have_one_image_of_each_prompt(qwen, tmp_path, shown, size):
    backbone, _ = loading.load(str(qwen / "t"), resolution=128)
    cond, null = (backbone.encode_text(backbone.tokenize(p)) for p in (CAPTIONS[:shown], [""]))
    save_sample_grid(backbone, backbone.net, SamplerConfig(steps=2, eta=1.0), cond, null, tmp_path, 7)
    with Image.open(tmp_path / "samples/step-000007.png") as grid:
        assert grid.size == size


def test_a_cache_of_the_first_format_is_trained_on_and_not_added_to(teacher, encoded, photos, tmp_path):
    """The first format: shards in the order of the source, and encoders known by the bytes of their files."""
    shutil.copytree(encoded, tmp_path / "c")
    plan, manifest = (json.loads((tmp_path / "c" / f).read_text()) for f in ("plan.json", "manifest.json"))
    plan |= {"format": 1, "teacher": fingerprints.file_fingerprint(teacher), "content": "0123"}
    del plan["shards"], manifest["shards"], manifest["content"]
    (tmp_path / "c/plan.json").write_text(json.dumps(plan))
    (tmp_path / "c/manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    words = [f"teacher={teacher}", f"data.folder={tmp_path / 'c'}", *WORDS]
    train.train(*resolve("sd35-medium-advdmd-2step-24gb", words), tmp_path / "run")
    with pytest.raises(ValueError, match="of an earlier version, which cannot be added to"):
        encode(photos, str(teacher), tmp_path / "c")


def test_a_teacher_from_the_hub_keeps_its_name_and_is_not_downloaded_to_estimate_memory(
    teacher, encoded, tmp_path, monkeypatch
):
    import huggingface_hub

    asked, fetched = [], []

    def fetch(repo, revision=None, allow_patterns=(), ignore_patterns=()):
        asked.append((repo, revision, allow_patterns))
        files = list(huggingface_hub.utils.filter_repo_objects(
            [f"{kind}/model.safetensors" for kind in ("transformer", "text_encoder_3", "text_encoders")]
            + ["sd3.5_large.safetensors", "text_encoder_3/model.fp16-00001-of-00002.safetensors"]
            + ["model_index.json", "vae/x.bin"]
            + ["tokenizer/chat_template.jinja", "tokenizer_3/spiece.model", "tokenizer/merges.txt"],
            allow_patterns=allow_patterns, ignore_patterns=ignore_patterns,
        ))  # fmt: skip
        fetched.append(files)
        return shutil.copytree(teacher, tmp_path / "snapshots/0123456789abcdef", dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    words = ["teacher=someone/model@v1", f"data.folder={encoded}", *WORDS]
    name, r = resolve("sd35-medium-dmd2-2step-24gb", [w for w in words if "dm_only" not in w and "ramp" not in w])
    assert memory.estimate(r).base > 0
    assert fetched == [["model_index.json"]]
    student = train.train(name, r, tmp_path / "run")
    assert asked[-1][:2] == ("someone/model", "v1")
    assert fetched[-1] == [
        *("transformer/model.safetensors", "text_encoder_3/model.safetensors", "model_index.json"),
        *("tokenizer/chat_template.jinja", "tokenizer_3/spiece.model", "tokenizer/merges.txt"),
    ]
    fingerprint = fingerprints.encoder_fingerprint(teacher)
    (tmp_path / "snapshots/0123456789abcdef/text_encoder/model.fp16.safetensors").write_bytes(b"what another program fetched")
    assert fingerprints.encoder_fingerprint(tmp_path / "snapshots/0123456789abcdef") == fingerprint
    assert "\nbase_model: someone/model\n" in (student / "README.md").read_text()


def test_a_cache_with_another_prompt_template_or_text_length_is_refused(qwen, tmp_path, monkeypatch):
    """Template and length of text are the pipeline's code, not files of its folder."""
    words = [f"teacher={qwen / 't'}", f"data.folder={qwen / 'c'}", *WORDS]
    name, r = resolve("qwen-image-advdmd-4step-80gb", words)
    before = loading.load_pipeline

    def other(*args, **kw):
        pipe = before(*args, **kw)
        pipe.tokenizer_max_length -= 1
        return pipe

    monkeypatch.setattr(loading, "load_pipeline", other)
    with pytest.raises(ValueError, match="another prompt template or length of text"):
        train.train(name, r, tmp_path / "run")


def test_a_run_on_a_cache_resumes_exactly(teacher, encoded, tmp_path):
    words = [f"teacher={teacher}", f"data.folder={encoded}", *WORDS]
    name, whole = resolve("sd35-medium-advdmd-2step-24gb", words)
    train.train(name, whole, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for f in (tmp_path / "cut/checkpoints").glob("step-0000003*"):
        f.unlink()
    shutil.rmtree(tmp_path / "cut/student")
    train.train(name, whole, tmp_path / "cut")
    a, b = (load_file(tmp_path / x / "checkpoints/step-0000003.safetensors") for x in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_published_model_needs_a_cache_and_whole_networks_float32(teacher):
    name = "sd35-medium-advdmd-4step-24gb"
    with pytest.raises(ValueError, match="is not a cache: make one with advdmd encode"):
        train.train(*resolve(name, [f"teacher={teacher}", "data.folder=nowhere"]), teacher / "x")
    with pytest.raises(ValueError, match="whole networks learn in float32"):
        resolve(name, ["lora_rank=0"])
    with pytest.raises(ValueError, match=r"name validation\.prompts and validation\.scorers"):
        resolve(name, ["eval_every=5"])


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(size=(8, 6), mode="RGB", **options):
    out = io.BytesIO()
    Image.new(mode, size, **options).save(out, "PNG")
    return out.getvalue()


def test_sources_of_every_format_give_the_same_entries(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n\n two stars \n")
    assert read_captioned_images(tmp_path / "p.txt") == [CaptionedImage("a red circle"), CaptionedImage("two stars")]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red circle"}\n{"caption": "two stars"}\n')
    assert read_captioned_images(tmp_path / "p.jsonl") == [CaptionedImage("a red circle"), CaptionedImage("two stars")]
    tar = tar_of(
        tmp_path / "d.tar",
        {"1.png": png(), "1.txt": b"a red circle", "2.jpg": b"", "2.json": b'{"caption": "two stars"}', "3.txt": b"alone"},
    )
    found = read_captioned_images(tar)
    assert [(e.prompt, e.image.place) for e in found] == [("a red circle", f"{tar}:1.png"), ("two stars", f"{tar}:2.jpg")]
    assert tar.read_bytes()[found[0].image.start :][: found[0].image.size] == png()
    assert load_image(found[0].image, 4, 4).shape == (3, 4, 4)
    one, two = ImagePlace(tar, "1"), ImagePlace(tar, "2")
    assert group_by_prompt(
        [CaptionedImage("a", one), CaptionedImage("b"), CaptionedImage("a", two), CaptionedImage("a", one)]
    ) == (
        ["a", "b"],
        [[one, two], []],
    )


def test_a_saved_dataset_gives_the_same_entries_as_its_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    for n, color in enumerate(("red", "blue")):
        (tmp_path / f"{n}.png").write_bytes(png(color=color))
    kinds = datasets.Features({"caption": datasets.Value("string"), "picture": datasets.Image()})
    rows = {"caption": ["a red circle", "two stars"], "picture": [str(tmp_path / f"{n}.png") for n in (0, 1)]}
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path / "saved")
    found = read_captioned_images(tmp_path / "saved")
    assert [(e.prompt, e.image.place) for e in found] == [
        (p, f"{tmp_path / 'saved'}, row {n}") for n, p in enumerate(rows["caption"])
    ]
    for n, entry in enumerate(found):
        assert (load_image(entry.image, 4, 4) == load_image(ImagePlace(tmp_path / f"{n}.png"), 4, 4)).all()
    datasets.Dataset.from_dict({"text": ["a red circle"]}).save_to_disk(tmp_path / "bare")
    assert read_captioned_images(tmp_path / "bare") == [CaptionedImage("a red circle")]
    datasets.Dataset.from_dict({"title": ["a red circle"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="captions are looked for in a column text or prompt or caption"):
        read_captioned_images(tmp_path / "other")
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="give the folder of one of them"):
        read_captioned_images(tmp_path / "splits")
    assert read_captioned_images(tmp_path / "splits/train") == [CaptionedImage("a")]
    (tmp_path / "saved/state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a dataset"):
        saved_dataset.__wrapped__(tmp_path / "saved")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1"),
        ("[1]", "needs an object"),
        ('{"text": ""}', "holds no prompts"),
        ('{"text": 3}', "is no text"),
        ('{"title": "a"}', "needs an object with the caption under text or prompt or caption or en_caption; it has title"),
        ("[" * 100_000, "line 1"),
        (r'{"text": "\ud800"}', "half a character"),
        ('{"text": "a", "file_name": "loop"}', "loop"),
        ('{"text": "a", "file_name": "a\\u0000b"}', "line 1"),
        ('{"text": "a", "file_name": "../x.png"}', "leads out of the folder"),
        ('{"text": "a", "file_name": "/etc/hostname"}', "leads out of the folder"),
        ('{"text": "a", "file_name": "none.png"}', "there is no image"),
    ],
)
def test_bad_metadata_names_file_and_line(tmp_path, line, message):
    (tmp_path / "metadata.jsonl").write_text(line)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match=message):
        read_captioned_images(tmp_path)


def test_what_is_no_source_is_refused(tmp_path):
    for path, message in ((tmp_path, "holds neither"), (tmp_path / "no", "no such file"), (tmp_path / "x.csv", "give a .txt")):
        if path.suffix == ".csv":
            path.write_text("a")
        with pytest.raises(ValueError, match=message):
            read_captioned_images(path)
    (tmp_path / "e.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_captioned_images(tmp_path / "e.txt")
    for data in (b"not a tar at all", b"\x1f\x8b\x08\x00", tar_of(tmp_path / "u.tar", {"1.png": png()}).read_bytes()[:600]):
        (tmp_path / "t.tar").write_bytes(data)
        with pytest.raises(ValueError, match=r"t\.tar"):
            read_captioned_images(tmp_path / "t.tar")


def test_a_tar_that_names_a_member_twice_or_a_folder_like_a_text_is_read_by_its_files(tmp_path):
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for name, data in (("1.txt", b"\xef\xbb\xbfa red circle"), ("1.png", png())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in (("1.txt", tarfile.DIRTYPE), ("1.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            tar.addfile(info)
    (entry,) = read_captioned_images(tmp_path / "d.tar")
    assert entry.prompt == "a red circle"
    assert load_image(entry.image, 4, 4).shape == (3, 4, 4)


def test_images_of_every_kind_become_rgb_and_broken_ones_are_named(tmp_path):
    for name, mode, color, value in (
        ("cmyk.jpg", "CMYK", (0, 0, 0, 0), 1.0),
        ("deep.png", "I;16", 65535, 1.0),
        ("clear.png", "RGBA", (0, 0, 0, 0), 1.0),
        ("grey.png", "L", 0, -1.0),
        ("moves.gif", "P", 0, None),
    ):
        Image.new(mode, (10, 8), color).save(tmp_path / name)
        pixels = load_image(ImagePlace(tmp_path / name), 4, 6)
        assert pixels.shape == (3, 4, 6)
        assert value is None or np.allclose(pixels, value, atol=0.02), name
    rotated = Image.new("RGB", (8, 4), "black")
    rotated.paste("white", (0, 0, 4, 4))
    exif = rotated.getexif()
    exif[0x0112] = 3  # upside down
    rotated.save(tmp_path / "rotated.png", exif=exif)
    assert load_image(ImagePlace(tmp_path / "rotated.png"), 4, 8)[0, 0, 0] < 0
    (tmp_path / "broken.png").write_bytes(png()[:40])
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        load_image(ImagePlace(tmp_path / "broken.png"), 4, 4)


def test_masked_text_is_cut_to_the_longest_prompt_of_the_batch(tmp_path):
    cond = Cond(torch.randn(2, 5, 4), mask=torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]))
    embedding_cache.create_or_resume(tmp_path, {"resolution": 16, "teacher": {}})
    content = embedding_cache.ShardContent(["a", "b"], "")
    rows = [
        embedding_cache.Encoded(prompt_hash("ab"[n]), cond[torch.tensor([n])], torch.zeros(1, 1, 2, 2), [""]) for n in (0, 1)
    ]
    embedding_cache.write_shard(tmp_path, 0, content, rows)
    embedding_cache.write_null(tmp_path, cond[:1])
    assert embedding_cache.finalize(tmp_path, [content])
    found = embedding_cache.EmbeddingCache(tmp_path)
    assert found.cond([0]).embeds.shape == (1, 2, 4)
    assert found.cond([0, 1]).mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_an_iteration_runs_on_the_trainers_device_and_no_default_device_is_set():
    """Batches and random numbers are made on the CPU and moved; minibatch indices stay there. "meta" stands for a GPU."""
    cond = lambda i: Cond(torch.zeros(len(i), 2, 3))  # noqa: E731
    batch, samples = make_batch_fn(4, BatchConfig(2, 2, 0), cond, lambda p, k: torch.zeros(1, 2, 2))(0)
    moved = batch.to("meta")
    assert {moved.real_latents.device.type, moved.cond.embeds.device.type, moved.prompt_index.device.type} == {"meta"}
    rng = Rng(0, 0, samples, device="meta")
    draws = [rng.normal("rollout", (2,)), rng.uniform("t"), rng.integers("critic.k", 0, 3)]
    assert {x.device.type for x in draws} == {"meta"}
    assert rng.minibatches("critic.order", 2, 2)[0][0].device.type == "cpu"
    ambient = ("set_default_device", "get_default_device", 'torch.device("cpu")')
    sources = [f for f in Path(advdmd.__file__).parent.rglob("*.py") if any(word in f.read_text() for word in ambient)]
    assert sources == []
