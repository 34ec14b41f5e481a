"""Judges that answer questions about an image: mPLUG in an interpreter of its own, Qwen3-VL, an OpenAI-compatible endpoint.

Each answers with the probability of yes. Their figures are never one column: the judge is part of the metric's name.
"""

import base64
import hashlib
import io
import json
import math
import os
import subprocess
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from advdmd.evaluation.benchmark import Judgement, SuiteItem
from advdmd.models.backbone import Module, Tokenizer
from advdmd.models.hub import download
from advdmd.models.pretrained import load_pretrained_strict, load_tokenizer, weights_hash
from advdmd.types import Json

QUESTION_TEMPLATE = "{q} Answer with yes or no only."
IMAGE = "<|image_pad|>"
YES_WORDS, NO_WORDS = ("yes", "Yes", "YES", " yes", " Yes"), ("no", "No", "NO", " no", " No")
Answer = Callable[[Image.Image, str], float]  # probability of yes
MPLUG = "mplug-large"
JUDGES = {"qwen-vl": "FOLDER", "mplug": "INTERPRETER", "endpoint": "URL#MODEL"}  # what is written behind the name and a colon


class VQAJudge:
    """The judge of any suite of questions: puts an item's questions to one model, image by image."""

    batch = 1

    def __init__(self, name: str, fingerprint: str, answer: Answer):
        self.name, self.fingerprint, self.answer = name, fingerprint, answer

    def self_test(self) -> None:
        """A plain red picture must be more red than blue to the model. Raises ValueError if it is not."""
        picture = Image.new("RGB", (64, 64), (224, 31, 31))
        red, blue = (self.answer(picture, f"is the picture {c}?") for c in ("red", "blue"))
        if not red > blue:
            raise ValueError(f"self-test: of a red picture {self.name} says 'red' with {red:.2f} and 'blue' with {blue:.2f}")

    def judge(self, items: Sequence[SuiteItem], images: Sequence[np.ndarray]) -> list[Judgement]:
        """The probability of yes for each question of each of N images [H, W, 3].

        Raises ValueError if an answer is no probability.
        """
        out = []
        for item, image in zip(items, images, strict=True):
            picture = Image.fromarray(image)
            answers = {str(q.id): round(float(self.answer(picture, q.text)), 5) for q in item.meta["questions"]}
            if wrong := {k: v for k, v in answers.items() if not 0 <= v <= 1}:
                raise ValueError(f"{self.name} answered {wrong}: a probability lies in [0, 1]")
            out.append({"answers": answers})
        return out


def _mark(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16]


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()  # closes its pipes and waits for it


class JudgeProcess:
    """A judge in another interpreter: JSON lines {"image": PNG in base64, "question"} in, {"answer": text} out."""

    def __init__(self, command: Sequence[str]):
        self.command = list(command)
        self.process: subprocess.Popen[str] | None = None

    def _running(self) -> subprocess.Popen[str]:
        if self.process is None:
            try:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
                )
            except OSError as e:
                raise ValueError(f"the judge's interpreter {self.command[0]} does not start: {e}") from None
            weakref.finalize(self, _stop, self.process)  # it ends with the judge, or with the program
        return self.process

    def __call__(self, picture: Image.Image, question: str) -> float:
        """The probability of yes, 0 or 1, to a question about a picture. Raises ValueError if the process gives no answer."""
        process, data = self._running(), io.BytesIO()
        picture.save(data, "PNG")
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"image": base64.b64encode(data.getvalue()).decode(), "question": question}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            return float(json.loads(line)["answer"].strip().lower() == "yes")
        except (OSError, ValueError, KeyError, TypeError) as e:
            code = process.poll()
            raise ValueError(
                f"the judge {' '.join(self.command)} gave no answer ({type(e).__name__}: {e}; exit status {code}): run it by "
                "hand with one question to see why"
            ) from None


def mplug(python: str, model: str = "damo/mplug_visual-question-answering_coco_large_en") -> VQAJudge:
    """DPG-Bench's own judge, in an interpreter `python` that has modelscope (it wants transformers < 5)."""
    script = str(files("advdmd") / "evaluation" / "judges" / "mplug_worker.py")
    return VQAJudge(MPLUG, _mark("mplug", model), JudgeProcess([python, script, model]))


class QwenVL:
    """Qwen3-VL's probability of yes: over the distinct first tokens of yes and no, normalised.

    transformers' own processor needs a video processor and with it torchvision, so the few steps for one image are made here.
    Raises ValueError if the tokenizer begins yes and no with the same token.
    """

    def __init__(self, model: Module, tokenizer: Tokenizer, images: Tokenizer, device: str = "cpu"):
        self.model, self.tokenizer, self.images, self.device = model.to(device).eval(), tokenizer, images, device
        ids = lambda words: {tokenizer.encode(w, add_special_tokens=False)[0] for w in words}  # noqa: E731
        yes, no = ids(YES_WORDS), ids(NO_WORDS)
        self.yes, self.no = sorted(yes - no), sorted(no - yes)
        if not self.yes or not self.no:
            raise ValueError("this tokenizer begins yes and no with the same token: its first token is no answer")

    @torch.no_grad()
    def __call__(self, picture: Image.Image, question: str) -> float:
        """The probability of yes to a question about a picture.

        Raises ValueError if the chat template has no place for the image.
        """
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION_TEMPLATE.format(q=question)}]}
        ]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        seen = self.images(images=[picture], return_tensors="pt")
        slots = int(seen["image_grid_thw"][0].prod()) // self.images.merge_size**2
        ids = self.tokenizer(text.replace(IMAGE, IMAGE * slots), return_tensors="pt").input_ids.to(self.device)
        shown = (ids == self.model.config.image_token_id).int()
        if int(shown.sum()) != slots:
            raise ValueError(
                f"{int(shown.sum())} image tokens in the prompt, {slots} needed: is {IMAGE!r} in the chat template?"
            )
        out = self.model(
            input_ids=ids,
            pixel_values=seen["pixel_values"].to(self.device),
            image_grid_thw=seen["image_grid_thw"].to(self.device),
            mm_token_type_ids=shown,
        )
        p = out.logits[0, -1].float().softmax(-1)
        yes, no = p[self.yes].sum(), p[self.no].sum()
        return float(yes / (yes + no))


def qwen_vl(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> VQAJudge:
    """A Qwen3-VL folder in transformers' format as the judge."""
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = load_pretrained_strict(Qwen3VLForConditionalGeneration, folder, dtype=dtype)
    tokenizer = load_tokenizer(folder)
    images = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    judge = QwenVL(model, tokenizer, images, device)
    return VQAJudge(folder.resolve().name.lower(), _mark("qwen-vl", weights_hash(folder), QUESTION_TEMPLATE), judge)


class Endpoint:
    """A chat endpoint with OpenAI's protocol; the key is read from the environment and written nowhere.

    Raises ValueError unless `url` is an http address.
    """

    def __init__(self, url: str, model: str, key_variable: str = "OPENAI_API_KEY", timeout: float = 120.0):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r}: an address such as http://localhost:8000/v1")
        self.url, self.model, self.key_variable, self.timeout = url.rstrip("/"), model, key_variable, timeout

    def __call__(self, picture: Image.Image, question: str) -> float:
        """The probability of yes to a question about a picture. Raises ValueError if the endpoint gives no answer."""
        data = io.BytesIO()
        picture.save(data, "PNG")
        image = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": QUESTION_TEMPLATE.format(q=question)},
        ]
        asked = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
        }
        head = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            head["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(asked).encode(), head)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                choice = json.load(reply)["choices"][0]
        except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError, TypeError) as e:
            raise ValueError(f"the judge at {self.url} gave no answer: {type(e).__name__}: {e}") from None
        return self._probability(choice)

    def _probability(self, choice: Json) -> float:
        """From the first token's probabilities where they are given, else from the word of the answer."""
        first = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
        mass = {"yes": 0.0, "no": 0.0}
        for token in first:
            word = token["token"].strip().lower()
            if word in mass:
                mass[word] += math.exp(token["logprob"])
        if sum(mass.values()) > 0:
            return mass["yes"] / sum(mass.values())
        answer = str(choice["message"]["content"]).strip().lower()
        if not answer.startswith(("yes", "no")):
            raise ValueError(f"{self.model} answered {answer[:40]!r}, not yes or no")
        return float(answer.startswith("yes"))


def endpoint(url: str, model: str) -> VQAJudge:
    """A judge behind a chat endpoint, with the name of its model."""
    return VQAJudge(model, _mark("endpoint", url, model, QUESTION_TEMPLATE), Endpoint(url, model))


def make_judge(text: str, device: str = "cpu") -> VQAJudge:
    """The judge "NAME:WHERE" of JUDGES. Raises ValueError if it is none of them, or if its weights do not fit."""
    kind, _, where = text.partition(":")
    if kind == "qwen-vl" and where:
        return qwen_vl(download(Path(where).expanduser()), device)
    if kind == "mplug" and where:
        return mplug(where)
    if kind == "endpoint" and "#" in where:
        url, _, model = where.rpartition("#")
        return endpoint(url, model)
    raise ValueError(f"judge {text!r}: write {' or '.join(f'{k}:{v}' for k, v in JUDGES.items())}")
