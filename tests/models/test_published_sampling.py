"""A teacher without metadata of ours is sampled as it was published: its card's guidance, its scheduler's grid."""

import json

import numpy as np
import pytest
import torch

from advdmd.models import loading
from advdmd.models.diffusers_pipeline import DiffusersModel, DiffusersSampling
from advdmd.models.model_cards import card_sampling
from advdmd.models.qwen_image import pack
from advdmd.models.sampler import SamplerConfig, draw_noise, sample
from advdmd.recipes.published import MODELS
from tests.tiny_pipelines import FAMILIES

PROMPTS = ["a picture of a red circle"]
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift": 1.0}


def saved(pipe, folder, **scheduler):
    """A folder as others publish it, with the length and side that a tiny pipeline needs, and no sampling."""
    pipe.save_pretrained(folder)
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
    (folder / "advdmd.json").write_text(json.dumps({"t5_length": 0, "side": 8, "text_length": 12}))
    return folder


@pytest.mark.parametrize("scheduler", [{}, DYNAMIC, DYNAMIC | {"shift_terminal": 0.02}], ids=["static", "dynamic", "terminal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_the_stock_pipelines_at_its_own_defaults(family, scheduler, tmp_path):
    torch.manual_seed(0)
    folder = saved(FAMILIES[family](), tmp_path / family, **scheduler)
    backbone, sampler = loading.load(str(folder))
    assert sampler.shift is None
    sampler = sampler.changed(5, None)
    noise = draw_noise([0], backbone.latent_shape, 1)
    ours = sample(backbone, backbone.net, PROMPTS, noise, sampler)
    call = {"num_inference_steps": 5, "output_type": "pt", "height": 32, "width": 32, "latents": noise[0]}
    if family == "qwen":
        call |= {"latents": pack(noise[0]), "true_cfg_scale": sampler.guidance_scale, "negative_prompt": " "}
    elif family == "flux":
        call |= {"latents": pack(noise[0]), "guidance_scale": 3.5, "max_sequence_length": 12}
    elif family == "flux2":
        patches = backbone.pipe._patchify_latents(noise[0])
        call |= {"latents": patches, "guidance_scale": sampler.guidance_scale, "max_sequence_length": 12}
    elif family == "flux2-dev":
        patches = backbone.pipe._patchify_latents(noise[0])
        call |= {"latents": patches, "guidance_scale": 4.0, "max_sequence_length": 12}
    elif family == "z-image":
        call |= {"guidance_scale": sampler.guidance_scale - 1}
    else:
        call |= {"guidance_scale": sampler.guidance_scale, "max_sequence_length": 0}
    with torch.no_grad():
        theirs = backbone.pipe(prompt=PROMPTS, **call).images
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=2e-4, rtol=0)
    static = sample(backbone, backbone.net, PROMPTS, noise, SamplerConfig(steps=5, guidance_scale=sampler.guidance_scale))
    if (family, scheduler) != ("qwen", {}):  # whose own grid is the plain one
        assert not torch.allclose(ours, static, atol=1e-3), "and another grid is another image"


def test_guidance_and_steps_are_those_of_each_models_card():
    pipelines_of = {
        "SD3Transformer2DModel": "StableDiffusion3Pipeline",
        "QwenImageTransformer2DModel": "QwenImagePipeline",
        "FluxTransformer2DModel": "FluxPipeline",
        "Flux2Transformer2DModel": "Flux2KleinPipeline",
        "ZImageTransformer2DModel": "ZImagePipeline",
    }
    pipelines = {k: "QwenImageEditPlusPipeline" if m.edits else pipelines_of[m.transformer] for k, m in MODELS.items()}
    pipelines["flux2-dev"] = "Flux2Pipeline"
    found = {name: card_sampling(pipelines[name], m.config) for name, m in MODELS.items()}
    assert {k: (v.steps, v.guidance) for k, v in found.items()} == {
        "sd3-medium": (28, 7.0),
        "sd35-medium": (40, 4.5),
        "sd35-large": (28, 3.5),
        "qwen-image": (50, 4.0),
        "qwen-image-edit": (40, 4.0),
        "flux-dev": (50, 3.5),
        "flux2-klein-4b": (50, 4.0),
        "flux2-dev": (50, 4.0),
        "z-image": (50, 4.0),
    }
    assert all(MODELS[k].guidance == v.cfg for k, v in found.items()), "distillation guides by the card too"
    with pytest.raises(ValueError, match="SanaPipeline"):
        card_sampling("SanaPipeline", {})


@pytest.mark.parametrize(("family", "kwargs"), [("sd3", (28, 7.0)), ("sd35", (40, 4.5)), ("qwen", (50, 4.0))])
def test_evaluation_through_the_stock_pipeline_follows_the_card_too(family, kwargs, tmp_path):
    """A pipeline's own default is not its model's: SD3.5 Large would get guidance 7, Qwen-Image none."""
    pipe = FAMILIES[family]()
    pipe.save_pretrained(tmp_path / family)
    model = DiffusersModel(str(tmp_path / family), DiffusersSampling())
    scale = model.call_kwargs.get("true_cfg_scale", model.call_kwargs.get("guidance_scale"))
    assert (model.call_kwargs["num_inference_steps"], scale) == kwargs
    assert model.nfe == 2 * kwargs[0]
    assert DiffusersModel(str(tmp_path / family), DiffusersSampling(steps=3, guidance_scale=1.0)).nfe == 3


def test_guidance_that_a_transformer_takes_is_one_evaluation_and_no_classifier_free_guidance(tmp_path):
    FAMILIES["flux"]().save_pretrained(tmp_path / "flux")
    model = DiffusersModel(str(tmp_path / "flux"), DiffusersSampling())
    assert (model.call_kwargs, model.nfe) == ({"num_inference_steps": 50, "guidance_scale": 3.5}, 50)
    other = DiffusersModel(str(tmp_path / "flux"), DiffusersSampling(steps=3, guidance_scale=7.0))
    assert (other.call_kwargs, other.nfe) == ({"num_inference_steps": 3, "guidance_scale": 7.0}, 3)


def test_what_the_teacher_generates_for_training_follows_its_card_and_the_users_options(tmp_path):
    from advdmd.commands.encode import encode

    folder = saved(FAMILIES["sd3"](), tmp_path / "sd3")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a picture of a red circle\n")
    encode(prompts, str(folder), tmp_path / "cache", real_images="teacher", steps=2)
    real_images = json.loads((tmp_path / "cache/plan.json").read_text())["reals"]
    assert (real_images["steps"], real_images["guidance"], real_images["shift"]) == (2, 7.0, None)
    with pytest.raises(ValueError, match="--real-images teacher"):
        encode(prompts, str(folder), tmp_path / "other", guidance=2.0)


def test_a_student_has_a_shift():
    with pytest.raises(ValueError, match="shift=None"):
        SamplerConfig(steps=4, eta=1.0, shift=None)
    assert np.isclose(SamplerConfig(steps=4, shift=None).nfe, 4)
