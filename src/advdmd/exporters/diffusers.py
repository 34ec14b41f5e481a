"""A student as a stock diffusers folder: its pipeline, its scheduler, a model card, and a workflow for ComfyUI."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from advdmd.exporters.comfyui import workflow
from advdmd.exporters.model_card import LORA_FILE, SAMPLES_FILE, model_card
from advdmd.files import write_folder
from advdmd.models.backbone import Backbone
from advdmd.models.loading import ENCODERS, TARGET_TIME, read_index, read_metadata, save_pipeline, stored_dtype
from advdmd.models.lora import LoraModel
from advdmd.models.sampler import SamplerConfig
from advdmd.models.target_time import TargetTime
from advdmd.types import Json


def export_student(
    backbone: Backbone,
    net: nn.Module,
    sampler: SamplerConfig,
    teacher: Path,
    folder: Path,
    metadata: Json,
    samples: Path | None = None,
) -> Path:
    """Write the teacher's pipeline with the student `net` as its transformer and the student's scheduler into `folder`.

    All or nothing.

    metadata: what else advdmd.json records, such as the recipe. samples: a picture of what the student generates. Stock
    schedulers re-noise fully: only eta = 1 is the same sampler there, and the model card of another eta says so.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    assert sampler.shift is not None  # only a teacher follows its pipeline's scheduler
    parts, target_embedding, adapter = dict(backbone.pipe.components), None, None
    if isinstance(net, TargetTime):
        target_embedding, net = net.zero_target_state_dict(), net.net
    if isinstance(net, LoraModel):
        adapter, net = net.lora_state_dict(), _fused(net)
    parts["transformer"], dtype = net, next(net.parameters()).dtype
    parts["vae"] = copy.deepcopy(backbone.vae).to(stored_dtype(teacher, "vae"))  # in a run it is float32
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=sampler.shift, stochastic_sampling=sampler.eta == 1)
    pipe = type(backbone.pipe)(**parts)
    sampling = {"steps": sampler.steps, "shift": sampler.shift, "eta": sampler.eta}
    if sampler.last_time:
        sampling |= {"gap": sampler.last_time}
    stock = {"stock_load": backbone.pipeline_load_kwargs, "stock_call": backbone.pipeline_call_kwargs(sampler.steps)}
    base = read_metadata(teacher).get("name", teacher.name)
    record = {"sampling": sampling, **backbone.metadata, **stock, "base_model": base, **metadata}

    def write(making: Path) -> None:
        save_pipeline(pipe, making, record)
        _copy_encoders(making, teacher)
        if adapter is not None:
            header = {"format": "pt", "advdmd": json.dumps(record)}
            save_file({k: v.cpu().contiguous() for k, v in adapter.items()}, making / LORA_FILE, header)
        if sampler.stock:
            nodes = workflow(backbone, sampler, LORA_FILE if adapter is not None else None)
            (making / "comfyui_workflow.json").write_text(json.dumps(nodes, indent=1))
        if samples:
            shutil.copyfile(samples, making / SAMPLES_FILE)
        if target_embedding is not None:
            save_file({k: v.cpu().contiguous() for k, v in target_embedding.items()}, making / TARGET_TIME)
        (making / "README.md").write_text(model_card(making, folder.name, sampler, backbone, record, dtype))

    write_folder(folder, write)
    return folder


def _fused(adapter: LoraModel) -> nn.Module:
    """A transformer to be saved, on the CPU, with an adapter's weights added to the base's."""
    base: Any = adapter.shared_base.net
    with torch.device("meta"):  # what is no weight stays there and is not saved
        net = type(base).from_config(base.config)
    net.load_state_dict(adapter.fused_state_dict(), assign=True)
    return net.eval()


def _copy_encoders(folder: Path, teacher: Path) -> None:
    """Copy text encoders that stayed on disk during a run from the teacher's folder."""
    index, ours = (read_index(f) for f in (teacher, folder))
    for part, kind in index.items():
        if part in ENCODERS and kind[0] and ours.get(part, [None])[0] is None:
            shutil.copytree(teacher / part, folder / part)
            ours[part] = kind
    (folder / "model_index.json").write_text(json.dumps(ours, indent=2) + "\n")
