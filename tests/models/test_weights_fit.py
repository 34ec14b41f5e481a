"""A pipeline whose files lack, misname or add weights is refused, part by part, before anything runs."""

import json

import pytest
from safetensors.torch import load_file, save_file

from advdmd.models import loading
from advdmd.models.diffusers_pipeline import DiffusersModel, DiffusersSampling
from tests.tiny_pipelines import save_teacher

FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "text_encoder_3": "model.safetensors",
}


@pytest.fixture
def pipeline(tmp_path):
    return save_teacher(tmp_path / "pipe")


def change(file, f):
    tensors = load_file(file)
    save_file(f(tensors), file, {"format": "pt"})


def without_some(tensors):
    gone = [k for k in tensors if "norm" not in k and "embed" not in k and "shared" not in k][:2]
    return {k: v for k, v in tensors.items() if k not in gone}


@pytest.mark.parametrize("part", FILES)
def test_missing_weights_of_any_part_are_named(pipeline, part):
    change(pipeline / part / FILES[part], without_some)
    with pytest.raises(ValueError, match=rf"{part} does not hold the weights of .*missing keys, such as .*fetch or convert"):
        loading.load(str(pipeline))
    (pipeline / "advdmd.json").unlink()
    with pytest.raises(ValueError, match=rf"{part} does not hold the weights of"):
        DiffusersModel(str(pipeline), DiffusersSampling())


def test_a_lora_that_was_not_unloaded_is_named_as_such(pipeline):
    rename = lambda k: k.replace(".to_q.", ".to_q.base_layer.")  # noqa: E731
    change(pipeline / "transformer" / FILES["transformer"], lambda t: {rename(k): v for k, v in t.items()})
    with pytest.raises(ValueError, match=r"fuse_lora\(\) and unload_lora_weights\(\)"):
        loading.load(str(pipeline))


def test_unexpected_weights_are_refused(pipeline):
    change(pipeline / "transformer" / FILES["transformer"], lambda t: t | {"more": next(iter(t.values())).clone()})
    with pytest.raises(ValueError, match="1 unexpected keys, such as more"):
        loading.load(str(pipeline))


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_folder_that_has_a_half_precision_variant_alone_is_read(pipeline, variant):
    whole = loading.load(str(pipeline))[0]
    for part, file in FILES.items():
        stem, _, end = file.partition(".")
        (pipeline / part / file).rename(pipeline / part / f"{stem}.{variant}.{end}")
    again = loading.load(str(pipeline))[0]
    a, b = whole.net.state_dict(), again.net.state_dict()
    assert all((a[k] == b[k]).all() for k in a)


@pytest.mark.parametrize("gone", ["text_encoder_3", "tokenizer_3"])
def test_without_one_of_t5s_two_halves_a_pipeline_has_no_t5(pipeline, gone):
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps(index | {gone: [None, None]}))
    backbone = loading.load(str(pipeline))[0]
    assert len(backbone.encoders) == 2
