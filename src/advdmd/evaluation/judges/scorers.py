"""Judges of suites as scorers of any prompt: a model that answers questions, and GenEval's detector on GenEval's prompts."""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from advdmd.evaluation.benchmark import Judge, SuiteItem
from advdmd.evaluation.dpg import Question
from advdmd.evaluation.geneval import GenEval
from advdmd.evaluation.judges import geneval_detector, vqa
from advdmd.rewards.registry import register_scorer

QUESTION = "Does the picture show this: {prompt}?"  # after VQAScore (2404.01291): the probability of yes


class VQAScorer:
    """The probability with which a judge says that an image shows its prompt, in [0, 1]."""

    def __init__(self, judge: Judge):
        judge.self_test()
        self.judge, self.name, self.fingerprint = judge, f"vqa[{judge.name}]", f"{judge.fingerprint}/{QUESTION}"

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """Scores [N] of N images [H, W, 3] uint8 for N prompts. Raises ValueError if the judge gives no answer."""
        items = [_item(p.strip().rstrip(".")) for p in prompts]
        return torch.tensor([j["answers"]["1"] for j in self.judge.judge(items, images)])


@cache
def _item(prompt: str) -> SuiteItem:
    question = Question(1, QUESTION.format(prompt=prompt), (), "whole")
    return SuiteItem(prompt, prompt, "whole", {"questions": [question]}, 1)


class GenEvalScorer:
    """GenEval's own verdict, 0 or 1, on images of GenEval's prompts."""

    def __init__(self, judge: Judge):
        judge.self_test()
        self.judge, self.name, self.fingerprint = judge, "geneval", judge.fingerprint
        self.suite = GenEval()
        self.items = {i.prompt: i for i in self.suite.items()}

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """Scores [N] of N images [H, W, 3] uint8 for N prompts. Raises ValueError on a prompt that is not GenEval's."""
        if unknown := [p for p in prompts if p not in self.items]:
            raise ValueError(f"{unknown[0]!r} is no prompt of GenEval, whose detector looks for what its prompts name")
        items = [self.items[p] for p in prompts]
        found = self.judge.judge(items, images)
        return torch.tensor([self.suite.verdict(i, j).official for i, j in zip(items, found, strict=True)])


def _geneval(where: str, device: str) -> GenEvalScorer:
    detector, comma, clip = where.partition(",")
    if not comma:
        raise ValueError(f"scorer geneval:{where}: name two folders, geneval:DETECTOR,CLIP")
    return GenEvalScorer(geneval_detector.load_detector(Path(detector).expanduser(), Path(clip).expanduser(), device))


def judge_name(kind: str, where: str) -> str:
    """The name of a scorer as the judge of a suite, or as a metric, before what it says in brackets of its weights."""
    names = {
        "geneval": geneval_detector.NAME,
        "qwen-vl": Path(where).resolve().name.lower(),
        "mplug": vqa.MPLUG,
        "endpoint": where.rpartition("#")[2],
    }
    return names.get(kind, kind)


def _question(kind: str, where: str, device: str) -> VQAScorer:
    return VQAScorer(vqa.make_judge(f"{kind}:{where}", device))


register_scorer("geneval", _geneval, "DETECTOR,CLIP")
for _kind, _argument in vqa.JUDGES.items():
    register_scorer(_kind, partial(_question, _kind), _argument)
