"""Operations as torch counts them, hours by measured rates, and the share of the matrix rate that a run logs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from advdmd.commands import train
from advdmd.commands.show import describe
from advdmd.distillation import cost, memory
from advdmd.distillation.cost import MEASURED, forward_operations
from advdmd.distillation.memory import tokens_of, transformer
from advdmd.mini import pipelines
from advdmd.models import loading
from advdmd.recipes.registry import resolve
from tests.test_product import SMALL
from tests.tiny_pipelines import FAMILIES

FULL = ["iterations=10", "algorithm.dm_only_iterations=0", "algorithm.policy_ramp_iterations=0"]  # policy updates throughout


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_what_torch_counts(family):
    backbone = loading.backbone_from_pipeline(FAMILIES[family](), {"t5_length": 0, "side": pipelines.LATENT, "text_length": 30})
    with torch.no_grad():
        cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle"]))
        x = torch.randn(1, *backbone.latent_shape)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            backbone.velocity(backbone.net, x, torch.rand(1), cond)
    found = forward_operations(backbone.net, tokens_of(backbone.net, *x.shape[-2:]), cond.embeds.shape[1])
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("hub", "resolution", "measured"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", 512, 2.44),
        ("stabilityai/stable-diffusion-3.5-medium", 1024, 11.25),
        ("Qwen/Qwen-Image", 1024, 88.95),
    ],
)
def test_operations_of_published_models_are_those_that_were_counted_on_a_gpu(hub, resolution, measured):
    net, text, _ = transformer(hub)
    tokens = tokens_of(net, resolution // 8, resolution // 8)
    assert forward_operations(net, tokens, text) / 1e12 == pytest.approx(measured, rel=2e-3)


def test_hours_are_those_of_the_measured_rate():
    """The page says 21 hours of an H200 for SD3.5 Medium at 512 pixels; four GPUs take a quarter."""
    name, r = resolve("sd35-medium-advdmd-4step-80gb")

    def line(**asked):
        return describe(name, r, **asked).splitlines()[-1]

    one = line(gpu="H200", resolution=512)
    assert "hours on one H200, at 50 TFLOP/s of each, as measured for it" in one
    found = float(one.split(": ")[1].split(" hours")[0])
    assert found == pytest.approx(21, abs=1.5)
    four = line(gpu="h200", resolution=512, gpus=4)
    assert float(four.split(": ")[1].split(" hours")[0]) == pytest.approx(found / 4, abs=0.1)
    assert "as measured for other models and sizes" in line(gpu="h100", resolution=1024)
    with pytest.raises(ValueError, match="gpu=b200: rates were measured on h100, h200"):
        line(gpu="b200")
    with pytest.raises(ValueError, match="mini-sd35 is of the miniature"):
        describe(*resolve("mini-sd35-advdmd"), gpu="h100")


@pytest.mark.parametrize(("gpu", "file"), [("h200", "card.json"), ("h100", "card_h100.json")])
def test_rates_are_those_of_the_committed_benchmark(gpu, file):
    rows = json.loads((Path(__file__).parent.parent / "results/performance" / file).read_text())["size"]
    committed = {tuple(r["case"].replace("-80gb", "").split("@")): r["share"] * r["matrix_teraflops"] for r in rows}
    found = {(model, str(side)): rate for (model, side), rate in MEASURED[gpu].items()}
    assert found == pytest.approx(committed, abs=0.1)


def test_a_run_logs_its_share_of_the_matrix_rate(tiny_folder, tmp_path):
    train.train(*resolve("mini-sd35-advdmd", [*SMALL, f"teacher={tiny_folder}"]), tmp_path / "run")
    found = [json.loads(line)["cost/mfu"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(0 < x < 1.5 for x in found)


def test_traffic_between_gpus_and_machines_is_counted():
    """Adapters: each of seven optimizer steps sums its network's gradients in a ring. Hybrid shards: each sums its part."""
    _, r = resolve("sd35-medium-advdmd-4step-80gb", ["prompts_per_step=8", *FULL])
    adapter = memory.estimate(r).adapter
    assert r.algorithm.optimizer_steps(9) == {"student": 3, "fake_score": 2, "discriminator": 2}
    assert cost.traffic(r, 2) == (7 * 4 * adapter, 0)
    assert cost.traffic(r, 8).gradients == pytest.approx(7 * 4 * adapter * 2 * 7 / 8)
    _, whole = resolve("sd35-medium-advdmd-4step-8x80gb", ["prompts_per_step=16", *FULL])
    full, hybrid = whole, replace(whole, fsdp_sharding="hybrid")
    base = memory.estimate(whole).base
    assert cost.traffic(hybrid, 16, 2) == (pytest.approx(7 * 4 * base / 8), 0)
    assert cost.traffic(full, 16, 2).weights > 20 * cost.traffic(hybrid, 16, 2).gradients
    text = describe("x", hybrid, 80, 16, 1024, None, 2, 25.0)
    assert "network between 2 machines, each GPU in a full iteration: 7.85 GB of gradients, 0.3 s at 25 GB/s" in text
    with pytest.raises(ValueError, match="nodes=3: 16 GPUs are not the same number on each"):
        describe("x", hybrid, 80, 16, 1024, None, 3)
    with pytest.raises(ValueError, match="bandwidth=0"):
        describe("x", hybrid, 80, 16, 1024, None, 2, 0)
