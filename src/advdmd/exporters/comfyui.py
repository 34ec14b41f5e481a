"""A student's workflow for ComfyUI."""

import math

from advdmd.models.backbone import Backbone
from advdmd.models.sampler import SamplerConfig
from advdmd.types import Json

# Pipelines that edit images: the node that encodes prompt and source image, and its input for the latter.
EDIT_NODES = {
    "QwenImageEditPipeline": ("TextEncodeQwenImageEdit", "image"),
    "QwenImageEditPlusPipeline": ("TextEncodeQwenImageEditPlus", "image1"),
}
# Pipelines with one text encoder: its file, and the loader's type.
ONE_ENCODER = {
    "QwenImagePipeline": ("qwen_2.5_vl_7b", "qwen_image"),
    "QwenImageEditPipeline": ("qwen_2.5_vl_7b", "qwen_image"),
    "QwenImageEditPlusPipeline": ("qwen_2.5_vl_7b", "qwen_image"),
    "ZImagePipeline": ("qwen_3_4b", "lumina2"),
    "Flux2KleinPipeline": ("qwen_3_4b", "flux2"),
    "Flux2Pipeline": ("mistral_3_small_flux2_bf16", "flux2"),
}

FLUX2 = ("Flux2KleinPipeline", "Flux2Pipeline")


def _node(kind: str, **inputs: object) -> Json:
    return {"class_type": kind, "inputs": inputs}


def workflow(backbone: Backbone, sampler: SamplerConfig, lora: str | None = None) -> Json:
    """A workflow in ComfyUI's API format, for a transformer file or for the base with the adapter file `lora`.

    Names are to be filled in.

    The sampler "lcm" re-noises fully and the scheduler "simple" takes equal steps before the shift: the student's grid. SD3
    attends to T5's padding, so prompts are padded to the length of training.
    """
    kind = type(backbone.pipe).__name__
    side = backbone.pipe.vae_scale_factor * backbone.latent_shape[-1]

    files, shift, with_t5 = ("clip_l", "clip_g", "t5xxl"), "ModelSamplingSD3", len(backbone.encoders) == 3
    names = {f"clip_name{i}": f"{n}.safetensors" for i, n in enumerate(files[: len(backbone.encoders)], 1)}
    text = _node("TripleCLIPLoader", **names) if with_t5 else _node("DualCLIPLoader", **names, type="sd3")
    if kind in ONE_ENCODER:
        name, of = ONE_ENCODER[kind]
        text, shift = _node("CLIPLoader", clip_name=f"{name}.safetensors", type=of), "ModelSamplingAuraFlow"
    elif kind == "FluxPipeline":
        text = _node("DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl.safetensors", type="flux")
    nodes = {
        "model": _node("UNETLoader", unet_name="transformer.safetensors", weight_dtype="default"),
        "clip": text,
        "vae": _node("VAELoader", vae_name="vae.safetensors"),
        "shift": _node(shift, model=["model", 0], shift=sampler.shift),
        "prompt": _node("CLIPTextEncode", clip=["clip", 0], text="a picture of a red circle"),
        "none": _node("CLIPTextEncode", clip=["clip", 0], text=""),
        "latent": _node("EmptySD3LatentImage", width=side, height=side, batch_size=1),
        "sample": _node(
            "KSampler",
            model=["shift", 0],
            positive=["prompt", 0],
            negative=["none", 0],
            latent_image=["latent", 0],
            **{"seed": 0, "steps": sampler.steps, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple", "denoise": 1.0},
        ),
        "image": _node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": _node("SaveImage", images=["image", 0], filename_prefix="advdmd"),
    }
    if kind == "StableDiffusion3Pipeline" and with_t5:  # else ComfyUI pads T5 to another length than training did
        nodes["tokens"] = _node("T5TokenizerOptions", clip=["clip", 0], min_padding=0, min_length=backbone.max_text_length)
        for name in ("prompt", "none"):
            nodes[name]["inputs"]["clip"] = ["tokens", 0]
    if kind in EDIT_NODES:
        node, image = EDIT_NODES[kind]
        nodes["source"] = _node("LoadImage", image="source.png")
        for name in ("prompt", "none"):
            text = nodes[name]["inputs"]["text"]
            nodes[name] = _node(node, clip=["clip", 0], vae=["vae", 0], prompt=text, **{image: ["source", 0]})
        if backbone.pipe.transformer.config.get("zero_cond_t"):  # source images have time 0
            how = {"conditioning": ["prompt", 0], "reference_latents_method": "index_timestep_zero"}
            nodes["time"] = _node("FluxKontextMultiReferenceLatentMethod", **how)
            nodes["sample"]["inputs"]["positive"] = ["time", 0]
    if kind in FLUX2:
        nodes["latent"]["class_type"] = "EmptyFlux2LatentImage"
    if kind in ("FluxPipeline", *FLUX2):  # its node's shift grows with the image: here a constant
        constant = round(math.log(sampler.shift or 1.0), 6)
        shifts = {"max_shift": constant, "base_shift": constant, "width": side, "height": side}
        nodes["shift"] = _node("ModelSamplingFlux", model=["model", 0], **shifts)
        if "embedded_guidance" in backbone.metadata:
            scale = backbone.metadata["embedded_guidance"]
            nodes["guidance"] = _node("FluxGuidance", conditioning=["prompt", 0], guidance=scale)
            nodes["sample"]["inputs"]["positive"] = ["guidance", 0]
    if lora:
        nodes["adapter"] = _node("LoraLoaderModelOnly", model=["model", 0], lora_name=lora, strength_model=1.0)
        nodes["shift"]["inputs"]["model"] = ["adapter", 0]
    return nodes
