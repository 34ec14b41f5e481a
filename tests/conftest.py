import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # claims are about the CPU; where a GPU is visible, processes cannot be forked after a backward pass
)

import pytest
import torch

from advdmd.mini import pipelines
from advdmd.mini.world.caption import VOCABULARY

torch.set_num_threads(1)
TINY = pipelines.MiniConfig(width=32, layers=2, text_width=32, vae_channels=(4, 4, 8))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A real StableDiffusion3Pipeline folder with random weights, as small as it gets."""
    import json

    folder = tmp_path_factory.mktemp("teacher") / "tiny-sd35"
    torch.manual_seed(0)
    pipelines.sd3(VOCABULARY, TINY, sd35=True).save_pretrained(folder)
    metadata = {"name": "tiny-sd35", "sampling": {"steps": 4, "guidance": 2.0}, "t5_length": 0}
    (folder / "advdmd.json").write_text(json.dumps(metadata))
    return folder


@pytest.fixture
def backbone(tiny_folder):
    from advdmd.models import loading

    return loading.load(str(tiny_folder))[0]


@pytest.fixture
def gen():
    return lambda seed=0: torch.Generator().manual_seed(seed)
