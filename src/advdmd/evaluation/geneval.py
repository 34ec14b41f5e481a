"""GenEval (Ghosh et al. 2023, 2310.11513): its prompts, drawn again from their seed, and its verdict beside a strict one."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from advdmd.evaluation.benchmark import Judgement, SuiteItem, Verdict
from advdmd.evaluation.geneval_rule import Detection, geneval_correct
from advdmd.types import Json

NAMES = (  # in COCO's order, three of them renamed
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,"
    "surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,"
    "broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,"
    "laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
COCO = tuple(NAMES.split(","))
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = ("zero", "one", "two", "three", "four")
METADATA_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # confidence a detection must exceed; counting asks for more


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _many(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _record(tag: str, include: list[Json], text: str, exclude: list[Json] | None = None) -> Json:
    more = {} if exclude is None else {"exclude": exclude}
    return {"tag": tag, "include": include, **more, "prompt": f"a photo of {text}"}


def _drawn() -> list[Json]:
    """All draws of the benchmark's one generator, in its order."""
    rng, names, person = np.random.default_rng(43), COCO, COCO.index("person")
    one = lambda c, **more: {"class": names[c], "count": 1, **more}  # noqa: E731
    out = [_record("single_object", [one(c)], _a(names[c])) for c in rng.choice(80, size=80, replace=False)]
    for _ in range(100):
        a, b = rng.choice(80, size=2, replace=False)
        out.append(_record("two_object", [one(a), one(b)], f"{_a(names[a])} and {_a(names[b])}"))
    for _ in range(100):
        c, n = rng.choice(80), int(rng.integers(2, 4, endpoint=True))
        exclude = [{"class": names[c], "count": n + 1}]
        out.append(_record("counting", [{"class": names[c], "count": n}], f"{NUMBERS[n]} {_many(names[c])}", exclude))
    for _ in range(100):
        c, k = (rng.choice(79) + 1 + person) % 80, rng.choice(10)
        out.append(_record("colors", [one(c, color=COLORS[k])], f"{_a(COLORS[k])} {names[c]}"))
    for _ in range(100):
        (a, b), r = rng.choice(80, size=2, replace=False), RELATIONS[rng.choice(4)]
        out.append(_record("position", [one(b), one(a, position=[r, 0])], f"{_a(names[a])} {r} {_a(names[b])}"))
    for _ in range(100):
        (a, b), (i, j) = (rng.choice(79, size=2, replace=False) + 1 + person) % 80, rng.choice(10, size=2, replace=False)
        include = [one(a, color=COLORS[i]), one(b, color=COLORS[j])]
        text = f"{_a(COLORS[i])} {names[a]} and {_a(COLORS[j])} {names[b]}"
        out.append(_record("color_attr", include, text))
    return out


@cache
def metadata() -> tuple[str, ...]:
    """The 553 lines of evaluation_metadata.jsonl, byte for byte. Raises ValueError if they are not."""
    lines = tuple(dict.fromkeys(json.dumps(r) for r in _drawn()))
    found = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    if found != METADATA_SHA256:
        raise ValueError(f"GenEval's metadata came out as {found}: numpy {np.__version__} draws other numbers than it did")
    return lines


@dataclass(frozen=True)
class GenEval:
    """The whole suite: 553 prompts, `images` of each. Raises ValueError if images < 1."""

    images: int = 4
    name: str = "geneval"
    split: str = "test"

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images={self.images}: at least one of each prompt; the published protocol has 4")

    def items(self) -> list[SuiteItem]:
        """One item per prompt, with its metadata."""
        found = [json.loads(line) for line in metadata()]
        return [SuiteItem(f"{i:05d}", m["prompt"], m["tag"], m, self.images) for i, m in enumerate(found)]

    def verdict(self, item: SuiteItem, judgement: Judgement) -> Verdict:
        """`official` is GenEval's own verdict; `strict` also wants exactly as many of each named class as were asked for."""
        sure = COUNTING_THRESHOLD if item.task == "counting" else THRESHOLD
        found = [
            Detection(o["label"], o.get("color"), tuple(o["box"]), o["confidence"])
            for o in judgement["objects"]
            if o["confidence"] > sure
        ]
        correct, reason = geneval_correct(item.meta, found)
        wanted: dict[str, int] = {}
        for clause in item.meta["include"]:
            wanted[clause["class"]] = wanted.get(clause["class"], 0) + clause["count"]
        counts = {c: sum(d.label == c for d in found) for c in wanted}
        stray = [f"expected exactly {n} {c}, found {counts[c]}" for c, n in wanted.items() if counts[c] != n]
        return Verdict(float(correct), float(correct and not stray), "\n".join(filter(None, [reason, *stray])), judgement)

    def breakdown(self, items: Sequence[SuiteItem], verdicts: Sequence[Verdict]) -> dict[str, float]:
        """Empty: GenEval has no kinds within a task."""
        return {}

    def diversity(self, folder: Path) -> dict[str, float]:
        """Empty: what a prompt leaves open cannot be measured on photographs."""
        return {}
