"""The backbone against the stock pipeline, and the rules of the models."""

import copy

import pytest
import torch

from advdmd import flow
from advdmd.mini import pipelines
from advdmd.mini.world.caption import VOCABULARY
from advdmd.models import loading
from advdmd.models.discriminator import DiscriminatorConfig, DiscriminatorHeads, scale_gradient
from advdmd.models.networks import Teacher, no_param_grad
from advdmd.models.sampler import SamplerConfig, draw_noise, sample
from advdmd.models.sd3 import SD3
from advdmd.rollout import rollout
from advdmd.transitions import cps
from advdmd.types import Batch, Cond
from tests.conftest import TINY

PROMPTS = ["a picture of a red circle", "Two small red circles. A large blue star. Circles above star. Gray background."]


def test_embeddings_are_the_stock_pipelines(backbone):
    with torch.no_grad():
        cond = backbone.encode_text(backbone.tokenize(PROMPTS))
        theirs, _, pooled, _ = backbone.pipe.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
    assert torch.equal(cond.embeds, theirs)
    assert torch.equal(cond.pooled, pooled)


def test_every_word_is_one_token_and_the_end_id_is_not_two(backbone):
    tokenizer = backbone.pipe.tokenizer
    for word in VOCABULARY:
        assert len(tokenizer(word).input_ids) == 3, word
    assert tokenizer.eos_token_id != 2


def test_the_teachers_sampler_is_the_stock_pipeline_to_the_bit(backbone):
    noise = draw_noise([0, 1], backbone.latent_shape, 1)
    ours = sample(backbone, backbone.net, PROMPTS, noise, SamplerConfig(steps=4, guidance_scale=3.0))
    with torch.no_grad():
        theirs = backbone.pipe(
            PROMPTS,
            sigmas=[1.0, 0.75, 0.5, 0.25],
            guidance_scale=3.0,
            latents=noise[0],
            height=32,
            width=32,
            max_sequence_length=0,
            output_type="pt",
        ).images
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=1e-5, rtol=0)


def test_features_are_the_blocks_own_outputs_and_the_rest_is_not_run(backbone):
    x, t = torch.randn(2, *backbone.latent_shape), torch.rand(2)
    cond = backbone.encode_text(backbone.tokenize(PROMPTS))
    ran = []
    blocks = backbone.blocks(backbone.net)
    handle = blocks[1].register_forward_pre_hook(lambda *a: ran.append(1))
    (first,) = backbone.features(backbone.net, x, t, cond, [0])
    assert not ran
    both = backbone.features(backbone.net, x, t, cond, [0, 1])
    handle.remove()
    assert first.shape == (2, 16, backbone.hidden_size)
    assert torch.equal(first, both[0])
    assert not any(b._forward_hooks for b in blocks)


def test_teacher_with_guidance_is_one_double_batch(backbone):
    x, t = torch.randn(2, *backbone.latent_shape), torch.rand(2)
    with torch.no_grad():
        cond, null = backbone.encode_text(backbone.tokenize(PROMPTS)), backbone.encode_text(backbone.tokenize([""]))
        v = backbone.velocity(backbone.net, x, t, cond)
        n = backbone.velocity(backbone.net, x, t, null[torch.tensor([0, 0])])
        torch.testing.assert_close(Teacher(backbone, 3.0, null)(x, t, cond), flow.guide(v, n, 3.0), atol=1e-5, rtol=1e-4)
        assert torch.equal(Teacher(backbone, 1.0, null)(x, t, cond), v)
    with pytest.raises(ValueError, match=r"guidance_scale=0\.5"):
        Teacher(backbone, 0.5, null)


def test_latents_round_trip_through_the_configured_scale(backbone):
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        z = backbone.encode(pixels)
        raw = backbone.vae.encode(pixels).latent_dist.mean
        expected = backbone.vae.decode(raw).sample.clamp(-1, 1)
        torch.testing.assert_close(backbone.decode(z), expected, atol=1e-5, rtol=1e-5)


def test_an_images_noise_does_not_depend_on_its_batch(backbone):
    sampler, keys = SamplerConfig(steps=2, eta=1.0), ["a", "b", "c"]
    noise = draw_noise(keys, backbone.latent_shape, 2)
    assert torch.equal(noise[:, 1:2], draw_noise(["b"], backbone.latent_shape, 2))
    prompts = [PROMPTS[0]] * 3
    whole, parts = (sample(backbone, backbone.net, prompts, noise, sampler, batch=b) for b in (3, 1))
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"steps": 4, "guidance_scale": 0.0},
        {"steps": 4, "eta": 1.0, "guidance_scale": 2.0},
        {"steps": 4, "eta": 3.0},
    ],
)
def test_bad_sampling_is_refused(bad):
    with pytest.raises(ValueError, match=r"steps|guidance|eta"):
        SamplerConfig(**bad)


def test_evaluations_count_guidance_twice():
    assert (SamplerConfig(steps=40, guidance_scale=4.0).nfe, SamplerConfig(steps=4, eta=1.0).nfe) == (80, 4)


@pytest.mark.parametrize("sd35", [False, True])
def test_both_generations_of_sd3_are_built_with_their_own_parts(sd35):
    net = pipelines.sd3(
        VOCABULARY, pipelines.MiniConfig(width=32, layers=2, text_width=32, vae_channels=(4, 4, 8)), sd35=sd35
    ).transformer
    names = [n for n, _ in net.named_parameters()]
    assert any("attn2" in n for n in names) == sd35
    assert any("norm_q" in n for n in names) == sd35


def test_a_deeper_text_encoder_gives_the_same_embeddings_until_it_is_trained(backbone, tmp_path):
    ids = backbone.tokenize(["a picture of a red circle", ""])
    before = backbone.encode_text(ids)
    pipelines.add_text_layer(backbone.pipe)
    after = backbone.encode_text(ids)
    assert torch.equal(before.embeds, after.embeds)
    assert torch.equal(before.pooled, after.pooled)
    backbone.pipe.save_pretrained(tmp_path)
    assert torch.equal(SD3(loading.load_pipeline(tmp_path), 0).encode_text(ids).embeds, after.embeds)


def test_an_sd3_begins_near_the_sd35_it_is_made_from(backbone):
    """Without dual attention the two differ only by the norms of queries and keys, for which a constant stands in."""
    net = copy.deepcopy(backbone.net)
    for block in net.transformer_blocks:
        if block.use_dual_attention:
            torch.nn.init.zeros_(block.attn2.to_out[0].weight)
            torch.nn.init.zeros_(block.attn2.to_out[0].bias)
    x, t, cond = (
        torch.randn(4, *backbone.latent_shape),
        torch.rand(4),
        backbone.encode_text(backbone.tokenize(["a red circle"] * 4)),
    )
    expected = backbone.velocity(net, x, t, cond)
    new = pipelines.as_sd3(backbone.pipe).transformer
    assert new.config.qk_norm is None
    assert not any(b.use_dual_attention for b in new.transformer_blocks)
    fresh = pipelines.sd3(VOCABULARY, TINY, sd35=False, seed=5).transformer
    off, far = ((backbone.velocity(n, x, t, cond) - expected).square().mean() for n in (new, fresh))
    assert off < 0.05 * far


@pytest.mark.parametrize("bad", [{"width": 40}, {"text_width": 0}, {"patch": 3}])
def test_sizes_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        pipelines.MiniConfig(**bad)


def test_what_is_not_a_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a shipped model"):
        loading.load(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="FluxPipeline"):
        loading.load(str(tmp_path))


def test_shipped_teachers_load_with_their_sampler():
    assert set(loading.shipped()) == {"mini-sd3", "mini-sd35", "mini-qwen"}
    for name in loading.shipped():
        backbone, sampler = loading.load(name)
        assert backbone.latent_shape == (4, 8, 8)
        assert sampler.steps == 40
        assert sampler.guidance_scale > 1
        assert pipelines.is_mini_pipeline(backbone)
        total = sum(f.stat().st_size for f in loading.pipeline_folder(name).rglob("*") if f.is_file())
        assert total < 10e6


def test_feature_depths_are_fractions_of_the_depth():
    assert DiscriminatorConfig(feature_depths=(0.25, 0.5)).feature_indices(4) == [0, 1]
    assert DiscriminatorConfig(feature_depths=(0.5, 1.0)).feature_indices(24) == [11, 23]
    for bad in (
        {"feature_depths": ()},
        {"feature_depths": (1.5,)},
        {"trunk": "student"},
        {"trunk_grad_scale": 2.0},
        {"trunk": "teacher", "trunk_grad_scale": 0.1},
        {"hidden_size": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            DiscriminatorConfig(**bad)


def test_discriminator_heads_do_not_depend_on_the_order_of_tokens():
    torch.manual_seed(0)
    heads, f = DiscriminatorHeads(8, [0, 1], 16), [torch.randn(3, 16, 8), torch.randn(3, 16, 8)]
    order = torch.randperm(16)
    torch.testing.assert_close(heads(f), heads([x[:, order] for x in f]))
    assert heads(f).shape == (3,)


def test_gradients_are_scaled_and_requires_grad_is_restored_after_no_param_grad():
    x = torch.ones(3, requires_grad=True)
    scale_gradient(x, 0.25).sum().backward()
    assert (x.grad == 0.25).all()
    net = torch.nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    with no_param_grad(net):
        assert not any(p.requires_grad for p in net.parameters())
    assert net.weight.requires_grad
    assert not net.bias.requires_grad


def test_columns_index_and_join():
    c = Cond(torch.arange(6.0).reshape(3, 2))
    b = Batch(c, torch.arange(3.0))
    assert len(b[torch.tensor([2, 0])]) == 2
    assert torch.equal(Cond.cat([c, c]).embeds[3:], c.embeds)
    assert c.to(torch.float64).embeds.dtype == torch.float64


def test_sampling_a_student_is_a_rollout(backbone):
    noise, sampler = draw_noise([0], backbone.latent_shape, 4), SamplerConfig(steps=4, eta=1.0)
    cond = backbone.encode_text(backbone.tokenize(PROMPTS[:1]))
    trajectory = rollout(lambda x, t, c: backbone.velocity(backbone.net, x, t, c), cond, noise, flow.grid(4, 3.0), cps(1.0))
    torch.testing.assert_close(sample(backbone, backbone.net, PROMPTS[:1], noise, sampler), backbone.decode(trajectory.x[-1]))
