"""Specs to words. Two styles: GenEval's short phrase and DPG's few sentences; the vocabulary is closed."""

import re

from advdmd.mini.world.scene import BACKGROUNDS, COLORS, RELATIONS, SHAPES, Group, Spec

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLURALS = {s: s + ("es" if s.endswith("s") else "s") for s in SHAPES}
_GLUE = ["a", "an", "picture", "of", "and", "background", "left", "right", "above", "below"]
VOCABULARY = tuple(sorted({*_GLUE, *NUMBERS.values(), *COLORS, *SHAPES, *PLURALS.values(), *BACKGROUNDS, "small", "large"}))
assert all(w in VOCABULARY for r in RELATIONS for w in r.split())


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def phrase(g: Group) -> str:
    noun = g.shape if g.count == 1 else PLURALS[g.shape]
    words = " ".join(w for w in (g.size, g.color, noun) if w)
    return _article(words) if g.count == 1 else f"{NUMBERS[g.count]} {words}"


def short(spec: Spec) -> str:
    """GenEval's form: "a picture of a red circle left of a blue star"."""
    first, *rest = (phrase(g) for g in spec.groups)
    if spec.relation:
        return f"a picture of {first} {spec.relation[1]} {rest[0]}"
    return "a picture of " + " and ".join((first, *rest))


def dense(spec: Spec) -> str:
    """DPG's form, terse enough for 25 tokens: the groups (the first two joined when there are three), the relation, the
    background: "Two small red circles. A large blue star. Circles left of star. Gray background."
    """
    phrases = [phrase(g) for g in spec.groups]
    sentences = [f"{phrases[0]} and {phrases[1]}", phrases[2]] if len(phrases) == 3 else phrases
    if spec.relation:
        i, name, j = spec.relation
        noun = [g.shape if g.count == 1 else PLURALS[g.shape] for g in spec.groups]
        sentences = [*sentences, f"{noun[i]} {name} {noun[j]}"]
    if spec.background:
        sentences = [*sentences, f"{spec.background} background"]
    return " ".join(s[0].upper() + s[1:] + "." for s in sentences)


def unknown_words(prompt: str) -> list[str]:
    """Words of a prompt that are outside the vocabulary, in order, each once."""
    words = re.findall(r"[^\s.,]+", prompt.lower())
    return [w for w in dict.fromkeys(words) if w not in VOCABULARY]


def check_prompt(prompt: str) -> None:
    """Raises ValueError that names the words the miniature does not know, and those it does."""
    if bad := unknown_words(prompt):
        raise ValueError(
            f"prompt {prompt!r}: the miniature does not know {', '.join(map(repr, bad))}. It knows: {', '.join(VOCABULARY)}"
        )
    if not prompt.strip(" .,"):
        raise ValueError(f"prompt {prompt!r} is empty: try 'a picture of a red circle above a blue star'")


_COUNTS = {"a": 1, "an": 1} | {word: n for n, word in NUMBERS.items()}
_NOUNS = {s: s for s in SHAPES} | {plural: s for s, plural in PLURALS.items()}
_one_of = "|".join
_PHRASE = re.compile(
    rf"({_one_of(_COUNTS)})(?: (small|large))?(?: ({_one_of(COLORS)}))? ({_one_of(sorted(_NOUNS, key=len, reverse=True))})"
)
_JOINT = re.compile(rf" (and|{_one_of(RELATIONS)}) ")


def parse(prompt: str) -> Spec:
    """What a prompt of either style asks for, the inverse of `short` and `dense`. Raises ValueError if it is neither."""
    text = " ".join(prompt.lower().replace(",", " ").split()).removeprefix("a picture of ")
    groups: list[Group] = []
    relation, background = None, None
    for sentence in filter(None, (s.strip() for s in text.split("."))):
        if sentence.removesuffix(" background") in BACKGROUNDS and background is None:
            background = sentence.removesuffix(" background")
            continue
        parts = _JOINT.split(sentence)
        names = [_NOUNS.get(p) for p in parts[::2]]
        if len(parts) == 3 and parts[1] in RELATIONS and all(names):  # "circles left of star": of groups named before
            at = [[i for i, g in enumerate(groups) if g.shape == n] for n in names]
            if relation or any(len(i) != 1 for i in at):
                raise ValueError(f"prompt {prompt!r}: {sentence!r} must stand between two shapes that are named once before it")
            relation = (at[0][0], parts[1], at[1][0])
            continue
        for p in parts[::2]:
            found = _PHRASE.fullmatch(p)
            if not found:
                raise ValueError(f"prompt {prompt!r}: {p!r} is no phrase like 'a red circle' or 'two small blue squares'")
            count, size, color, noun = found.groups()
            groups.append(Group(_NOUNS[noun], _COUNTS[count], color, size))
        if relations := [p for p in parts[1::2] if p != "and"]:
            if relation or len(parts) != 3:
                raise ValueError(f"prompt {prompt!r}: one relation between two shapes can be asked for")
            relation = (len(groups) - 2, relations[0], len(groups) - 1)
    if not groups:
        raise ValueError(f"prompt {prompt!r} names no shape: try 'a picture of a red circle above a blue star'")
    return Spec(tuple(groups), relation, background)
