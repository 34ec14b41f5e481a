"""A student as other people load it: a stock diffusers folder, its scheduler, a model card."""

from pathlib import Path
from typing import Any

from torch import nn

from advdmd import flow
from advdmd.models.load import read_note, save_pipeline
from advdmd.models.sampler import Sampling
from advdmd.train.checkpoint import write_folder


def sigmas(how: Sampling) -> list[float]:
    """What a stock SD3 pipeline must be told: its scheduler applies the shift itself, so the grid before shifting."""
    return [round(float(t), 6) for t in flow.grid(how.steps, 1.0)[:-1]]


def snippet(folder: str, how: Sampling, t5_length: int, size: int) -> str:
    return f"""import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}", text_encoder_3=None, tokenizer_3=None)
torch.manual_seed(0)  # the noise of the hops is drawn from the global generator
image = pipe(
    "a picture of a red circle",
    sigmas={sigmas(how)},
    guidance_scale=1.0,
    height={size},
    width={size},
    max_sequence_length={t5_length},
).images[0]
"""


def export_student(backbone: Any, net: nn.Module, how: Sampling, teacher: Path, folder: Path, note: dict[str, Any]) -> Path:
    """Write the teacher's pipeline with the student as its transformer and the student's scheduler; all or nothing.

    Stock schedulers re-noise fully: only eta = 1 is the same sampler there. The card of another eta says so.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    parts = dict(backbone.pipe.components)
    parts["transformer"] = net
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=how.shift, stochastic_sampling=how.eta == 1)
    pipe = StableDiffusion3Pipeline(**parts)
    sampling = {"steps": how.steps, "shift": how.shift, "eta": how.eta}
    base = read_note(teacher).get("name", teacher.name)
    record = {"sampling": sampling, "t5_length": backbone.t5_length, "base_model": base, **note}

    def write(making: Path) -> None:
        save_pipeline(pipe, making, record)
        (making / "README.md").write_text(_card(folder.name, how, backbone, record))

    write_folder(folder, write)
    return folder


def _card(name: str, how: Sampling, backbone: Any, record: dict[str, Any]) -> str:
    warning = "" if how.eta == 1 else f"\n**eta = {how.eta}: stock schedulers cannot sample it, `advdmd sample` can.**\n"
    size = backbone.pipe.vae_scale_factor * backbone.latent_shape[-1]
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
base_model: {record["base_model"]}
base_model_relation: finetune
tags: [advdmd, distillation, few-step]
---
# {record["base_model"]} in {how.steps} steps

Distilled with `{record["recipe"]}`, seed {record["seed"]}. Sample without guidance, in {how.steps} steps:
{warning}
```python
{snippet(name, how, backbone.t5_length, size)}```

Pass `sigmas` as shown (the default grid of the pipeline is another one) and `max_sequence_length={backbone.t5_length}`.
With stochastic sampling the pipeline's `generator` seeds only the first noise: call `torch.manual_seed` to repeat an image.
The scheduler has shift {how.shift:g} and `stochastic_sampling`. The licence of the base model applies to this student.
"""
