"""mini-geneval and mini-dpg: the miniature's two suites, judged by the exact checker."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from advdmd.evaluation.benchmark import Judgement, SuiteItem, Verdict
from advdmd.evaluation.generate import image_jobs, read_images
from advdmd.evaluation.geneval_rule import Detection, geneval_correct, relative_position
from advdmd.mini.dataset import DENSE, HELD_OUT_TASKS, caption_for, held_out, is_validation_prompt
from advdmd.mini.diversity import diversity
from advdmd.mini.world import checker
from advdmd.mini.world.caption import PLURALS, parse
from advdmd.mini.world.checker import ObservedObject, ObservedScene
from advdmd.mini.world.render import render, to_uint8
from advdmd.mini.world.scene import COLORS, SIZE, TASKS, WORLDS, Scene, SceneObject, Spec, specs, stable_hash
from advdmd.types import Json

SPLITS = ("test", "train", "validation", "pairs")
SEED_OF_SPLIT = {"validation": "exam"}  # prompts are drawn from a hash of this name: it is a seed and never changes


def metadata(task: str, spec: Spec) -> Json:
    """GenEval's metadata of a spec: the object that stands in a relation comes second, as in GenEval."""
    clauses: list[Json] = [{"class": g.shape, "count": g.count} | ({"color": g.color} if g.color else {}) for g in spec.groups]
    if spec.relation:
        i, name, j = spec.relation
        clauses = [clauses[j], clauses[i] | {"position": (name, 0)}]
    meta: Json = {"tag": task, "include": clauses, "objects": sum(g.count for g in spec.groups)}
    if task == "counting":
        meta["exclude"] = [{"class": g.shape, "count": g.count + 1} for g in spec.groups]
    return meta


def _detections(seen: ObservedScene) -> list[Detection]:
    return [Detection(b.shape, b.color, b.box, b.match) for b in seen.blobs if b.shape]


def _stray(seen: ObservedScene, objects: int) -> str:
    """What the strict rule adds: exactly as many blobs as asked for, on one of the three backgrounds."""
    reasons = []
    if len(seen.blobs) != objects:
        reasons.append(f"expected {objects} objects in all, found {len(seen.blobs)}")
    if seen.background is None:
        reasons.append("the background is none of black, gray, white")
    return "\n".join(reasons)


def to_json(seen: ObservedScene) -> Json:
    """A scene for records and galleries."""
    objects = [
        {
            "label": b.shape,
            "color": b.color,
            "size": b.size,
            "box": [round(v, 1) for v in b.box],
            "confidence": round(b.match, 3),
        }
        for b in seen.blobs
    ]
    return {"background": seen.background, "objects": objects}


class CheckerJudge:
    """The exact checker as a judge."""

    name, fingerprint, batch = "checker", "checker-1", 512

    def self_test(self) -> None:
        """A rendered scene must be read back. Raises ValueError if it is not."""
        scene = Scene("black", (SceneObject("circle", "red", "large", 16.0, 16.0, 6.0, COLORS["red"]),))
        (seen,) = checker.read_scene(to_uint8(render([scene])))
        if [(b.shape, b.color, b.size) for b in seen.blobs] != [("circle", "red", "large")]:
            raise ValueError(f"self-test: a drawn large red circle was read as {seen}")

    def judge(self, items: Sequence[SuiteItem], images: Sequence[np.ndarray]) -> list[Judgement]:
        """What each of N images [32, 32, 3] uint8 shows. Raises ValueError on images of another size."""
        if wrong := {im.shape for im in images if im.shape != (SIZE, SIZE, 3)}:
            raise ValueError(
                f"images of {SIZE} x {SIZE} pixels, not {sorted(wrong)[0]}: the miniature's suites are not for others"
            )
        return [asdict(seen) for seen in checker.read_scene(np.stack(list(images)))]


def from_json(judgement: Judgement) -> ObservedScene:
    """A scene from a judgement of the checker."""
    return ObservedScene(
        judgement["background"], tuple(ObservedObject(**{**b, "box": tuple(b["box"])}) for b in judgement["blobs"])
    )


def geneval_verdict(meta: Json, seen: ObservedScene) -> Verdict:
    """The verdict on a scene by GenEval's rule, and by the strict one: no stray objects, a valid background."""
    correct, reason = geneval_correct(meta, _detections(seen))
    stray = _stray(seen, meta["objects"])
    return Verdict(float(correct), float(correct and not stray), "\n".join(filter(None, (reason, stray))), to_json(seen))


@dataclass(frozen=True)
class Question:
    """One yes/no question of a dense prompt; asked only if its `parents` were answered yes."""

    kind: str  # DPG's columns: entity, attribute/color, attribute/size, other/count, relation/spatial, global
    text: str
    parents: tuple[int, ...]
    test: Json


def questions(spec: Spec) -> list[Question]:
    """About eleven questions with DPG's dependencies: attributes depend on their entity, a relation on both of its ends."""
    out, entity = [], []
    for g in spec.groups:
        root, about = len(out), {"shape": g.shape}
        entity.append(root)
        out.append(Question("entity", f"is there a {g.shape}?", (), about))
        out.append(
            Question("other/count", f"is the number of {PLURALS[g.shape]} {g.count}?", (root,), about | {"count": g.count})
        )
        if g.color:
            out.append(Question("attribute/color", f"is every {g.shape} {g.color}?", (root,), about | {"color": g.color}))
        if g.size:
            out.append(Question("attribute/size", f"is every {g.shape} {g.size}?", (root,), about | {"size": g.size}))
    if spec.relation:
        i, name, j = spec.relation
        a, b = spec.groups[i].shape, spec.groups[j].shape
        test = {"shape": a, "relation": name, "other": b}
        out.append(Question("relation/spatial", f"is the {a} {name} the {b}?", (entity[i], entity[j]), test))
    if spec.background:
        out.append(Question("global", f"is the background {spec.background}?", (), {"background": spec.background}))
    return out


def answer(test: Json, seen: ObservedScene) -> bool:
    """The checker's answer to one question about a scene."""
    if "background" in test:
        return seen.background == test["background"]
    mine: list[ObservedObject] = [b for b in seen.blobs if b.shape == test["shape"]]
    if "count" in test:
        return len(mine) == test["count"]
    if "color" in test:
        return bool(mine) and all(b.color == test["color"] for b in mine)
    if "size" in test:
        return bool(mine) and all(b.size == test["size"] for b in mine)
    if "relation" in test:
        found = _detections(seen)
        pairs = [(a, b) for a in found if a.label == test["shape"] for b in found if b.label == test["other"]]
        return bool(pairs) and all(test["relation"] in relative_position(a, b) for a, b in pairs)
    return bool(mine)


def dpg_verdict(meta: Json, seen: ObservedScene) -> Verdict:
    """Share of questions answered yes, a question with a failed parent counting as no; strict: 0 with stray objects."""
    raw = [answer(q.test, seen) for q in meta["questions"]]
    yes = [r and all(raw[p] for p in q.parents) for q, r in zip(meta["questions"], raw, strict=True)]
    score, stray = sum(yes) / len(yes), _stray(seen, meta["objects"])
    failed = [q.text for q, y in zip(meta["questions"], yes, strict=True) if not y]
    kinds = {
        k: [y for q, y in zip(meta["questions"], yes, strict=True) if q.kind == k] for k in {q.kind for q in meta["questions"]}
    }
    details = to_json(seen) | {"by_kind": {k: sum(v) / len(v) for k, v in sorted(kinds.items())}}
    return Verdict(score, 0.0 if stray else score, "\n".join([*failed, *filter(None, [stray])]), details)


def item_of(prompt: str) -> SuiteItem:
    """Any prompt that the miniature can read, with its questions, as an item of mini-dpg. Raises ValueError if it cannot."""
    spec = parse(prompt)
    return SuiteItem("prompt", prompt, DENSE, metadata(DENSE, spec) | {"questions": questions(spec)}, 1)


@dataclass(frozen=True)
class MiniSuite:
    """A suite of the miniature: "mini-geneval" or "mini-dpg".

    Raises ValueError on values out of range.

    `images_per_task` images for each task, spread evenly over at most `prompts_per_task` prompts. split: "test" are prompts
    kept out of training, "validation" dense ones kept out of both, for scores while training; "pairs" name a shape x colour
    pair that training never showed, "train" the rest.
    """

    name: str
    images_per_task: int = 96
    prompts_per_task: int = 48
    split: str = "test"
    world: str = "half"

    def __post_init__(self) -> None:
        if self.name not in ("mini-geneval", "mini-dpg"):
            raise ValueError(f"suite {self.name!r}: the miniature has mini-geneval and mini-dpg")
        if self.world not in WORLDS:
            raise ValueError(f"world {self.world!r}: one of {', '.join(WORLDS)}")
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split!r}: one of {', '.join(SPLITS)}")
        if self.split == "validation" and self.name != "mini-dpg":
            raise ValueError(f"split 'validation' of {self.name}: only mini-dpg has prompts enough to keep some for validation")
        if min(self.images_per_task, self.prompts_per_task) < 1:
            raise ValueError(f"{self.images_per_task} images of {self.prompts_per_task} prompts: both must be at least 1")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The suite's tasks."""
        if self.name == "mini-dpg":
            return (DENSE,)
        return ("colors", "color_attr") if self.split == "pairs" else TASKS

    def _prompts(self, task: str) -> dict[str, Spec]:
        """Distinct prompts of the split, in an order fixed by the suite; fewer where the task has no more."""
        rng = np.random.default_rng(stable_hash(f"{self.name}/{SEED_OF_SPLIT.get(self.split, self.split)}/{task}"))
        found: dict[str, Spec] = {}
        for spec in islice(specs(task, rng, WORLDS[self.world], pairs=self.split == "pairs"), 60 * self.prompts_per_task):
            prompt = caption_for(task, spec)
            kept, validation = held_out(task, prompt), is_validation_prompt(task, prompt)
            test = (kept and not validation) or task not in HELD_OUT_TASKS
            if {"test": test, "train": not kept, "validation": validation, "pairs": True}[self.split]:
                found.setdefault(prompt, spec)
            if len(found) == min(self.prompts_per_task, self.images_per_task):
                break
        return found

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Item id -> spec, for what only the miniature can measure (diversity against the renderer)."""
        return {f"{task}-{i:03d}": s for task in self.tasks for i, s in enumerate(self._prompts(task).values())}

    def items(self) -> list[SuiteItem]:
        """One item per prompt, with what a verdict needs to know."""
        out = []
        for task in self.tasks:
            mine = [(k, s) for k, s in self.specs.items() if k.rpartition("-")[0] == task]
            base, more = divmod(self.images_per_task, len(mine))
            for i, (key, spec) in enumerate(mine):
                meta = metadata(task, spec)
                if task == DENSE:
                    meta["questions"] = questions(spec)
                out.append(SuiteItem(key, caption_for(task, spec), task, meta, base + (i < more)))
        return out

    def verdict(self, item: SuiteItem, judgement: Judgement) -> Verdict:
        """The score of a judged image by the suite's rule and by the strict one."""
        return (dpg_verdict if item.task == DENSE else geneval_verdict)(item.meta, from_json(judgement))

    def judge_images(self, items: Sequence[SuiteItem], images: np.ndarray) -> list[Verdict]:
        """A verdict for each image [N, 32, 32, 3] uint8, items repeated as the images are."""
        return [self.verdict(i, p) for i, p in zip(items, CheckerJudge().judge(items, list(images)), strict=True)]

    def breakdown(self, items: Sequence[SuiteItem], verdicts: Sequence[Verdict]) -> dict[str, float]:
        """mini-dpg: share of questions of each kind that hold."""
        kinds: dict[str, list[float]] = {}
        for v in verdicts:
            for kind, share in v.details.get("by_kind", {}).items():
                kinds.setdefault(kind, []).append(share)
        return {k: float(np.mean(v)) for k, v in sorted(kinds.items())}

    def spread(self, images: np.ndarray, ids: Sequence[str]) -> dict[str, float]:
        """Diversity of images [N, 32, 32, 3] of the items `ids` [N], against the renderer's (mini.diversity)."""
        return diversity(self.specs, WORLDS[self.world], images, ids, pairs=self.split == "pairs")

    def diversity(self, folder: Path) -> dict[str, float]:
        """Diversity of all images of the suite in a folder."""
        return self.spread(read_images(self, folder), [i.id for i, _ in image_jobs(self)])
