"""GPU memory that a recipe needs, from the published models' configurations alone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from advdmd.distillation.memory import estimate, fit_advice, warning
from advdmd.recipes.published import RECIPES, preset_from_name
from advdmd.recipes.registry import resolve


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        *(("sd3-medium", 2.028), ("sd35-medium", 2.243), ("sd35-large", 8.057), ("qwen-image", 20.430), ("flux-dev", 11.901)),
        *(("flux2-klein-4b", 3.876), ("flux2-dev", 32.223), ("z-image", 6.155)),
    ],
)
def test_parameters_are_as_many_as_the_published_models_have(name, billions):
    found = estimate(resolve(f"{name}-advdmd-4step-80gb", ["base_bits=32"])[1])
    assert found.base / 1e9 == pytest.approx(billions, abs=6e-4)
    assert found.parts["frozen base"] == 2 * found.base


def test_every_recipe_fits_the_gpus_it_is_named_after():
    for name in RECIPES:
        r, fit = resolve(name)[1], preset_from_name(name)
        assert name.endswith(f"-{fit.gpus}x{fit.gpu_memory}gb" if fit.gpus > 1 else f"-{fit.gpu_memory}gb")
        assert fit_advice(r, estimate(r, fit.resolution, fit.gpus), fit.gpu_memory).startswith("fits"), name
        r.check_world_size(fit.gpus)
    assert preset_from_name("mini-sd35-advdmd") is None


def test_whole_networks_are_sharded_over_the_gpus():
    r = resolve("sd35-large-advdmd-4step-8x80gb")[1]
    one, many = estimate(r, gpus=1), estimate(r, gpus=8)
    for part in ("trained weights", "gradients", "Adam", "EMA"):
        assert many.parts[part] == one.parts[part] / 8
    # One GPU has no other to shard with: all of it is float32.
    assert many.parts["frozen base"] == one.parts["frozen base"] / 16
    assert many.parts["activations"] == one.parts["activations"] / 2
    assert "lora_rank=32 fsdp=false (adapters on one base), more GPUs" in fit_advice(r, one, 80)


def test_hybrid_sharding_is_inside_a_machine():
    """Two machines of eight hold what one of eight does, each its replica."""
    r = resolve("sd35-large-advdmd-4step-8x80gb", ["prompts_per_step=16"])[1]
    hybrid = replace(r, fsdp_sharding="hybrid")
    one, two, full = estimate(r, gpus=8), estimate(hybrid, gpus=16, nodes=2), estimate(r, gpus=16)
    for part in ("trained weights", "gradients", "Adam", "EMA"):
        assert two.parts[part] == one.parts[part] == 2 * full.parts[part]


def test_adapters_are_counted_as_they_are_made(backbone, tiny_folder):
    from advdmd.models.lora import LoraModel, SharedBase

    r = resolve("sd35-medium-advdmd-4step-24gb", [f"teacher={tiny_folder}", "lora_rank=4"])[1]
    made = LoraModel(SharedBase(backbone.net, ["student"], 4, backbone.lora_targets), "student")
    assert estimate(r).adapter == sum(p.numel() for p in made.parameters())
    assert estimate(r).networks == 3


def test_advice_for_a_gpu_that_is_too_small_names_settings_that_need_less():
    r = resolve("sd35-large-advdmd-4step-80gb")[1]
    assert "algorithm.micro_batch_size=1" in fit_advice(r, estimate(r), 24)
    large = resolve("qwen-image-advdmd-4step-80gb")[1]
    assert "base_bits=4" in fit_advice(large, estimate(large), 24)
    assert "the frozen base alone takes 11 GB" in fit_advice(large, estimate(large), 8), "in the fewest bits"
    few = resolve("qwen-image-advdmd-4step-24gb")[1]
    assert "the frozen base alone takes 11 GB" in fit_advice(few, estimate(few), 8)
    whole = resolve("sd35-medium-advdmd-4step-24gb", ["dtype=float32", "lora_rank=0"])[1]
    assert "lora_rank=32" in fit_advice(whole, estimate(whole), 24)


def test_a_transformer_whose_memory_cannot_be_estimated_is_named(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer/config.json").write_text('{"_class_name": "SanaTransformer2DModel"}')
    with pytest.raises(ValueError, match="has a SanaTransformer2DModel: memory is counted for SD3Transformer2DModel, Qwen"):
        estimate(resolve("sd35-medium-advdmd-4step-24gb", [f"teacher={tmp_path}"])[1])


def test_quantization_is_counted_in_the_blocks_alone():
    r = resolve("qwen-image-advdmd-4step-80gb")[1]
    whole, few = (
        estimate(r),
        estimate(resolve("qwen-image-advdmd-4step-80gb", ["base_bits=4", "fake_score_optimizer.state_bits=8"])[1]),
    )
    assert 0.51 / 2 < few.parts["frozen base"] / whole.parts["frozen base"] < 0.53 / 2
    eight, thirty_two = 2, 2  # optimizers: fake score and trunk; the student's two
    assert few.parts["Adam"] / whole.parts["Adam"] == (eight * 8 + thirty_two * 32) / (4 * 32)


def test_a_float32_base_is_merged_anew_for_every_network_of_a_graph():
    def held(*words):
        return estimate(resolve("sd35-medium-advdmd-4step-80gb", words)[1]).parts["activations"]

    assert held("dtype=float32") == 2 * held(), "checkpointing keeps a block's at a time"
    assert held("dtype=float32", "gradient_checkpointing=false") > 2 * held("gradient_checkpointing=false") + 1e10


def test_a_run_warns_before_it_loads_anything_that_its_gpu_is_too_small(monkeypatch):
    """By the memory that torch reports; on a CPU, and where the recipe fits, there is no warning."""
    recipe = resolve("sd35-large-advdmd-4step-80gb")[1]
    gb = {"total_memory": 24 * 10**9}
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(**gb))
    text = warning(recipe, 1024, 1, "cuda")
    assert "GPU can be used: " in text
    assert "lora_rank=16" in text
    assert warning(recipe, 1024, 1, "cpu") == ""
    gb["total_memory"] = 80 * 10**9
    assert warning(recipe, 1024, 1, "cuda:0") == ""
