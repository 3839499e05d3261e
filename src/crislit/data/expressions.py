"""Referring expressions for the embedded scenes: what may be said of an object so that it is true of no other.

A sentence names attributes (shape, colour, pattern), and where these leave several candidates adds a size, a place in the
picture or a relation to a landmark. Every predicate is three-valued: clearly true, clearly false, or borderline. A sentence is
used only if it is clearly true of its target and clearly false of every other object, so that nobody has to argue about
borderline cases.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Style = Literal["absolute", "attributes", "relations"]
"""Which extras a data set's sentences use: places (``shapes``), none but size (``shapes+``), relations (``gshapes``)."""
MAX_WORDS = 14
"""Words that a sentence may have: what can be said is in a text encoder's reach, uncut."""
WIDTH, HEIGHT = 320, 240
"""The size of a scene in pixels."""
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
PATTERNS = ("plain", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
NOUNS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "plus sign"),
    "diamond": ("diamond", "diamond", "rhombus"),
    "ring": ("ring", "ring", "donut"),
    "heart": ("heart",),
}
ANYTHING = ("one", "object", "thing", "shape")
COLOUR_WORDS = {name: (name,) for name in COLOURS} | {
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
}
BEFORE = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
}
AFTER = {
    "plain": ("without a pattern",),
    "striped": ("with stripes",),
    "dotted": ("with dots", "with spots"),
    "checkered": ("with checks", "with a checkerboard"),
}
SIZE_WORDS = {
    "big": ("big", "large", "bigger", "biggest", "largest"),
    "small": ("small", "little", "smaller", "smallest"),
}
PLACE_WORDS = {  # {} stands for the noun phrase
    "left": (
        "left {}",
        "leftmost {}",
        "{} on the left",
        "{} on the far left",
        "{} on the left side",
    ),
    "right": (
        "right {}",
        "rightmost {}",
        "{} on the right",
        "{} on the far right",
        "{} on the right side",
    ),
    "top": ("top {}", "{} at the top", "topmost {}", "highest {}", "{} up high"),
    "bottom": ("bottom {}", "{} at the bottom", "lowest {}", "{} down low"),
    "top left": (
        "top left {}",
        "{} in the top left corner",
        "upper left {}",
        "{} at the upper left",
    ),
    "top right": (
        "top right {}",
        "{} in the top right corner",
        "upper right {}",
        "{} at the upper right",
    ),
    "bottom left": (
        "bottom left {}",
        "{} in the bottom left corner",
        "lower left {}",
        "{} at the lower left",
    ),
    "bottom right": (
        "bottom right {}",
        "{} in the bottom right corner",
        "lower right {}",
        "{} at the lower right",
    ),
    "middle": (
        "middle {}",
        "center {}",
        "{} in the middle",
        "{} in the center",
        "{} nearest to the center",
    ),
}
RELATION_WORDS = {
    "left of": ("left of", "left of", "to the left of"),
    "right of": ("right of", "right of", "to the right of"),
    "above": ("above", "higher up than"),
    "below": ("below", "lower down than", "beneath"),
    "closest to": ("closest to", "nearest to"),
}


@dataclass(frozen=True)
class Thing:
    """One object as a viewer sees it.

    ``x`` and ``y`` are the centre of its visible pixels, ``visible`` their number, ``full`` what it would be unoccluded.
    """

    shape: str
    colour: str
    pattern: str
    x: float
    y: float
    visible: int
    full: int


Attributes = tuple[str, ...]
"""Names of the attributes that a noun phrase mentions, a subset of ``("colour", "pattern", "shape")``."""
# How often a combination of attributes is preferred: people name the shape and the colour first.
MENTIONS: dict[Attributes, float] = {
    ("shape",): 3.0,
    ("colour", "shape"): 4.0,
    ("colour",): 1.5,
    ("pattern", "shape"): 1.5,
    ("colour", "pattern", "shape"): 1.0,
    ("colour", "pattern"): 0.6,
    ("pattern",): 0.4,
    (): 0.6,
}
LANDMARKS: dict[Attributes, float] = {
    ("shape",): 2.0,
    ("colour", "shape"): 1.0,
    ("colour", "pattern", "shape"): 0.2,
}
"""How a landmark may be named, and how often that is preferred: in few words where few will do."""


def candidates(things: Sequence[Thing], target: Thing, mention: Attributes) -> list[Thing]:
    """Return the other things that share every mentioned attribute with the target."""
    return [
        t
        for t in things
        if t is not target and all(getattr(t, a) == getattr(target, a) for a in mention)
    ]


def has_size(size: str, target: Thing, others: Sequence[Thing]) -> bool:
    """Whether the target is clearly the biggest (or smallest) among the others, by its visible and by its full area."""
    if size == "big":
        return all(target.visible >= 1.4 * other.full for other in others)
    return all(1.4 * target.full <= other.visible for other in others)


def has_place(place: str, target: Thing, others: Sequence[Thing]) -> bool:
    """Whether the target is in that part of the picture, and more so than each of the others."""
    x, y = target.x / WIDTH, target.y / HEIGHT
    rest = [(other.x / WIDTH, other.y / HEIGHT) for other in others]
    if place == "middle":

        def off_centre(u: float, v: float) -> float:  # in picture widths
            return float(np.hypot(u - 0.5, (v - 0.5) * HEIGHT / WIDTH))

        return off_centre(x, y) < 0.14 and all(
            off_centre(u, v) > off_centre(x, y) + 0.12 for u, v in rest
        )
    # Every other place is a half or a quarter of the picture: mirror it, so that it is the left or the top.
    if "right" in place:
        x, rest = 1 - x, [(1 - u, v) for u, v in rest]
    if "bottom" in place:
        y, rest = 1 - y, [(u, 1 - v) for u, v in rest]
    if place in ("left", "right"):
        return x < 0.42 and all(u > x + 0.1 for u, _ in rest)
    if place in ("top", "bottom"):
        return y < 0.42 and all(v > y + 0.13 for _, v in rest)
    return x < 0.42 and y < 0.42 and all(u > 0.56 or v > 0.56 for u, v in rest)


def clarity(relation: str, thing: Thing, landmark: Thing) -> float:
    """Return how clearly the relation holds, in units of the margin that makes it clear (above 1: true, below 0: false)."""
    dx, dy = (landmark.x - thing.x) / WIDTH, (landmark.y - thing.y) / HEIGHT
    signed = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return (signed - 0.03) / 0.07


def is_related(relation: str, target: Thing, others: Sequence[Thing], landmark: Thing) -> bool:
    """Whether the target clearly stands in the relation to the landmark, and none of the others does."""
    others = [other for other in others if other is not landmark]
    if relation == "closest to":

        def distance(thing: Thing) -> float:
            return float(np.hypot(thing.x - landmark.x, thing.y - landmark.y)) / WIDTH

        return all(distance(other) > distance(target) + 0.08 for other in others)
    return clarity(relation, target, landmark) > 1 and all(
        clarity(relation, o, landmark) < 0 for o in others
    )


def noun_phrase(rng: np.random.Generator, thing: Thing, mention: Attributes, size: str = "") -> str:
    """Put the mentioned attributes (and a size) into words, without an article."""
    after = ""
    words = [pick(rng, SIZE_WORDS[size])] if size else []
    described = []
    if "colour" in mention:
        described.append(pick(rng, COLOUR_WORDS[thing.colour]))
    if "pattern" in mention:
        if rng.random() < 0.35:
            after = " " + pick(rng, AFTER[thing.pattern])
        else:
            described.insert(
                int(rng.integers(len(described) + 1)), pick(rng, BEFORE[thing.pattern])
            )
    noun = pick(rng, NOUNS[thing.shape]) if "shape" in mention else pick(rng, ANYTHING)
    return " ".join([*words, *described, noun]) + after


class Saying(NamedTuple):
    """One thing that is true of the target alone; ``landmark_mention`` says how its landmark is named."""

    weight: float
    mention: Attributes
    size: str = ""
    place: str = ""
    relation: str = ""
    landmark: Thing | None = None
    landmark_mention: Attributes = ()


def sayings(things: Sequence[Thing], target: Thing, style: Style) -> Iterator[Saying]:
    """Yield everything that a data set of this style may say of the target."""
    for mention, weight in MENTIONS.items():
        others = candidates(things, target, mention)
        if style == "relations":
            if "shape" in mention:
                yield from related_sayings(
                    things, target, mention, weight / len(mention) ** 2
                )  # relations are long enough
            continue
        if mention and not others:
            yield Saying(2 * weight, mention)
        for size in SIZE_WORDS if others and mention else ():
            if has_size(size, target, others):
                yield Saying(weight, mention, size=size)
        for place in PLACE_WORDS if style == "absolute" else ():
            if has_place(place, target, others):  # likelier where it tells candidates apart
                yield Saying(weight * (1.2 if others else 0.3), mention, place=place)


def related_sayings(
    things: Sequence[Thing], target: Thing, mention: Attributes, weight: float
) -> Iterator[Saying]:
    """Yield the relations of the target to landmarks that are themselves unmistakable."""
    others = candidates(things, target, mention)
    for landmark in things:
        for told, brevity in LANDMARKS.items():
            if landmark is target or candidates(things, landmark, told):
                continue
            for relation in RELATION_WORDS:
                if others and is_related(relation, target, others, landmark):
                    yield Saying(
                        weight * brevity,
                        mention,
                        relation=relation,
                        landmark=landmark,
                        landmark_mention=told,
                    )
                elif (
                    not others
                    and relation != "closest to"
                    and clarity(relation, target, landmark) > 1
                ):
                    yield Saying(
                        0.25 * weight * brevity,
                        mention,
                        relation=relation,
                        landmark=landmark,
                        landmark_mention=told,
                    )


def realise(rng: np.random.Generator, target: Thing, saying: Saying) -> str:
    """Put a saying into words."""
    phrase = noun_phrase(rng, target, saying.mention, saying.size)
    if saying.landmark is not None:
        link = pick(rng, ("", "", "", "", "", "", "that is ", "which is ")) + pick(
            rng, RELATION_WORDS[saying.relation]
        )
        landmark = noun_phrase(rng, saying.landmark, saying.landmark_mention)
        article = pick(rng, ("the", "the", "an" if phrase[0] in "aeiou" else "a"))
        return f"{article} {phrase} {link} the {landmark}"
    if saying.place:
        phrase = pick(rng, PLACE_WORDS[saying.place]).format(phrase)
    return "the " + phrase if rng.random() < 0.4 else phrase


def describe(
    rng: np.random.Generator, things: Sequence[Thing], target: Thing, style: Style, count: int
) -> list[str]:
    """Write up to ``count`` different sentences, each true of the target alone (fewer where no more can be said)."""
    known = list(sayings(things, target, style))
    sentences: list[str] = []
    while known and len(sentences) < count:
        weights = np.array([saying.weight for saying in known])
        sentence = realise(
            rng, target, known.pop(int(rng.choice(len(known), p=weights / weights.sum())))
        )
        if sentence not in sentences and len(sentence.split()) <= MAX_WORDS:
            sentences.append(sentence)
    return sentences


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Draw one of the options."""
    return options[int(rng.integers(len(options)))]
