"""Model folders in every published layout; what is no pipeline is refused with what to do."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from advdmd.models import hub, loading
from advdmd.models.diffusers_pipeline import DiffusersModel, DiffusersSampling
from tests.tiny_pipelines import save_teacher, sd3_with_t5


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("models") / "pipe")


def weights(path, **tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.zeros(1), **tensors}, path)


def test_what_is_no_pipeline_is_refused_with_what_to_do(pipeline, tmp_path):
    weights(tmp_path / "sd3.5_medium.safetensors")
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF\3\0\0\0")
    weights(tmp_path / "lora/pytorch_lora_weights.safetensors")
    weights(tmp_path / "single/sd3_medium.safetensors")
    (tmp_path / "run/student").mkdir(parents=True)
    (tmp_path / "run/recipe.yaml").write_text("recipe: mini-sd35-advdmd\n")
    (tmp_path / "part").mkdir()
    shutil.copytree(pipeline / "transformer", tmp_path / "part/transformer")
    messages = {
        "sd3.5_medium.safetensors": r"is a single file.*from_single_file\('sd3.5_medium.safetensors'\)",
        "model-Q4_K_M.gguf": "is a GGUF file, whose rounded weights cannot be trained",
        "lora": "holds a LoRA.*fuse_lora, unload_lora_weights",
        "single": r"holds sd3_medium.safetensors.*from_single_file\('sd3_medium.safetensors'\)",
        "run": "is the folder of a training run: its student is .*run/student",
        "part": "holds a part of a pipeline",
        "part/transformer": "holds a part of a pipeline",
        "nothing": "is neither a shipped model",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            loading.pipeline_folder(str(tmp_path / name))
        if (tmp_path / name).is_dir():  # evaluation takes any pipeline of diffusers
            with pytest.raises(ValueError, match=message):
                DiffusersModel(str(tmp_path / name), DiffusersSampling())


@pytest.mark.parametrize("kind", ["deleted", "null", "encoder only", "tokenizer only"])
def test_t5_may_be_absent_in_any_way(pipeline, tmp_path, kind):
    """Deleted to save 9 GB with the index as it was, null in the index, or one half of it."""
    folder = shutil.copytree(pipeline, tmp_path / "p")
    index = json.loads((folder / "model_index.json").read_text())
    gone = {"encoder only": ["text_encoder_3"], "tokenizer only": ["tokenizer_3"]}.get(kind, ["text_encoder_3", "tokenizer_3"])
    for part in gone:
        shutil.rmtree(folder / part)
        index[part] = index[part] if kind == "deleted" else [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    backbone = loading.load(str(folder))[0]
    assert len(backbone.encoders) == 2
    (folder / "advdmd.json").unlink()
    stock = DiffusersModel(str(folder), DiffusersSampling(steps=1, guidance_scale=1.0, height=32, width=32))
    assert stock.sample(["a star"], [0]).shape == (1, 32, 32, 3)


def test_files_that_a_system_or_a_second_type_left_change_nothing(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "p")
    (folder / "text_encoder/.DS_Store").write_bytes(b"x")
    (folder / "transformer/._diffusion_pytorch_model.safetensors").write_bytes(b"\0\5\x16\7")
    shutil.copy(
        folder / "transformer/diffusion_pytorch_model.safetensors",
        folder / "transformer/diffusion_pytorch_model.fp16.safetensors",
    )
    assert loading.weights_hash(folder) == loading.weights_hash(pipeline)
    a, b = (loading.load(str(f))[0].net.state_dict() for f in (pipeline, folder))
    assert all(torch.equal(a[k], b[k]) for k in a)
    (folder / "advdmd.json").unlink()
    DiffusersModel(str(folder), DiffusersSampling())


def test_half_precision_files_are_read(pipeline, tmp_path):
    folder = tmp_path / "half"
    sd3_with_t5().to(torch.float16).save_pretrained(folder)
    shutil.copy(pipeline / "advdmd.json", folder)
    assert loading.stored_dtype(folder) == torch.float16
    assert loading.load(str(folder))[0].dtype == torch.float32


def test_refusals_of_the_hub_are_reported_with_what_to_do(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    class Response:
        headers, status_code, request, url = {}, 401, None, "x"

    def refusing(kind, text):
        def download(*args, **more):
            error = kind.__new__(kind)
            Exception.__init__(error, text)
            raise error

        return download

    cases = [
        (errors.GatedRepoError, "401 Client Error", "someone/model, then run `hf auth login`"),
        (errors.RepositoryNotFoundError, "401 Client Error", "no such repository, or it is private.*hf auth login"),
        (errors.RevisionNotFoundError, "404", "no such revision"),
        (OSError, "no network", "no network"),
    ]
    for kind, text, message in cases:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", refusing(kind, text))
        with pytest.raises(ValueError, match=message):
            hub.download("someone/model")


def test_a_snapshots_folder_gives_its_hub_id(tmp_path):
    path = tmp_path / "models--a--b-c/snapshots/01"
    assert hub.id_of_snapshot(path) == "a/b-c"
    assert hub.id_of_snapshot(tmp_path) is None


@pytest.mark.parametrize("with_t5", [True, False])
def test_a_comfyui_workflow_asks_for_the_encoders_that_the_student_has(with_t5):
    from advdmd.exporters.comfyui import workflow
    from advdmd.mini import pipelines
    from advdmd.mini.world.caption import VOCABULARY
    from advdmd.models.sampler import SamplerConfig
    from tests.conftest import TINY

    pipe, length = (sd3_with_t5(), 6) if with_t5 else (pipelines.sd3(VOCABULARY, TINY, sd35=True), 154)
    nodes = workflow(loading.backbone_from_pipeline(pipe, {"t5_length": length}), SamplerConfig(steps=4, shift=3.0, eta=1.0))
    loader = nodes["clip"]
    assert loader["class_type"] == ("TripleCLIPLoader" if with_t5 else "DualCLIPLoader")
    assert ("clip_name3" in loader["inputs"]) == ("tokens" in nodes) == with_t5
    assert ("zero" in nodes) == (not with_t5)
    names = set(nodes)
    for node in nodes.values():
        assert {v[0] for v in node["inputs"].values() if isinstance(v, list)} <= names, "every link leads somewhere"
