"""Learned metrics: real classes, random weights, known values."""

import numpy as np
import pytest
import torch
from PIL import Image

from advdmd.commands import metric
from advdmd.evaluation.generate import generate
from advdmd.evaluation.metrics import distances
from advdmd.mini.suites import MiniSuite
from advdmd.rewards import clip, imagereward
from advdmd.rewards.registry import load_scorer, parse_reward
from tests.evaluation import tiny
from tests.evaluation.test_evaluation import true_sampler

IMAGES = [np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8) for i in range(3)]
PROMPTS = ["a photo of a red bench", "a photo of a blue dog", "a photo of two cats"]


@pytest.fixture
def weights(tmp_path):
    return tiny.save_clip(tmp_path / "tiny-clip")


def test_scores_are_those_of_the_models_own_processor(weights):
    """CLIPModel with its own image processor as the reference; PickScore is its logit, CLIPScore 100 cos, not below 0."""
    model, tokenizer = tiny.clip()
    pixels = tiny.image_processor()([Image.fromarray(i) for i in IMAGES], return_tensors="pt").pixel_values
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, pixel_values=pixels).logits_per_image.diagonal()
    pick, clips = (load_scorer(n, str(weights)).score(IMAGES, PROMPTS) for n in ("pickscore", "clipscore"))
    torch.testing.assert_close(pick, logits, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(clips, (100 * logits / model.logit_scale.exp()).clamp(min=0), rtol=2e-3, atol=2e-2)
    assert load_scorer("clipscore", str(weights)).name == "clipscore[tiny-clip]"


def test_hps_pads_to_a_square_where_clip_crops(weights):
    white = np.full((20, 60, 3), 255, np.uint8)
    padded, cropped = clip.padded(white, 56), clip.cropped(white, 56)
    black = (0 - torch.tensor(clip.MEAN)) / torch.tensor(clip.STD)
    assert torch.allclose(padded[:, 0, 0], black)
    assert (padded[0] > 0).sum() == 56 * 19
    assert (cropped[0] > 0).all()
    assert not torch.allclose(*(load_scorer(n, str(weights)).score(IMAGES, PROMPTS) for n in ("hpsv2", "clipscore")))


def to_open_clip(state):
    """CLIPModel's names as open_clip has them: the inverse, written by hand."""
    out = {}
    for k, v in state.items():
        if "position_ids" in k:
            continue
        if ".self_attn." in k and "out_proj" not in k:
            if "q_proj" in k:
                parts = torch.cat([state[k.replace("q_proj", f"{n}_proj")] for n in "qkv"])
                out[k.replace("q_proj.", "in_proj_")] = parts
        else:
            out[k] = v
    renamed = {}
    for k, v in out.items():
        side, text = k.startswith("vision_model."), k.startswith("text_model.")
        for a, b in (
            ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
            ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
            ("vision_model.embeddings.patch_embedding", "visual.conv1"),
            ("vision_model.pre_layrnorm", "visual.ln_pre"),
            ("vision_model.post_layernorm", "visual.ln_post"),
            ("text_model.embeddings.token_embedding", "token_embedding"),
            ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
            ("text_model.final_layer_norm", "ln_final"),
            ("vision_model.encoder.layers", "visual.transformer.resblocks"),
            ("text_model.encoder.layers", "transformer.resblocks"),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn", "attn"),
        ):
            k = k.replace(a, b)
        if k in ("visual_projection.weight", "text_projection.weight"):
            k, v = {"v": "visual.proj", "t": "text_projection"}[k[0]], v.T
        assert side or text or k in ("logit_scale", "visual.proj", "text_projection")
        renamed[k] = v
    return renamed


def test_open_clips_weights_become_a_clip_model(tmp_path):
    model, _ = tiny.clip(hidden_act="gelu")
    theirs = to_open_clip(model.state_dict())
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in theirs
    ours = clip.from_open_clip(theirs | {"attn_mask": torch.zeros(1)})
    want = {k: v for k, v in model.state_dict().items() if "position_ids" not in k}
    assert ours.keys() == want.keys()
    assert all(torch.equal(ours[k], want[k]) for k in want)
    torch.save({"state_dict": theirs}, tmp_path / "hps.pt")
    base = tiny.save_clip(tmp_path / "base", hidden_act="gelu")
    clip.convert_hps(tmp_path / "hps.pt", base, tmp_path / "out")
    want, found = (load_scorer("hpsv2", str(f)).score(IMAGES, PROMPTS) for f in (base, tmp_path / "out"))
    assert torch.equal(want, found)
    with pytest.raises(ValueError, match="not empty"):
        clip.convert_hps(tmp_path / "hps.pt", base, tmp_path / "out")
    with pytest.raises(ValueError, match="no parameter of open_clip"):
        clip.from_open_clip({"conv.weight": torch.zeros(1)})


def tiny_blip():
    from transformers import BlipTextConfig, BlipVisionConfig

    vision = BlipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = BlipTextConfig(
        vocab_size=1200,
        hidden_size=16,
        encoder_hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return vision, text


def test_imagereward_reads_its_published_names_and_rates_image_and_prompt(tmp_path):
    torch.manual_seed(0)
    net = imagereward.Network(*tiny_blip()).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(8)  # so that answers differ
    theirs = {}
    for k, v in net.state_dict().items():
        k = k.replace("text.", "blip.text_encoder.", 1) if k.startswith("text.") else k
        k = k.replace("rating.", "mlp.layers.", 1) if k.startswith("rating.") else k
        if k.startswith("vision."):
            k = k.replace("vision.", "blip.visual_encoder.", 1).replace("post_layernorm", "norm")
            for a, b in imagereward.VISION:
                k = k.replace(b, a)
        theirs[k] = v
    assert "blip.visual_encoder.blocks.0.attn.qkv.weight" in theirs
    assert {k for k in theirs if k.startswith("mlp")} == {
        f"mlp.layers.{i}.{p}" for i in (0, 2, 4, 6, 7) for p in ("weight", "bias")
    }
    back = imagereward.converted(theirs | {"blip.vision_proj.weight": torch.zeros(1)})
    assert all(torch.equal(back[k], v) for k, v in net.state_dict().items())
    assert back.keys() == net.state_dict().keys()
    torch.save(theirs, tmp_path / "ImageReward.pt")
    _, tokenizer = tiny.clip()
    tokenizer.save_pretrained(tmp_path)
    scorer = imagereward.image_reward(tmp_path, settings=tiny_blip())
    found = scorer.score([IMAGES[0], IMAGES[0], IMAGES[1]], [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert len({round(x, 6) for x in found.tolist()}) == 3
    with torch.no_grad():
        for layer in net.rating:
            if isinstance(layer, torch.nn.Linear):
                layer.weight.zero_()
                layer.bias.zero_()
    with torch.no_grad():
        rating = net(torch.zeros(1, 3, 32, 32), torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))
    assert rating.item() == pytest.approx(-imagereward.MEAN / imagereward.STD)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (200_000, 2)), rng.normal(0, 1, (200_000, 2)) * [2, 3] + [1, 0]
    assert distances.frechet(x, y) == pytest.approx(1 + (2 - 1) ** 2 + (3 - 1) ** 2, rel=0.02)
    assert distances.frechet(x, x) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at least two"):
        distances.frechet(x[:1], y)


def test_kernel_distance_is_unbiased():
    """Its mean over many small draws of one distribution is zero; a biased estimate's is not."""
    rng = np.random.default_rng(0)
    draws = [distances.kernel(rng.normal(size=(8, 4)), rng.normal(size=(8, 4))) for _ in range(2000)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(len(draws))
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 1
    k = lambda a, b: (np.dot(a, b) / 3 + 1) ** 3  # noqa: E731
    pairs = lambda z: np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])  # noqa: E731
    want = pairs(x) + pairs(y) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert distances.kernel(x, y) == pytest.approx(want)


def test_diversity_is_within_prompts_only():
    f = np.eye(4)[[0, 1, 2, 2]]
    assert distances.within_prompts(f, ["a", "a", "b", "b"]) == pytest.approx(0.5)
    assert distances.within_prompts(np.eye(4)[[0, 0, 1, 1]], ["a", "a", "b", "b"]) == pytest.approx(0)
    with pytest.raises(ValueError, match="no prompt has two images"):
        distances.within_prompts(f, ["a", "b", "c", "d"])


def test_a_metric_is_measured_over_a_suite_and_written_down(weights, tmp_path):
    suite, folder = MiniSuite("mini-geneval", 4, 2), tmp_path / "generated"
    generate(suite, true_sampler(suite), folder, 0, {"model": {"name": "renderer", "rewards": {"pickscore": 0.5}}})
    found = metric.compute_metric(suite, folder, "clipscore", weights)
    assert len(found["rows"]) == found["images"] == 24
    assert found["interval"][0] <= found["mean"] <= found["interval"][1]
    assert (folder / "metric-clipscore.json").is_file()
    same = metric.compute_metric(suite, folder, "frechet", weights, reference=folder / "images")
    assert same["mean"] == pytest.approx(0, abs=1e-4)
    assert same["name"] == "frechet[tiny-clip]"
    assert 0 < metric.compute_metric(suite, folder, "diversity", weights)["mean"] < 2
    from safetensors.torch import save_file

    from advdmd.evaluation.metrics.inception import Inception

    save_file(Inception().state_dict(), tmp_path / "inception.safetensors")
    fid = metric.compute_metric(suite, folder, "fid", tmp_path / "inception.safetensors", reference=folder / "images")
    assert (fid["name"], fid["reference_images"]) == ("fid", 24)
    assert fid["mean"] == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="trained with pickscore"):
        metric.compute_metric(suite, folder, "pickscore", weights)
    assert (
        "own training reward" in metric.compute_metric(suite, folder, "pickscore", weights, allow_training_reward=True)["name"]
    )
    for bad, message in (({"metric": "psnr"}, "one of clipscore"), ({"metric": "kernel"}, "--reference goes with")):
        with pytest.raises(ValueError, match=message):
            metric.compute_metric(suite, folder, **{"weights": weights, **bad})


@pytest.mark.parametrize("text", ["pickscore:x", "0*pickscore:x", "-1*clipscore:x", "1*fid:x", "1*clipscore", "x*clipscore:y"])
def test_rewards_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match="write WEIGHT"):
        parse_reward(text)


def test_a_reward_is_written_weight_times_name():
    weight, kind, where = parse_reward("0.5*pickscore:models/pick")
    assert (weight, kind, str(where)) == (0.5, "pickscore", "models/pick")


def test_fids_network_has_the_published_shape_and_names(tmp_path):
    """Shapes and names of torchvision's InceptionV3, whose classifier and counters are ignored; other names are refused."""
    from advdmd.evaluation.metrics import inception

    torch.manual_seed(0)
    net = inception.Inception().eval()
    assert sum(p.numel() for p in net.parameters()) == 21_785_568  # InceptionV3's 23,834,568 less its 2,049,000 classifier
    assert "Mixed_7c.branch3x3dbl_3b.bn.running_var" in net.state_dict()
    torch.save(net.state_dict() | {"fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, tmp_path / "w.pth")
    features = inception.load_inception(tmp_path / "w.pth")
    assert features.embed([IMAGES[0][:, :40], IMAGES[1]]).shape == (2, inception.WIDTH)
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not FID's Inception"):
        inception.load_inception(tmp_path / "x.pth")
    x = torch.ones(1, 1, 4, 4)
    assert (inception.average(x) == 1).all(), "padding is left out of averages"
    assert net.Mixed_7b.pool is inception.average
    assert net.Mixed_7c.pool is inception.maximum
