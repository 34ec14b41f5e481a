"""FLUX.1 as a backbone, against the stock pipeline: embedded guidance, positions, a student that runs there."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from advdmd import flow
from advdmd.commands import train
from advdmd.mini.world.caption import VOCABULARY
from advdmd.models import loading
from advdmd.models.flux import Flux
from advdmd.models.lora_files import read_lora
from advdmd.models.sampler import SamplerConfig, draw_noise, sample
from advdmd.recipes.registry import resolve
from advdmd.rollout import rollout
from advdmd.transitions import renoise
from tests.conftest import TINY
from tests.tiny_pipelines import flux

PROMPTS = ["a picture of a red circle", "Two small red circles. A large blue star. Circles above star. Gray background."]
METADATA = {"name": "tiny-flux", "sampling": {"steps": 4, "guidance": 1.0}, "side": 8, "text_length": 12}
SMALL = [
    "iterations=3", "algorithm.steps=2", "algorithm.group_size=2", "prompts_per_step=2", "data.num_prompts=6",
    "data.images_per_prompt=1", "algorithm.dm_only_iterations=1", "algorithm.policy_ramp_iterations=0", "guidance_scale=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "tiny-flux"
    flux(VOCABULARY, TINY).save_pretrained(folder)
    (folder / "advdmd.json").write_text(json.dumps(METADATA))
    return folder


@pytest.fixture
def backbone(folder):
    return loading.load(str(folder))[0]


def test_embeddings_are_the_stock_pipelines(backbone):
    with torch.no_grad():
        cond = backbone.encode_text(backbone.tokenize(PROMPTS))
        embeds, pooled, _ = backbone.pipe.encode_prompt(list(PROMPTS), None, max_sequence_length=12)
    torch.testing.assert_close(cond.embeds, embeds)
    torch.testing.assert_close(cond.pooled, pooled)
    assert cond.mask is None, "padding is attended to"
    assert backbone.text_lengths(PROMPTS)[0] < backbone.text_lengths(PROMPTS)[1]


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_the_teachers_sampler_is_the_stock_pipeline(folder, guidance):
    """A wrong position, time or guidance number would all differ; so would another grid than the scheduler's own."""
    pipe = loading.load_pipeline(folder)
    backbone = Flux(pipe, side=8, guidance=guidance, text_length=12)
    noise = draw_noise([0, 1], backbone.latent_shape, 1)
    ours = sample(backbone, backbone.net.eval(), PROMPTS, noise, SamplerConfig(steps=4, shift=None))
    size = {"height": 8 * pipe.vae_scale_factor, "width": 8 * pipe.vae_scale_factor, "max_sequence_length": 12}
    packed = pipe._pack_latents(noise[0], 2, 4, 8, 8)
    theirs = pipe(
        list(PROMPTS), guidance_scale=guidance, num_inference_steps=4, latents=packed, output_type="pt", **size
    ).images
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=2e-5, rtol=0)
    assert ours.std() > 0.01


def test_guidance_is_a_number_for_dev_and_none_for_schnell(folder, backbone):
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), backbone.encode_text(backbone.tokenize(PROMPTS))
    other = Flux(backbone.pipe, side=8, guidance=7.0, text_length=12)
    assert not torch.allclose(backbone.velocity(backbone.net, x, t, cond), other.velocity(backbone.net, x, t, cond))
    schnell = Flux(flux(VOCABULARY, TINY, guidance_embeds=False), side=8, text_length=12)
    assert schnell.guidance is None
    assert "guidance_scale" not in schnell.pipeline_call_kwargs(4)
    assert schnell.velocity(schnell.net, x, t, cond).shape == x.shape


def test_a_published_folder_is_sampled_as_its_card_says(tmp_path):
    flux(VOCABULARY, TINY).save_pretrained(tmp_path / "dev")
    assert loading.default_sampling(tmp_path / "dev") == SamplerConfig(steps=50, shift=None, guidance_scale=1.0)


def test_features_are_image_tokens_of_both_kinds_of_blocks(backbone):
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), backbone.encode_text(backbone.tokenize(PROMPTS))
    n = len(backbone.blocks(backbone.net))
    assert n == TINY.layers + 2
    found = backbone.features(backbone.net, x, t, cond, [0, n - 1])
    assert [f.shape for f in found] == [(2, 16, backbone.hidden_size)] * 2
    assert not torch.allclose(found[0], backbone.features(backbone.net, x.flip(-1), t, cond, [0])[0])


def test_latents_round_trip(backbone):
    pixels = backbone.decode(torch.randn(2, 4, 8, 8))
    mean = backbone.vae.encode(pixels).latent_dist.mean
    config = backbone.vae.config
    torch.testing.assert_close(backbone.encode(pixels) / config.scaling_factor + config.shift_factor, mean)
    with pytest.raises(ValueError, match="reads latents two by two"):
        Flux(backbone.pipe, 7)


@pytest.mark.parametrize("words", [[], ["lora_rank=4", "gradient_checkpointing=true"]], ids=["whole", "adapters"])
def test_a_two_step_student_runs_in_the_stock_pipeline(words, folder, tmp_path):
    student = train.train(*resolve("mini-sd35-advdmd", [*SMALL, f"teacher={folder}", *words]), tmp_path / "run")
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(student, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    backbone, sampler = loading.load(str(student))
    call = json.loads((student / "advdmd.json").read_text())["stock_call"]
    assert call == {"num_inference_steps": 2, "guidance_scale": 3.5, "height": 64, "width": 64, "max_sequence_length": 12} | {
        k: call[k] for k in ("height", "width")
    }
    first = torch.randn(1, 4, 8, 8)
    torch.manual_seed(11)
    noise = torch.stack([first, torch.randn(1, 16, 16).reshape(1, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 4, 8, 8)])
    torch.manual_seed(11)
    packed = pipe._pack_latents(first, 1, 4, 8, 8)
    theirs = pipe(PROMPTS[0], latents=packed, output_type="latent", **call).images
    cond = backbone.encode_text(backbone.tokenize(PROMPTS[:1]))
    trajectory = rollout(
        lambda x, t, c: backbone.velocity(backbone.net, x, t, c), cond, noise, flow.grid(2, sampler.shift), renoise
    )
    torch.testing.assert_close(pipe._pack_latents(trajectory.x[-1], 1, 4, 8, 8), theirs, atol=1e-5, rtol=1e-4)

    nodes = json.loads((student / "comfyui_workflow.json").read_text())
    assert nodes["shift"] == {
        "class_type": "ModelSamplingAuraFlow",
        "inputs": {**nodes["shift"]["inputs"], "shift": sampler.shift},
    }
    assert nodes["tokens"]["inputs"]["min_length"] == backbone.max_text_length, "the text length of training"
    assert nodes["sample"]["inputs"]["positive"] == ["guidance", 0]
    if words:
        base = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        base.load_lora_weights(student)
        base.fuse_lora()
        base.unload_lora_weights()
        fused = pipe.transformer.state_dict()
        for k, v in base.transformer.state_dict().items():
            torch.testing.assert_close(v, fused[k], rtol=1e-4, atol=1e-5)


def test_black_forest_labs_lora_names_are_mapped_as_diffusers_converts_them(tmp_path):
    """Every linear layer of Black Forest Labs' own FLUX, against diffusers' conversion of whole weights."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    with torch.device("meta"):
        net = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    d, g = net.inner_dim, torch.Generator().manual_seed(0)
    shapes = {
        "img_in": (d, 64),
        "txt_in": (d, 4096),
        "final_layer.linear": (64, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    shapes |= {f"{k}.in_layer": (d, n) for k, n in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256))}
    shapes |= {f"{k}.out_layer": (d, d) for k in ("time_in", "vector_in", "guidance_in")}
    double = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.0": (4 * d, d), "mlp.2": (d, 4 * d), "mod.lin": (6 * d, d)}
    shapes |= {f"double_blocks.0.{side}_{k}": shape for side in ("img", "txt") for k, shape in double.items()}
    single = {"linear1": (7 * d, d), "linear2": (d, 5 * d), "modulation.lin": (3 * d, d)}
    shapes |= {f"single_blocks.0.{k}": shape for k, shape in single.items()}
    lora, rows = {}, {}  # the conversion splits and swaps rows, so those of B stand for a weight's
    for name, (out, columns) in shapes.items():
        flat, b = f"lora_unet_{name.replace('.', '_')}", torch.randn(out, 2, generator=g)
        lora |= {f"{flat}.lora_down.weight": torch.zeros(2, columns), f"{flat}.lora_up.weight": b}
        rows |= {f"{name}.weight": b, f"{name}.bias": torch.zeros(out)}
    norms = [f"double_blocks.0.{s}_attn.norm" for s in ("img", "txt")] + ["single_blocks.0.norm"]
    rows |= {f"{norm}.{k}_norm.scale": torch.zeros(1) for norm in norms for k in ("query", "key")}
    expected = convert_flux_transformer_checkpoint_to_diffusers(rows)
    save_file(lora, tmp_path / "a.safetensors")
    found = read_lora(str(tmp_path / "a.safetensors"), net).products
    assert set(found) == {k for k, m in net.named_modules() if isinstance(m, nn.Linear)}
    for k, (_, b) in found.items():
        assert torch.equal(b, expected[f"{k}.weight"]), k
