"""A student's workflow for ComfyUI."""

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
    "Flux2KleinPipeline": ("qwen_3_4b", "flux2"),  # of the model of 4 billion parameters
    "Flux2Pipeline": ("mistral_3_small_flux2_bf16", "flux2"),
}
KLEIN_9B_ENCODER = "qwen_3_8b"
KLEIN_4B_WIDTH = 7680  # of its text embeddings

FLUX2 = ("Flux2KleinPipeline", "Flux2Pipeline")
CLIP_TOKENS = 77


def reads_transformer(backbone: Backbone) -> bool:
    """Whether ComfyUI reads the transformer's file as diffusers writes it. FLUX.2's it reads in its makers' keys alone."""
    return type(backbone.pipe).__name__ not in FLUX2


def _node(kind: str, **inputs: object) -> Json:
    return {"class_type": kind, "inputs": inputs}


def workflow(backbone: Backbone, sampler: SamplerConfig, lora: str | None = None) -> Json:
    """A workflow in ComfyUI's API format, for a transformer file or for the base with the adapter file `lora`.

    Names are to be filled in.

    The sampler "lcm" re-noises fully and the scheduler "simple" takes equal steps before the shift: the student's grid. SD3 and
    FLUX.1 attend to T5's padding, so prompts are padded to the length of training. In SD3 without T5 zeros stand in its place,
    which ComfyUI can add 77 at a time.
    """
    kind = type(backbone.pipe).__name__
    side = backbone.pipe.vae_scale_factor * backbone.latent_shape[-1]

    files, with_t5 = ("clip_l", "clip_g", "t5xxl"), len(backbone.encoders) == 3
    shift = "ModelSamplingSD3" if kind == "StableDiffusion3Pipeline" else "ModelSamplingAuraFlow"  # the same line, other units
    names = {f"clip_name{i}": f"{n}.safetensors" for i, n in enumerate(files[: len(backbone.encoders)], 1)}
    text = _node("TripleCLIPLoader", **names) if with_t5 else _node("DualCLIPLoader", **names, type="sd3")
    if kind in ONE_ENCODER:
        name, of = ONE_ENCODER[kind]
        if kind == "Flux2KleinPipeline" and backbone.pipe.transformer.config.joint_attention_dim > KLEIN_4B_WIDTH:
            name = KLEIN_9B_ENCODER
        text = _node("CLIPLoader", clip_name=f"{name}.safetensors", type=of)
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
    if kind == "FluxPipeline" or with_t5:  # else ComfyUI pads T5 to another length than training did
        nodes["tokens"] = _node("T5TokenizerOptions", clip=["clip", 0], min_padding=0, min_length=backbone.max_text_length)
        for name in ("prompt", "none"):
            nodes[name]["inputs"]["clip"] = ["tokens", 0]
    elif zeros := round(backbone.metadata.get("t5_length", 0) / CLIP_TOKENS):
        nodes["zero"] = _node("ConditioningZeroOut", conditioning=["prompt", 0])
        for k in range(zeros):
            before = f"zeros{k - 1}" if k else "prompt"
            nodes[f"zeros{k}"] = _node("ConditioningConcat", conditioning_to=[before, 0], conditioning_from=["zero", 0])
        nodes["sample"]["inputs"]["positive"] = [f"zeros{zeros - 1}", 0]
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
    if "embedded_guidance" in backbone.metadata:
        nodes["guidance"] = _node("FluxGuidance", conditioning=["prompt", 0], guidance=backbone.metadata["embedded_guidance"])
        nodes["sample"]["inputs"]["positive"] = ["guidance", 0]
    if lora:
        nodes["adapter"] = _node("LoraLoaderModelOnly", model=["model", 0], lora_name=lora, strength_model=1.0)
        nodes["shift"]["inputs"]["model"] = ["adapter", 0]
    return nodes
