"""Quantized bases and moments: close to the original ones, and the same after gradients, stops and exports."""

import copy
import json
import shutil
import sys

import pytest
import torch

from advdmd.commands.train import train
from advdmd.files import file_hash
from advdmd.models import loading, quantization
from advdmd.models.lora import LoraModel, SharedBase
from advdmd.recipes.registry import resolve
from advdmd.training.learner import Learner
from advdmd.training.optimizer import OptimizerConfig, ParamGroup

WORDS = [
    "algorithm.group_size=2", "prompts_per_step=2", "algorithm.dm_only_iterations=1", "algorithm.policy_ramp_iterations=1",
    "data.num_prompts=4", "data.images_per_prompt=1",
    "save_every=2", "sample_every=0", "discriminator.hidden_size=8", "lora_rank=4", "base_bits=4",
    "dm_optimizer.state_bits=8", "policy_optimizer.state_bits=8",
    "fake_score_optimizer.state_bits=8", "gradient_checkpointing=true",
]  # fmt: skip


@pytest.fixture(params=[(8, 0.03), (4, 0.3)], ids=["8", "4"])
def quantized(request, backbone):
    bits, tolerance = request.param
    torch.manual_seed(2)
    with torch.no_grad():
        cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle", "a picture of two stars"]))
    inputs = torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.8]), cond
    original = copy.deepcopy(backbone.net)
    quantization.quantize(backbone.blocks(backbone.net), bits, torch.float32, "cpu")
    return backbone, original, tolerance, inputs


def test_a_quantized_base_is_close_to_the_original(quantized):
    backbone, original, tolerance, inputs = quantized
    with torch.no_grad():
        exact, close = backbone.velocity(original, *inputs), backbone.velocity(backbone.net, *inputs)
    assert 0 < (close - exact).norm() / exact.norm() < tolerance
    weights = [quantization.dequantize(m) for m in backbone.net.modules()]
    assert sum(w is not None for w in weights) > 20
    assert all(quantization.dequantize(m) is None for m in original.modules())


def test_adapters_on_a_quantized_base_learn_and_fuse_as_on_its_dequantized_weights(quantized):
    """The reference is a network of the dequantized weights. 8-bit products round activations too, hence the tolerance."""
    backbone, dequantized, tolerance, inputs = quantized
    student = LoraModel(SharedBase(backbone.net, ["student"], 4, backbone.lora_targets), "student")
    torch.manual_seed(1)
    for p in student.parameters():
        p.data.normal_(0, 0.1)
    fused = student.fused_state_dict()
    assert set(fused) == set(dequantized.state_dict())
    dequantized.load_state_dict(fused)
    dequantized.requires_grad_(True)
    exact, close = backbone.velocity(dequantized, *inputs), backbone.velocity(student, *inputs)
    assert (close - exact).norm() / exact.norm() < tolerance / 10

    exact.square().mean().backward()
    close.square().mean().backward()
    adapters = dict(student.named_parameters())
    for key, b in adapters.items():
        if key.endswith("lora_B"):  # of W + BA, the gradient of B is that of W through A
            place = key.removesuffix("/lora_B").replace("/", ".")
            wanted = dequantized.get_parameter(f"{place}.weight").grad @ adapters[key.replace("lora_B", "lora_A")].detach().T
            torch.testing.assert_close(b.grad, wanted, atol=tolerance / 2 * float(wanted.abs().max()), rtol=0.1)


@pytest.mark.parametrize("bits", [8, 4])
def test_fused_weights_of_a_quantized_bfloat16_base_are_bfloat16(tiny_folder, bits):
    backbone = loading.load(str(tiny_folder), dtype=torch.bfloat16)[0]
    quantization.quantize(backbone.blocks(backbone.net), bits, torch.bfloat16, "cpu")
    student = LoraModel(SharedBase(backbone.net, ["student"], 4, backbone.lora_targets), "student")
    assert {v.dtype for v in student.fused_state_dict().values()} == {torch.bfloat16}


def learner(bits):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Linear(80, 4))  # one large enough for bytes, and small ones
    return Learner("net", net, net, {"main": (OptimizerConfig(lr=1e-2, state_bits=bits), [ParamGroup(net.parameters())])})


def update(one, steps, gen):
    for _ in range(steps):
        x = torch.randn(16, 64, generator=gen)
        one.update([(one(x) - x[:, :4]).square().mean(1)])


def test_8_bit_moments_train_like_32_bit_moments_and_survive_a_stop(gen):
    exact, close, g, h = learner(32), learner(8), gen(1), gen(1)
    began = copy.deepcopy(exact.net.state_dict())
    update(exact, 8, g)
    update(close, 8, h)
    exact_state, close_state = exact.net.state_dict(), close.net.state_dict()
    change, difference = (
        torch.cat([(a[k] - b[k]).flatten() for k in began]) for a, b in ((exact_state, began), (close_state, exact_state))
    )
    assert 0 < difference.norm() < 0.2 * change.norm()
    tensors, counters = close.state_dict()
    assert sum(v.dtype == torch.uint8 for v in tensors.values()) == 2
    other = learner(8)
    other.load_state_dict({k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(counters)))
    for one in (close, other):
        update(one, 3, gen(2))
    assert all(torch.equal(a, b) for a, b in zip(close.net.parameters(), other.net.parameters(), strict=True))
    with pytest.raises(ValueError, match="whole optimizer state of 3"):
        learner(8).load_state_dict({k: v for k, v in tensors.items() if "0/absmax1" not in k}, counters)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_run_goes_on_and_exports_a_stock_pipeline(tiny_folder, tmp_path, bits):
    name, r = resolve("mini-sd35-advdmd", [*WORDS, f"base_bits={bits}", f"teacher={tiny_folder}", "iterations=4"])
    run = tmp_path / "run"
    student = train(name, r, run)
    once = file_hash(loading.weights_file(student))
    shutil.rmtree(student)
    for file in (run / "checkpoints").glob("*4.*"):  # as if it had been stopped between 2 and 4
        file.unlink()
    assert file_hash(loading.weights_file(train(name, r, run))) == once
    assert loading.load(str(student))[0].net.dtype == torch.float32
    assert f"the base in {bits} bits" in (student / "README.md").read_text()


def test_what_cannot_be_quantized_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"base_bits=4: only a frozen base .* set lora_rank"):
        resolve("mini-sd35-advdmd", ["base_bits=4"])
    with pytest.raises(ValueError, match=r"8-bit optimizers .* cannot be sharded"):
        resolve("sd35-large-advdmd-4step-8x80gb", ["fake_score_optimizer.state_bits=8"])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"need bitsandbytes: pip install 'advdmd\[bits\]'"):
        train("x", resolve("mini-sd35-advdmd", WORDS)[1], tmp_path / "run")
    assert not (tmp_path / "run").exists()
