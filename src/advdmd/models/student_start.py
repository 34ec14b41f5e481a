"""Where a student starts if not at its teacher: a few-step model of the same kind, or a LoRA on the teacher."""

from pathlib import Path

import torch
from torch import nn

from advdmd.files import read_object
from advdmd.models import loading
from advdmd.models.backbone import Backbone
from advdmd.models.lora import LoraModel
from advdmd.models.lora_files import FILE_NAMES, LoraFile, fuse, load_adapter, read_lora
from advdmd.models.sampler import SamplerConfig
from advdmd.types import Json

Start = LoraFile | nn.Module  # a LoRA on the teacher, or a whole transformer


def read_start(source: str, backbone: Backbone, sampler: SamplerConfig, adapters: bool) -> Start:
    """What a student starts from: a pipeline folder, a hub id, or a LoRA of the teacher's transformer.

    sampler: how the student will be sampled. adapters: whether it is an adapter, which starts from a LoRA only; our exports
    hold one beside their pipeline. Raises ValueError if the source does not fit the teacher, or is sampled otherwise.
    """
    path = Path(source).expanduser()
    is_pipeline = (path / "model_index.json").is_file()
    has_lora = path.is_dir() and any((path / name).is_file() for name in FILE_NAMES)
    if adapters and is_pipeline and not has_lora:
        raise ValueError(
            f"student={source} is a whole model, and adapters (lora_rank > 0) start from a LoRA: name one, or set lora_rank=0"
        )
    if adapters or path.is_file() or (path.is_dir() and not is_pipeline):  # what is not here is on the hub
        lora = read_lora(source, backbone.net)
        _check_sampling(source, lora.record.get("sampling"), sampler)
        return lora
    folder = loading.pipeline_folder(source)
    index = loading.read_index(folder)
    parts = [k for k in index if k != "transformer"]
    net = loading.load_parts(folder, index, {"default": backbone.dtype}, skip=parts)["transformer"]
    ours, theirs = ({k: v.shape for k, v in n.state_dict().items()} for n in (backbone.net, net))
    if type(net) is not type(backbone.net) or ours != theirs:
        raise ValueError(
            f"student={source} has another transformer than the teacher: a student starts from a model of its kind"
        )
    _check_sampling(source, loading.read_metadata(folder).get("sampling") or _scheduler_sampling(folder), sampler)
    return net


@torch.no_grad()
def start_student(net: nn.Module, start: Start) -> None:
    """Set a student's weights, whole or an adapter's, to those that it starts from."""
    if isinstance(start, LoraFile):
        if isinstance(net, LoraModel):
            load_adapter(net, start)
        else:
            fuse(net, start)
    else:
        net.load_state_dict(start.state_dict())


def _scheduler_sampling(folder: Path) -> Json:
    """The time shift of a pipeline's scheduler, if it is a constant."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_object(file, hint=loading.EXPORT_AGAIN) if file.is_file() else {}
    return {"shift": config["shift"]} if "shift" in config and not config.get("use_dynamic_shifting") else {}


def _check_sampling(source: str, known: Json | None, sampler: SamplerConfig) -> None:
    known = known or {}
    if known.get("guidance", 1) > 1:
        raise ValueError(f"student={source} is sampled with guidance, so it is a teacher and no few-step model")
    changes = [
        f"algorithm.{key}={known[key]:g}"
        for key in ("steps", "shift", "eta")
        if key in known and known[key] != getattr(sampler, key)
    ]
    if changes:
        raise ValueError(f"student={source} is sampled otherwise than this recipe's student: set {' '.join(changes)}")
