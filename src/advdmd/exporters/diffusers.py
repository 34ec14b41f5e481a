"""A student as a stock diffusers folder: its pipeline, its scheduler, a model card, and a workflow for ComfyUI."""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from advdmd.exporters.comfyui import reads_transformer, workflow
from advdmd.exporters.model_card import SAMPLES_FILE, adapter_card, model_card
from advdmd.files import write_folder
from advdmd.models.backbone import Backbone
from advdmd.models.hub import DTYPE_VARIANTS, id_of_snapshot
from advdmd.models.loading import (
    ENCODERS,
    TARGET_TIME,
    TEXT_ENCODERS,
    absent_parts,
    read_index,
    read_metadata,
    save_pipeline,
    stored_dtype,
    weight_files,
)
from advdmd.models.lora import LoraModel
from advdmd.models.lora_files import LORA_FILE, LoraFile, joined, plain_network
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
    style: LoraFile | None = None,
) -> Path:
    """Write the teacher's pipeline with the student `net` as its transformer and the student's scheduler into `folder`.

    All or nothing.

    metadata: what else advdmd.json records, such as the recipe. samples: a picture of what the student generates. style: a LoRA
    of the teacher: the exported LoRA does what it and the student's adapter do together. Stock
    schedulers re-noise fully: only eta = 1 is the same sampler there, and the model card of another eta says so.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    assert sampler.shift is not None  # only a teacher follows its pipeline's scheduler
    parts, target_embedding, adapter = dict(backbone.pipe.components), None, None
    if isinstance(net, TargetTime):
        target_embedding, net = net.zero_target_state_dict(), net.net
    if isinstance(net, LoraModel):
        adapter, net = net.lora_state_dict(), _fused(net)
        adapter = adapter if style is None else joined(style, adapter)
    parts["transformer"], dtype = net, next(net.parameters()).dtype
    parts |= dict.fromkeys({"processor"} & parts.keys())  # copied from the teacher
    parts["vae"] = copy.deepcopy(backbone.vae).to(stored_dtype(teacher, "vae"))  # in a run it is float32
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=sampler.shift, stochastic_sampling=sampler.eta == 1)
    pipe = type(backbone.pipe)(**parts)
    sampling = {"steps": sampler.steps, "shift": sampler.shift, "eta": sampler.eta}
    if sampler.last_time:
        sampling |= {"gap": sampler.last_time}
    stock = {"stock_load": backbone.pipeline_load_kwargs, "stock_call": backbone.pipeline_call_kwargs(sampler.steps)}
    base = read_metadata(teacher).get("name") or id_of_snapshot(teacher) or teacher.name
    record = {"sampling": sampling, **backbone.metadata, **stock, "base_model": base, **metadata}

    def write(making: Path) -> None:
        save_pipeline(pipe, making, record)
        _copy_encoders(making, teacher)
        if adapter is not None:
            header = {"format": "pt", "advdmd": json.dumps(record)}
            save_file({k: v.cpu().contiguous() for k, v in adapter.items()}, making / LORA_FILE, header)
            _write_adapter_config(making, adapter, base)
        if sampler.stock and (adapter is not None or reads_transformer(backbone)):
            nodes = workflow(backbone, sampler, LORA_FILE if adapter is not None else None)
            (making / "comfyui_workflow.json").write_text(json.dumps(nodes, indent=1))
        if samples:
            shutil.copyfile(samples, making / SAMPLES_FILE)
        if target_embedding is not None:
            save_file({k: v.cpu().contiguous() for k, v in target_embedding.items()}, making / TARGET_TIME)
        (making / "README.md").write_text(model_card(making, folder.name, sampler, record, dtype))

    write_folder(folder, write)
    return folder


def export_adapter(net: nn.Module, teacher: Path, folder: Path, metadata: Json) -> Path:
    """Write a student's adapter alone into `folder`, all or nothing: the speed-up, to use beside other LoRAs of its base.

    Raises ValueError if the student is a whole network.
    """
    if not isinstance(net, LoraModel):
        raise ValueError("only=speed: the student is a whole network, its speed-up is no LoRA; train with lora_rank above 0")
    adapter, base = net.lora_state_dict(), read_metadata(teacher).get("name") or id_of_snapshot(teacher) or teacher.name
    record = {"base_model": base, **metadata}

    def write(making: Path) -> None:
        making.mkdir(parents=True, exist_ok=True)
        header = {"format": "pt", "advdmd": json.dumps(record)}
        save_file({k: v.cpu().contiguous() for k, v in adapter.items()}, making / LORA_FILE, header)
        _write_adapter_config(making, adapter, record["base_model"])
        (making / "README.md").write_text(adapter_card(record))

    write_folder(folder, write)
    return folder


def _write_adapter_config(folder: Path, adapter: Mapping[str, torch.Tensor], base: str) -> None:
    """peft's adapter_config.json of an adapter's weights, whose scale is 1: alpha equals the rank."""
    from peft import LoraConfig

    rank = next(v.shape[0] for k, v in adapter.items() if k.endswith("lora_A.weight"))
    targets = sorted({k.removeprefix("transformer.").rpartition(".lora_")[0] for k in adapter})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, base_model_name_or_path=base, inference_mode=True)
    config.save_pretrained(str(folder))


def _fused(adapter: LoraModel) -> nn.Module:
    """A transformer to be saved, on the CPU, with an adapter's weights added to the base's."""
    net = plain_network(adapter.shared_base.net)  # what is no weight stays on the meta device and is not saved
    net.load_state_dict(adapter.fused_state_dict(), assign=True)
    return net.eval()


def _copy_encoders(folder: Path, teacher: Path) -> None:
    """Copy the teacher's text encoders, whose weights may have stayed on disk during a run, and its tokenizers, file by file.

    Older libraries read a tokenizer from vocab.json and merges.txt: where the teacher lacks them they are written beside its
    tokenizer.json.
    """
    index, ours = (read_index(f) for f in (teacher, folder))
    absent = absent_parts(teacher, index)
    for part, kind in index.items():
        if part not in ENCODERS or part == "vae" or not kind[0] or part in absent:
            continue
        variants = {f.name for f in (teacher / part).iterdir() if any(f.match(v) for v in DTYPE_VARIANTS)}
        if part in TEXT_ENCODERS and {f.name for f in weight_files(teacher / part)} <= variants:
            if ours.get(part, [None])[0] is not None:
                continue  # the pipeline has written its weights under the plain name
            variants = set[str]()
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir()
        for file in (teacher / part).iterdir():
            if file.is_file() and not file.name.startswith(".") and file.name not in variants:
                shutil.copyfile(file, folder / part / file.name)
        if part not in TEXT_ENCODERS:
            _write_bpe_files(folder / part)
        ours[part] = kind
    (folder / "model_index.json").write_text(json.dumps(ours, indent=2) + "\n")


def _write_bpe_files(tokenizer: Path) -> None:
    """vocab.json and merges.txt of a byte-pair tokenizer that has its tokenizer.json alone."""
    file = tokenizer / "tokenizer.json"
    model = json.loads(file.read_text(encoding="utf-8")).get("model", {}) if file.is_file() else {}
    if model.get("type") != "BPE" or (tokenizer / "vocab.json").exists():
        return
    merges = (m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (tokenizer / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{m}\n" for m in merges), encoding="utf-8")
