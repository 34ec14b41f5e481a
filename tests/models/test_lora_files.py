"""LoRA files of every program, a teacher with a style, and students that start from a few-step model."""

import json
import re
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from advdmd.commands import train
from advdmd.commands.export import export
from advdmd.distillation.validation import start_table
from advdmd.models import loading
from advdmd.models.images import image_sampler
from advdmd.models.lora import LoraModel
from advdmd.models.lora_files import fuse, load_adapter, parse_lora, read_lora
from advdmd.models.networks import trainable_copies
from advdmd.models.student_start import read_start
from advdmd.monitoring.health import read_metrics
from advdmd.monitoring.html_report import write_report
from advdmd.recipes.registry import resolve
from tests.test_product import SMALL, cli, trained  # noqa: F401

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_add_out", "transformer_blocks.1.ff.net.0.proj")


def pairs(net, rank=3, layers=LAYERS):
    g = torch.Generator().manual_seed(0)
    shapes = {k: net.get_submodule(k).weight.shape for k in layers}
    return {k: (torch.randn(rank, i, generator=g), torch.randn(o, rank, generator=g)) for k, (o, i) in shapes.items()}


def written(path, tensors, **header):
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt", **header})
    return str(path)


def in_keys(found, form):
    """The pairs in the keys of a program."""
    spell = {
        "diffusers": lambda k: (f"transformer.{k}.lora_A.weight", f"transformer.{k}.lora_B.weight"),
        "old diffusers": lambda k: (f"transformer.{k}.lora.down.weight", f"transformer.{k}.lora.up.weight"),
        "peft": lambda k: (f"base_model.model.{k}.lora_A.weight", f"base_model.model.{k}.lora_B.weight"),
        "peft, named": lambda k: (f"{k}.lora_A.default.weight", f"{k}.lora_B.default.weight"),
        "kohya": lambda k: tuple(f"lora_unet_{k.replace('.', '_')}.lora_{p}.weight" for p in ("down", "up")),
        "comfyui": lambda k: (f"diffusion_model.{k}.lora_A.weight", f"diffusion_model.{k}.lora_B.weight"),
    }[form]
    return {name: x for k, both in found.items() for name, x in zip(spell(k), both, strict=True)}


@pytest.mark.parametrize("form", ["diffusers", "old diffusers", "peft", "peft, named", "kohya", "comfyui"])
def test_keys_of_every_program_are_the_same_lora(form, backbone, tmp_path):
    found = pairs(backbone.net)
    lora = read_lora(written(tmp_path / "a.safetensors", in_keys(found, form)) + ":0.5", backbone.net)
    assert set(lora.products) == set(LAYERS)
    before = {k: backbone.net.get_submodule(k).weight.clone() for k in LAYERS}
    fuse(backbone.net, lora)
    for k, (a, b) in found.items():
        torch.testing.assert_close(backbone.net.get_submodule(k).weight, before[k] + 0.5 * b @ a)


def test_alphas_scale_as_in_the_program_that_wrote_them(backbone, tmp_path):
    found = pairs(backbone.net, rank=4)
    kohya = in_keys(found, "kohya") | {f"lora_unet_{k.replace('.', '_')}.alpha": torch.tensor(2.0) for k in found}
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
    half = [read_lora(written(tmp_path / "k.safetensors", kohya), backbone.net)]
    half.append(read_lora(written(tmp_path / "d.safetensors", in_keys(found, "diffusers"), **header), backbone.net))
    folder = tmp_path / "peft"
    folder.mkdir()
    written(folder / "adapter_model.safetensors", in_keys(found, "peft"))
    config = {"r": 4, "lora_alpha": 2, "alpha_pattern": {"attn.to_add_out": 8}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    peft = read_lora(str(folder), backbone.net)
    for k, (_, b) in found.items():
        for lora in half:
            torch.testing.assert_close(lora.products[k][1], 0.5 * b)
        torch.testing.assert_close(peft.products[k][1], (2.0 if k.endswith("to_add_out") else 0.5) * b)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    torch.testing.assert_close(read_lora(str(folder), backbone.net).products[LAYERS[0]][1], found[LAYERS[0]][1])


def test_diffusers_itself_makes_the_same_weights(tiny_folder, tmp_path):
    first, second = (loading.load(str(tiny_folder))[0] for _ in range(2))
    config = {"r": 3, "lora_alpha": 6, "target_modules": list(LAYERS)}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    file = written(tmp_path / "a.safetensors", in_keys(pairs(first.net), "diffusers"), **header)
    fuse(first.net, read_lora(f"{file}:0.7", first.net))
    second.pipe.load_lora_weights(file)
    second.pipe.fuse_lora(lora_scale=0.7)
    second.pipe.unload_lora_weights()
    for k, v in second.pipe.transformer.state_dict().items():
        torch.testing.assert_close(first.net.state_dict()[k], v, rtol=1e-4, atol=1e-5)


def test_stabilitys_lora_names_are_mapped_as_diffusers_converts_them(backbone, tmp_path):
    """Every linear layer of its SD3, by its name there in kohya's spelling, against diffusers' conversion of whole weights."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    net, g = backbone.net, torch.Generator().manual_seed(0)
    d, n = net.inner_dim, len(net.transformer_blocks)
    dual = [i for i in range(n) if getattr(net.transformer_blocks[i], "attn2", None) is not None]
    embed = net.time_text_embed
    shapes = {
        "context_embedder": (d, net.context_embedder.in_features),
        "t_embedder.mlp.0": (d, embed.timestep_embedder.linear_1.in_features),
        "t_embedder.mlp.2": (d, d),
        "y_embedder.mlp.0": (d, embed.text_embedder.linear_1.in_features),
        "y_embedder.mlp.2": (d, d),
        "final_layer.linear": tuple(net.proj_out.weight.shape),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for i in range(n):
        for side in ("x_block", "context_block"):
            last = i == n - 1 and side == "context_block"
            shapes[f"joint_blocks.{i}.{side}.attn.qkv"] = (3 * d, d)
            chunks = 2 if last else 9 if i in dual and side == "x_block" else 6
            shapes[f"joint_blocks.{i}.{side}.adaLN_modulation.1"] = (chunks * d, d)
            if not last:
                shapes[f"joint_blocks.{i}.{side}.attn.proj"] = (d, d)
                shapes[f"joint_blocks.{i}.{side}.mlp.fc1"] = (4 * d, d)
                shapes[f"joint_blocks.{i}.{side}.mlp.fc2"] = (d, 4 * d)
            if i in dual and side == "x_block":
                shapes[f"joint_blocks.{i}.x_block.attn2.qkv"] = (3 * d, d)
                shapes[f"joint_blocks.{i}.x_block.attn2.proj"] = (d, d)
    lora, whole = {}, {}
    for name, (rows, columns) in shapes.items():
        a, b = torch.randn(2, columns, generator=g), torch.randn(rows, 2, generator=g)
        flat = f"lora_unet_{name.replace('.', '_')}"
        lora |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.alpha": torch.tensor(2.0)}
        whole |= {f"{name}.weight": b @ a, f"{name}.bias": torch.zeros(rows)}
    attentions = [(i, "attn") for i in range(n)] + [(i, "attn2") for i in dual]
    for i, attention in attentions:
        norms = [f"joint_blocks.{i}.{side}.{attention}.ln_{k}.weight" for side in ("x_block", "context_block") for k in "qk"]
        whole |= dict.fromkeys(norms, torch.zeros(8))
    whole |= {"pos_embed": torch.zeros(1), "x_embedder.proj.weight": torch.zeros(1), "x_embedder.proj.bias": torch.zeros(1)}
    expected = convert_sd3_transformer_checkpoint_to_diffusers(whole)
    found = read_lora(written(tmp_path / "sai.safetensors", lora), net).products
    linear = {k for k, m in net.named_modules() if isinstance(m, nn.Linear)}
    assert set(found) == linear, "every linear layer has its part"
    for k, (a, b) in found.items():
        torch.testing.assert_close(b @ a, expected[f"{k}.weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(1, 2)}, "changes a text encoder"),
        ({"transformer.x.dora_scale": torch.zeros(1)}, "DoRA"),
        ({"lora_unet_x.lokr_w1": torch.zeros(1, 1)}, "LoKr"),
        ({f"transformer.nothing.lora_{k}.weight": torch.zeros(2, 2) for k in "AB"}, "no layer"),
        ({f"transformer.{LAYERS[0]}.lora_A.weight": torch.zeros(3, 7)}, "made for another model"),
        ({f"transformer.{LAYERS[0]}.lora_A.weight": torch.zeros(5, 32)}, "made for another model"),
        ({"transformer.proj_out.lora_A.weight": torch.zeros(3, 32)}, "has only lora_A"),
        ({f"transformer.{LAYERS[0]}.lora_A.weight": torch.zeros(3, 32, 3, 3)}, "convolution"),
        ({"transformer.proj_out.bias": torch.zeros(3)}, "no part of a LoRA"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_its_key(change, message, backbone, tmp_path):
    file = written(tmp_path / "a.safetensors", in_keys(pairs(backbone.net), "diffusers") | change)
    with pytest.raises(ValueError, match=message):
        read_lora(file, backbone.net)


def test_a_lora_is_given_by_its_place_and_its_scale(tmp_path):
    assert parse_lora("a/b.safetensors") == ("a/b.safetensors", 1.0)
    assert parse_lora("owner/name:0.8") == ("owner/name", 0.8)
    assert parse_lora("C:/x/style.safetensors") == ("C:/x/style.safetensors", 1.0)
    assert parse_lora("style.safetensors:-1") == ("style.safetensors", -1.0)
    with pytest.raises(ValueError, match="SCALE with a scale other than 0"):
        parse_lora("style:strong")
    for name in ("a.safetensors", "b.safetensors"):
        written(tmp_path / name, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"holds 2 safetensors .*name the file"):
        read_lora(str(tmp_path), nn.Linear(1, 1))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickles"):
        read_lora(str(tmp_path / "x.bin"), nn.Linear(1, 1))
    done = cli("train", "mini-sd35-advdmd", f"teacher_lora={tmp_path}/no.safetensors", "--out", tmp_path / "r")
    assert done.returncode == 2
    assert "no.safetensors" in done.stderr
    assert not (tmp_path / "r").exists(), "before anything is made"


# A teacher with a style


@pytest.fixture(scope="module")
def styled(tiny_folder, tmp_path_factory):
    """A run of adapters whose teacher has a LoRA, and the LoRA."""
    folder = tmp_path_factory.mktemp("styled")
    net = loading.load(str(tiny_folder))[0].net
    style = written(folder / "style.safetensors", {k: 0.1 * v for k, v in in_keys(pairs(net), "kohya").items()})
    words = [*SMALL, f"teacher={tiny_folder}", f"teacher_lora={style}:0.5", "lora_rank=2", "dm_optimizer.lr=0.01"]
    train.train(*resolve("mini-sd35-advdmd", words), folder / "run")
    return folder / "run", style


def weights_with(tiny_folder, *loras):
    """The transformer of a stock pipeline with LoRAs, file and scale each."""
    pipe = loading.load(str(tiny_folder))[0].pipe
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
        for i, (file, _) in enumerate(loras):
            pipe.load_lora_weights(file, adapter_name=str(i))
    pipe.set_adapters([str(i) for i in range(len(loras))], [scale for _, scale in loras])
    pipe.fuse_lora(adapter_names=[str(i) for i in range(len(loras))])
    pipe.unload_lora_weights()
    return pipe.transformer.state_dict()


def test_the_students_lora_holds_style_and_speed_or_speed_alone(styled, tiny_folder, tmp_path):
    """In stock diffusers: the one on the base is the exported pipeline; so is the other beside the style."""
    run, style = styled
    whole = load_file(loading.weights_file(run / "student"))
    base = load_file(loading.weights_file(tiny_folder))
    both = weights_with(tiny_folder, (run / "student", 1.0))
    speed = export(run, tmp_path / "speed", only="speed")
    net = loading.load(str(tiny_folder))[0].net
    in_diffusers = written(tmp_path / "s.safetensors", in_keys(read_lora(style, net).products, "diffusers"))
    beside = weights_with(tiny_folder, (in_diffusers, 0.5), (speed, 1.0))
    alone = weights_with(tiny_folder, (speed, 1.0))
    for k, v in whole.items():
        torch.testing.assert_close(both[k], v, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(beside[k], v, rtol=1e-4, atol=1e-5)
    assert max((alone[k] - whole[k]).abs().max() for k in whole) > 1e-3, "the speed-up alone has no style"
    assert max((alone[k] - base[k]).abs().max() for k in whole) > 1e-4
    card = (run / "student/README.md").read_text()
    assert "style.safetensors" in card
    assert "both are in `pytorch_lora_weights.safetensors`" in card
    assert json.loads((run / "student/advdmd.json").read_text())["teacher_lora"].endswith(":0.5")
    assert sorted(f.name for f in speed.iterdir()) == ["README.md", "adapter_config.json", "pytorch_lora_weights.safetensors"]
    card = (speed / "README.md").read_text()
    assert "in 4 steps, as a LoRA" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    ran = {}
    exec(code.replace("THIS_FOLDER", str(speed)).replace('"tiny-sd35"', f'"{tiny_folder}"'), ran)
    assert ran["image"].size[0] > 0


def test_only_an_adapter_can_be_exported_as_speed_alone(trained, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="the student is a whole network"):
        export(trained, tmp_path / "a", only="speed")
    done = cli("export", trained, "--out", tmp_path / "a", "--only", "style")
    assert done.returncode == 2
    assert "speed is the one part" in done.stderr


def test_a_teacher_with_a_style_is_base_and_lora(styled, tiny_folder):
    from advdmd.distillation.build import restore
    from advdmd.recipes import registry

    run, _ = styled
    _, r = registry.resolve(str(run / "recipe.yaml"))
    (ready, _), plain = restore(run, r), loading.load(str(tiny_folder))[0]
    x, t = torch.randn(1, *plain.latent_shape), torch.full((1,), 0.5)
    cond = ready.data.null
    with torch.no_grad():
        ours, theirs = ready.models.teacher(x, t, cond), plain.velocity(plain.net, x, t, cond)
    assert (ours - theirs).abs().max() > 1e-3


# A student that starts from a few-step model

START = [*SMALL[:1], "algorithm.warmup_iterations=4", *SMALL[1:]]


def test_a_student_starts_from_the_given_model_and_is_frozen_during_the_warm_up(trained, tiny_folder, tmp_path):  # noqa: F811
    """Whole networks: with a warm-up as long as the run the student is its start, and fake score and discriminator learn."""
    start = trained / "student"
    words = [*START, f"teacher={tiny_folder}", f"student={start}", "algorithm.shift=1.2"]
    name, r = resolve("mini-sd35-advdmd", words)
    ours = load_file(loading.weights_file(train.train(name, r, tmp_path / "run")))
    theirs = load_file(loading.weights_file(start))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    logged = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all("fake_score/loss" in x and "student/dm_loss" not in x for x in logged)
    forwards = r.forwards(0)
    assert forwards["distribution matching"] == 0
    assert json.loads((tmp_path / "run/student/advdmd.json").read_text())["started_from"] == start.name


def test_scores_of_the_start_are_recorded_first_and_shown_beside_the_students(trained, tiny_folder, tmp_path):  # noqa: F811
    """Of the start itself, not of a student that has moved; a run that goes on keeps them."""
    start, out = trained / "student", tmp_path / "run"
    words = [*START, f"teacher={tiny_folder}", f"student={start}", "eval_every=2", "eval_images=6"]
    name, r = resolve("mini-sd35-advdmd", words)
    train.train(name, replace(r, iterations=2), out)
    kept = json.loads((out / "start.json").read_text())
    assert set(kept) >= {"score", "diversity"}
    backbone, sampler = loading.load(str(start))
    expected = r.data.open(r.teacher).validation(6)(image_sampler(backbone, backbone.net, sampler))
    assert kept == pytest.approx(expected, abs=0.05)
    train.train(name, replace(r, iterations=4), out)
    assert json.loads((out / "start.json").read_text()) == kept
    head, *rows = start_table(out, read_metrics(out))
    assert head[:2] == ["validation", "the start"]
    assert {row[0] for row in rows} == set(kept)
    assert "Start and student" in write_report([out], [], tmp_path / "r.html").read_text()


def test_a_run_goes_on_without_its_start(trained, tiny_folder, tmp_path):  # noqa: F811
    import shutil

    start = shutil.copytree(trained / "student", tmp_path / "start")
    words = [*START, f"teacher={tiny_folder}", f"student={start}"]
    train.train(*resolve("mini-sd35-advdmd", words), tmp_path / "run")
    shutil.rmtree(start)
    name, r = resolve("mini-sd35-advdmd", [*words, "iterations=5"])
    train.train(name, r, tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "out").is_dir()


def test_an_adapter_starts_from_a_lora_of_no_more_rank(styled, tiny_folder):
    run, _ = styled
    _, r = resolve("mini-sd35-advdmd", [f"teacher={tiny_folder}"])
    backbone = loading.load(str(tiny_folder))[0]
    start = read_start(str(run / "student"), backbone, r.algorithm.sampler(), adapters=True)
    assert start.rank == 5, "style and speed"
    (adapter, other), whole = (
        trainable_copies(backbone, ["student", "other"], 8, 0, False),
        loading.load(str(tiny_folder))[0].net,
    )
    assert isinstance(adapter, LoraModel)
    load_adapter(adapter, start)
    fuse(whole, start)
    for k, v in whole.state_dict().items():
        torch.testing.assert_close(adapter.fused_state_dict()[k], v, rtol=1e-4, atol=1e-5)
    zero = [k for k, p in adapter.named_parameters() if not p.any()]
    assert all("lora_B" in k for k in zero), "what is beyond the LoRA's rank can learn"
    assert all(not p.any() for k, p in other.named_parameters() if k.endswith("lora_B"))
    (small,) = trainable_copies(loading.load(str(tiny_folder))[0], ["student"], 4, 0, False)
    with pytest.raises(ValueError, match="has rank 5: set lora_rank=5"):
        load_adapter(small, start)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algorithm.steps=2"], r"set algorithm\.steps=4"),
        (["algorithm.shift=3"], r"set algorithm\.shift=1\.2"),
        (["lora_rank=4"], "adapters .* start from a LoRA"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(words, message, trained, tiny_folder, tmp_path):  # noqa: F811
    right = [*SMALL, f"teacher={tiny_folder}", f"student={trained / 'student'}"]
    with pytest.raises(ValueError, match=message):
        train.train(*resolve("mini-sd35-advdmd", [*right, *words]), tmp_path / "r")
    train.train(*resolve("mini-sd35-advdmd", [*right, "iterations=1"]), tmp_path / "r")  # nothing was begun there


def test_other_starts_are_refused(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="twinflow starts from its teacher"):
        resolve("mini-sd35-twinflow", ["student=a"])
    with pytest.raises(ValueError, match="is a teacher and no few-step model"):
        train.train(*resolve("mini-sd35-advdmd", [*SMALL, f"teacher={tiny_folder}", f"student={tiny_folder}"]), tmp_path / "r")
    with pytest.raises(ValueError, match="another transformer than the teacher"):
        train.train(*resolve("mini-sd35-advdmd", [*SMALL, f"teacher={tiny_folder}", "student=mini-sd35"]), tmp_path / "r")
