"""DPG-Bench (ELLA, 2403.05135): dense prompts, questions that depend on one another, any judge that answers yes or no.

The prompts' licence is mixed, so none are shipped: the CSV is named by its path, and its hash goes into the record.
"""

import csv
import graphlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from advdmd.evaluation.benchmark import ExcludedItem, Judgement, SuiteItem, Verdict
from advdmd.files import file_hash
from advdmd.types import Json

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
YES = 0.5  # probability from which an answer counts as yes


@dataclass(frozen=True)
class Question:
    """One yes/no question about a prompt; `parents` must be answered yes for it to count."""

    id: int
    text: str
    parents: tuple[int, ...]
    category: str  # "entity - whole": what stands before the tuple's bracket; before " - " the broad one


def _parents(text: str, where: str) -> tuple[int, ...]:
    try:
        return tuple(n for n in (int(part) for part in text.split(",") if part.strip()) if n)
    except ValueError:
        raise ValueError(f"{where}: dependency={text!r}: numbers of questions, separated by commas; 0 for none") from None


def _check(item: str, questions: Sequence[Question]) -> None:
    """Raises ValueError if a question is asked twice, depends on one that is not there, or on itself by a detour."""
    ids = [q.id for q in questions]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{item}: question {next(i for i in ids if ids.count(i) > 1)} stands twice")
    for q in questions:
        if lost := set(q.parents) - set(ids):
            raise ValueError(f"{item}: question {q.id} depends on {sorted(lost)}, which {item} does not have")
    try:
        graphlib.TopologicalSorter({q.id: q.parents for q in questions}).prepare()
    except graphlib.CycleError as e:
        raise ValueError(f"{item}: questions depend on one another in a circle: {e.args[1]}") from None


def read_csv(path: Path) -> dict[str, tuple[str, list[Question]]]:
    """Item -> (prompt, questions) of a DPG-Bench CSV, one row a question. Raises ValueError naming the row."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name DPG-Bench's dpg_bench.csv, which is not shipped here")
    found: dict[str, tuple[str, list[Question]]] = {}
    try:
        with open(path, newline="", encoding="utf-8") as f:
            table = csv.DictReader(f)
            if lacking := [c for c in COLUMNS if c not in (table.fieldnames or ())]:
                raise ValueError(f"{path} has no column {lacking[0]}: it needs {', '.join(COLUMNS)}")
            for n, row in enumerate(table, 2):
                if any(row[c] is None for c in COLUMNS):
                    raise ValueError(f"{path}, line {n}: fewer cells than columns")
                if not row["proposition_id"].strip().isdecimal():
                    raise ValueError(f"{path}, line {n}: proposition_id={row['proposition_id']!r} is not a number")
                item, text, number = row["item_id"].strip(), row["text"], int(row["proposition_id"])
                if not item or any(c in item for c in "/\\\0") or item in (".", ".."):
                    raise ValueError(f"{path}, line {n}: item_id={item!r} names no file")
                parents = _parents(row["dependency"], f"{path}, line {n}")
                question = Question(number, row["question_natural_language"], parents, row["tuple"].split("(")[0].strip())
                prompt, questions = found.setdefault(item, (text, []))
                if prompt != text:
                    raise ValueError(f"{path}, line {n}: {item} has another prompt than before")
                questions.append(question)
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path} is not a CSV in UTF-8: {e}") from None
    if not found:
        raise ValueError(f"{path} holds no questions")
    return found


def apply_dependencies(questions: Sequence[Question], yes: Mapping[int, bool]) -> dict[int, bool]:
    """Answers after the dependency rule: a question with a failed parent fails, whatever the judge said, and so on down."""
    by_id, out = {q.id: q for q in questions}, {}
    for i in graphlib.TopologicalSorter({q.id: q.parents for q in questions}).static_order():
        out[i] = yes[i] and all(out[p] for p in by_id[i].parents)
    return {q.id: out[q.id] for q in questions}


@dataclass(frozen=True)
class DPG:
    """The suite of a CSV, `images` of each prompt.

    Raises ValueError on values out of range, and on questions that do not fit together.

    mode "fixed" scores every question and computes categories from what counted, over all images. "official" repeats what the
    published script does in one process: the CSV's first question is lost (and the first prompt with it if another question
    depends on it), rows are read in their order, categories come from each prompt's last image before the dependency rule.
    """

    csv: str
    images: int = 4
    mode: Literal["fixed", "official"] = "fixed"
    name: str = "dpg"
    split: str = "test"

    def __post_init__(self) -> None:
        if self.mode not in ("fixed", "official"):
            raise ValueError(f"mode={self.mode!r}: fixed, or official for the published script's arithmetic")
        if self.images < 1:
            raise ValueError(f"images={self.images}: at least one of each prompt; the published protocol has 4")
        for item, (_, questions) in self.table.items():
            _check(item, questions)

    @cached_property
    def table(self) -> dict[str, tuple[str, list[Question]]]:
        return read_csv(Path(self.csv))

    @cached_property
    def csv_sha256(self) -> str:
        return file_hash(Path(self.csv))

    def items(self) -> list[SuiteItem]:
        """One item per prompt, with its questions."""
        about = {"csv": self.csv_sha256}
        return [SuiteItem(k, text, "dense", about | {"questions": q}, self.images) for k, (text, q) in self.table.items()]

    def _asked(self, item: SuiteItem) -> list[Question]:
        questions = item.meta["questions"]
        return questions[1:] if self.mode == "official" and item.id == next(iter(self.table)) else questions

    def verdict(self, item: SuiteItem, judgement: Judgement) -> Verdict:
        """`official` is DPG's score, the share of questions that hold; `strict` wants all of them.

        Raises ExcludedItem where the official arithmetic loses the prompt, KeyError if the judge left a question unanswered.
        """
        asked, answers = self._asked(item), {int(k): v for k, v in judgement["answers"].items()}
        yes = {q.id: answers[q.id] >= YES for q in asked}
        holds = apply_dependencies(asked, yes) if self.mode == "fixed" else self._official_rule(item, asked, yes)
        failed = [q.text for q in asked if not holds[q.id]]
        score = sum(holds.values()) / len(holds) if holds else 0.0
        counted = holds if self.mode == "fixed" else yes
        kinds: dict[str, list[float]] = {}
        for q in asked:
            for kind in {q.category, q.category.split(" - ")[0].strip()}:
                kinds.setdefault(kind, []).append(float(counted[q.id]))
        details: Json = {"answers": judgement["answers"], "kinds": kinds}
        return Verdict(score, float(not failed), "\n".join(failed), details)

    def _official_rule(self, item: SuiteItem, asked: Sequence[Question], yes: Mapping[int, bool]) -> dict[int, bool]:
        """In the file's order: a parent that stands later is looked at before its own parents are.

        The script fails, and leaves the prompt out, without any question, and when it looks up a parent that is lost; behind
        a failed parent it looks up no other.
        """
        holds = dict(yes)
        try:
            for q in asked:
                failed = any(not holds[p] for p in q.parents)
                holds[q.id] = holds[q.id] and not failed
        except KeyError:
            raise ExcludedItem(item.id) from None
        if not holds:
            raise ExcludedItem(item.id)
        return holds

    def breakdown(self, items: Sequence[SuiteItem], verdicts: Sequence[Verdict]) -> dict[str, float]:
        """Mean over questions of each category, broad and narrow."""
        shown = list(zip(items, verdicts, strict=True))
        if self.mode == "official":
            shown = list({item.id: (item, v) for item, v in shown}.values())  # each prompt's last image
        kinds: dict[str, list[float]] = {}
        for _, v in shown:
            for kind, scores in v.details["kinds"].items():
                kinds.setdefault(kind, []).extend(scores)
        return {k: float(np.mean(v)) for k, v in sorted(kinds.items())}

    def diversity(self, folder: Path) -> dict[str, float]:
        """Empty: what a prompt leaves open cannot be measured on photographs."""
        return {}
