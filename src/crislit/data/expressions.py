"""Generates referring expressions that fit exactly one object of an embedded scene.

A sentence names attributes (shape, color, pattern). If they fit several objects, it adds a size, a
place in the image or a relation to a landmark. Every predicate is clearly true, clearly false or
borderline; a sentence is used only if it is clearly true of its target and clearly false of every
other object.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Style = Literal["absolute", "attributes", "relations"]
"""How sentences tell objects with the same attributes apart.

By place or size in ``shapes``, by size in ``shapes+``, by relation in ``gshapes``.
"""
MAX_WORDS = 14
"""Maximum words per sentence, so that text encoders need not truncate any."""
WIDTH, HEIGHT = 320, 240
"""The size of a scene in pixels."""
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
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
COLOR_WORDS = {name: (name,) for name in COLORS} | {
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
# {} is the noun phrase.
_PLACES = {
    "left": "left {}; leftmost {}; {} on the left; {} on the far left; {} on the left side",
    "right": "right {}; rightmost {}; {} on the right; {} on the far right; {} on the right side",
    "top": "top {}; {} at the top; topmost {}; highest {}; {} up high",
    "bottom": "bottom {}; {} at the bottom; lowest {}; {} down low",
    "top left": "top left {}; {} in the top left corner; upper left {}; {} at the upper left",
    "top right": "top right {}; {} in the top right corner; upper right {}; {} at the upper right",
    "bottom left": "bottom left {}; {} in the bottom left corner; "
    "lower left {}; {} at the lower left",
    "bottom right": "bottom right {}; {} in the bottom right corner; "
    "lower right {}; {} at the lower right",
    "middle": "middle {}; center {}; {} in the middle; {} in the center; {} nearest to the center",
}
PLACE_WORDS = {place: tuple(phrases.split("; ")) for place, phrases in _PLACES.items()}
RELATION_WORDS = {
    "left of": ("left of", "left of", "to the left of"),
    "right of": ("right of", "right of", "to the right of"),
    "above": ("above", "higher up than"),
    "below": ("below", "lower down than", "beneath"),
    "closest to": ("closest to", "nearest to"),
}


@dataclass(frozen=True)
class Thing:
    """An object as a viewer sees it.

    Attributes:
        shape: One of ``SHAPES``.
        color: One of ``COLORS``.
        pattern: One of ``PATTERNS``.
        x: Horizontal center of its visible pixels.
        y: Vertical center of its visible pixels.
        visible: Number of its visible pixels.
        full: Number of its pixels, including hidden ones.
    """

    shape: str
    color: str
    pattern: str
    x: float
    y: float
    visible: int
    full: int


Attributes = tuple[str, ...]
"""The attributes that a noun phrase mentions: any of ``color``, ``pattern`` and ``shape``."""
# Relative frequencies; people prefer to name the shape and the color.
MENTIONS: dict[Attributes, float] = {
    ("shape",): 3.0,
    ("color", "shape"): 4.0,
    ("color",): 1.5,
    ("pattern", "shape"): 1.5,
    ("color", "pattern", "shape"): 1.0,
    ("color", "pattern"): 0.6,
    ("pattern",): 0.4,
    (): 0.6,
}
# Relative frequencies for landmarks, which have shorter names.
LANDMARKS: dict[Attributes, float] = {
    ("shape",): 2.0,
    ("color", "shape"): 1.0,
    ("color", "pattern", "shape"): 0.2,
}


def candidates(things: Sequence[Thing], target: Thing, mention: Attributes) -> list[Thing]:
    """Return the other things that share every mentioned attribute with the target."""
    return [
        thing
        for thing in things
        if thing is not target and all(getattr(thing, a) == getattr(target, a) for a in mention)
    ]


def has_size(size: str, target: Thing, others: Sequence[Thing]) -> bool:
    """Whether the target is clearly the biggest or smallest, by visible and by full area.

    Args:
        size: ``big`` or ``small``.
        target: The target.
        others: Things that the target is compared with.
    """
    if size == "big":
        return all(target.visible >= 1.4 * other.full for other in others)
    return all(1.4 * target.full <= other.visible for other in others)


def has_place(place: str, target: Thing, others: Sequence[Thing]) -> bool:
    """Whether the target is in a part of the image, and further in than each of the others."""

    def position(thing: Thing) -> tuple[float, float]:
        """Return x and y, mirrored so that halves and quarters are at the left and the top."""
        x, y = thing.x / WIDTH, thing.y / HEIGHT
        return 1 - x if "right" in place else x, 1 - y if "bottom" in place else y

    (x, y), rest = position(target), [position(other) for other in others]
    if place == "middle":

        def off_center(u: float, v: float) -> float:  # in image widths
            return float(np.hypot(u - 0.5, (v - 0.5) * HEIGHT / WIDTH))

        distance = off_center(x, y)
        return distance < 0.14 and all(off_center(u, v) > distance + 0.12 for u, v in rest)
    if place in ("left", "right"):
        return x < 0.42 and all(u > x + 0.1 for u, _ in rest)
    if place in ("top", "bottom"):
        return y < 0.42 and all(v > y + 0.13 for _, v in rest)
    return x < 0.42 and y < 0.42 and all(u > 0.56 or v > 0.56 for u, v in rest)


def clarity(relation: str, thing: Thing, landmark: Thing) -> float:
    """Return how clearly a relation holds: clearly true above 1, clearly false below 0."""
    dx, dy = (landmark.x - thing.x) / WIDTH, (landmark.y - thing.y) / HEIGHT
    signed = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return (signed - 0.03) / 0.07


def is_related(relation: str, target: Thing, others: Sequence[Thing], landmark: Thing) -> bool:
    """Whether a relation to the landmark is clearly true of the target and false of the others."""
    others = [other for other in others if other is not landmark]
    if relation == "closest to":

        def distance(thing: Thing) -> float:
            return float(np.hypot(thing.x - landmark.x, thing.y - landmark.y)) / WIDTH

        return all(distance(other) > distance(target) + 0.08 for other in others)
    is_clear = clarity(relation, target, landmark) > 1
    return is_clear and all(clarity(relation, other, landmark) < 0 for other in others)


def noun_phrase(rng: np.random.Generator, thing: Thing, mention: Attributes, size: str = "") -> str:
    """Return the mentioned attributes and the size in words, without an article."""
    after = ""
    words = [pick(rng, SIZE_WORDS[size])] if size else []
    adjectives = [pick(rng, COLOR_WORDS[thing.color])] if "color" in mention else []
    if "pattern" in mention:
        if rng.random() < 0.35:
            after = " " + pick(rng, AFTER[thing.pattern])
        else:
            position = int(rng.integers(len(adjectives) + 1))
            adjectives.insert(position, pick(rng, BEFORE[thing.pattern]))
    noun = pick(rng, NOUNS[thing.shape] if "shape" in mention else ANYTHING)
    return " ".join([*words, *adjectives, noun]) + after


class Description(NamedTuple):
    """A description that is true of the target alone.

    Attributes:
        weight: Relative frequency.
        mention: The target's mentioned attributes.
        size: ``big``, ``small`` or empty.
        place: A key of ``PLACE_WORDS``, or empty.
        relation: A key of ``RELATION_WORDS``, or empty.
        landmark: The thing that the relation refers to.
        landmark_mention: The landmark's mentioned attributes.
    """

    weight: float
    mention: Attributes
    size: str = ""
    place: str = ""
    relation: str = ""
    landmark: Thing | None = None
    landmark_mention: Attributes = ()


def find_descriptions(
    things: Sequence[Thing], target: Thing, style: Style
) -> Iterator[Description]:
    """Yield the descriptions of the target in a style."""
    for mention, weight in MENTIONS.items():
        if style == "relations":
            # Relations are long enough without more attributes.
            if "shape" in mention:
                yield from find_relations(things, target, mention, weight / len(mention) ** 2)
            continue
        others = candidates(things, target, mention)
        if mention and not others:
            yield Description(2 * weight, mention)
        if mention and others:
            yield from (
                Description(weight, mention, size=size)
                for size in SIZE_WORDS
                if has_size(size, target, others)
            )
        if style == "absolute":
            # Prefer places that are needed to tell objects apart.
            yield from (
                Description(weight * (1.2 if others else 0.3), mention, place=place)
                for place in PLACE_WORDS
                if has_place(place, target, others)
            )


def find_relations(
    things: Sequence[Thing], target: Thing, mention: Attributes, weight: float
) -> Iterator[Description]:
    """Yield the relations of the target to landmarks that are unambiguous themselves."""
    others = candidates(things, target, mention)
    for landmark, (landmark_mention, brevity) in itertools.product(things, LANDMARKS.items()):
        if landmark is not target and not candidates(things, landmark, landmark_mention):
            # Without others, "closest to" is true for every landmark.
            yield from (
                Description(
                    (1.0 if others else 0.25) * weight * brevity,
                    mention,
                    relation=relation,
                    landmark=landmark,
                    landmark_mention=landmark_mention,
                )
                for relation in RELATION_WORDS
                if (others or relation != "closest to")
                and is_related(relation, target, others, landmark)
            )


def to_sentence(rng: np.random.Generator, target: Thing, description: Description) -> str:
    """Put a description into words."""
    phrase = noun_phrase(rng, target, description.mention, description.size)
    if description.landmark is not None:
        link = pick(rng, ("", "", "", "", "", "", "that is ", "which is "))
        relation = pick(rng, RELATION_WORDS[description.relation])
        landmark = noun_phrase(rng, description.landmark, description.landmark_mention)
        article = pick(rng, ("the", "the", "an" if phrase[0] in "aeiou" else "a"))
        return f"{article} {phrase} {link}{relation} the {landmark}"
    if description.place:
        phrase = pick(rng, PLACE_WORDS[description.place]).format(phrase)
    return "the " + phrase if rng.random() < 0.4 else phrase


def describe(
    rng: np.random.Generator, things: Sequence[Thing], target: Thing, style: Style, count: int
) -> list[str]:
    """Return up to ``count`` different sentences, each true of the target alone."""
    descriptions = list(find_descriptions(things, target, style))
    sentences: list[str] = []
    while descriptions and len(sentences) < count:
        weights = np.array([description.weight for description in descriptions])
        drawn = int(rng.choice(len(descriptions), p=weights / weights.sum()))
        sentence = to_sentence(rng, target, descriptions.pop(drawn))
        if sentence not in sentences and len(sentence.split()) <= MAX_WORDS:
            sentences.append(sentence)
    return sentences


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Draw one of the options."""
    return options[int(rng.integers(len(options)))]
