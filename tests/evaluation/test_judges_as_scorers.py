"""Judges of suites as scorers: of validations, and as rewards."""

import numpy as np
import pytest
import torch

from advdmd.commands.evaluate import trained_on_metric
from advdmd.evaluation.geneval import GenEval
from advdmd.evaluation.judges import scorers, vqa
from advdmd.recipes.registry import resolve
from advdmd.rewards.registry import load_scorer, parse_scorer

RED, BLUE = (np.full((16, 16, 3), c, np.uint8) for c in ((224, 31, 31), (31, 31, 224)))


def red_or_blue(picture, question):
    """A judge that knows two colours."""
    red, _, blue = picture.getpixel((0, 0))
    return 0.9 if ("red" in question) == (red > blue) else 0.2


def test_a_judge_is_asked_whether_the_picture_shows_the_prompt():
    asked = []

    def answer(picture, question):
        asked.append(question)
        return red_or_blue(picture, question)

    scorer = scorers.VQAScorer(vqa.VQAJudge("two-colours", "f", answer))
    found = scorer.score([RED, BLUE, RED], ["a red square.", "a red square", "a blue square"])
    torch.testing.assert_close(found, torch.tensor([0.9, 0.2, 0.2]))
    assert asked[-1] == "Does the picture show this: a blue square?"
    assert scorer.name == "vqa[two-colours]"


def test_a_judge_that_fails_its_test_scores_nothing():
    with pytest.raises(ValueError, match="self-test"):
        scorers.VQAScorer(vqa.VQAJudge("blind", "f", lambda picture, question: 0.5))


def test_genevals_verdict_is_a_scorer_of_genevals_prompts():
    class DogDetector:
        name, fingerprint = "eye", "f"

        def self_test(self):
            pass

        def judge(self, items, images):
            dog = {"label": "dog", "confidence": 0.95, "box": [0, 0, 8, 8]}
            return [{"objects": [dog] if image[0, 0, 0] > 100 else []} for image in images]

    scorer = scorers.GenEvalScorer(DogDetector())
    item = next(i for i in GenEval().items() if i.task == "single_object" and i.meta["include"][0]["class"] == "dog")
    assert scorer.score([RED, BLUE], [item.prompt] * 2).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="'a dog of mine' is no prompt of GenEval"):
        scorer.score([RED], ["a dog of mine"])


@pytest.mark.parametrize("text", ["qwen-vl", "qwen-vl:", "endpoint:", "geneval", "checker:x", "vqa:x"])
def test_an_incomplete_scorer_is_refused_with_the_syntax(text):
    with pytest.raises(ValueError, match=r"endpoint:URL#MODEL.*|geneval:DETECTOR,CLIP"):
        parse_scorer(text)


def test_what_a_judge_needs_is_read_before_a_run_begins(tmp_path):
    scorers_ = 'validation.scorers=["endpoint:http://localhost:1/v1#judge"]'
    _, r = resolve("mini-sd35-advdmd", ["eval_every=5", scorers_, f"validation.prompts={tmp_path / 'p.txt'}"])
    assert r.validation.scorers == ("endpoint:http://localhost:1/v1#judge",)
    with pytest.raises(ValueError, match="http://localhost:1/v1 gave no answer"):
        load_scorer(*parse_scorer(r.validation.scorers[0]))
    with pytest.raises(ValueError, match="name two folders, geneval:DETECTOR,CLIP"):
        load_scorer("geneval", str(tmp_path / "detector"))


def test_a_model_that_was_trained_on_a_judge_is_known_by_the_judges_name():
    rewards = {scorers.judge_name("endpoint", "http://x/v1#gpt-judge"): 1.0, scorers.judge_name("geneval", "d,c"): 1.0}
    for name in ("gpt-judge", "mask2former-swin-s + clip", "mask2former-swin-s + clip (other weights than GenEval's)"):
        assert trained_on_metric({"rewards": rewards}, name, allow=True)
        with pytest.raises(ValueError, match="no evidence of its quality"):
            trained_on_metric({"rewards": rewards}, name, allow=False)
    for other in ("checker", "gpt-judge-mini"):
        assert not trained_on_metric({"rewards": rewards}, other, allow=False)
