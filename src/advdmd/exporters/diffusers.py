"""A student as other people load it: a stock diffusers folder, its scheduler, a model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from advdmd.exporters.comfyui import workflow
from advdmd.files import write_folder
from advdmd.models.backbone import Backbone
from advdmd.models.loading import ENCODERS, TARGET_TIME, read_index, read_metadata, save_pipeline
from advdmd.models.lora import LoraModel
from advdmd.models.sampler import SamplerConfig
from advdmd.models.target_time import TargetTime

LORA = "pytorch_lora_weights.safetensors"
SAMPLES = "samples.png"


def stock(how: SamplerConfig) -> bool:
    """Whether stock schedulers can sample so: they re-noise fully, on the shifted grid."""
    return how.eta == 1 and how.gap is None


def snippet(folder: str, backbone: Backbone, steps: int) -> str:
    """Lines that draw an image with the stock pipeline."""
    told = "".join(f", {k}={v!r}" for k, v in backbone.stock_load.items())
    words = "".join(f"    {k}={v!r},\n" for k, v in backbone.stock_call(steps).items())
    return f"""import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}"{told})
torch.manual_seed(0)  # the noise of the hops is drawn from the global generator
image = pipe(
    "a picture of a red circle",
{words}).images[0]
"""


def export_student(
    backbone: Backbone,
    net: nn.Module,
    how: SamplerConfig,
    teacher: Path,
    folder: Path,
    note: dict[str, Any],
    samples: Path | None = None,
) -> Path:
    """Write the teacher's pipeline with the student as its transformer and the student's scheduler; all or nothing. `samples`:
    a picture of what the student draws, if there is one.

    Stock schedulers re-noise fully: only eta = 1 is the same sampler there. The card of another eta says so.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    parts, standing, adapter = dict(backbone.pipe.components), None, None
    if isinstance(net, TargetTime):
        standing, net = net.standing(), net.net
    if isinstance(net, LoraModel):
        adapter, net = net.weights(), plain(net)
    parts["transformer"] = net
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=how.shift, stochastic_sampling=how.eta == 1)
    pipe = type(backbone.pipe)(**parts)
    sampling = {"steps": how.steps, "shift": how.shift, "eta": how.eta} | ({"gap": how.gap} if how.gap else {})
    base = read_metadata(teacher).get("name", teacher.name)
    told = {"stock_load": backbone.stock_load, "stock_call": backbone.stock_call(how.steps)}
    record = {"sampling": sampling, **backbone.note, **told, "base_model": base, **note}

    def write(making: Path) -> None:
        save_pipeline(pipe, making, record)
        _complete(making, teacher)
        if adapter is not None:
            told = {"format": "pt", "advdmd": json.dumps(record)}
            save_file({k: v.cpu().contiguous() for k, v in adapter.items()}, making / LORA, told)
        if stock(how):
            nodes = workflow(backbone, how, LORA if adapter is not None else None)
            (making / "comfyui_workflow.json").write_text(json.dumps(nodes, indent=1))
        if samples:
            shutil.copyfile(samples, making / SAMPLES)
        if standing is not None:
            save_file({"standing": standing}, making / TARGET_TIME)
        (making / "README.md").write_text(_card(making, folder.name, how, backbone, record))

    write_folder(folder, write)
    return folder


def plain(role: LoraModel) -> Any:
    """A transformer to be saved, on the CPU, with an adapter's weights added to the base's."""
    base: Any = role.roles.net
    with torch.device("meta"):  # whatever is no weight stays there and is not saved
        net = type(base).from_config(base.config)
    net.load_state_dict(role.fused(), assign=True)
    return net.eval()


def _complete(folder: Path, teacher: Path) -> None:
    """Text encoders that stayed on disk during a run come from the teacher's folder."""
    index, ours = (read_index(f) for f in (teacher, folder))
    for part, kind in index.items():
        if part in ENCODERS and kind[0] and ours.get(part, [None])[0] is None:
            shutil.copytree(teacher / part, folder / part)
            ours[part] = kind
    (folder / "model_index.json").write_text(json.dumps(ours, indent=2) + "\n")


def _card(folder: Path, name: str, how: SamplerConfig, backbone: Backbone, record: dict[str, Any]) -> str:
    warning = "" if how.eta == 1 else f"\n**eta = {how.eta}: stock schedulers cannot sample it, `advdmd sample` can.**\n"
    if how.gap is not None:
        warning = "\n**TwinFlow has times of its own: stock pipelines cannot sample it, `advdmd sample` can.**\n"
    if "base_bits" in record:
        bits = f"the base in {record['base_bits']} bits"
        warning += (
            f"\nIts adapter learned on {bits}, which is fused here: on the published base `{LORA}` is only close to it.\n"
        )
    more = ""
    if (folder / LORA).is_file():
        more += (
            f"\n`{LORA}` is the adapter itself. In this folder it is added to the base's weights and rounded to their type, so "
            "the two draw nearly, not exactly, the same unless that is float32.\n"
        )
    if (folder / SAMPLES).is_file():
        more += f"\n![what it draws: the averaged student while it learned, {how.steps} steps]({SAMPLES})\n"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
base_model: {record["base_model"]}
base_model_relation: finetune
license: other
license_name: that-of-the-base-model
tags: [advdmd, distillation, few-step]
---
# {record["base_model"]} in {how.steps} steps

Distilled with `{record["recipe"]}`, seed {record["seed"]}. Sample without guidance, in {how.steps} steps:
{warning}
```python
{snippet(name, backbone, how.steps)}```

Pass what is shown: other values mean another grid or another function. With stochastic sampling the pipeline's `generator`
seeds only the first noise: call `torch.manual_seed` to repeat an image.
The scheduler has shift {how.shift:g} and `stochastic_sampling`. The licence of the base model applies to this student.
{more}"""
