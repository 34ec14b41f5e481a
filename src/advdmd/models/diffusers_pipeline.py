"""Any diffusers text-to-image pipeline through its own call: how evaluation samples models that no backbone knows."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from advdmd.models.backbone import Pipeline
from advdmd.models.folder_kinds import no_pipeline
from advdmd.models.hub import hub_error
from advdmd.models.loading import (
    KNOWN_PIPELINES,
    UnfitWeights,
    absent_parts,
    check_text_to_image,
    load_parts,
    pipeline_class,
    read_index,
    read_metadata,
    shipped,
    silence_libraries,
    verify_weights,
)
from advdmd.models.model_cards import card_sampling
from advdmd.rng import generator
from advdmd.types import Json, Prompt

GUIDANCE_NAMES = ("true_cfg_scale", "guidance_scale")  # as pipelines name it; Qwen-Image's guidance is the former


def _takes_guidance(pipe: Pipeline) -> bool:
    """Whether the transformer takes the guidance scale as an input, in one pass: then it is `guidance_scale` (FLUX.1 dev)."""
    return bool(getattr(getattr(pipe, "transformer", None), "config", {}).get("guidance_embeds"))


@dataclass(frozen=True, kw_only=True)
class DiffusersSampling:
    """Arguments of a pipeline's call; None leaves one to the folder's metadata, to the model's card (`model_cards`) or, where
    there is neither, to the pipeline's default.

    steps, height, width >= 1, the latter in pixels. Raises ValueError on values out of range.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")

    def call_kwargs(self, pipe: Pipeline, metadata: Json) -> Json:
        """Keyword arguments of the pipeline's call. Raises ValueError if the pipeline has no such argument."""
        known = inspect.signature(pipe.__call__).parameters
        kwargs, steps, guidance = dict(metadata.get("stock_call", {})), self.steps, self.guidance_scale
        if not metadata and type(pipe).__name__ in KNOWN_PIPELINES:  # the pipelines' own defaults are not the models'
            card = card_sampling(type(pipe).__name__, pipe.transformer.config, bool(pipe.config.get("is_distilled")))
            steps, guidance = steps or card.steps, card.guidance if guidance is None else guidance
        if steps is not None:
            kwargs.pop("sigmas", None)
            kwargs["num_inference_steps"] = steps
        if guidance is not None:
            name = next((n for n in GUIDANCE_NAMES[_takes_guidance(pipe) :] if n in known), None)
            if name is None:
                raise ValueError(f"guidance={guidance}: {type(pipe).__name__} takes no guidance scale")
            kwargs[name] = guidance
            if name == "true_cfg_scale" and guidance > 1:
                kwargs.setdefault("negative_prompt", " ")  # without one this pipeline leaves guidance off
        kwargs |= {k: v for k, v in (("height", self.height), ("width", self.width)) if v is not None}
        if unknown := sorted(set(kwargs) - set(known)):
            raise ValueError(f"{type(pipe).__name__} takes no {unknown[0]}")
        return kwargs


def _absent(folder: Path) -> dict[str, None]:
    """Parts that a pipeline was saved without, which must be given as None when it is loaded (SD3 without T5)."""
    parts = read_index(folder) if (folder / "model_index.json").is_file() else {}
    absent = [k for k, v in parts.items() if isinstance(v, list) and v and v[0] is None]
    return dict.fromkeys([*absent, *absent_parts(folder, parts)])


class DiffusersModel:
    """A pipeline from a folder or the hub, with safetensors only and no code of the repository's.

    Raises ValueError if it cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        sampling: DiffusersSampling,
        revision: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
    ):
        silence_libraries()
        from diffusers import DiffusionPipeline

        folder = Path(model)
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            raise ValueError(no_pipeline(model, folder, list(shipped())))
        metadata = read_metadata(folder)
        verify_weights(folder)
        check_text_to_image(pipeline_class(folder))
        if not folder.is_dir():
            model, _, named = model.partition("@")
            revision = revision or named or None
        kind: torch.dtype = getattr(torch, dtype)
        try:
            parts = load_parts(folder, read_index(folder), {"default": kind}, _absent(folder)) if folder.is_dir() else {}
            self.pipe: Pipeline = DiffusionPipeline.from_pretrained(
                model,
                revision=revision,
                dtype=kind,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=folder.is_dir(),
                **parts,
                **_absent(folder),
            )
        except UnfitWeights:
            raise
        except Exception as e:  # whatever a broken folder or an unreachable hub makes the library raise
            raise ValueError(f"{model} cannot be loaded as a diffusers pipeline: {hub_error(model, e)}") from None
        check_text_to_image(type(self.pipe).__name__)  # of one on the hub
        self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.call_kwargs = sampling.call_kwargs(self.pipe, metadata)

    @property
    def nfe(self) -> int | None:
        """Network evaluations per image, where the call's arguments tell; guidance above 1 costs two per step."""
        known, kwargs = inspect.signature(self.pipe.__call__).parameters, self.call_kwargs

        def argument(name: str) -> float | None:
            return kwargs.get(name, known[name].default if name in known else None)

        steps = len(kwargs["sigmas"]) if "sigmas" in kwargs else argument("num_inference_steps")
        scale = next((argument(n) for n in GUIDANCE_NAMES if n in known), None)
        if "true_cfg_scale" in known and "negative_prompt" not in kwargs:  # also of a transformer that takes the scale
            scale = 1.0
        return None if steps is None else int(steps) * (2 if scale and scale > 1 else 1)

    def sample(self, prompts: Sequence[Prompt], keys: Sequence[object]) -> np.ndarray:
        """Images [N, H, W, 3] uint8 of N prompts, one by one.

        Every image has a seed of its own, also for what a stochastic scheduler draws from the global generator.
        """
        out = []
        for prompt, key in zip(prompts, keys, strict=True):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator("hops", key))))
            image = self.pipe(prompt=str(prompt), generator=generator("image", key), **self.call_kwargs).images[0]
            out.append(np.asarray(image.convert("RGB")))
        return np.stack(out)
