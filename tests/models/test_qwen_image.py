"""Qwen-Image as a backbone, against the stock pipeline."""

import copy
import json

import pytest
import torch

from advdmd import flow
from advdmd.commands import train
from advdmd.mini import pipelines
from advdmd.mini.world.caption import VOCABULARY
from advdmd.models import loading
from advdmd.models.networks import Teacher
from advdmd.models.qwen_image import QwenImage, pack, unpack, use_2d_convs
from advdmd.models.sampler import SamplerConfig, draw_noise, sample
from advdmd.recipes.registry import resolve
from advdmd.rollout import rollout
from advdmd.transitions import renoise
from advdmd.types import Cond
from tests.conftest import TINY

PROMPTS = ["a picture of a red circle", "Two small red circles. A large blue star. Circles above star. Gray background."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A real QwenImagePipeline folder with random weights."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny-qwen"
    pipelines.qwen_image(VOCABULARY, TINY).save_pretrained(folder)
    metadata = {"name": "tiny-qwen", "sampling": {"steps": 4, "guidance": 2.0}, "side": 8}
    (folder / "advdmd.json").write_text(json.dumps(metadata))
    return folder


@pytest.fixture
def qwen(folder):
    return loading.load(str(folder))[0]


def test_embeddings_and_masks_are_the_stock_pipelines(qwen):
    with torch.no_grad():
        cond = qwen.encode_text(qwen.tokenize(PROMPTS))
        theirs, mask = qwen.pipe.encode_prompt(PROMPTS)
    assert torch.equal(cond.embeds, theirs)
    assert torch.equal(cond.mask, mask)
    assert cond.pooled is None


def test_every_word_is_one_token_and_the_dropped_part_of_the_template_has_34(qwen):
    tokenizer = qwen.pipe.tokenizer
    for word in VOCABULARY:
        for text in (f" {word}", word.capitalize(), f" {word.capitalize()}"):
            assert len(tokenizer(text).input_ids) == 1, text
    assert qwen.pipe.prompt_template_encode == pipelines.QWEN_TEMPLATE
    assert (
        len(tokenizer(pipelines.QWEN_TEMPLATE.partition("{}")[0]).input_ids)
        == qwen.template_tokens
        == qwen.pipe.prompt_template_encode_start_idx
    )


def test_a_tokenizer_that_splits_the_template_otherwise_is_refused(qwen):
    qwen.pipe.tokenizer = pipelines.qwen_tokenizer(VOCABULARY, "{}")
    with pytest.raises(ValueError, match="drops 34"):
        QwenImage(qwen.pipe, 8)


def test_packing_is_the_stock_pipelines_and_inverts(qwen):
    x = torch.randn(3, 4, 8, 6)
    assert torch.equal(pack(x), qwen.pipe._pack_latents(x, 3, 4, 8, 6))
    assert torch.equal(unpack(pack(x), 8, 6), x)


def test_padding_does_not_change_the_velocity(qwen):
    cond = qwen.encode_text(qwen.tokenize(PROMPTS[:1]))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.6])
    both = Cond.cat([cond, cond.padded(40)])
    with torch.no_grad():
        v = qwen.velocity(qwen.net, x, t, cond)
        padded = qwen.velocity(qwen.net, x[[0, 0]], t[[0, 0]], both)
    torch.testing.assert_close(padded, v[[0, 0]], atol=1e-5, rtol=1e-4)


def test_times_are_cast_as_the_pipeline_casts_them(qwen):
    timesteps = []
    hook = qwen.net.register_forward_pre_hook(lambda m, a, kw: timesteps.append(kw["timestep"]), with_kwargs=True)
    cond = qwen.encode_text(qwen.tokenize(PROMPTS[:1]))
    t = torch.tensor([0.75])  # where rounding t and rounding 1000 t differ
    qwen.net.bfloat16()
    half = QwenImage(qwen.pipe, 8)
    assert half.velocity(half.net, torch.randn(1, 4, 8, 8), t, cond).dtype == torch.float32
    hook.remove()
    assert torch.equal(timesteps[0], (t * 1000).bfloat16() / 1000)
    assert not torch.equal(timesteps[0], t.bfloat16())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_teachers_sampler_is_the_stock_pipeline(qwen, guidance):
    noise = draw_noise([0, 1], qwen.latent_shape, 1)
    ours = sample(qwen, qwen.net, PROMPTS, noise, SamplerConfig(steps=4, guidance_scale=guidance))
    theirs = qwen.pipe(
        PROMPTS,
        negative_prompt=" " if guidance > 1 else None,
        true_cfg_scale=guidance,
        num_inference_steps=4,
        latents=pack(noise[0]),
        height=32,
        width=32,
        output_type="pt",
    ).images
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=2e-5, rtol=0)


def test_guidance_keeps_the_length_of_every_token(qwen):
    v, v_null = torch.randn(2, 2, 4, 8, 8)
    out = qwen.apply_guidance(v, v_null, 4.0)
    torch.testing.assert_close(pack(out).norm(dim=-1), pack(v).norm(dim=-1))
    torch.testing.assert_close(qwen.apply_guidance(v, v_null, 1.0), v)


def test_a_guided_teacher_pads_the_empty_prompt(qwen):
    null = qwen.encode_text(qwen.tokenize([""]))
    cond = qwen.encode_text(qwen.tokenize(PROMPTS))
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    with torch.no_grad():
        v = Teacher(qwen, 3.0, null)(x, t, cond)
        alone = [qwen.velocity(qwen.net, x, t, c) for c in (cond, null[torch.zeros(2, dtype=torch.long)])]
    torch.testing.assert_close(v, qwen.apply_guidance(*alone, 3.0), atol=1e-5, rtol=1e-4)


def test_latents_round_trip_through_the_configured_statistics(qwen):
    qwen.vae.register_to_config(latents_mean=[1.0, 0.0, -1.0, 0.5], latents_std=[2.0, 1.0, 0.5, 1.0])
    z = torch.randn(2, 4, 8, 8)
    mean, std = qwen._statistics(z)
    with torch.no_grad():
        plain = qwen.vae.decode((z * std + mean)[:, :, None]).sample[:, :, 0].clamp(-1, 1)
        assert torch.equal(qwen.decode(z), plain)
        encoded = qwen.vae.encode(plain[:, :, None]).latent_dist.mean[:, :, 0]
        torch.testing.assert_close(qwen.encode(plain) * std + mean, encoded)


def test_an_image_is_a_video_of_one_frame(qwen):
    torch.manual_seed(0)
    stock = pipelines.qwen_autoencoder(TINY)
    quick = use_2d_convs(copy.deepcopy(stock))
    again = copy.deepcopy(quick)  # a copy uses its own weights
    for p in quick.parameters():
        p.data.zero_()
    frame, video = torch.rand(2, 3, 1, 32, 32), torch.rand(1, 3, 5, 32, 32)
    with torch.no_grad():
        for x in (frame, video):
            z = stock.encode(x).latent_dist.mean
            torch.testing.assert_close(again.encode(x).latent_dist.mean, z, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(again.decode(z).sample, stock.decode(z).sample, atol=1e-5, rtol=1e-5)
    calls = (module for module in again.modules() if isinstance(module, torch.nn.Conv3d))
    assert all(module.forward.__func__ is not type(module).forward for module in calls)


def test_features_are_image_tokens(qwen):
    cond = qwen.encode_text(qwen.tokenize(PROMPTS))
    found = qwen.features(qwen.net, torch.randn(2, 4, 8, 8), torch.rand(2), cond, [0, 1])
    assert [f.shape for f in found] == [(2, 16, qwen.hidden_size)] * 2


@pytest.mark.parametrize("recipe", ["mini-sd35-advdmd", "mini-sd35-dmd2"])
def test_a_two_step_student_runs_in_the_stock_pipeline_with_its_steps_alone(recipe, folder, tmp_path):
    words = [
        "iterations=2",
        "algorithm.steps=2",
        "algorithm.group_size=2",
        "prompts_per_step=2",
        "data.num_prompts=6",
        "data.images_per_prompt=1",
    ]
    words += ["algorithm.dm_only_iterations=0", "algorithm.policy_ramp_iterations=0"] if recipe.endswith("advdmd") else []
    student = train.train(*resolve(recipe, [*words, f"teacher={folder}"]), tmp_path / "run")
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(student, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    backbone, sampler = loading.load(str(student))
    cond = backbone.encode_text(backbone.tokenize(PROMPTS[:1]))
    first = torch.randn(1, 4, 8, 8)
    torch.manual_seed(11)
    noise = torch.stack([first, unpack(torch.randn(1, 16, 16), 8, 8)])
    torch.manual_seed(11)
    theirs = pipe(PROMPTS[0], num_inference_steps=2, latents=pack(first), height=32, width=32, output_type="latent").images
    trajectory = rollout(
        lambda x, t, c: backbone.velocity(backbone.net, x, t, c), cond, noise, flow.grid(2, sampler.shift), renoise
    )
    assert torch.equal(pack(trajectory.x[-1]), theirs)
