"""Trains the towers of ``model=tiny`` as CLIP was: pictures and sentences that belong together are made alike.

The pictures are the training scenes of the three embedded data sets, and simpler ones drawn for this alone: most pictures on
the web show little else than what their captions name, and so do these, with one to three objects. None is of an evaluation
split. Retrieval on val scenes, which the training never saw, is measured at the end.

python scripts/pretrain_tiny_clip.py src/crislit/assets/tiny-clip.safetensors
"""

import argparse
import json
import math
import sys
import time
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
from crislit.transforms.letterbox import letterbox_image, normalise, stack_images
from crislit.transforms.tokenizer import tokenize

FEW = (1, 1, 2, 3)
"""Objects of the simple scenes, in turn."""

SENTENCE_NORM = 0.3
"""Length that a sentence's feature has on average in the file. CLIP compares angles alone; CRIS makes convolutions of these
features, and learns sooner where they start small."""

SIMPLE = 1_000_003
"""Seeds the simple scenes, apart from all data sets' scenes."""

EVERY = 100
"""Steps between two reports, each with a file to go on from."""

Scene = tuple[np.ndarray, list[list[str]]]
"""A picture, and for each described object its sentences."""


def draw(number: int, name: str, split: str, size: int) -> Scene:
    """Return one scene of a data set as the network sees it, (size, size, 3) uint8, and its sentences."""
    image, _, described = make_scene(0, name, split, number)
    return letterbox_image(image, size), [sentences for _, sentences in described]


def draw_simple(number: int, name: str, size: int) -> Scene:
    """Return a scene of few objects, described in the language of a data set; relations need two."""
    spec = SETS[name]
    rng = np.random.default_rng([SIMPLE, list(SETS).index(name), number])
    objects = max(FEW[number % len(FEW)], 2 if spec.style == "relations" else 1)
    while True:
        image, drawn = draw_scene(rng, objects=objects)
        things = [d.seen() for d in drawn]
        said = [describe(rng, things, thing, spec.style, spec.sentences) for thing in things]
        if any(said):
            return letterbox_image(image, size), [sentences for sentences in said if sentences]


def draw_all(simple: int, size: int) -> list[Scene]:
    """Draw every training scene of the three data sets, and so many simple ones in the language of each."""
    scenes: list[Scene] = []
    with ProcessPoolExecutor(2) as pool:
        for name, spec in SETS.items():
            numbers = range(spec.splits["train"])
            work = pool.map(
                partial(draw, name=name, split="train", size=size), numbers, chunksize=50
            )
            scenes += tqdm(
                work, f"drawing training scenes of {name}", total=len(numbers), disable=None
            )
            work = pool.map(partial(draw_simple, name=name, size=size), range(simple), chunksize=50)
            scenes += tqdm(work, f"drawing simple scenes like {name}'s", total=simple, disable=None)
    return scenes


def contrastive_loss(images: Tensor, sentences: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over a batch of pairs: (B, E), (B, E) of unit length, and the temperature's inverse."""
    logits = scale * images @ sentences.T
    pairs = torch.arange(len(logits))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def caption(rng: np.random.Generator, said: list[list[str]]) -> str:
    """Describe one object of a scene or several, in any order."""
    chosen = rng.permutation(len(said))[: int(rng.integers(1, len(said) + 1))]
    return ", ".join(str(rng.choice(said[i])) for i in chosen)


def batch_loss(towers: CLIP, scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    """Return the contrastive loss of some scenes, each with a caption."""
    pictures = normalise(stack_images([image for image, _ in scenes]))
    images = F.normalize(towers.visual(pictures), dim=-1)
    sentences = encode(towers, [caption(rng, said) for _, said in scenes])
    return contrastive_loss(images, sentences, towers.logit_scale.exp().clamp(max=100))


def encode(towers: CLIP, sentences: list[str]) -> Tensor:
    """Return the sentences' features of unit length."""
    return F.normalize(project(towers, sentences), dim=-1)


def project(towers: CLIP, sentences: list[str]) -> Tensor:
    """Return the sentences' features, computed on no more positions than they need."""
    tokens = tokenize(sentences, max_words=len(towers.positional_embedding))
    tokens = tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]
    length = tokens.shape[1]
    x = towers.token_embedding(tokens) + towers.positional_embedding[:length]
    x = towers.ln_final(towers.transformer(x, attn_mask=towers.attn_mask[:length, :length]))
    features: Tensor = x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ towers.text_projection
    return features


@torch.no_grad()
def retrieval(towers: CLIP, scenes: list[Scene], objects: int) -> dict[str, float]:
    """Return how often a scene finds its caption of so many objects, and is found by it, within the first 1, 5 and 10."""
    towers.eval()
    pictures = normalise(stack_images([image for image, _ in scenes]))
    images = F.normalize(torch.cat([towers.visual(part) for part in pictures.split(100)]), dim=-1)
    similar = (
        images
        @ encode(towers, [", ".join(one[0] for one in said[:objects]) for _, said in scenes]).T
    )
    found = {"scenes": float(len(scenes))}
    for way, scores in (("image_to_text", similar), ("text_to_image", similar.T)):
        rank = (scores > scores.diagonal()[:, None]).sum(dim=1)
        found |= {f"{way}_R@{k}": float((rank < k).float().mean()) for k in (1, 5, 10)}
    return found | {f"chance_R@{k}": k / len(scenes) for k in (1, 5, 10)}


@torch.no_grad()
def scale_sentences(towers: CLIP, sentences: list[str]) -> None:
    """Give sentences' features the mean length :data:`SENTENCE_NORM`, which changes no similarity."""
    towers.text_projection.mul_(SENTENCE_NORM / project(towers, sentences).norm(dim=-1).mean())


def train(towers: CLIP, scenes: list[Scene], steps: int, batch: int, seed: int, work: Path) -> None:
    """Train with AdamW and a cosine schedule, and go on from ``work`` where an earlier try was interrupted."""
    decayed = [p for p in towers.parameters() if p.ndim >= 2]
    others = [p for p in towers.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3,
        fused=True,
    )
    rates = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    done = 0
    if work.is_file():
        kept = torch.load(work, weights_only=True)
        if kept["of"] != [steps, batch, seed]:
            raise SystemExit(
                f"error: {work} is of a training with (steps, batch, seed) {kept['of']}; delete it to begin anew"
            )
        towers.load_state_dict(kept["towers"])
        adam.load_state_dict(kept["adam"])
        rates.load_state_dict(kept["rates"])
        done = kept["step"]
    towers.train()
    losses: list[float] = []
    for step in tqdm(range(done, steps), "training", initial=done, total=steps, disable=None):
        rng = np.random.default_rng([seed, step])
        chosen = [scenes[i] for i in rng.choice(len(scenes), size=batch, replace=False)]
        loss = batch_loss(towers, chosen, rng)
        adam.zero_grad()
        loss.backward()
        adam.step()
        rates.step()
        losses.append(loss.item())
        if (step + 1) % EVERY == 0:
            print(f"step {step + 1} of {steps}: loss {np.mean(losses[-EVERY:]):.3f}", flush=True)
            kept = {
                "towers": towers.state_dict(),
                "adam": adam.state_dict(),
                "rates": rates.state_dict(),
                "step": step + 1,
            }
            kept["of"] = [steps, batch, seed]
            torch.save(kept, work.with_suffix(".part"))
            work.with_suffix(".part").replace(work)


def main() -> None:
    """Draw, train, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="the weights' file")
    parser.add_argument(
        "--simple",
        type=int,
        default=7000,
        help="simple scenes in the language of each of the three sets",
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128, help="scenes of a step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start, begun_at = time.perf_counter(), commit()
    options.target.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    settings = compose_config(["model=tiny"])
    size = settings["image_size"]
    towers = build_clip(settings["model"]["clip"])
    towers = towers.to(memory_format=torch.channels_last)
    scenes = draw_all(options.simple, size)
    held_out = {
        name: [draw(number, name, "val", size) for number in range(SETS[name].splits["val"])]
        for name in SETS
    }
    work = options.target.with_suffix(".resume")
    train(towers, scenes, options.steps, options.batch, options.seed, work)
    found = {
        f"{name}, {n} objects": retrieval(towers, val, n)
        for name, val in held_out.items()
        for n in (1, 2)
    }
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "seed": options.seed,
        "seconds": round(time.perf_counter() - start),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": begun_at,
        "hardware": hardware(),
        "retrieval": found,
    }
    scale_sentences(towers, [said[0][0] for _, said in scenes[:1000]])
    weights = {
        name: value.half() if value.is_floating_point() else value
        for name, value in towers.state_dict().items()
    }
    save_file(
        {name: value.contiguous() for name, value in weights.items()},
        options.target,
        {"pretraining": json.dumps(facts)},
    )
    work.unlink(missing_ok=True)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
