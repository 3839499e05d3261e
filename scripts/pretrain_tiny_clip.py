"""Pretrains the encoders of ``model=tiny`` like CLIP, by contrasting images and sentences.

    python scripts/pretrain_tiny_clip.py src/crislit/assets/tiny-clip.safetensors

The images are the training scenes of the three embedded data sets, and simpler ones of one to three
objects: like images on the web, they show little beyond their captions. No scene belongs to an
evaluation split. At the end, retrieval is measured on val scenes.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from crislit.config import compose_config
from crislit.data.expressions import describe
from crislit.data.scenes import draw_scene
from crislit.data.shapes import SETS, make_scene
from crislit.models.build import build_clip
from crislit.training.provenance import commit, hardware
from crislit.transforms.letterbox import letterbox_image, normalize, stack_images
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

Scene = tuple[np.ndarray, list[list[str]]]
"""An image, and the sentences of each described object."""


def draw(number: int, name: str, split: str, size: int) -> Scene:
    """Return a scene of a data set as the network sees it, (size, size, 3) uint8 RGB."""
    image, _, described = make_scene(0, name, split, number)
    return letterbox_image(image, size), [sentences for _, sentences in described]


def draw_simple(number: int, name: str, size: int) -> Scene:
    """Return a scene of few objects, described in the style of a data set."""
    spec = SETS[name]
    rng = np.random.default_rng([SIMPLE_SEED, list(SETS).index(name), number])
    # Relations need two objects.
    objects = max(OBJECTS[number % len(OBJECTS)], 2 if spec.style == "relations" else 1)
    while True:
        image, drawn = draw_scene(rng, objects=objects)
        things = [d.seen() for d in drawn]
        described = [describe(rng, things, thing, spec.style, spec.sentences) for thing in things]
        if any(described):
            return letterbox_image(image, size), [sentences for sentences in described if sentences]


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


def contrastive_loss(images: Tensor, sentences: Tensor, scale: Tensor) -> Tensor:
    """Return CLIP's symmetric cross-entropy over a batch of pairs.

    Args:
        images: (B, E) of unit norm.
        sentences: (B, E) of unit norm.
        scale: Inverse temperature.
    """
    logits = scale * images @ sentences.T
    pairs = torch.arange(len(logits))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def caption(rng: np.random.Generator, described: Sequence[Sequence[str]]) -> str:
    """Describe one or several objects of a scene, in random order."""
    chosen = rng.permutation(len(described))[: int(rng.integers(1, len(described) + 1))]
    return ", ".join(str(rng.choice(described[i])) for i in chosen)


def batch_loss(clip: CLIP, scenes: Sequence[Scene], rng: np.random.Generator) -> Tensor:
    """Return the contrastive loss of some scenes, each with a caption."""
    inputs = normalize(stack_images([image for image, _ in scenes]))
    images = F.normalize(clip.visual(inputs), dim=-1)
    sentences = encode(clip, [caption(rng, described) for _, described in scenes])
    return contrastive_loss(images, sentences, clip.logit_scale.exp().clamp(max=100))


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
    inputs = normalize(stack_images([image for image, _ in scenes]))
    images = F.normalize(
        torch.cat([clip.visual(part) for part in torch.split(inputs, 100)]), dim=-1
    )
    captions = [", ".join(s[0] for s in described[:objects]) for _, described in scenes]
    similarity = images @ encode(clip, captions).T
    recalls = {"scenes": float(len(scenes))}
    for direction, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        rank = (scores > scores.diagonal()[:, None]).sum(dim=1)
        recalls |= {f"{direction}_R@{k}": float((rank < k).float().mean()) for k in (1, 5, 10)}
    return recalls | {f"chance_R@{k}": k / len(scenes) for k in (1, 5, 10)}


@torch.no_grad()
def scale_sentences(clip: CLIP, sentences: Sequence[str]) -> None:
    """Scale sentence features to a mean norm of ``SENTENCE_NORM``; angles stay the same."""
    clip.text_projection.mul_(SENTENCE_NORM / project(clip, sentences).norm(dim=-1).mean())


def train(
    clip: CLIP, scenes: Sequence[Scene], steps: int, batch: int, seed: int, state: Path
) -> None:
    """Train with AdamW and a cosine schedule.

    Args:
        clip: The encoders.
        scenes: Training scenes.
        steps: Number of steps.
        batch: Scenes per step.
        seed: Seed of scenes and captions.
        state: File from which an interrupted training continues.
    """
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
    options, start = [steps, batch, seed], 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        if saved["of"] != options:
            raise SystemExit(
                f"error: {state} is of a training with (steps, batch, seed) {saved['of']}: delete "
                "it to start from the beginning"
            )
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        start = saved["step"]
    clip.train()
    losses: list[float] = []
    for step in tqdm(range(start, steps), "training", initial=start, total=steps, disable=None):
        rng = np.random.default_rng([seed, step])
        chosen = [scenes[i] for i in rng.choice(len(scenes), size=batch, replace=False)]
        loss = batch_loss(clip, chosen, rng)
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
    parser.add_argument("--steps", type=int, default=3000)
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
    train(clip, scenes, options.steps, options.batch, options.seed, state)
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
    scale_sentences(clip, [described[0][0] for _, described in scenes[:1000]])
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in clip.state_dict().items()
    }
    save_file(weights, options.target, {"pretraining": json.dumps(facts)})
    state.unlink(missing_ok=True)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
