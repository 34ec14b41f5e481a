"""GenEval: prompts, verdict, detector, converter."""

import json
import pickle
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from advdmd.evaluation.benchmark import SuiteItem
from advdmd.evaluation.geneval import COCO, COLORS, RELATIONS, GenEval, metadata
from advdmd.evaluation.judges import geneval_detector, mask2former
from tests.evaluation import tiny


def test_metadata_is_the_published_one_byte_for_byte():
    """Its hash is asserted inside; here the counts of the paper and a prompt of each oddity."""
    found = [json.loads(line) for line in metadata()]
    counts = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert Counter(m["tag"] for m in found) == counts
    prompts = {m["prompt"] for m in found}
    assert {"a photo of three buses", "a photo of a bench"} <= prompts
    assert [i.n_images for i in GenEval().items()] == [4] * 553


def independent(meta, objects):
    """GenEval's rule once more, written as quantifiers over numpy arrays instead of a loop over clauses."""
    sure = 0.9 if meta["tag"] == "counting" else 0.3
    top = lambda c: sorted((o for o in objects if o["label"] == c and o["confidence"] > sure), key=lambda o: -o["confidence"])  # noqa: E731
    groups = [top(c["class"])[: c["count"]] for c in meta["include"]]

    def stands(a, b, relation):
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a["box"], b["box"]
        d = np.array([(ax0 + ax1) - (bx0 + bx1), (ay0 + ay1) - (by0 + by1)]) / 2
        room = 0.1 * np.array([(ax1 - ax0) + (bx1 - bx0), (ay1 - ay0) + (by1 - by0)])
        moved = np.where(d > 0, np.maximum(d - room, 0), np.minimum(d + room, 0))
        if np.abs(moved).max() < 1e-3:
            return False
        x, y = moved / np.hypot(*d)
        return {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}[relation]

    def holds(i):
        clause, group = meta["include"][i], groups[i]
        enough = len(group) == clause["count"]
        colored = "color" not in clause or sum(o.get("color") == clause["color"] for o in group) >= clause["count"]
        if not (enough and colored and "position" in clause):
            return enough and colored
        relation, j = clause["position"]
        return holds(j) and all(stands(a, b, relation) for a in group for b in groups[j])

    spared = all(len(top(c["class"])) < c["count"] for c in meta.get("exclude", []))
    return spared and all(holds(i) for i in range(len(groups)))


def test_verdict_agrees_with_an_independent_formulation_on_ten_thousand_random_scenes():
    rng, suite = np.random.default_rng(0), GenEval()
    items, agreed = suite.items(), Counter()
    for _ in range(10_000):
        item = items[rng.integers(len(items))]
        names = [c["class"] for c in item.meta["include"]]
        objects = []
        for _ in range(rng.integers(0, 5)):
            x, y, w, h = rng.integers(0, 60, 2).tolist() + rng.integers(1, 40, 2).tolist()
            label = names[rng.integers(len(names))] if rng.random() < 0.9 else COCO[rng.integers(80)]
            colors = [c["color"] for c in item.meta["include"] if "color" in c] or ["red"]
            color = colors[rng.integers(len(colors))] if rng.random() < 0.8 else COLORS[rng.integers(10)]
            confidence = float(rng.choice([0.2, 0.5, 0.91, 0.99]))  # ties of confidence are decided by order
            objects.append({"label": label, "box": [x, y, x + w, y + h], "confidence": confidence, "color": color})
        verdict = suite.verdict(item, {"objects": objects})
        assert bool(verdict.official) == independent(item.meta, objects), (item.meta, objects)
        assert verdict.strict <= verdict.official
        agreed[item.task, bool(verdict.official)] += 1
    assert len(agreed) == 12, "both outcomes of every task have to occur"


def test_the_strict_rule_refuses_more_objects_than_the_prompt_names():
    suite = GenEval()
    item = next(i for i in suite.items() if i.task == "single_object")
    one = {"label": item.meta["include"][0]["class"], "box": [0, 0, 9, 9], "confidence": 0.8}
    assert suite.verdict(item, {"objects": [one]}).strict == 1
    twice = suite.verdict(item, {"objects": [one, one]})
    assert (twice.official, twice.strict) == (1, 0)
    assert "found 2" in twice.reason


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_are_read_as_a_person_reads_them(relation):
    suite = GenEval()
    item = next(i for i in suite.items() if i.task == "position" and i.meta["include"][1]["position"][0] == relation)
    target, subject = (c["class"] for c in item.meta["include"])
    dx, dy = {"left of": (-40, 0), "right of": (40, 0), "above": (0, -40), "below": (0, 40)}[relation]
    there = {"label": target, "box": [50, 50, 60, 60], "confidence": 0.9}
    here = {"label": subject, "box": [50 + dx, 50 + dy, 60 + dx, 60 + dy], "confidence": 0.9}
    assert item.prompt.index(subject) < item.prompt.index(relation)
    assert suite.verdict(item, {"objects": [there, here]}).official == 1
    assert suite.verdict(item, {"objects": [there | {"label": subject}, here | {"label": target}]}).official == 0


def test_converted_weights_give_the_same_outputs_and_a_wrong_permutation_does_not():
    """OpenMMLab's state dict is made by inverting the map."""
    from transformers import Mask2FormerForUniversalSegmentation

    net, x = tiny.detector(), torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    theirs = mask2former.from_transformers(net.state_dict())
    assert all(k.startswith(("backbone.", "panoptic_head.")) for k in theirs)

    def outputs(state):
        other = Mask2FormerForUniversalSegmentation(tiny.detector_config()).eval()
        mask2former.load_state(other, state)
        with torch.no_grad():
            out = other(x)
        return out.masks_queries_logits, out.class_queries_logits

    with torch.no_grad():
        want = net(x)
    ours = mask2former.to_transformers(theirs)
    masks, classes = outputs(ours)
    assert torch.equal(masks, want.masks_queries_logits)
    assert torch.equal(classes, want.class_queries_logits)
    name = "backbone.stages.0.downsample.reduction.weight"
    assert not torch.equal(ours[f"{mask2former.SWIN}.encoder.layers.0.downsample.reduction.weight"], theirs[name])
    unordered = ours | {f"{mask2former.SWIN}.encoder.layers.0.downsample.reduction.weight": theirs[name]}
    assert not torch.allclose(outputs(unordered)[0], want.masks_queries_logits)
    rolled = mask2former.to_transformers(theirs | {k: v.roll(len(v) // 3, 0) for k, v in theirs.items() if "in_proj" in k})
    assert not torch.allclose(outputs(rolled)[0], want.masks_queries_logits)


def test_older_parameter_names_are_read_and_unknown_ones_refused():
    theirs = mask2former.from_transformers(tiny.detector().state_dict())
    old = {
        k.replace(".cross_attn.attn.", ".attentions.0.attn.")
        .replace(".ffn.layers.", ".ffns.0.layers.")
        .replace("decoder.layers.0.self_attn.attn.", "decoder.layers.0.attentions.1.attn.")
        .replace("encoder.layers.0.self_attn.", "encoder.layers.0.attentions.0."): v
        for k, v in theirs.items()
    }
    assert set(old) != set(theirs)
    a, b = mask2former.to_transformers(old), mask2former.to_transformers(theirs)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match=r"roi_head.*no parameter of OpenMMLab's Mask2Former"):
        mask2former.to_transformers({"roi_head.weight": torch.zeros(1)})
    net = tiny.detector()
    b.pop(next(iter(b)))
    with pytest.raises(ValueError, match="1 missing"):
        mask2former.load_state(net, b)
    with pytest.raises(ValueError, match="1 left over"):
        mask2former.load_state(net, net.state_dict() | {"more": torch.zeros(1)})


class RunsCode:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": RunsCode()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="running code"):
        mask2former.convert(tmp_path / "bad.pth", tmp_path / "out")
    (tmp_path / "short.pth").write_bytes(pickle.dumps({})[:3])
    with pytest.raises(ValueError, match=r"short\.pth cannot be read"):
        mask2former.convert(tmp_path / "short.pth", tmp_path / "out")
    assert "code ran" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_converted_folder_loads_as_genevals_detector(tmp_path):
    net = tiny.detector()
    torch.save({"state_dict": mask2former.from_transformers(net.state_dict()), "meta": {"epoch": 1}}, tmp_path / "w.pth")
    folder = mask2former.convert(tmp_path / "w.pth", tmp_path / "det", tiny.detector_config())
    clip = tiny.save_clip(tmp_path / "clip")
    judge = geneval_detector.load_detector(folder, clip)
    assert "not comparable" not in judge.name
    net.save_pretrained(tmp_path / "other")
    other = geneval_detector.load_detector(tmp_path / "other", clip)
    assert "not comparable" in other.name
    assert other.fingerprint != "" != judge.fingerprint
    image = (np.random.default_rng(0).random((16, 640, 3)) * 255).astype(np.uint8)
    item = GenEval().items()[0]
    assert judge.judge([item], [image]) == other.judge([item], [image])


@pytest.mark.parametrize(("size", "want"), [((512, 512), (800, 800)), ((1024, 768), (1067, 800)), ((300, 900), (444, 1333))])
def test_images_are_fitted_and_padded_as_the_detector_was_trained(size, want):
    x, inner = geneval_detector.preprocess(np.full((*size, 3), 124, np.uint8))
    assert inner == want
    assert [n % 32 for n in x.shape[-2:]] == [0, 0]
    assert 0 <= x.shape[-2] - want[0] < 32
    assert x[0, :, 0, 0].tolist() == pytest.approx(
        [(124 - m) / s for m, s in zip(geneval_detector.MEAN, geneval_detector.STD)], abs=1e-5
    )
    assert (x[0, :, want[0] :] == 0).all()


def slowly(classes, masks, padded, size, image):
    """Every one of the top pairs enlarged and scored, then thresholded: nothing dropped early."""
    p = classes.softmax(-1)[:, :-1]
    m = F.interpolate(masks[None], padded, mode="bilinear")[..., : size[0], : size[1]]
    m = F.interpolate(m, image, mode="bilinear")[0]
    out = []
    for i in p.flatten().argsort(descending=True)[: geneval_detector.TOP].tolist():
        q, c = divmod(i, p.shape[1])
        inside = m[q] > 0
        s = (p[q, c] * (m[q].sigmoid() * inside).sum() / (inside.sum() + 1e-6)).item()
        if s > geneval_detector.THRESHOLD:
            ys, xs = np.nonzero(inside.numpy())
            out.append((c, s, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]))
    return sorted(out, key=lambda o: -o[1])


def test_dropping_instances_early_loses_no_object():
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        classes = torch.randn(20, 81, generator=g) * 4
        masks = F.interpolate(torch.randn(1, 20, 4, 4, generator=g) * 4, (16, 24), mode="bilinear")[0]
        args = (classes, masks, (64, 96), (60, 90), (40, 60))
        want, found = slowly(*args), geneval_detector.instances_from_logits(*args)
        assert len(want) > 2
        assert found.labels.tolist() == [w[0] for w in want]
        assert found.confidence.tolist() == pytest.approx([w[1] for w in want], rel=1e-5)
        assert found.boxes.tolist() == [[float(v) for v in w[2]] for w in want]
    none = geneval_detector.instances_from_logits(torch.zeros(20, 81), masks, *args[2:])
    assert len(none.labels) == 0
    assert none.masks.shape == (0, 40, 60)


def test_a_crop_shows_the_object_on_grey():
    image, mask = np.full((20, 30, 3), 10, np.uint8), np.zeros((20, 30), bool)
    mask[5:10, 8:12] = True
    mask[5, 8] = False
    found = np.asarray(geneval_detector.crop(image, mask, (8.0, 5.0, 12.0, 10.0)))
    assert found.shape == (5, 4, 3)
    assert found[0, 0].tolist() == [0x99] * 3
    assert found[1, 1].tolist() == [10] * 3


def test_only_the_classes_whose_colour_is_asked_for_are_named_and_thresholds_hold():
    model, tokenizer = tiny.clip()
    judge = geneval_detector.GenEvalDetector(
        tiny.detector(), geneval_detector.ClipColorClassifier(model, tokenizer, tiny.image_processor()), "x", True
    )
    image = (np.random.default_rng(0).random((16, 640, 3)) * 255).astype(np.uint8)
    plain = GenEval().items()[0]
    objects = judge.judge([plain], [image])[0]["objects"]
    assert objects
    assert all(o["confidence"] > 0.3 and "color" not in o for o in objects)
    assert max(Counter(o["label"] for o in objects).values()) <= geneval_detector.MAX_OBJECTS
    label = objects[0]["label"]
    asked = SuiteItem("x", "", "colors", {"tag": "colors", "include": [{"class": label, "count": 1, "color": "red"}]}, 1)
    named = judge.judge([asked], [image])[0]["objects"]
    assert all(("color" in o) == (o["label"] == label) for o in named)
    assert {o["color"] for o in named if "color" in o} <= set(COLORS)


def test_plain_gelu_is_refused_and_random_weights_fail_the_self_test(tmp_path):
    with pytest.raises(ValueError, match="quick_gelu"):
        geneval_detector.load_color_classifier(tiny.save_clip(tmp_path / "gelu", hidden_act="gelu"))
    passed = []
    for seed in range(1, 9):
        model, tokenizer = tiny.clip(seed)
        judge = geneval_detector.GenEvalDetector(
            tiny.detector(), geneval_detector.ClipColorClassifier(model, tokenizer, tiny.image_processor()), "x", True
        )
        with suppress(ValueError):
            judge.self_test()
            passed.append(seed)
    assert len(passed) <= 2, "chance alone passes one in a hundred"


def test_pickled_or_partial_judges_are_refused(tmp_path):
    (tmp_path / "pickled").mkdir()
    torch.save({}, tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(ValueError, match="no safetensors"):
        geneval_detector.load_detector(tmp_path / "pickled", tmp_path)
    from safetensors.torch import load_file, save_file

    tiny.detector().save_pretrained(tmp_path / "det")
    weights = load_file(tmp_path / "det/model.safetensors")
    weights.pop("class_predictor.bias")
    save_file(weights, tmp_path / "det/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*class_predictor\.bias"):
        geneval_detector.load_detector(tmp_path / "det", tiny.save_clip(tmp_path / "clip"))
