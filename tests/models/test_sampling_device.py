"""Images are generated on the device and in the type that were asked for, whatever kind of pipeline the model is."""

import json

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from advdmd.cli import main
from advdmd.commands.evaluate import generate_images, is_native
from advdmd.mini.suites import MiniSuite
from advdmd.models import loading
from tests.tiny_pipelines import sd3_with_t5

COMMAND = typer.main.get_command(main.app)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A student as this package exports one of a published model: with T5, 16-bit transformer and encoders, its metadata."""
    folder = tmp_path_factory.mktemp("published") / "student"
    pipe = sd3_with_t5()
    pipe.transformer.to(torch.bfloat16)
    loading.save_pipeline(pipe, folder, {"sampling": {"steps": 2, "shift": 3.0, "eta": 1.0}, "t5_length": 6})
    return folder


def test_a_student_of_a_published_model_is_sampled_natively_and_a_plain_folder_is_not(published, tmp_path):
    sd3_with_t5().save_pretrained(tmp_path / "plain")
    assert is_native(str(published))
    assert is_native("mini-sd35")
    assert not is_native(str(tmp_path / "plain"))
    assert not is_native("stabilityai/stable-diffusion-3.5-medium")


@pytest.mark.parametrize(("dtype", "kind"), [("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_the_type_reaches_transformer_and_encoders_and_the_manifest(published, tmp_path, dtype, kind):
    backbone, _ = loading.load_for_sampling(str(published), "cpu", dtype)
    modules = (backbone.net, *backbone.encoders)
    assert {p.dtype for m in modules for p in m.parameters()} == {getattr(torch, kind)}
    assert {p.dtype for p in backbone.vae.parameters()} == {torch.float32}
    suite = MiniSuite("mini-geneval", images_per_task=1, prompts_per_task=1)
    generate_images(str(published), suite, tmp_path, device="cpu", dtype=dtype)
    record = json.loads((tmp_path / "manifest.json").read_text())
    assert record.get("dtype", "float32") == kind
    assert len(list(tmp_path.rglob("*.png"))) == 6


def test_bfloat16_images_are_near_those_of_float32(published, tmp_path):
    images = []
    for dtype in ("float32", "bfloat16"):
        COMMAND.main(
            ["sample", str(published), "a red circle", "--out", str(tmp_path / dtype), "--device", "cpu", "--dtype", dtype],
            standalone_mode=False,
        )
        images.append(np.asarray(Image.open(tmp_path / dtype / "000.png"), float))
    assert 0 < np.abs(images[0] - images[1]).mean() < 8


def test_the_stored_type_is_read_from_the_file(published):
    assert loading.stored_dtype(published) == torch.bfloat16
    assert loading.stored_dtype(loading.shipped_or_path("mini-sd35")) == torch.float32


def test_a_sharded_transformer_has_a_hash(tmp_path):
    pipe = sd3_with_t5()
    pipe.save_pretrained(tmp_path / "one")
    pipe.transformer.save_pretrained(tmp_path / "many/transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "many/transformer").glob("*.safetensors"))) > 1
    assert loading.weights_hash(tmp_path / "many") != loading.weights_hash(tmp_path / "one")


def test_an_unknown_type_or_a_missing_gpu_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="dtype='int8': one of auto, float32, bfloat16, float16"):
        loading.load_for_sampling("mini-sd35", "cpu", "int8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no such GPU here"):
            loading.load_for_sampling("mini-sd35", "cuda")
