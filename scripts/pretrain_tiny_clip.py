"""Pretrains the encoders of ``model=tiny`` like CLIP, by contrasting images and sentences.

    python scripts/pretrain_tiny_clip.py src/crislit/assets/tiny-clip.safetensors

The images are the training scenes of the three embedded data sets, and simpler ones of one to three
objects: like images on the web, they show little beyond their captions. No scene belongs to an
evaluation split. The first part of the training sees windows of the scenes, which are small and
therefore many; the second sees whole scenes. At the end, retrieval is measured on val scenes.

Captions are made anew at every step. Two rules make the contrast precise: a caption that may be
true of another image of the batch is not contrasted with it, and many captions have an altered
copy that is false of their own image, with another colour or on the other side.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from crislit.config import compose_config
from crislit.data.expressions import (
    COLOURS,
    MENTIONS,
    PATTERNS,
    SHAPES,
    Description,
    Style,
    Thing,
    candidates,
    clarity,
    find_descriptions,
    has_place,
    to_sentence,
)
from crislit.data.scenes import BoolMask, Drawn, bounding_slices, draw_scene
from crislit.data.shapes import SETS, make_scene
from crislit.io import Image
from crislit.models.build import build_clip
from crislit.training.provenance import commit, hardware
from crislit.transforms.letterbox import letterbox_image, letterbox_mask, normalise, stack_images
from crislit.transforms.tokenizer import tokenize

OBJECTS = (1, 1, 2, 3)
"""Numbers of objects of the simple scenes, in turn."""

SENTENCE_NORM = 0.3
"""Mean norm of the sentence features in the file.

CLIP compares angles only. CRIS turns these features into convolution kernels, and learns faster
from small ones.
"""

SIMPLE_SEED = 1_000_003
"""Separates the simple scenes from those of the data sets."""

EVERY = 100
"""Steps between two reports; each also saves the state of the training."""

WINDOW = 64
"""Side of a window in pixels, at the scale of the whole scene."""

SHOWN = 0.8
"""Share of an object's bounding box that a window must contain to describe the object."""

MOST_PARTS = 3
"""Maximum number of objects per caption, so that CLIP's context suffices."""

ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "pattern": PATTERNS}

OPPOSITES = {
    **{"left": "right", "top": "bottom", "left of": "right of", "above": "below"},
    **{"top left": "top right", "bottom left": "bottom right"},
}
OPPOSITES |= {opposite: word for word, opposite in OPPOSITES.items()}


@dataclass
class Scene:
    """A scene and what can be said about it.

    Attributes:
        image: (S, S, 3) uint8 RGB.
        things: Its objects.
        boxes: Their bounding boxes in the image, (objects, 4): left, top, right, bottom.
        style: The style of its sentences.
        sentences: The data set's sentences of each described object.
    """

    image: Image
    things: list[Thing]
    boxes: npt.NDArray[np.int64]
    style: Style
    sentences: list[list[str]]


class Part(NamedTuple):
    """A part of a caption: one object and what is said about it."""

    target: Thing
    description: Description


def to_scene(
    image: Image, drawn: Sequence[Drawn], style: Style, size: int, sentences: list[list[str]]
) -> Scene:
    """Letterbox a scene and the bounding boxes of its objects."""
    boxes = np.array([bounding_box(d.visible, size) for d in drawn])
    things = [d.seen() for d in drawn]
    return Scene(letterbox_image(image, size), things, boxes, style, sentences)


def bounding_box(mask: BoolMask, size: int) -> tuple[int, int, int, int]:
    """Return the bounding box of a mask after letterboxing: left, top, right, bottom."""
    rows, columns = bounding_slices(letterbox_mask(255 * mask.astype(np.uint8), size) > 0)
    return columns.start, rows.start, columns.stop, rows.stop


def draw(number: int, name: str, split: str, size: int) -> Scene:
    """Return a scene of a data set as the network sees it."""
    image, drawn, described = make_scene(0, name, split, number)
    return to_scene(image, drawn, SETS[name].style, size, [texts for _, texts in described])


def draw_simple(number: int, name: str, size: int) -> Scene:
    """Return a scene of few objects, for descriptions in the style of a data set."""
    spec = SETS[name]
    rng = np.random.default_rng([SIMPLE_SEED, list(SETS).index(name), number])
    # Relations need two objects.
    objects = max(OBJECTS[number % len(OBJECTS)], 2 if spec.style == "relations" else 1)
    return to_scene(*draw_scene(rng, objects=objects), spec.style, size, [])


def draw_all(simple: int, size: int) -> list[Scene]:
    """Draw all training scenes of the three data sets, and ``simple`` ones in the style of each."""
    scenes: list[Scene] = []
    with ProcessPoolExecutor(2) as pool:
        for name, spec in SETS.items():
            draw_training = partial(draw, name=name, split="train", size=size)
            for kind, work, count in (
                ("training", draw_training, spec.splits["train"]),
                ("simple", partial(draw_simple, name=name, size=size), simple),
            ):
                drawn = pool.map(work, range(count), chunksize=50)
                scenes += tqdm(drawn, f"drawing {kind} scenes of {name}", count, disable=None)
    return scenes


# -- Captions


class View(NamedTuple):
    """What a step sees of a scene.

    Attributes:
        image: The scene, or a window of it, uint8 RGB.
        things: The objects that captions may describe.
        present: All objects of the scene.
        style: The style of the scene's sentences, or None for a window, where objects are described
            by their attributes alone.
    """

    image: Image
    things: list[Thing]
    present: list[Thing]
    style: Style | None


def whole(scene: Scene) -> View:
    """Show all of a scene."""
    return View(scene.image, scene.things, scene.things, scene.style)


def window(rng: np.random.Generator, scene: Scene) -> View:
    """Show a window around one object of a scene, at random."""
    chosen = int(rng.integers(len(scene.boxes)))
    low, high = scene.boxes[chosen, :2], scene.boxes[chosen, 2:]
    # The window contains the object or, if that is larger, lies inside its box.
    first, last = np.minimum(high - WINDOW, low), np.maximum(high - WINDOW, low)
    corner = rng.integers(first, last + 1).clip(0, len(scene.image) - WINDOW)
    lows, highs = scene.boxes[:, :2], scene.boxes[:, 2:]
    inside = np.minimum(highs, corner + WINDOW) - np.maximum(lows, corner)
    shares = inside.clip(0).prod(axis=1) / (highs - lows).prod(axis=1)
    shares[chosen] = 1
    shown = [t for t, share in zip(scene.things, shares, strict=True) if share >= SHOWN]
    left, top = corner.tolist()
    image = scene.image[top : top + WINDOW, left : left + WINDOW]
    return View(image, shown, scene.things, None)


def describe_part(rng: np.random.Generator, view: View, target: Thing) -> Part:
    """Describe one object of a view."""
    options = list(find_descriptions(view.things, target, view.style)) if view.style else []
    if not options:
        options = [Description(weight, mention) for mention, weight in MENTIONS.items() if mention]
    weights = np.array([option.weight for option in options])
    return Part(target, options[int(rng.choice(len(options), p=weights / weights.sum()))])


def caption(rng: np.random.Generator, view: View) -> list[Part]:
    """Describe one or several objects of a view, in random order."""
    count = int(rng.integers(1, min(len(view.things), MOST_PARTS) + 1))
    chosen = rng.permutation(len(view.things))[:count]
    return [describe_part(rng, view, view.things[i]) for i in chosen]


def falsify(rng: np.random.Generator, view: View, parts: Sequence[Part]) -> list[Part] | None:
    """Alter one part of a caption so that it is false of the whole scene; None without a way."""
    chosen = int(rng.integers(len(parts)))
    false = contradict(view, parts[chosen]) or change_attribute(rng, view, parts[chosen])
    return [*parts[:chosen], false, *parts[chosen + 1 :]] if false else None


def contradict(view: View, part: Part) -> Part | None:
    """Say the opposite of a place or relation, if that is false of every object it may refer to."""
    target, said = part
    alike = [target, *candidates(view.present, target, said.mention)]
    if opposite := OPPOSITES.get(said.place):
        if any(has_place(opposite, thing, []) for thing in alike):
            return None
        return Part(target, said._replace(place=opposite))
    if said.landmark is not None and (opposite := OPPOSITES.get(said.relation)):
        landmarks = [
            said.landmark,
            *candidates(view.present, said.landmark, said.landmark_mention),
        ]
        pairs = ((thing, mark) for thing in alike for mark in landmarks if thing is not mark)
        if any(clarity(opposite, *pair) > 0 for pair in pairs):
            return None
        return Part(target, said._replace(relation=opposite))
    return None


def change_attribute(rng: np.random.Generator, view: View, part: Part) -> Part | None:
    """Name another shape, colour or pattern, such that no object of the scene fits."""
    target, said = part
    for attribute in rng.permutation(np.array(said.mention, dtype=str)):
        for value in rng.permutation(ATTRIBUTES[attribute]):
            other = replace(target, **{str(attribute): str(value)})  # type: ignore[arg-type]
            if not candidates(view.present, other, said.mention):
                return Part(other, said)
    return None


def word(rng: np.random.Generator, parts: Sequence[Part]) -> str:
    """Put a caption into words."""
    return ", ".join(to_sentence(rng, *part) for part in parts)


def may_be_true(captions: Sequence[Sequence[Part]], views: Sequence[View]) -> Tensor:
    """Return which captions may be true of which views, (captions, views) bool.

    These are captions all of whose attributes occur in the view's scene, whatever is said about
    places, sizes and relations.
    """
    named = [
        (i, thing, mention)
        for i, parts in enumerate(captions)
        for target, said in parts
        for thing, mention in ((target, said.mention), (said.landmark, said.landmark_mention))
        if thing is not None
    ]
    owners = torch.tensor([i for i, _, _ in named])
    wanted = torch.tensor([attribute_bits(thing, mention) for _, thing, mention in named])
    seen = [(j, thing) for j, view in enumerate(views) for thing in view.present]
    places = torch.tensor([j for j, _ in seen])
    given = torch.tensor([attribute_bits(thing, tuple(ATTRIBUTES)) for _, thing in seen])
    fits = (wanted @ given.T == wanted.sum(dim=1, keepdim=True)).float()  # (phrases, objects)
    occurs = torch.zeros(len(named), len(views)).index_add_(1, places, fits) > 0
    missing = torch.zeros(len(captions), len(views)).index_add_(0, owners, (~occurs).float())
    return missing == 0


def attribute_bits(thing: Thing, mention: Sequence[str]) -> list[float]:
    """Return a one for each mentioned attribute of an object, at the place of its value."""
    return [
        float(attribute in mention and getattr(thing, attribute) == value)
        for attribute, values in ATTRIBUTES.items()
        for value in values
    ]


# -- Training


def contrastive_loss(
    images: Tensor, sentences: Tensor, scale: Tensor, ignored: Tensor | None = None
) -> Tensor:
    """Return CLIP's symmetric cross-entropy over a batch of pairs.

    Args:
        images: (B, E) of unit norm.
        sentences: (B + K, E) of unit norm; the last K belong to no image.
        scale: Inverse temperature.
        ignored: (B, B + K) bool, pairs that are not contrasted.
    """
    logits = scale * images @ sentences.T
    if ignored is not None:
        logits = logits.masked_fill(ignored, -torch.inf)
    pairs = torch.arange(len(logits))
    of_images = F.cross_entropy(logits, pairs)
    return (of_images + F.cross_entropy(logits[:, : len(logits)].T, pairs)) / 2


def batch_loss(clip: CLIP, views: Sequence[View], rng: np.random.Generator) -> Tensor:
    """Return the contrastive loss of some views, each with a caption and a false one."""
    captions = [caption(rng, view) for view in views]
    altered = [falsify(rng, view, parts) for view, parts in zip(views, captions, strict=True)]
    false = [(i, parts) for i, parts in enumerate(altered) if parts]
    captions += [parts for _, parts in false]
    ignored = may_be_true(captions, views).T.clone()
    ignored.fill_diagonal_(False)
    for column, (own, _) in enumerate(false, len(views)):
        ignored[own, column] = False
    inputs = normalise(stack_images([view.image for view in views]))
    images = F.normalize(encode_images(clip, inputs), dim=-1)
    sentences = encode(clip, [word(rng, parts) for parts in captions])
    return contrastive_loss(images, sentences, clip.logit_scale.exp().clamp(max=100), ignored)


def encode_images(clip: CLIP, images: Tensor) -> Tensor:
    """Return the features of images of any size, (B, E): positions are resized to their grid."""
    resnet = clip.visual
    x = resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(resnet.stem(images)))))
    positions = resnet.attnpool.positional_embedding  # that of the mean comes first
    side = round((len(positions) - 1) ** 0.5)
    grid = positions[1:].T.reshape(1, -1, side, side)
    resized = F.adaptive_avg_pool2d(grid, x.shape[-2:])[0].flatten(1).T
    weights = {"positional_embedding": torch.cat([positions[:1], resized])}
    features: Tensor = functional_call(resnet.attnpool, weights, (x,))
    return features


def encode(clip: CLIP, sentences: Sequence[str]) -> Tensor:
    """Return the sentences' features, (B, E), of unit norm."""
    return F.normalize(project(clip, sentences), dim=-1)


def project(clip: CLIP, sentences: Sequence[str]) -> Tensor:
    """Return the sentences' features, (B, E), computed without unneeded padding."""
    tokens = tokenize(sentences, len(clip.positional_embedding))
    ends = tokens.argmax(dim=-1)
    length = int(ends.max()) + 1
    x = clip.token_embedding(tokens[:, :length]) + clip.positional_embedding[:length]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    features: Tensor = x[torch.arange(len(x)), ends] @ clip.text_projection
    return features


@torch.no_grad()
def retrieval(clip: CLIP, scenes: Sequence[Scene], objects: int) -> dict[str, float]:
    """Return the recall at 1, 5 and 10 between scenes and captions of so many objects."""
    clip.eval()
    inputs = normalise(stack_images([scene.image for scene in scenes]))
    images = F.normalize(
        torch.cat([clip.visual(part) for part in torch.split(inputs, 100)]), dim=-1
    )
    captions = [", ".join(texts[0] for texts in scene.sentences[:objects]) for scene in scenes]
    similarity = images @ encode(clip, captions).T
    recalls = {"scenes": float(len(scenes))}
    for direction, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        rank = (scores > scores.diagonal()[:, None]).sum(dim=1)
        recalls |= {f"{direction}_R@{k}": float((rank < k).float().mean()) for k in (1, 5, 10)}
    return recalls | {f"chance_R@{k}": k / len(scenes) for k in (1, 5, 10)}


@torch.no_grad()
def scale_sentences(clip: CLIP, sentences: Sequence[str]) -> None:
    """Scale sentence features to a mean norm of :data:`SENTENCE_NORM`; angles stay the same."""
    clip.text_projection.mul_(SENTENCE_NORM / project(clip, sentences).norm(dim=-1).mean())


class Schedule(NamedTuple):
    """How long to train, on what, and the seed of views and captions.

    Attributes:
        window_steps: Steps on windows, which come first.
        scene_steps: Steps on whole scenes.
        batch: Scenes per step; three times as many windows.
        seed: Seed of views and captions.
    """

    window_steps: int
    scene_steps: int
    batch: int
    seed: int

    def views(self, scenes: Sequence[Scene], step: int) -> tuple[list[View], np.random.Generator]:
        """Return the views of a step, and the generator for their captions."""
        rng = np.random.default_rng([self.seed, step])
        is_window = step < self.window_steps
        count = min(len(scenes), 3 * self.batch if is_window else self.batch)
        chosen = [scenes[i] for i in rng.choice(len(scenes), size=count, replace=False)]
        return [window(rng, scene) if is_window else whole(scene) for scene in chosen], rng


def train(clip: CLIP, scenes: Sequence[Scene], schedule: Schedule, state: Path) -> None:
    """Train with AdamW and a cosine schedule.

    Args:
        clip: The encoders.
        scenes: Training scenes.
        schedule: How long to train, and on what.
        state: File from which an interrupted training continues.
    """
    steps = schedule.window_steps + schedule.scene_steps
    decayed = [p for p in clip.parameters() if p.ndim >= 2]
    others = [p for p in clip.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3,
        fused=True,
    )
    rates = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    stateful = {"towers": clip, "adam": adam, "rates": rates}
    options, start = list(schedule), 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        if saved["of"] != options:
            raise SystemExit(
                f"error: {state} is of a training with (window steps, scene steps, batch, seed) "
                f"{saved['of']}: delete it to start from the beginning"
            )
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        start = saved["step"]
    clip.train()
    losses: list[float] = []
    for step in tqdm(range(start, steps), "training", initial=start, total=steps, disable=None):
        loss = batch_loss(clip, *schedule.views(scenes, step))
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        rates.step()
        losses.append(loss.item())
        if (step + 1) % EVERY == 0:
            print(f"step {step + 1} of {steps}: loss {np.mean(losses[-EVERY:]):.3f}", flush=True)
            parts = {name: part.state_dict() for name, part in stateful.items()}
            torch.save(parts | {"step": step + 1, "of": options}, state.with_suffix(".part"))
            state.with_suffix(".part").replace(state)


def main() -> None:
    """Draw the scenes, train, measure retrieval and write the weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="file of the weights")
    parser.add_argument("--simple", type=int, default=7000, help="simple scenes per data set")
    parser.add_argument("--window-steps", type=int, default=2000, help="steps on windows")
    parser.add_argument("--scene-steps", type=int, default=2000, help="steps on whole scenes")
    parser.add_argument("--batch", type=int, default=128, help="scenes per step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start, start_commit = time.perf_counter(), commit()
    options.target.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    config = compose_config(["model=tiny"])
    size = config["image_size"]
    clip = build_clip(config["model"]["clip"]).to(memory_format=torch.channels_last)
    scenes = draw_all(options.simple, size)
    held_out = {
        name: [draw(number, name, "val", size) for number in range(spec.splits["val"])]
        for name, spec in SETS.items()
    }
    state = options.target.with_suffix(".resume")
    schedule = Schedule(options.window_steps, options.scene_steps, options.batch, options.seed)
    train(clip, scenes, schedule, state)
    recalls = {
        f"{name}, {n} objects": retrieval(clip, val, n)
        for name, val in held_out.items()
        for n in (1, 2)
    }
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "seed": options.seed,
        "seconds": round(time.perf_counter() - start),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": start_commit,
        "hardware": hardware(),
        "retrieval": recalls,
    }
    scale_sentences(clip, [scene.sentences[0][0] for scene in scenes[:1000]])
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in clip.state_dict().items()
    }
    save_file(weights, options.target, {"pretraining": json.dumps(facts)})
    state.unlink(missing_ok=True)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
