"""FLUX.2 klein and dev as backbones, against the stock pipeline: text layers, normalised patches, a student that runs there."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer

from advdmd import flow
from advdmd.commands import train
from advdmd.mini.world.caption import VOCABULARY
from advdmd.models import loading
from advdmd.models.flux2 import Flux2
from advdmd.models.lora_files import read_lora
from advdmd.models.qwen_image import pack
from advdmd.models.sampler import SamplerConfig, draw_noise, sample
from advdmd.recipes.registry import resolve
from advdmd.rollout import rollout
from advdmd.transitions import renoise
from tests.conftest import TINY
from tests.models.test_flux import SMALL
from tests.tiny_pipelines import flux2

PROMPTS = ["a picture of a red circle", "Two small red circles. A large blue star. Circles above star. Gray background."]
LENGTH = 100  # tokens; dev has a system message
METADATA = {"name": "tiny-flux2", "sampling": {"steps": 4, "guidance": 1.0}, "side": 8, "text_length": LENGTH}


def save(folder, dev):
    """A folder as it is published: dev's tokenizer is in a processor."""
    flux2(VOCABULARY, TINY, dev=dev).save_pretrained(folder)
    (folder / "advdmd.json").write_text(json.dumps(METADATA))
    if dev:
        index = json.loads((folder / "model_index.json").read_text())
        index["tokenizer"] = ["transformers", "PixtralProcessor"]
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module", params=["klein", "dev"])
def folder(tmp_path_factory, request):
    return save(tmp_path_factory.mktemp("teacher") / f"tiny-{request.param}", request.param == "dev")


def stock(folder):
    """The stock pipeline of a folder; dev's with a tokenizer for its processor, which needs torchvision."""
    from diffusers import Flux2KleinPipeline, Flux2Pipeline

    index = json.loads((folder / "model_index.json").read_text())
    if index["tokenizer"][1] != "PixtralProcessor":
        return Flux2KleinPipeline.from_pretrained(folder, local_files_only=True)
    pipe = Flux2Pipeline.from_pretrained(folder, local_files_only=True, tokenizer=None)
    pipe.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return pipe


@pytest.fixture
def backbone(folder):
    return loading.load(str(folder))[0]


def test_embeddings_are_the_stock_pipelines(backbone):
    with torch.no_grad():
        cond = backbone.encode_text(backbone.tokenize(PROMPTS))
        embeds, _ = backbone.pipe.encode_prompt(list(PROMPTS), max_sequence_length=LENGTH)
    torch.testing.assert_close(cond.embeds, embeds)
    assert cond.pooled is None
    assert cond.mask is None, "padding is attended to"
    assert 5 < backbone.text_lengths(PROMPTS)[0] < backbone.text_lengths(PROMPTS)[1] < LENGTH


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_teachers_sampler_is_the_stock_pipeline(folder, guidance):
    """A wrong position, layer of text, normalisation or time would all differ; so would another grid, which goes by steps.
    klein has classifier-free guidance, dev takes the scale as a number."""
    pipe = loading.load_pipeline(folder)
    embedded = bool(pipe.transformer.config.guidance_embeds)
    backbone = loading.backbone_from_pipeline(pipe, METADATA | {"embedded_guidance": guidance} if embedded else METADATA)
    noise = draw_noise([0, 1], backbone.latent_shape, 1)
    sampler = SamplerConfig(steps=4, shift=None, guidance_scale=1.0 if embedded else guidance)
    ours = sample(backbone, backbone.net.eval(), PROMPTS, noise, sampler)
    scale = backbone.pipe.vae_scale_factor
    theirs = backbone.pipe(
        prompt=list(PROMPTS),
        guidance_scale=guidance,
        num_inference_steps=4,
        latents=backbone.pipe._patchify_latents(noise[0]),
        output_type="pt",
        height=8 * scale,
        width=8 * scale,
        max_sequence_length=LENGTH,
    ).images
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=2e-5, rtol=0)
    assert ours.std() > 0.01


@pytest.mark.parametrize(("distilled", "card"), [(False, (50, 4.0)), (True, (4, 1.0))])
def test_a_published_folder_is_sampled_as_its_card_says(distilled, card, tmp_path):
    flux2(VOCABULARY, TINY, distilled).save_pretrained(tmp_path / "klein")
    assert loading.default_sampling(tmp_path / "klein") == SamplerConfig(steps=card[0], shift=None, guidance_scale=card[1])


def test_features_are_image_tokens_of_both_kinds_of_blocks(backbone):
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), backbone.encode_text(backbone.tokenize(PROMPTS))
    n = len(backbone.blocks(backbone.net))
    assert n == TINY.layers + 2
    found = backbone.features(backbone.net, x, t, cond, [0, n - 1])
    assert [f.shape for f in found] == [(2, 16, backbone.hidden_size)] * 2
    assert not torch.allclose(found[0], backbone.features(backbone.net, x.flip(-1), t, cond, [0])[0])


def test_latents_are_the_pipelines_normalised_patches(backbone):
    pixels = backbone.decode(torch.randn(2, 4, 8, 8))
    with torch.no_grad():
        patches = backbone.pipe._encode_vae_image(pixels, torch.Generator())
        torch.testing.assert_close(pack(backbone.encode(pixels)), backbone.pipe._pack_latents(patches))
        torch.testing.assert_close(backbone.decode(backbone.encode(pixels)), backbone.vae(pixels).sample.clamp(-1, 1))
    with pytest.raises(ValueError, match="reads latents two by two"):
        Flux2(backbone.pipe, 7)


@pytest.mark.parametrize("words", [[], ["lora_rank=4", "gradient_checkpointing=true"]], ids=["whole", "adapters"])
def test_a_two_step_student_runs_in_the_stock_pipeline(words, folder, tmp_path):
    scale = 1 if loading.read_index(folder)["_class_name"] == "Flux2Pipeline" else 2
    student = train.train(
        *resolve("mini-sd35-advdmd", [*SMALL, f"teacher={folder}", f"guidance_scale={scale}", *words]), tmp_path / "run"
    )
    pipe = stock(student)
    pipe.set_progress_bar_config(disable=True)
    backbone, sampler = loading.load(str(student))
    call = json.loads((student / "advdmd.json").read_text())["stock_call"]
    guidance = 4.0 if backbone.guidance else 1.0
    assert (call["num_inference_steps"], call["guidance_scale"], call["max_sequence_length"]) == (2, guidance, LENGTH)
    first = torch.randn(1, 4, 8, 8)
    torch.manual_seed(11)
    noise = torch.stack([first, torch.randn(1, 16, 16).reshape(1, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 4, 8, 8)])
    torch.manual_seed(11)
    theirs = pipe(prompt=PROMPTS[0], latents=pipe._patchify_latents(first), output_type="pt", **call).images
    cond = backbone.encode_text(backbone.tokenize(PROMPTS[:1]))
    trajectory = rollout(
        lambda x, t, c: backbone.velocity(backbone.net, x, t, c), cond, noise, flow.grid(2, sampler.shift), renoise
    )
    torch.testing.assert_close((backbone.decode(trajectory.x[-1]) + 1) / 2, theirs, atol=1e-5, rtol=1e-4)

    file = student / "comfyui_workflow.json"
    assert file.is_file() == bool(words), "of whole students ComfyUI does not read the file"
    if words:
        nodes = json.loads(file.read_text())
        kinds = {nodes[k]["class_type"] for k in ("shift", "latent", "clip")}
        assert kinds == {"ModelSamplingAuraFlow", "EmptyFlux2LatentImage", "CLIPLoader"}
        assert ("guidance" in nodes) == (guidance > 1)
        base = stock(folder)
        base.load_lora_weights(student)
        base.fuse_lora()
        base.unload_lora_weights()
        fused = pipe.transformer.state_dict()
        for k, v in base.transformer.state_dict().items():
            torch.testing.assert_close(v, fused[k], rtol=1e-4, atol=1e-5)


def test_black_forest_labs_lora_names_are_mapped_as_diffusers_converts_them(tmp_path):
    """Every linear layer of Black Forest Labs' own FLUX.2, against diffusers' conversion of whole weights."""
    from diffusers import Flux2Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    with torch.device("meta"):
        net = Flux2Transformer2DModel(num_layers=1, num_single_layers=1)
    d, g = net.inner_dim, torch.Generator().manual_seed(0)
    shapes = {
        "img_in": (d, 128),
        "txt_in": (d, 15360),
        "final_layer.linear": (128, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    shapes |= {f"{k}.{layer}": (d, n) for k in ("time_in", "guidance_in") for layer, n in (("in_layer", 256), ("out_layer", d))}
    shapes |= {f"double_stream_modulation_{side}.lin": (6 * d, d) for side in ("img", "txt")}
    shapes |= {"single_stream_modulation.lin": (3 * d, d)}
    double = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.0": (6 * d, d), "mlp.2": (d, 3 * d)}
    shapes |= {f"double_blocks.0.{side}_{k}": shape for side in ("img", "txt") for k, shape in double.items()}
    shapes |= {"single_blocks.0.linear1": (9 * d, d), "single_blocks.0.linear2": (d, 4 * d)}
    lora, rows = {}, {}  # the conversion splits and swaps rows, so those of B stand for a weight's
    for name, (out, columns) in shapes.items():
        flat, b = f"lora_unet_{name.replace('.', '_')}", torch.randn(out, 2, generator=g)
        lora |= {f"{flat}.lora_down.weight": torch.zeros(2, columns), f"{flat}.lora_up.weight": b}
        rows |= {f"{name}.weight": b}
    expected = convert_flux2_transformer_checkpoint_to_diffusers(rows)
    save_file(lora, tmp_path / "a.safetensors")
    found = read_lora(str(tmp_path / "a.safetensors"), net).products
    assert set(found) == {k for k, m in net.named_modules() if isinstance(m, nn.Linear)}
    for k, (_, b) in found.items():
        assert torch.equal(b, expected[f"{k}.weight"]), k


def test_a_processor_without_a_chat_template_is_named(tmp_path):
    folder = save(tmp_path / "dev", dev=True)
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"tokenizer holds no chat template \(chat_template.jinja\)"):
        loading.load_pipeline(folder)
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer holds no tokenizer that can be loaded"):
        loading.load_pipeline(folder)
