"""Qwen-Image-Edit as a backbone, against the stock pipelines; and a student of it from pairs to exported pipeline."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from advdmd.cli.main import app
from advdmd.commands import train
from advdmd.commands.demo import DemoModel
from advdmd.commands.encode import encode
from advdmd.commands.evaluate import generate_images, make_suite
from advdmd.commands.sample import edits_of
from advdmd.commands.sample import sample as sample_command
from advdmd.data.aspect_buckets import BucketedCache
from advdmd.data.captioned_images import Columns, ImagePlace
from advdmd.data.embedding_cache import EmbeddingCache
from advdmd.data.loader import BatchConfig
from advdmd.data.sources import read_captioned_images
from advdmd.distillation.memory import estimate, transformer
from advdmd.distillation.prompt_validation import encoded_prompts, read_prompts
from advdmd.files import file_hash
from advdmd.mini.world.caption import VOCABULARY
from advdmd.models import loading
from advdmd.models.diffusers_pipeline import DiffusersModel, DiffusersSampling
from advdmd.models.networks import Teacher
from advdmd.models.qwen_image import pack, unpack
from advdmd.models.qwen_image_edit import QwenImageEdit, VisionProcessor, size_of_area
from advdmd.models.sampler import SamplerConfig, draw_noise, encode_prompts, sample
from advdmd.recipes.registry import resolve
from advdmd.types import Cond, Edit
from tests import tiny_pipelines
from tests.conftest import TINY

PROMPTS = ["a picture of a red circle", "two blue stars. gray background."]
SHORT = [
    *("algorithm.steps=2", "algorithm.group_size=2", "algorithm.dm_only_iterations=0", "algorithm.policy_ramp_iterations=0"),
    *("prompts_per_step=2", "device=cpu", "dtype=float32", "gradient_checkpointing=false", "threads=1"),
]
SIDE = 32  # pixels, of images and of source images


@pytest.fixture(autouse=True)
def _small_sources(monkeypatch):
    """The stock pipelines give source images a million pixels; here as many as the metadata say."""
    plus, first = pipeline_qwenimage_edit_plus, pipeline_qwenimage_edit
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", SIDE * SIDE)
    stock = first.calculate_dimensions
    monkeypatch.setattr(first, "calculate_dimensions", lambda area, ratio: stock(SIDE * SIDE, ratio))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two source images and what they are to become, in a folder with metadata."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for n, prompt in enumerate(PROMPTS):
        Image.radial_gradient("L").convert("RGB").rotate(40 * n).resize((96, 96)).save(folder / f"before-{n}.png")
        Image.linear_gradient("L").convert("RGB").rotate(90 * n).save(folder / f"after-{n}.png")
        rows.append({"file_name": f"after-{n}.png", "source_image": f"before-{n}.png", "text": prompt})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def save(folder, **options):
    pipe = tiny_pipelines.qwen_image_edit(VOCABULARY, TINY, **options)
    processor, _ = pipe.processor, pipe.register_modules(processor=None)
    pipe.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder / "processor")
    processor.images.save_pretrained(folder / "processor")
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    metadata = {"name": folder.name, "sampling": {"steps": 4, "guidance": 2.0}, "side": SIDE // 4, "source_side": SIDE}
    (folder / "advdmd.json").write_text(json.dumps(metadata))
    return folder


KINDS = {"edit": {"plus": False}, "edit-2509": {}, "edit-2511": {"zero_cond_t": True}}


@pytest.fixture(scope="module", params=KINDS)
def folder(tmp_path_factory, request):
    """A real pipeline of each kind with random weights."""
    return save(tmp_path_factory.mktemp("teacher") / request.param, **KINDS[request.param])


@pytest.fixture
def model(folder):
    return loading.load(str(folder))[0]


@pytest.fixture
def edits(pictures):
    return edits_of(PROMPTS, [pictures / f"before-{n}.png" for n in range(2)])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_teachers_sampler_is_the_stock_pipeline(model, edits, guidance):
    noise = draw_noise([0, 1], model.latent_shape, 1)
    ours = sample(model, model.net, edits, noise, SamplerConfig(steps=3, guidance_scale=guidance))
    for n, edit in enumerate(edits):
        theirs = model.pipe(
            Image.open(edit.sources[0].path),
            str(edit),
            negative_prompt=" " if guidance > 1 else None,
            true_cfg_scale=guidance,
            num_inference_steps=3,
            latents=pack(noise[0][[n]]),
            height=SIDE,
            width=SIDE,
            output_type="pt",
        ).images
        torch.testing.assert_close((ours[[n]] + 1) / 2, theirs, atol=1e-4, rtol=0)


def test_several_source_images_are_the_stock_pipelines(tmp_path, pictures):
    model, _ = loading.load(str(save(tmp_path / "plus", zero_cond_t=True)))
    files = [pictures / f"before-{n}.png" for n in range(2)]
    both, swapped, (one,) = edits_of(PROMPTS[:1], files), edits_of(PROMPTS[:1], files[::-1]), edits_of(PROMPTS[:1], files[:1])
    noise, how = draw_noise([0], model.latent_shape, 1), SamplerConfig(steps=2, guidance_scale=3.0)
    ours = sample(model, model.net, both, noise, how)
    theirs = model.pipe(
        [Image.open(f) for f in files],
        PROMPTS[0],
        negative_prompt=" ",
        true_cfg_scale=3.0,
        num_inference_steps=2,
        latents=pack(noise[0]),
        height=SIDE,
        width=SIDE,
        output_type="pt",
    ).images
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=1e-4, rtol=0)
    assert not torch.allclose(ours, sample(model, model.net, swapped, noise, how), atol=1e-3), "their order matters"
    mixed = sample(model, model.net, [*both, one], torch.cat([noise, noise], 1), how)
    torch.testing.assert_close(mixed[:1], ours, atol=1e-5, rtol=0)
    first, _ = loading.load(str(save(tmp_path / "first", plus=False)))
    with pytest.raises(ValueError, match="has 2 source images: a QwenImageEditPipeline takes one; give one, or use"):
        encode_prompts(first, both, "cpu")
    row = {"file_name": "after-0.png", "source_image": ["before-0.png", "before-1.png"], "text": PROMPTS[0]}
    pairs = shutil.copytree(pictures, tmp_path / "pairs")
    (pairs / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="has 2 source images: a QwenImageEditPipeline takes one; give one, or use"):
        encode(pairs, str(tmp_path / "first"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists(), "before any work"


def test_prompts_with_other_numbers_of_source_images_are_other_buckets(pictures, tmp_path, monkeypatch):
    """A student learns from all of them; what is encoded stays when a number comes or goes."""
    pairs = shutil.copytree(pictures, tmp_path / "pairs")
    rows = [json.loads(line) for line in (pairs / "metadata.jsonl").read_text().splitlines()]
    more = [rows[0] | {"source_image": ["before-0.png", "before-1.png"]}, rows[1] | {"source_image": ["before-1.png"]}]
    teacher, cache, encoded = save(tmp_path / "teacher"), tmp_path / "cache", []
    stock = QwenImageEdit.encode_edits
    monkeypatch.setattr(QwenImageEdit, "encode_edits", lambda self, e, *size: encoded.extend(e) or stock(self, e, *size))
    for found, new, most in (([rows[0]], 1, 1), ([*more, rows[0]], 2, 2), ([more[1], rows[0]], 0, 1), ([*more, rows[0]], 0, 2)):
        encoded.clear()
        (pairs / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
        assert encode(pairs, str(teacher), cache)
        data = BucketedCache(cache)
        assert (len(encoded), len(data.prompts), data.source_images) == (new, len(found), most)
    assert [(part.folder.name, len(part.prompts)) for part in data.parts] == [("32x32", 2), ("32x32-2-sources", 1)]
    backbone, _ = loading.load(str(teacher), encoders=False)
    batch_fn = data.load(backbone, BatchConfig(2, 2, 0)).batch_fn
    assert {batch_fn(i)[0].cond.source.shape[1] for i in range(20)} == {1, 2}
    words = [f"teacher={teacher}", f"data.folder={cache}", "iterations=4", "lora_rank=2", "base_bits=32", *SHORT]
    student = train.train(*resolve("qwen-image-edit-advdmd-4step-80gb", words), tmp_path / "run")
    assert loading.load(str(student))[0].edits
    with pytest.raises(ValueError, match="1 to 2 source images a prompt: all need one number"):
        read_prompts(pairs, edits=True)
    (pairs / "metadata.jsonl").write_text(json.dumps(rows[0] | {"source_image": ["before-0.png", None]}) + "\n")
    with pytest.raises(ValueError, match="line 1: a source image is None: give the name of a file, or a list of names"):
        encode(pairs, str(teacher), tmp_path / "other")
    (pairs / "metadata.jsonl").write_text(json.dumps(rows[0] | {"source_image": ["before-0.png", "none.png"]}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: there is no image 'none\.png'"):
        encode(pairs, str(teacher), tmp_path / "other")


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (832, 1216), (1344, 768)])
def test_source_images_have_the_stock_pipelines_size(height, width):
    theirs = pipeline_qwenimage_edit_plus.calculate_dimensions(1024 * 1024, width / height)
    assert size_of_area(1024, height, width) == theirs[::-1]


def test_teacher_and_discriminator_see_the_source(model, edits):
    cond = encode_prompts(model, edits, "cpu")
    other = Cond(cond.embeds, mask=cond.mask, source=cond.source.flip(0), null=cond.null)
    x, t = torch.randn(2, *model.latent_shape), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        for f in (lambda c: model.velocity(model.net, x, t, c), lambda c: model.features(model.net, x, t, c, [1])[0]):
            assert (f(cond) - f(other)).abs().max() > 1e-3
        tokens = (SIDE // 8) ** 2
        assert model.features(model.net, x, t, cond, [0])[0].shape == (2, tokens, model.hidden_size)


def test_guidance_keeps_the_source(model, edits):
    cond = encode_prompts(model, edits, "cpu")
    x, t = torch.randn(2, *model.latent_shape), torch.tensor([0.3, 0.8])
    empty = encode_prompts(model, [Edit(model.null_prompt, e.sources) for e in edits], "cpu")
    unused = cond[torch.tensor([0])]
    with torch.no_grad():
        v = Teacher(model, 3.0, unused)(x, t, cond)
        alone = [model.velocity(model.net, x, t, c) for c in (cond, empty)]
    torch.testing.assert_close(v, model.apply_guidance(*alone, 3.0), atol=1e-5, rtol=1e-4)


def test_one_source_image_of_an_early_cache_is_read(cache, model, edits, tmp_path):
    """Its latents have no dimension for several."""
    old = shutil.copytree(cache / "32x32", tmp_path / "old")
    wanted = EmbeddingCache(old).cond([0, 1])
    for file in old.glob("shard-*.safetensors"):
        tensors = load_file(file)
        tensors["source"] = tensors["source"][:, 0].contiguous()
        save_file(tensors, file)
        record = json.loads(file.with_suffix(".json").read_text())
        file.with_suffix(".json").write_text(json.dumps(record | {"sha256": file_hash(file)}))
    assert torch.equal(EmbeddingCache(old).cond([0, 1]).source, wanted.source)
    flat = {k: v[:, 0] if k == "source" else v for k, v in wanted.tensors().items()}
    assert torch.equal(Cond.from_tensors(flat).source, wanted.source)


def test_conditions_round_trip_through_tensors(model, edits):
    cond = encode_prompts(model, edits, "cpu")
    found = cond.tensors()
    assert set(found) == {"embeds", "mask", "source", "null_embeds", "null_mask"}
    again = Cond.from_tensors(found)
    assert all(torch.equal(v, again.tensors()[k]) for k, v in found.items())
    assert len(cond.to(torch.float64).null.embeds) == 2
    assert cond[torch.tensor([1])].null.embeds.shape[0] == 1


@pytest.fixture(scope="module")
def cache(folder, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "cache"
    assert encode(pictures, str(folder), out)
    return out


def test_a_cache_holds_sources_and_empty_prompts(cache, model, edits):
    found = EmbeddingCache(cache / "32x32")
    order = [found.prompts.index(p) for p in PROMPTS]
    ours, wanted = found.cond(order).tensors(), encode_prompts(model, edits, "cpu").tensors()
    for name, v in wanted.items():
        torch.testing.assert_close(ours[name].float(), v.bfloat16().float(), msg=name)


def test_one_prompt_edits_many_images_and_only_what_is_new_is_encoded(pictures, tmp_path, monkeypatch):
    folder, pairs = save(tmp_path / "teacher"), tmp_path / "pairs"
    pairs.mkdir()
    for n in range(3):
        Image.open(pictures / "before-0.png").rotate(30 * n).save(pairs / f"a{n}.png")
    rows = [{"file_name": "a0.png", "source_image": f"a{n}.png", "text": PROMPTS[0]} for n in range(2)]
    file = pairs / "metadata.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert encode(pairs, str(folder), tmp_path / "cache")
    assert EmbeddingCache(tmp_path / "cache/32x32").prompts == [PROMPTS[0]] * 2
    encoded = []
    stock = QwenImageEdit.encode_edits
    monkeypatch.setattr(QwenImageEdit, "encode_edits", lambda self, e, *size: encoded.append(e) or stock(self, e, *size))
    file.write_text("".join(json.dumps(r) + "\n" for r in [*rows, rows[0] | {"source_image": "a2.png"}]))
    assert encode(pairs, str(folder), tmp_path / "cache")
    assert [e.sources[0].path.name for (e,) in encoded] == ["a2.png"]
    found = EmbeddingCache(tmp_path / "cache/32x32")
    assert len(found.prompts) == len(set(found.prompt_hashes())) == 3
    encoded.clear()
    moved = pairs.rename(tmp_path / "moved")
    assert encode(moved, str(folder), tmp_path / "cache")
    assert not encoded, "a prompt is known by its words and its source's bytes"


@pytest.mark.parametrize("more", [["lora_rank=0"], ["lora_rank=2"]], ids=["whole", "adapter"])
def test_a_student_from_pairs_to_the_stock_pipeline(folder, cache, edits, pictures, tmp_path, more):
    words = [f"teacher={folder}", f"data.folder={cache}", "iterations=2", *SHORT, "sample_every=2", *more]
    recipe = "qwen-image-edit-advdmd-2step-80gb"
    student = train.train(*resolve(recipe, words), tmp_path / "run")
    assert list((tmp_path / "run/samples").glob("*.png"))
    backbone, sampler = loading.load(str(student))
    noise = draw_noise([0, 1], backbone.latent_shape, 2)
    pipe = DiffusionPipeline.from_pretrained(student, local_files_only=True, processor=None)
    pipe.processor = VisionProcessor.from_pretrained(student / "processor")  # the stock one needs torchvision
    pipe.set_progress_bar_config(disable=True)
    kwargs = json.loads((student / "advdmd.json").read_text())["stock_call"]
    torch.manual_seed(3)
    second_noise = torch.randn(1, 16, 16)
    torch.manual_seed(3)
    theirs = pipe(
        Image.open(edits[0].sources[0].path), PROMPTS[0], latents=pack(noise[0][:1]), output_type="latent", **kwargs
    ).images
    again = sample(backbone, backbone.net, edits[:1], torch.stack([noise[0][:1], unpack(second_noise, 8, 8)]), sampler)
    torch.testing.assert_close(again, backbone.decode(unpack(theirs, 8, 8)), atol=1e-5, rtol=1e-4)
    card = (student / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in card
    assert "load_image" in card
    nodes = json.loads((student / "comfyui_workflow.json").read_text())
    assert nodes["prompt"]["class_type"].startswith("TextEncodeQwenImageEdit")
    if more == ["lora_rank=2"]:  # the LoRA on the base, in diffusers' own keys
        base = DiffusionPipeline.from_pretrained(folder, local_files_only=True, processor=None)
        base.processor, base.scheduler = pipe.processor, pipe.scheduler
        base.set_progress_bar_config(disable=True)
        base.load_lora_weights(student)
        torch.manual_seed(3)
        torch.randn(1, 16, 16)
        torch.manual_seed(3)
        adapted = base(
            Image.open(edits[0].sources[0].path), PROMPTS[0], latents=pack(noise[0][:1]), output_type="latent", **kwargs
        ).images
        torch.testing.assert_close(adapted, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["edit-2509", "edit-2511"])
def test_twinflow_trains_edits(kind, pictures, tmp_path):
    teacher = save(tmp_path / "teacher", **KINDS[kind])
    encode(pictures, str(teacher), tmp_path / "cache")
    words = [f"teacher={teacher}", f"data.folder={tmp_path / 'cache'}", "iterations=1", "lora_rank=0", "device=cpu"]
    words += ["dtype=float32", "gradient_checkpointing=false", "threads=1", "algorithm.target_network=teacher"]
    student = train.train(*resolve("qwen-image-twinflow-2step-80gb", words), tmp_path / "run")
    assert loading.load(str(student))[0].edits


def test_buckets_of_several_aspect_ratios_have_source_images_of_their_ratio(pictures, tmp_path):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    rows = []
    for n, size in enumerate([(64, 64), (64, 40), (40, 64)]):
        for name in ("before", "after"):
            Image.open(pictures / f"{name}-0.png").resize(size).save(pairs / f"{name}-{n}.png")
        rows.append({"file_name": f"after-{n}.png", "source_image": f"before-{n}.png", "text": PROMPTS[0]})
    (pairs / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    teacher = save(tmp_path / "teacher")
    metadata = json.loads((teacher / "advdmd.json").read_text()) | {"source_side": 64}
    (teacher / "advdmd.json").write_text(json.dumps(metadata))
    assert encode(pairs, str(teacher), tmp_path / "cache", by_aspect=True)
    data = BucketedCache(tmp_path / "cache")
    assert len(data.parts) == 3
    for part in data.parts:
        height, width = size_of_area(64, *part.plan["size"])
        assert part.cond([0]).source.shape[-2:] == (height // 4, width // 4)
    backbone, _ = loading.load(str(teacher), encoders=False)
    shown = data.load(backbone, BatchConfig(1, 2, 0)).sample_cond
    assert shown.source.shape[-2:] == (16, 16), "of the square, as sample grids are"


def test_validation_prompts_are_encoded_with_their_source_images(folder, cache, pictures, tmp_path):
    prompts = read_prompts(pictures, edits=True)
    assert [str(p) for p in prompts] == PROMPTS
    _, r = resolve("qwen-image-edit-dmd2-2step-80gb", [f"teacher={folder}"])
    backbone, _ = loading.load(str(folder), encoders=False)
    for _ in range(2):  # encoded, then read
        cond = encoded_prompts(r, backbone, prompts, tmp_path)(prompts)
        full, _ = loading.load(str(folder), text_dtype=backbone.dtype)
        wanted = encode_prompts(full, prompts, "cpu").tensors()
        assert all(torch.allclose(v, wanted[k], atol=1e-6) for k, v in cond.tensors().items())
    (tmp_path / "bare.txt").write_text("a red circle\n")
    with pytest.raises(ValueError, match="'a red circle' has no source image"):
        read_prompts(tmp_path / "bare.txt", edits=True)


def test_what_has_no_source_image_is_refused(folder, pictures, tmp_path):
    name = str(folder)
    with pytest.raises(ValueError, match="edits images: give a source image with each prompt"):
        sample_command(name, PROMPTS, tmp_path / "a", device="cpu")
    (tmp_path / "p.txt").write_text("a red circle\n")
    with pytest.raises(ValueError, match=r"1 prompts have no source image, the first is 'a red circle'.*--source-column"):
        encode(tmp_path / "p.txt", name, tmp_path / "c", real_images="teacher")
    with pytest.raises(ValueError, match="here prompts have no source images"):
        generate_images(name, make_suite("mini-geneval", images=1), tmp_path / "e")
    with pytest.raises(ValueError, match=r"it needs data\.folder, from advdmd encode"):
        train.train(*resolve("mini-sd35-dmd2", [f"teacher={name}"]), tmp_path / "r")
    with pytest.raises(ValueError, match="--source: 3 images for 2 prompts"):
        edits_of(PROMPTS, [pictures / "before-0.png"] * 3)
    for prompts, files in ((PROMPTS, []), ([], [pictures / "before-0.png"])):
        with pytest.raises(ValueError, match="give one for all, or the same number for each"):
            edits_of(prompts, files)
    with pytest.raises(ValueError, match=r"there is no image .*none\.png"):
        edits_of(PROMPTS, [pictures / "none.png"])


def test_text_to_image_models_refuse_source_images(pictures, tmp_path):
    edits = edits_of(["a red circle"], [pictures / "before-0.png"])
    with pytest.raises(ValueError, match="edits no images: give prompts without source images"):
        sample_command("mini-sd35", edits, tmp_path / "a", device="cpu")
    with pytest.raises(ValueError, match="--source-column before: mini-sd35 does not edit images"):
        encode(pictures, "mini-sd35", tmp_path / "c", columns=Columns(source="before"))


def test_broken_source_images_are_named(folder, pictures, tmp_path):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for f in pictures.iterdir():
        (pairs / f.name).write_bytes(f.read_bytes())
    (pairs / "before-1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"before-1\.png cannot be read"):
        encode(pairs, str(folder), tmp_path / "c")
    (pairs / "before-1.png").unlink()
    with pytest.raises(ValueError, match=r"line 2: there is no image 'before-1\.png'"):
        encode(pairs, str(folder), tmp_path / "c")


def test_tokens_are_counted_by_version(folder):
    text = 512 + (37**2 - 14**2 if folder.name == "edit" else 0)
    net, *tokens = transformer(str(folder))
    assert tokens == [text, (SIDE // 16) ** 2]
    assert net.config.zero_cond_t == ("2511" in folder.name)
    assert transformer("Qwen/Qwen-Image-Edit-2511").source == 64 * 64
    r = resolve("qwen-image-edit-advdmd-4step-24gb")[1]
    one, two, three = (estimate(r, 512, source_images=n).total for n in (1, 2, 3))
    assert two - one == pytest.approx(three - two)
    assert two > one + 4e9, "what a further source image takes, by far most of it activations"


def test_the_compare_page_and_evaluation_by_the_stock_call_refuse_edits(folder):
    for load in (DemoModel.read, lambda name: DiffusersModel(name, DiffusersSampling())):
        with pytest.raises(ValueError, match="edits images, and here prompts have no source images"):
            load(str(folder))


def test_the_command_samples_an_edit(folder, pictures, tmp_path):
    words = ["sample", str(folder), PROMPTS[0], "--source", str(pictures / "before-0.png"), "--out", str(tmp_path / "o")]
    found = CliRunner().invoke(app, [*words, "--steps", "1", "--threads", "1", "--device", "cpu"])
    assert found.exit_code == 0, found.output
    with Image.open(tmp_path / "o/000.png") as image:
        assert image.size == (SIDE, SIDE)


def test_source_columns_of_tables_are_read(tmp_path, pictures):
    datasets = pytest.importorskip("datasets")
    kinds = {"input_image": datasets.Image(), "edit_prompt": datasets.Value("string"), "edited_image": datasets.Image()}
    row = [str(pictures / "before-0.png")], ["make it red"], [str(pictures / "after-0.png")]
    table = datasets.Dataset.from_dict(dict(zip(kinds, row, strict=True)), features=datasets.Features(kinds))
    table.save_to_disk(tmp_path / "saved")
    (found,) = read_captioned_images(tmp_path / "saved", Columns(caption="edit_prompt", edits=True))
    assert (found.image.column, found.sources[0].column) == ("edited_image", "input_image")
    assert isinstance(found.sources[0], ImagePlace)
    (found,) = read_captioned_images(tmp_path / "saved", Columns(caption="edit_prompt"))
    assert (found.image.column, found.sources) == ("input_image", ()), "the first, where sources are not wanted"
