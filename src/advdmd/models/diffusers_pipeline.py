"""Any diffusers text-to-image pipeline through its own call: what evaluation draws with when a model is not the miniature's."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advdmd.models.loading import read_index, read_metadata, silence_libraries, verify_weights
from advdmd.rng import generator

GUIDANCE_NAMES = ("true_cfg_scale", "guidance_scale")  # as pipelines call it; Qwen-Image's guidance is the former


@dataclass(frozen=True, kw_only=True)
class DiffusersSampling:
    """What a pipeline is told; None leaves a setting to the pipeline's own default (or to the model's note, if it is ours)."""

    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")

    def arguments(self, pipe: Any, note: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the call. Raises ValueError if the pipeline has no such setting."""
        known = inspect.signature(pipe.__call__).parameters
        told = dict(note.get("stock_call", {}))
        if self.steps is not None:
            told.pop("sigmas", None)
            told["num_inference_steps"] = self.steps
        if self.guidance is not None:
            name = next((n for n in GUIDANCE_NAMES if n in known), None)
            if name is None:
                raise ValueError(f"guidance={self.guidance}: {type(pipe).__name__} takes no guidance scale")
            told[name] = self.guidance
            if name == "true_cfg_scale" and self.guidance > 1:
                told.setdefault("negative_prompt", " ")  # without one this pipeline leaves guidance off
        told |= {k: v for k, v in (("height", self.height), ("width", self.width)) if v is not None}
        if unknown := sorted(set(told) - set(known)):
            raise ValueError(f"{type(pipe).__name__} takes no {unknown[0]}")
        return told


def _absent(folder: Path) -> dict[str, None]:
    """Parts that a pipeline was saved without, which it must be told again when it is loaded (SD3 without T5)."""
    parts = read_index(folder) if (folder / "model_index.json").is_file() else {}
    return {k: None for k, v in parts.items() if isinstance(v, list) and v and v[0] is None}


class DiffusersModel:
    """A pipeline from a folder or the hub, with safetensors only and no code of the repository's."""

    def __init__(
        self, model: str, how: DiffusersSampling, revision: str | None = None, device: str = "cpu", dtype: str = "float32"
    ):
        from diffusers import DiffusionPipeline

        silence_libraries()
        folder = Path(model)
        note = read_metadata(folder)
        verify_weights(folder)
        if not folder.is_dir():
            model, _, named = model.partition("@")
            revision = revision or named or None
        try:
            self.pipe: Any = DiffusionPipeline.from_pretrained(
                model,
                revision=revision,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=folder.is_dir(),
                **_absent(folder),
            )
        except Exception as e:  # whatever a broken folder or an unreachable hub makes the library raise
            raise ValueError(f"{model} cannot be loaded as a diffusers pipeline: {str(e).splitlines()[0]}") from None
        self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.told = how.arguments(self.pipe, note)

    @property
    def nfe(self) -> int | None:
        """Evaluations an image, where the call says so: guidance above 1 costs two a step."""
        known = inspect.signature(self.pipe.__call__).parameters
        default = lambda n: known[n].default if n in known else None  # noqa: E731
        steps = len(self.told["sigmas"]) if "sigmas" in self.told else self.told.get("num_inference_steps")
        steps = steps or default("num_inference_steps")
        scale = next((self.told.get(n, default(n)) for n in GUIDANCE_NAMES if n in known), None)
        if "true_cfg_scale" in known and "negative_prompt" not in self.told:
            scale = 1.0
        return None if steps is None else int(steps) * (2 if scale and scale > 1 else 1)

    def paint(self, prompts: Sequence[str], keys: Sequence[object]) -> np.ndarray:
        """[N, H, W, 3] uint8. Every image has a seed of its own, also for what a stochastic scheduler draws from the global
        generator; so they are drawn one by one."""
        out = []
        for prompt, key in zip(prompts, keys, strict=True):
            own = generator("image", key)
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator("hops", key))))
            image = self.pipe(prompt=prompt, generator=own, **self.told).images[0]
            out.append(np.asarray(image.convert("RGB")))
        return np.stack(out)
