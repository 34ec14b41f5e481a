"""The lines of a student's model card run as they stand, in the student's own type."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from advdmd.exporters.diffusers import export_student
from advdmd.models import loading
from advdmd.models.lora import LoraModel, SharedBase
from advdmd.models.sampler import SamplerConfig
from tests.tiny_pipelines import sd3_with_t5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_cards_lines_run_in_the_type_of_the_student(tmp_path, monkeypatch, dtype):
    """16-bit text encoders and autoencoder beside a transformer of each type, and an adapter on it."""
    kind, teacher = getattr(torch, dtype), tmp_path / "teacher"
    pipe = sd3_with_t5()
    for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3, pipe.vae):
        part.to(torch.bfloat16)
    pipe.transformer.to(kind)
    pipe.save_pretrained(teacher)
    (teacher / "advdmd.json").write_text(json.dumps({"sampling": {"steps": 2, "guidance": 2.0}, "t5_length": 6}))
    backbone, _ = loading.load(str(teacher), dtype=kind, text_dtype=torch.bfloat16)
    student = LoraModel(SharedBase(backbone.net, ["student"], 4, backbone.lora_targets), "student")
    sampler = SamplerConfig(steps=2, shift=3.0, eta=1.0)
    record = {"recipe": "a", "seed": 0, "base_model": "a"}
    folder = export_student(backbone, student, sampler, teacher, tmp_path / "student", record)
    assert f"dtype=torch.{dtype}" in (folder / "README.md").read_text()
    assert {v.dtype for v in load_file(folder / "vae/diffusion_pytorch_model.safetensors").values()} == {torch.bfloat16}
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    assert found["image"].size[0] > 0
    assert {p.dtype for p in found["pipe"].transformer.parameters()} == {kind}
