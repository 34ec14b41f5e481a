"""Compiled blocks: the numbers of eager ones, no breaks, and a number of graphs that does not grow with the depth."""

import copy
from collections import Counter

import pytest
import torch

from advdmd.distillation.build import Builder
from advdmd.mini import pipelines
from advdmd.mini.world.caption import VOCABULARY
from advdmd.models import loading, networks
from advdmd.models.compilation import compile_blocks
from advdmd.recipes.registry import resolve
from advdmd.rng import Rng
from advdmd.training.trainer import as_numbers
from advdmd.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of itself while it traces
WORDS = [
    "algorithm.dm_only_iterations=0", "algorithm.policy_ramp_iterations=0", "algorithm.auc_gating=false",
    "algorithm.group_size=4", "prompts_per_step=2", "discriminator.hidden_size=8",
]  # fmt: skip
KINDS = 2  # of a block: with a second attention, and the last one
GRAPHS = {"whole": 8, "adapters": 15}  # of a kind, at most: adapters, sizes of batches, with gradient or not


@pytest.fixture
def counted():
    """A backend that runs graphs as they are, and how many it was given."""
    found = Counter()

    def backend(graph, examples):
        found["graphs"] += 1
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield backend, found
    torch._dynamo.reset()


def folder_of(path, layers):
    """A tiny SD3.5 of so many layers."""
    size = pipelines.MiniConfig(width=32, layers=layers, text_width=32, vae_channels=(4, 4, 8))
    torch.manual_seed(0)
    pipelines.sd3(VOCABULARY, size, sd35=True).save_pretrained(path)
    (path / "advdmd.json").write_text('{"sampling": {"steps": 4, "guidance": 2.0}, "t5_length": 0}')
    return path


def iteration(folder, words, backend):
    """What an iteration of AdvDMD logs."""
    _, r = resolve("mini-sd35-advdmd", [f"teacher={folder}", *WORDS, *words])
    backbone = loading.load(str(folder))[0]
    with torch.no_grad():
        null = backbone.encode_text(backbone.tokenize([""]))
        cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle", "a picture of two squares"]))
    original = networks.trainable_copies
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "trainable_copies", lambda *args: original(*args[:-1], backend))
        models = Builder(r, backbone, null).build()
    latents = torch.randn(8, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    batch = Batch(cond[torch.arange(2).repeat_interleave(4)], latents)
    return as_numbers(r.algorithm.train_step(models, batch, 0, Rng(0, 0, range(8))))


@pytest.mark.parametrize(
    ("mode", "words"),
    [("whole", []), ("adapters", ["lora_rank=4", "gradient_checkpointing=true"])],
)
def test_a_compiled_iteration_is_the_eager_one(mode, words, counted, tiny_folder):
    """The same numbers, no break, and a bounded number of graphs."""
    backend, found = counted
    eager, compiled = (iteration(tiny_folder, words, compiled) for compiled in ("", backend))
    assert compiled == pytest.approx(eager, rel=1e-4, abs=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert 0 < found["graphs"] <= KINDS * GRAPHS[mode]


@pytest.mark.parametrize("rank", [0, 2])
def test_more_layers_need_no_more_graphs(rank, counted, tmp_path):
    backend, found = counted
    numbers = []
    for layers in (4, 6):
        found.clear()
        torch._dynamo.reset()
        backbone = loading.load(str(folder_of(tmp_path / str(layers), layers)))[0]
        with torch.no_grad():
            cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle"]))
        x, t = torch.randn(1, *backbone.latent_shape), torch.full((1,), 0.5)
        for net in networks.trainable_copies(backbone, ["a"], rank, 0, False, None, backend):
            backbone.velocity(net, x, t, cond).sum().backward()
            with torch.no_grad():
                backbone.velocity(net, x, t, cond)
        numbers.append(found["graphs"])
    assert numbers[0] == numbers[1] > 0


def test_a_copy_of_compiled_blocks_runs_with_its_own_weights(counted, backbone):
    backend, _ = counted
    compile_blocks(backbone.blocks(backbone.net), backend)
    copied = copy.deepcopy(backbone.net)
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(1.5)
        cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle"]))
        x, t = torch.randn(1, *backbone.latent_shape), torch.full((1,), 0.5)
        ours, theirs = (backbone.velocity(net, x, t, cond) for net in (backbone.net, copied))
    assert (ours - theirs).abs().max() > 1e-3


def test_on_the_cpu_nothing_is_compiled_unless_it_is_asked_for():
    _, r = resolve("mini-sd35-advdmd")
    assert not r.compiles("cpu")
    assert r.compiles("cuda")
    assert resolve("mini-sd35-advdmd", ["compile=blocks"])[1].compiles("cpu")
    assert not resolve("mini-sd35-advdmd", ["compile=none"])[1].compiles("cuda")
