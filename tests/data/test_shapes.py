"""The embedded scenes against an independent reader: its own words, its own grammar, its own eyes (pixels and masks).

Nothing of the generator is imported but what writes a set and what a set is called; only where the question is what an object
hides, ``make_scene`` tells.
"""

import hashlib
import json
import pickle
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from pycocotools import mask as coco

from crislit import tokenize
from crislit.data import shapes
from crislit.data.refer_index import ReferIndex
from crislit.data.scenes import Drawn
from crislit.data.shapes import SETS, make_scene, write_shapes
from crislit.errors import InputError

NAMES = ("shapes", "shapes+", "gshapes")
SPLITS = {
    "shapes": ("train", "val", "testA", "testB"),
    "shapes+": ("train", "val", "testA", "testB"),
    "gshapes": ("train", "val", "test"),
}
REFS = "refs(crislit).p"
WIDTH, HEIGHT = 320, 240
SEED = 7

Mask = npt.NDArray[np.bool_]
Picture = npt.NDArray[np.uint8]


# -- Words: what a sentence asks for ----------------------------------------------------------------------------------------

VOCABULARY = {
    "article": {"": "the; a; an"},
    "link": {"": "that is; which is"},
    "anything": {"": "one; object; thing; shape"},
    "shape": {
        "circle": "circle; disc",
        "square": "square; box",
        "triangle": "triangle",
        "star": "star",
        "cross": "cross; plus sign",
        "diamond": "diamond; rhombus",
        "ring": "ring; donut",
        "heart": "heart",
    },
    "colour": {
        "red": "red",
        "orange": "orange",
        "yellow": "yellow",
        "green": "green",
        "cyan": "cyan; turquoise",
        "blue": "blue",
        "purple": "purple; violet",
        "pink": "pink",
    },
    "pattern": {
        "plain": "plain; solid; without a pattern",
        "striped": "striped; stripy; with stripes",
        "dotted": "dotted; spotted; with dots; with spots",
        "checkered": "checkered; checked; with checks; with a checkerboard",
    },
    "size": {
        "big": "big; large; bigger; biggest; largest",
        "small": "small; little; smaller; smallest",
    },
    "place": {
        "left": "left; leftmost; on the left; on the far left; on the left side",
        "right": "right; rightmost; on the right; on the far right; on the right side",
        "top": "top; topmost; highest; at the top; up high",
        "bottom": "bottom; lowest; at the bottom; down low",
        "top left": "top left; upper left; in the top left corner; at the upper left",
        "top right": "top right; upper right; in the top right corner; at the upper right",
        "bottom left": "bottom left; lower left; in the bottom left corner; at the lower left",
        "bottom right": "bottom right; lower right; in the bottom right corner; at the lower right",
        "middle": "middle; center; in the middle; in the center; nearest to the center",
    },
    "relation": {
        "left of": "left of; to the left of",
        "right of": "right of; to the right of",
        "above": "above; higher up than",
        "below": "below; beneath; lower down than",
        "closest": "closest to; nearest to",
    },
}
LEXICON = {
    tuple(phrase.split()): (kind, meaning)
    for kind, meanings in VOCABULARY.items()
    for meaning, phrases in meanings.items()
    for phrase in phrases.split("; ")
}
LONGEST = max(map(len, LEXICON))
SPATIAL = re.compile(
    r"left|right|top|bottom|upper|lower|highe|lowest|\bup\b|\bdown\b|\bhigh\b|\blow\b|middle|cent|corner|\bside\b|far\b"
    r"|near|close|next|above|below|beneath|under\b|over\b|between"
)

Lexeme = tuple[str, str]


@dataclass(frozen=True)
class Phrase:
    """What a noun phrase asks for; an empty string where it does not say."""

    colour: str = ""
    pattern: str = ""
    shape: str = ""
    size: str = ""
    place: str = ""


@dataclass(frozen=True)
class Meaning:
    """A thing, and possibly how it stands to a landmark."""

    thing: Phrase
    relation: str = ""
    landmark: Phrase = Phrase()


def lexemes(sentence: str) -> list[Lexeme]:
    """Cut a sentence into the longest known phrases; every word has to belong to one."""
    words, found = sentence.split(" "), []
    while words:
        length = next((n for n in range(LONGEST, 0, -1) if tuple(words[:n]) in LEXICON), 0)
        if not length:
            raise ValueError(f"unknown word {words[0]!r}")
        found.append(LEXICON[tuple(words[:length])])
        words = words[length:]
    return found


def parse_phrase(found: list[Lexeme]) -> Phrase:
    """Read a noun phrase: an article if any, one noun, and nothing said twice."""
    if found and found[0][0] == "article":
        found = found[1:]
    kinds = Counter(kind for kind, _ in found)
    strays = set(kinds) - {"anything", *(field.name for field in fields(Phrase))}
    if strays or kinds["shape"] + kinds["anything"] != 1 or max(kinds.values()) > 1:
        raise ValueError(f"not a noun phrase: {found}")
    if kinds["size"] and kinds["place"]:
        raise ValueError(f"size and place at once are not defined: {found}")
    return Phrase(**{kind: meaning for kind, meaning in found if kind != "anything"})


def parse(sentence: str) -> Meaning:
    found = lexemes(sentence)
    relations = [i for i, (kind, _) in enumerate(found) if kind == "relation"]
    if not relations:
        return Meaning(parse_phrase(found))
    at = relations[0]
    thing, landmark = found[:at], found[at + 1 :]
    if thing and thing[-1][0] == "link":
        thing = thing[:-1]
    meaning = Meaning(parse_phrase(thing), found[at][1], parse_phrase(landmark))
    extras = meaning.thing.size, meaning.thing.place, meaning.landmark.size, meaning.landmark.place
    if any(extras) or landmark[0][0] != "article":
        raise ValueError(f"not a relation between two described things: {sentence}")
    return meaning


# -- Eyes: what is in the picture -------------------------------------------------------------------------------------------

HUES = {  # degrees; what lies between two ranges has no name
    "red": (345, 14),
    "orange": (16, 42),
    "yellow": (46, 66),
    "green": (95, 150),
    "cyan": (168, 195),
    "blue": (208, 245),
    "purple": (255, 292),
    "pink": (305, 340),
}
UNCLEAR = "unclear"


@dataclass(frozen=True)
class Seen:
    """An object as this test sees it: its colour and pattern from pixels, the rest from its mask."""

    ann_id: int
    colour: str
    pattern: str
    shape: str
    x: float
    y: float
    area: int


def erode(mask: Mask, by: int) -> Mask:
    return cv2.erode(mask.astype(np.uint8), np.ones((2 * by + 1, 2 * by + 1), np.uint8)).astype(
        bool
    )


def dilate(mask: Mask) -> Mask:
    return cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)


def median_hue(hues: npt.NDArray[np.float64]) -> float:
    """Return the median on the circle of hues: it is cut open opposite to their mean, so that red is not torn apart."""
    mean = float(np.degrees(np.angle(np.exp(1j * np.radians(hues)).mean())))
    return (float(np.median((hues - mean + 180) % 360)) + mean - 180) % 360


def colour_of(picture: Picture, inside: Mask) -> str:
    hsv = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_BGR2HSV)[inside].astype(
        np.float64
    )
    if np.median(hsv[:, 1]) < 0.5:
        return UNCLEAR
    hue = median_hue(hsv[:, 0])
    return next(
        (
            name
            for name, (first, last) in HUES.items()
            if (hue - first) % 360 <= (last - first) % 360
        ),
        UNCLEAR,
    )


def dark_pixels(picture: Picture, inside: Mask) -> npt.NDArray[np.float64]:
    """Return which of the pixels inside are clearly darker than the object's bright ones, as 0 or 1."""
    brightness = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)[inside]
    dark: npt.NDArray[np.float64] = (brightness < 0.75 * np.quantile(brightness, 0.9)).astype(
        np.float64
    )
    return dark


def share_between(lines: npt.NDArray[np.intp], values: npt.NDArray[np.float64]) -> float:
    """Return which share of the values' variance lies between the lines (rows or columns) that they are on."""
    counts = np.bincount(lines)
    sums = np.bincount(lines, weights=values)
    means = sums / np.maximum(counts, 1)
    return float(counts @ (means - values.mean()) ** 2 / len(values) / values.var())


def pattern_of(picture: Picture, inside: Mask) -> str:
    dark = dark_pixels(picture, inside)
    share = float(dark.mean())
    if share < 0.03:
        return "plain"
    rows, columns = np.nonzero(inside)
    along = max(share_between(rows, dark), share_between(columns, dark))
    if along > 0.8:  # every line is of one brightness
        return "striped"
    if (
        0.2 < along < 0.6 and 0.15 < share < 0.45
    ):  # few dark pixels, in rows of spots with bright gaps
        return "dotted"
    if along < 0.15 and 0.42 < share < 0.58:  # half of every row and of every column is dark
        return "checkered"
    return UNCLEAR


def outline(points: list[tuple[float, float]], size: tuple[int, int]) -> Mask:
    """Fill a polygon after stretching it to a box of this height and width."""
    xy = np.array(points)
    xy = (xy - xy.min(axis=0)) / np.ptp(xy, axis=0) * (size[1] - 1, size[0] - 1)
    return cv2.fillPoly(np.zeros(size, np.uint8), [xy.round().astype(np.int32)], [1]).astype(bool)


def turns(count: int) -> list[float]:
    return [2 * np.pi * i / count for i in range(count)]


def star_point(i: int) -> tuple[float, float]:
    radius = 1.0 if i % 2 == 0 else 0.45
    return radius * np.sin(np.pi * i / 5), -radius * np.cos(np.pi * i / 5)


HALF_HEART = [
    (50, 13),
    (40, 3),
    (27, 0),
    (13, 3),
    (4, 13),
    (0, 30),
    (4, 48),
    (16, 66),
    (32, 84),
    (50, 100),
]

TEMPLATES: dict[str, list[tuple[float, float]]] = {
    "circle": [(np.cos(t), np.sin(t)) for t in turns(60)],
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(1, 0), (2, 2), (0, 2)],
    "star": [star_point(i) for i in range(10)],
    "cross": [
        (1, 0),
        (2, 0),
        (2, 1),
        (3, 1),
        (3, 2),
        (2, 2),
        (2, 3),
        (1, 3),
        (1, 2),
        (0, 2),
        (0, 1),
        (1, 1),
    ],
    "diamond": [(1, 0), (2, 1), (1, 2), (0, 1)],
    "heart": [*HALF_HEART, *((100 - x, y) for x, y in HALF_HEART[-2:0:-1])],
}


def template(shape: str, size: tuple[int, int]) -> Mask:
    if shape != "ring":
        return outline(TEMPLATES[shape], size)
    ring, (h, w) = outline(TEMPLATES["circle"], size), size
    ring[h // 4 : h // 4 + h // 2, w // 4 : w // 4 + w // 2] &= ~outline(
        TEMPLATES["circle"], (h // 2, w // 2)
    )
    return ring


def geometry_of(mask: Mask) -> tuple[str, float]:
    """Return the shape whose template, stretched to the mask's box, overlaps it best, and their intersection over union."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    def iou(shape: str) -> float:
        other = template(shape, box.shape)
        return float((box & other).sum() / (box | other).sum())

    best = max((*TEMPLATES, "ring"), key=iou)
    return best, iou(best)


def decode(segmentation: Any) -> Mask:
    """Decode a COCO segmentation: a list of polygons, or run lengths."""
    encoded = coco.frPyObjects(segmentation, HEIGHT, WIDTH)
    merged = encoded if isinstance(segmentation, dict) else coco.merge(encoded)
    mask: Mask = coco.decode(merged).astype(bool)
    return mask


def see(picture: Picture, masks: dict[int, Mask], categories: dict[int, str]) -> list[Seen]:
    """Look at every object of a scene, given the masks and categories by annotation."""
    seen = []
    for ann_id, mask in masks.items():
        inside = erode(mask, 2)  # away from borders, where JPEG mixes colours
        alone = not any(
            (dilate(mask) & other).any() for key, other in masks.items() if key != ann_id
        )
        best, overlap = geometry_of(mask)
        shape = (
            best if alone or overlap > 0.93 else categories[ann_id]
        )  # what is cut off keeps its annotated shape
        ys, xs = np.nonzero(mask)
        colour, pattern = colour_of(picture, inside), pattern_of(picture, inside)
        seen.append(
            Seen(
                ann_id, colour, pattern, shape, float(xs.mean()), float(ys.mean()), int(mask.sum())
            )
        )
    return seen


# -- Sense: which objects a sentence is true of -----------------------------------------------------------------------------


def matching(phrase: Phrase, objects: list[Seen]) -> list[Seen]:
    """Return the objects that have every colour, pattern and shape that the phrase names."""
    return [
        seen
        for seen in objects
        if phrase.colour in ("", seen.colour)
        and phrase.pattern in ("", seen.pattern)
        and phrase.shape in ("", seen.shape)
    ]


def lowest(objects: list[Seen], measure: Callable[[Seen], float], margin: float) -> list[Seen]:
    """Return the objects of the lowest measure; those within the margin could be argued to be as low, and count too."""
    least = min(map(measure, objects), default=0.0)
    return [seen for seen in objects if measure(seen) <= least + margin]


def of_size(size: str, objects: list[Seen]) -> list[Seen]:
    """Return the biggest or smallest; who is within a fifth of it is no less so."""
    sign = -1 if size == "big" else 1
    return lowest(objects, lambda seen: sign * float(np.log(seen.area)), float(np.log(1.2)))


def in_place(place: str, objects: list[Seen]) -> list[Seen]:
    middle_x, middle_y = WIDTH / 2, HEIGHT / 2
    if place == "middle":
        nearest = lowest(
            objects,
            lambda seen: float(np.hypot(seen.x - middle_x, seen.y - middle_y)),
            0.03 * WIDTH,
        )
        return [
            s
            for s in nearest
            if abs(s.x - middle_x) < WIDTH / 4 and abs(s.y - middle_y) < HEIGHT / 4
        ]
    halves: dict[str, Callable[[Seen], float]] = {  # below 0 where the object is on that half
        "left": lambda seen: (seen.x - middle_x) / WIDTH,
        "right": lambda seen: (middle_x - seen.x) / WIDTH,
        "top": lambda seen: (seen.y - middle_y) / HEIGHT,
        "bottom": lambda seen: (middle_y - seen.y) / HEIGHT,
    }
    if " " in place:  # a corner needs no extreme, only to be alone in it
        return [seen for seen in objects if all(halves[half](seen) < 0 for half in place.split())]
    return [seen for seen in lowest(objects, halves[place], 0.03) if halves[place](seen) < 0]


def in_relation(relation: str, objects: list[Seen], landmark: Seen) -> list[Seen]:
    objects = [seen for seen in objects if seen is not landmark]
    if relation == "closest":
        return lowest(
            objects,
            lambda seen: float(np.hypot(seen.x - landmark.x, seen.y - landmark.y)),
            0.03 * WIDTH,
        )
    offsets: dict[str, Callable[[Seen], float]] = {
        "left of": lambda seen: (landmark.x - seen.x) / WIDTH,
        "right of": lambda seen: (seen.x - landmark.x) / WIDTH,
        "above": lambda seen: (landmark.y - seen.y) / HEIGHT,
        "below": lambda seen: (seen.y - landmark.y) / HEIGHT,
    }
    return [seen for seen in objects if offsets[relation](seen) > 0.05]


def true_of(meaning: Meaning, objects: list[Seen]) -> list[Seen]:
    """Return every object that the sentence is true of; none if its landmark is not unmistakable."""
    found = matching(meaning.thing, objects)
    if meaning.relation:
        landmarks = matching(meaning.landmark, objects)
        return in_relation(meaning.relation, found, landmarks[0]) if len(landmarks) == 1 else []
    if meaning.thing.size:
        return of_size(meaning.thing.size, found)
    return in_place(meaning.thing.place, found) if meaning.thing.place else found


# -- The sets under test ----------------------------------------------------------------------------------------------------


class Made:
    """A written set, read back without the library."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        self.instances: dict[str, Any] = json.loads((root / name / "instances.json").read_text())
        self.refs: list[dict[str, Any]] = pickle.loads((root / name / REFS).read_bytes())
        self.annotations = {item["id"]: item for item in self.instances["annotations"]}
        self.split_of: dict[int, str] = {ref["image_id"]: ref["split"] for ref in self.refs}

    @cached_property
    def masks(self) -> dict[int, dict[int, Mask]]:
        """The masks by annotation, by image."""
        masks: dict[int, dict[int, Mask]] = {image["id"]: {} for image in self.instances["images"]}
        for ann_id, item in self.annotations.items():
            masks[item["image_id"]][ann_id] = decode(item["segmentation"])
        return masks

    @cached_property
    def scenes(self) -> dict[int, list[Seen]]:
        """What there is to see, by image."""
        names = {category["id"]: category["name"] for category in self.instances["categories"]}
        categories = {
            ann_id: names[item["category_id"]] for ann_id, item in self.annotations.items()
        }
        return {
            image_id: see(self.image(image_id), masks, categories)
            for image_id, masks in self.masks.items()
        }

    @cached_property
    def drawn(self) -> dict[int, list[Drawn]]:
        """The generator's own objects, by image: only they know what is hidden."""
        return {
            image: make_scene(SEED, self.name, split, self.number(image))[1]
            for image, split in self.split_of.items()
        }

    def number(self, image_id: int) -> int:
        """Return an image's number within its split."""
        return sorted(
            image for image, split in self.split_of.items() if split == self.split_of[image_id]
        ).index(image_id)

    def picture_path(self, image_id: int) -> Path:
        return self.root / "images" / "train2014" / f"COCO_train2014_{image_id:012d}.jpg"

    def image(self, image_id: int) -> Picture:
        picture = cv2.imread(str(self.picture_path(image_id)))
        assert picture is not None
        return picture.astype(np.uint8)

    def mask(self, ref: dict[str, Any]) -> Mask:
        return self.masks[ref["image_id"]][ref["ann_id"]]

    def target(self, ref: dict[str, Any]) -> tuple[Seen, list[Seen]]:
        """Return a ref's object and the others of its scene."""
        objects = self.scenes[ref["image_id"]]
        return next(s for s in objects if s.ann_id == ref["ann_id"]), [
            s for s in objects if s.ann_id != ref["ann_id"]
        ]

    def drawn_target(self, ref: dict[str, Any]) -> Drawn:
        """Return a ref's object as drawn: the one whose visible pixels are its mask."""
        (same,) = [
            d for d in self.drawn[ref["image_id"]] if np.array_equal(d.visible, self.mask(ref))
        ]
        return same

    def split_refs(self, split: str) -> list[dict[str, Any]]:
        refs = [ref for ref in self.refs if ref["split"] == split]
        assert refs
        return refs

    def sentences(self) -> list[tuple[str, dict[str, Any]]]:
        return [(item["sent"], ref) for ref in self.refs for item in ref["sentences"]]

    def where(self, ref: dict[str, Any], sentence: str = "") -> str:
        """Say how to find a ref again."""
        number = self.number(ref["image_id"])
        return f"make_scene({SEED}, {self.name!r}, {ref['split']!r}, {number}), ann_id {ref['ann_id']}: {sentence!r}"


def sizes(name: str, train: int, evaluation: int) -> dict[str, int]:
    return {split: train if split == "train" else evaluation for split in SPLITS[name]}


@pytest.fixture(scope="session", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    name: str = request.param
    return Made(
        write_shapes(tmp_path_factory.mktemp("embedded"), name, SEED, sizes(name, 60, 20)), name
    )


without_relations = pytest.mark.parametrize("made", ["shapes", "shapes+"], indirect=True)


def share(facts: list[bool]) -> float:
    assert facts
    return sum(facts) / len(facts)


def words_of(made: Made) -> list[int]:
    return [len(sentence.split()) for sentence, _ in made.sentences()]


def digests(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


# -- The judge itself -------------------------------------------------------------------------------------------------------

TABLEAU = [
    Seen(1, "red", "plain", "circle", 50, 60, 3000),
    Seen(2, "red", "dotted", "circle", 150, 110, 2600),
    Seen(3, "blue", "plain", "square", 260, 60, 5000),
    Seen(4, "blue", "plain", "circle", 270, 200, 3100),
]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("the turquoise donut", []),
        ("box", [3]),
        ("the red disc", [1, 2]),
        ("spotted thing", [2]),
        ("solid disc", [1, 4]),
        ("largest one", [3]),
        ("the big circle", [1, 2, 4]),
        ("leftmost circle", [1]),
        ("blue thing on the left", []),
        ("the shape nearest to the center", [2]),
        ("circle without a pattern in the top left corner", [1]),
        ("the thing at the upper right", [3]),
        ("the disc nearest to the box", [2]),
        ("a circle that is to the right of the dotted disc", [4]),
        ("the circle left of the square", [1, 2]),
        ("the box above the circle", []),
        ("the blue circle lower down than the box", [4]),
    ],
)
def test_the_judge_understands(sentence: str, expected: list[int]) -> None:
    assert [seen.ann_id for seen in true_of(parse(sentence), TABLEAU)] == expected


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "the",
        "red",
        "red blue disc",
        "disc box",
        "shiny disc",
        "left of the box",
        "disc left of",
        "disc above box",
    ]
    + ["the the box", "disc above the box above the star", "big disc on the left"],
)
def test_the_judge_rejects(sentence: str) -> None:
    with pytest.raises(
        ValueError, match=r"unknown word|not a noun phrase|not a relation|size and place"
    ):
        parse(sentence)


# -- Truth ------------------------------------------------------------------------------------------------------------------


def test_every_word_is_understood(made: Made) -> None:
    wrong = []
    for sentence, ref in made.sentences():
        try:
            parse(sentence)
        except ValueError as error:
            wrong.append(f"{made.where(ref, sentence)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_every_colour_and_pattern_can_be_told_from_the_pixels(made: Made) -> None:
    unclear = [
        seen
        for scene in made.scenes.values()
        for seen in scene
        if UNCLEAR in (seen.colour, seen.pattern)
    ]
    assert not unclear


def test_the_annotated_category_is_the_shape_of_the_mask(made: Made) -> None:
    names = {category["id"]: category["name"] for category in made.instances["categories"]}
    seen = [seen for scene in made.scenes.values() for seen in scene]
    assert [
        s.ann_id for s in seen if s.shape != names[made.annotations[s.ann_id]["category_id"]]
    ] == []
    assert set(TEMPLATES) | {"ring"} == {s.shape for s in seen} == set(names.values())


def test_every_sentence_is_true_of_exactly_its_target(made: Made) -> None:
    wrong = []
    for sentence, ref in made.sentences():
        found = [seen.ann_id for seen in true_of(parse(sentence), made.scenes[ref["image_id"]])]
        if found != [ref["ann_id"]]:
            wrong.append(f"{made.where(ref, sentence)} is true of {found}")
    assert not wrong, "\n".join(wrong)


# -- Style ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["shapes+"], indirect=True)
def test_shapes_plus_never_says_where(made: Made) -> None:
    assert [sentence for sentence, _ in made.sentences() if SPATIAL.search(sentence)] == []


@pytest.mark.parametrize("made", ["shapes"], indirect=True)
def test_shapes_often_says_where_and_relates_nothing(made: Made) -> None:
    meanings = [parse(sentence) for sentence, _ in made.sentences()]
    assert not any(meaning.relation for meaning in meanings)
    assert 0.25 < share([bool(meaning.thing.place) for meaning in meanings]) < 0.75
    assert {meaning.thing.place for meaning in meanings} == {"", *VOCABULARY["place"]}


@pytest.mark.parametrize("made", ["gshapes"], indirect=True)
def test_gshapes_relates_every_target_in_seven_to_ten_words(made: Made) -> None:
    meanings = [parse(sentence) for sentence, _ in made.sentences()]
    assert all(meaning.relation for meaning in meanings)
    assert {meaning.relation for meaning in meanings} == set(VOCABULARY["relation"])
    assert 7 <= np.mean(words_of(made)) <= 10


def test_sentences_differ_in_length_and_none_is_said_twice_of_an_object(made: Made) -> None:
    assert len(set(words_of(made))) >= 4
    for ref in made.refs:
        sentences = [item["sent"] for item in ref["sentences"]]
        assert len(set(sentences)) == len(sentences) > 0


def test_no_sentence_is_cut_by_the_tokenizer(made: Made) -> None:
    limit = 22 if made.name == "gshapes" else 17
    sentences = [sentence for sentence, _ in made.sentences()]
    whole, short = tokenize(sentences, 77), tokenize(sentences, limit)
    assert not whole[:, limit:].any()
    assert whole[:, :limit].equal(short)


# -- Difficulty -------------------------------------------------------------------------------------------------------------


def test_half_of_the_targets_cover_three_to_six_percent_of_the_picture(made: Made) -> None:
    assert 0.03 < np.median([made.mask(ref).mean() for ref in made.refs]) < 0.06


def test_every_target_is_at_least_half_visible_and_some_are_partly_hidden(made: Made) -> None:
    targets = [made.drawn_target(ref) for ref in made.refs]
    visible = [target.visible.sum() / target.full.sum() for target in targets]
    assert min(visible) >= 0.5
    assert share([part < 1 for part in visible]) > 0.1


def test_most_targets_share_their_shape_or_colour_with_another_object(made: Made) -> None:
    pairs = [made.target(ref) for ref in made.refs]
    assert (
        share(
            [
                any(o.shape == target.shape or o.colour == target.colour for o in rest)
                for target, rest in pairs
            ]
        )
        >= 0.7
    )


def test_every_scene_has_four_to_seven_objects(made: Made) -> None:
    assert {len(masks) for masks in made.masks.values()} == {4, 5, 6, 7}


# -- Splits -----------------------------------------------------------------------------------------------------------------


@without_relations
def test_every_test_a_target_has_another_object_of_its_shape(made: Made) -> None:
    for ref in made.split_refs("testA"):
        target, rest = made.target(ref)
        assert target.shape in [other.shape for other in rest], made.where(ref)


@without_relations
def test_no_test_b_target_has_another_of_its_shape_but_one_of_its_colour_or_pattern(
    made: Made,
) -> None:
    for ref in made.split_refs("testB"):
        target, rest = made.target(ref)
        assert target.shape not in [other.shape for other in rest], made.where(ref)
        assert any(
            target.colour == other.colour or target.pattern == other.pattern for other in rest
        ), made.where(ref)


def test_no_picture_is_in_two_splits_or_drawn_twice(made: Made) -> None:
    assert (
        len({(ref["image_id"], ref["split"]) for ref in made.refs})
        == len(made.split_of)
        == len(made.masks)
    )
    pictures = digests(made.root / "images")
    assert len(set(pictures.values())) == len(pictures) == len(made.masks)


def test_every_scene_has_at_least_two_described_objects(made: Made) -> None:
    described = Counter(ref["image_id"] for ref in made.refs)
    assert len({ref["ann_id"] for ref in made.refs}) == len(made.refs)
    assert min(described[image["id"]] for image in made.instances["images"]) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_a_set_promises_3000_training_scenes_and_300_per_evaluation_split(name: str) -> None:
    assert tuple(SETS) == NAMES
    assert SETS[name].splits == sizes(name, 3000, 300)


# -- Files ------------------------------------------------------------------------------------------------------------------


def test_as_many_scenes_are_written_per_split_as_asked_for(made: Made) -> None:
    assert Counter(made.split_of.values()) == sizes(made.name, 60, 20)


def test_the_layout_is_that_of_refer(made: Made) -> None:
    for image in made.instances["images"]:
        assert image["file_name"] == made.picture_path(image["id"]).name
        assert (
            (image["height"], image["width"])
            == made.image(image["id"]).shape[:2]
            == (HEIGHT, WIDTH)
        )
    for ref in made.refs:
        annotation = made.annotations[ref["ann_id"]]
        assert (annotation["image_id"], annotation["category_id"]) == (
            ref["image_id"],
            ref["category_id"],
        )
    assert len({ref["ref_id"] for ref in made.refs}) == len(made.refs)
    sent_ids = [item["sent_id"] for ref in made.refs for item in ref["sentences"]]
    assert sent_ids == [sent_id for ref in made.refs for sent_id in ref["sent_ids"]]
    assert len(set(sent_ids)) == len(sent_ids)


def test_annotations_are_the_drawn_pixels_and_agree_with_their_area_and_box(made: Made) -> None:
    for image_id, masks in made.masks.items():
        assert (
            sum(masks.values(), np.zeros((HEIGHT, WIDTH), int)).max() == 1
        )  # no pixel belongs to two objects
        drawn = sorted(d.visible.tobytes() for d in made.drawn[image_id])
        assert drawn == sorted(mask.tobytes() for mask in masks.values())
        for ann_id, mask in masks.items():
            ys, xs = np.nonzero(mask)
            left, top, right, bottom = (
                int(xs.min()),
                int(ys.min()),
                int(xs.max()) + 1,
                int(ys.max()) + 1,
            )
            annotation = made.annotations[ann_id]
            assert annotation["area"] == mask.sum()
            assert annotation["bbox"] == [left, top, right - left, bottom - top]


def test_the_reader_finds_the_drawn_pixels_and_the_written_sentences(made: Made) -> None:
    index = ReferIndex.open(made.root, made.name, REFS)
    assert len(index) == len(made.refs)
    assert set(index.splits) == set(SPLITS[made.name])
    for row, ref in enumerate(made.refs):
        assert np.array_equal(index.mask(row), made.drawn_target(ref).visible)
        assert [index.sentence(i) for i in index.sentence_rows(row)] == [
            item["sent"] for item in ref["sentences"]
        ]
        assert index.image_path(row) == made.picture_path(ref["image_id"])
        assert row in index.split_refs(ref["split"])


def test_objects_with_holes_are_run_lengths_and_divided_ones_several_polygons(made: Made) -> None:
    runs = several = 0
    for ann_id, item in made.annotations.items():
        mask = made.masks[item["image_id"]][ann_id].astype(np.uint8)
        _, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        holes = bool((hierarchy[0, :, 3] >= 0).any())
        assert isinstance(item["segmentation"], dict) == holes
        runs += holes
        several += not holes and len(item["segmentation"]) > 1
    assert runs > 0
    assert several > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_determines_every_byte(name: str, tmp_path: Path) -> None:
    first, second, other = (
        write_shapes(tmp_path / str(i), name, seed, sizes(name, 6, 3))
        for i, seed in enumerate((3, 3, 4))
    )
    assert first != second
    assert digests(first) == digests(second)
    assert not set(digests(first / "images").values()) & set(digests(other / "images").values())


def test_writing_again_does_nothing(tmp_path: Path) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}

    root = write_shapes(tmp_path, "shapes", SEED, sizes("shapes", 2, 1))
    before = state()
    assert write_shapes(tmp_path, "shapes", SEED, sizes("shapes", 2, 1)) == root
    assert state() == before


def test_several_processes_write_what_one_writes_and_draw_no_number_of_torchs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for worth in (3, 1000):
        monkeypatch.setattr(shapes, "SCENES_PER_WORKER", worth)
        monkeypatch.setattr("os.cpu_count", lambda: 2)
        torch.manual_seed(5)
        folders.append(write_shapes(tmp_path / str(worth), "gshapes", SEED, sizes("gshapes", 9, 2)))
        assert torch.initial_seed() == 5
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(5))
    assert digests(folders[0]) == digests(folders[1])


def test_a_picture_that_cannot_be_written_is_named_and_no_set_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_picture = cv2.imwrite
    monkeypatch.setattr(
        cv2,
        "imwrite",
        lambda path, *rest: "000000000004" not in path and write_picture(path, *rest),
    )
    monkeypatch.setattr(shapes, "SCENES_PER_WORKER", 3)
    with pytest.raises(
        InputError, match=r"cannot write .*COCO_train2014_000000000004\.jpg: is the disk full\?"
    ):
        write_shapes(tmp_path, "shapes", SEED, sizes("shapes", 9, 2))
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_written_is_an_input_error_that_says_what_to_do(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("in the way")
    root = tmp_path / "file" / "data"
    with pytest.raises(InputError, match=rf"cannot write.*{re.escape(str(root))}.*writable folder"):
        write_shapes(root, "shapes", SEED, sizes("shapes", 2, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("name", "number"), [("gshapes", 2501), ("shapes+", 419)])
def test_no_object_shows_only_through_a_rings_hole(name: str, number: int) -> None:
    # In these two scenes a ring once lay on an object so that it looked like a disc.
    _, drawn, _ = make_scene(0, name, "train", number)
    for i, ring in enumerate(drawn):
        if ring.shape != "ring":
            continue
        ys, xs = np.nonzero(ring.full)
        radius = (xs.max() - xs.min() + 1) / 2
        y, x = np.mgrid[: ring.full.shape[0], : ring.full.shape[1]]
        disc = np.hypot(x - xs.mean(), y - ys.mean()) <= radius
        assert all((below.visible & ~disc).any() for below in drawn[:i])


def test_sentences_stay_within_fourteen_words_whatever_the_seed() -> None:
    words = [
        len(sentence.split())
        for seed in (
            0,
            97,
            214,
            297,
            318,
            348,
        )  # but for the first, seeds that once gave 15 to 17 words
        for _, sentences in make_scene(seed, "gshapes", "train", 0)[2]
        for sentence in sentences
    ]
    assert max(words) <= 14
    assert max(words) > 10
