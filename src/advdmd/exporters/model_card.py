"""The model card of a student: how it was made, and the lines that sample it with the stock pipeline."""

from importlib import metadata
from pathlib import Path

import torch

from advdmd.models.lora_files import LORA_FILE
from advdmd.models.sampler import SamplerConfig
from advdmd.types import Json

SAMPLES_FILE = "samples.png"


def _front_matter(record: Json, relation: str, *tags: str) -> str:
    return f"""---
library_name: diffusers
pipeline_tag: {"image" if record.get("edits") else "text"}-to-image
base_model: {record["base_model"]}
base_model_relation: {relation}
license: other
license_name: that-of-the-base-model
tags: [{", ".join(("advdmd", "distillation", "few-step", *tags))}]
---"""


def _snippet(folder: str, record: Json, dtype: torch.dtype, before: str = "") -> str:
    """Lines of Python that sample an image with the stock pipeline in `folder`, all its parts of one type.

    record: metadata with the arguments "stock_load" and "stock_call". before: lines between the two.
    """
    load = "".join(f", {k}={v!r}" for k, v in record["stock_load"].items())
    call = "".join(f"    {k}={v!r},\n" for k, v in record["stock_call"].items())
    prompt, more = '"a picture of a red circle"', ""
    if record.get("edits"):
        prompt, more = (
            'image=load_image("source.png"),\n    prompt="make the circle red"',
            "\nfrom diffusers.utils import load_image",
        )
    return f"""```python
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler{more}

pipe = DiffusionPipeline.from_pretrained("{folder}", dtype={dtype}{load})
{before}pipe.to("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)  # the noise of the steps is drawn from the global generator
image = pipe(
    {prompt},
{call}).images[0]
```"""


def _guidance(record: Json) -> str:
    return "with the guidance that the model takes as an input" if "embedded_guidance" in record else "without guidance"


def adapter_card(record: Json) -> str:
    """README.md of a folder with the speed-up alone; record: its metadata."""
    sampling = record["sampling"]
    adapter = f"""pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={sampling["shift"]:g}, stochastic_sampling=True)
pipe.load_lora_weights("THIS_FOLDER", adapter_name="speed")
"""
    return f"""{_front_matter(record, "adapter", "lora")}
# {record["base_model"]} in {sampling["steps"]} steps, as a LoRA

`{LORA_FILE}` holds the speed-up alone, made with `{record["recipe"]}`, seed {record["seed"]}. It goes on the base model beside
other LoRAs. Sample in {sampling["steps"]} steps, {_guidance(record)}:

{_snippet(record["base_model"], record, torch.bfloat16, adapter)}
"""


def model_card(folder: Path, name: str, sampler: SamplerConfig, record: Json, dtype: torch.dtype) -> str:
    """README.md of a student's `folder`, which will be called `name`; record: its metadata; dtype: of its transformer."""
    notes = ""
    if sampler.eta != 1:
        notes = f"\n**eta = {sampler.eta}: stock schedulers cannot sample it, `advdmd sample` can.**\n"
    if sampler.last_time is not None:
        notes = "\n**TwinFlow has its own grid of times: stock pipelines cannot sample it, `advdmd sample` can.**\n"
    if "base_bits" in record:
        notes += (
            f"\nIts adapter learned on the base in {record['base_bits']} bits, which is fused here: on the published base "
            f"`{LORA_FILE}` is only close to it.\n"
        )
    more = ""
    if (folder / LORA_FILE).is_file():
        more += (
            f"\n`{LORA_FILE}` is the adapter itself. In this folder it is added to the base's weights and rounded to their "
            "type, so the two give nearly, not exactly, the same images unless that is float32.\n"
        )
    if style := record.get("teacher_lora"):
        both = f", and both are in `{LORA_FILE}`, which goes on the base model alone" if (folder / LORA_FILE).is_file() else ""
        more += f"\nThe teacher had the LoRA `{style}`. Style and speed-up are both in these weights{both}.\n"
    if (folder / SAMPLES_FILE).is_file():
        more += f"\n![samples of the EMA student while it learned, {sampler.steps} steps]({SAMPLES_FILE})\n"
    return f"""{_front_matter(record, "finetune")}
# {record["base_model"]} in {sampler.steps} steps

Distilled with `{record["recipe"]}`, seed {record["seed"]}. Sample in {sampler.steps} steps, {_guidance(record)}:
{notes}
{_snippet(name, record, dtype)}

Pass the arguments as they are: other values mean another grid or another function. With stochastic sampling the pipeline's
`generator` seeds only the first noise: call `torch.manual_seed` to repeat an image. The same seed draws other noise in
`advdmd sample`. Written with diffusers {metadata.version("diffusers")} and transformers {metadata.version("transformers")}.
The scheduler has shift {sampler.shift:g} and `stochastic_sampling`. The licence of the base model applies to this student.
{more}"""
