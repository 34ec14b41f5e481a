"""Z-Image as a backbone, against the stock pipeline: sign, padding, a student that runs there."""

import json

import pytest
import torch

from advdmd import flow
from advdmd.commands import train
from advdmd.mini.world.caption import VOCABULARY
from advdmd.models import loading
from advdmd.models.sampler import SamplerConfig, draw_noise, sample
from advdmd.models.z_image import ZImage
from advdmd.recipes.registry import resolve
from advdmd.rollout import rollout
from advdmd.transitions import renoise
from advdmd.types import Cond
from tests.conftest import TINY
from tests.tiny_pipelines import z_image

PROMPTS = ["a picture of a red circle", "Two small red circles. A large blue star. Circles above star. Gray background."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "tiny-z"
    z_image(VOCABULARY, TINY).save_pretrained(folder)
    (folder / "advdmd.json").write_text(json.dumps({"name": "tiny-z", "sampling": {"steps": 4, "guidance": 2.0}, "side": 8}))
    return folder


@pytest.fixture
def z(folder):
    return loading.load(str(folder))[0]


def test_embeddings_are_the_stock_pipelines_at_each_captions_own_length(z):
    with torch.no_grad():
        cond = z.encode_text(z.tokenize(PROMPTS))
        theirs, _ = z.pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    lengths = cond.mask.sum(1).tolist()
    assert [len(e) for e in theirs] == lengths
    assert lengths[0] != lengths[1]
    for ours, n, stock in zip(cond.embeds, lengths, theirs, strict=True):
        torch.testing.assert_close(ours[:n], stock, atol=1e-5, rtol=1e-4)
        assert not ours[n:].any()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_teachers_sampler_is_the_stock_pipeline(z, guidance):
    """A wrong sign, a time from the wrong end or another guidance convention would all differ."""
    noise = draw_noise([0, 1], z.latent_shape, 1)
    ours = sample(z, z.net, PROMPTS, noise, SamplerConfig(steps=4, guidance_scale=guidance))
    size = {"height": 8 * z.pipe.vae_scale_factor, "width": 8 * z.pipe.vae_scale_factor}
    theirs = z.pipe(
        list(PROMPTS), guidance_scale=guidance - 1, num_inference_steps=4, latents=noise[0], output_type="pt", **size
    ).images
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=2e-5, rtol=0)
    assert ours.std() > 0.01


def test_velocity_points_from_data_to_noise(z):
    """A network that answers with data minus noise, as Z-Image's does, comes out as noise minus data."""
    x0, e, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    times = []

    def net(images, time, captions, return_dict):
        times.append(time)
        return ([a.unsqueeze(1) for a in (x0 - e)],)

    v = z.velocity(net, flow.interpolate(x0, e, t), t, z.encode_text(z.tokenize(PROMPTS)))
    torch.testing.assert_close(v, e - x0)
    torch.testing.assert_close(times[0], 1 - t)


def test_padding_does_not_change_the_velocity(z):
    """Neither by a caption that is padded with masked zeros, nor by one beside a longer one."""
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.6, 0.3])
    long = " ".join([PROMPTS[1]] * 3)  # another multiple of 32 tokens
    with torch.no_grad():
        alone, other = (z.encode_text(z.tokenize([p])) for p in (PROMPTS[0], long))
        v = z.velocity(z.net, x[:1], t[:1], alone)
        padded = z.velocity(z.net, x[:1], t[:1], alone.padded(90))
        beside = z.velocity(z.net, x, t, Cond.cat([alone, other]))[:1]
        wrong = z.velocity(z.net, x[:1], t[:1], Cond(alone.padded(90).embeds, mask=torch.ones(1, 90, dtype=torch.long)))
    torch.testing.assert_close(padded, v, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(beside, v, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(wrong, v, atol=1e-3)


def test_features_are_image_tokens(z):
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), z.encode_text(z.tokenize(PROMPTS))
    found = z.features(z.net, x, t, cond, [0, 1])
    assert [f.shape for f in found] == [(2, 16, z.hidden_size)] * 2
    swapped = z.features(z.net, x.flip(-1), t, cond, [0])[0]
    assert not torch.allclose(found[0], swapped)


def test_latents_round_trip(z):
    pixels = z.decode(torch.randn(2, 4, 8, 8))
    mean = z.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(z.encode(pixels) / z.vae.config.scaling_factor + z.vae.config.shift_factor, mean)


@pytest.mark.parametrize("words", [[], ["lora_rank=4", "discriminator.trunk=teacher"]], ids=["whole", "adapters"])
def test_a_two_step_student_runs_in_the_stock_pipeline(words, folder, tmp_path):
    tiny = [
        "iterations=3",
        "algorithm.steps=2",
        "algorithm.group_size=2",
        "prompts_per_step=2",
        "data.num_prompts=6",
        "data.images_per_prompt=1",
    ]
    tiny += ["algorithm.dm_only_iterations=1", "algorithm.policy_ramp_iterations=0", f"teacher={folder}"]
    student = train.train(*resolve("mini-sd35-advdmd", [*tiny, *words]), tmp_path / "run")
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(student, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    backbone, sampler = loading.load(str(student))
    call = json.loads((student / "advdmd.json").read_text())["stock_call"]
    assert call["num_inference_steps"] == 2
    first = torch.randn(1, 4, 8, 8)
    torch.manual_seed(11)
    noise = torch.stack([first, torch.randn(1, 4, 8, 8)])
    torch.manual_seed(11)
    theirs = pipe(PROMPTS[0], latents=first, output_type="latent", **call).images
    cond = backbone.encode_text(backbone.tokenize(PROMPTS[:1]))
    trajectory = rollout(
        lambda x, t, c: backbone.velocity(backbone.net, x, t, c), cond, noise, flow.grid(2, sampler.shift), renoise
    )
    torch.testing.assert_close(trajectory.x[-1], theirs, atol=1e-5, rtol=1e-4)


def test_an_odd_side_is_refused(z):
    with pytest.raises(ValueError, match="latents of 7 x 7: this transformer reads latents two by two"):
        ZImage(z.pipe, 7)
