"""How published models are sampled: what their model cards say, which their files do not."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class CardSampling(NamedTuple):
    """Steps and guidance of a model card: guidance as the stock pipeline counts it, cfg as SamplerConfig.guidance_scale."""

    steps: int
    guidance: float
    cfg: float


def card_sampling(pipeline: str, transformer: Mapping[str, Any], distilled: bool = False) -> CardSampling:
    """The card of the published model that a pipeline class and its transformer's configuration are of.

    Finetuned models of the same architecture are sampled like it. distilled: whether the pipeline says that it is a few-step
    model, as FLUX.2 klein is published too. Raises ValueError on another pipeline.
    """
    if pipeline == "StableDiffusion3Pipeline":
        if not transformer.get("qk_norm"):
            return CardSampling(28, 7.0, 7.0)  # SD3 Medium
        medium = bool(transformer.get("dual_attention_layers"))
        return CardSampling(40, 4.5, 4.5) if medium else CardSampling(28, 3.5, 3.5)  # SD3.5 Medium and Large
    if pipeline == "FluxPipeline":  # dev takes a guidance scale as an input, schnell has none
        return CardSampling(50, 3.5, 1.0) if transformer.get("guidance_embeds") else CardSampling(4, 0.0, 1.0)
    if pipeline == "Flux2KleinPipeline" and distilled:
        return CardSampling(4, 1.0, 1.0)
    # Z-Image counts from no guidance at 0.
    cards = {
        "QwenImagePipeline": CardSampling(50, 4.0, 4.0),
        "QwenImageEditPipeline": CardSampling(50, 4.0, 4.0),
        "QwenImageEditPlusPipeline": CardSampling(40, 4.0, 4.0),
        "ZImagePipeline": CardSampling(50, 4.0, 5.0),
        "Flux2KleinPipeline": CardSampling(50, 4.0, 4.0),
        "Flux2Pipeline": CardSampling(50, 4.0, 1.0),  # a number that the transformer takes
    }
    if pipeline not in cards:
        raise ValueError(f"{pipeline}: no model card is known, name steps and guidance")
    return cards[pipeline]
