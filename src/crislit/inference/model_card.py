"""The model card (README) of a shared network."""

import json
from typing import Any

from crislit.checkpoints.checkpoint import Checkpoint
from crislit.checkpoints.clip_weights import identify_weights
from crislit.errors import InputError
from crislit.io.assets import shipped_weights

HEADER = """---
{licence}library_name: crislit
pipeline_tag: image-segmentation
tags: [referring-image-segmentation, cris, clip]
---
"""
TEMPLATE = """{header}
# {name}

Referring image segmentation: given a picture and a sentence, the pixels that the sentence means. The network is CRIS
([CLIP-Driven Referring Image Segmentation](https://arxiv.org/abs/2111.15174), CVPR 2022) as implemented by crislit.

## Use

In Python, where crislit is installed:

    import crislit

    segmenter = crislit.Segmenter.from_pretrained("{source}")
    result = segmenter("photo.jpg", ["the man in red"])[0]
    result.mask         # (h, w) bool at the photo's own size

The files are `model.safetensors` and `config.json`: loading them runs no code.

## Measured

{results}

## How it was trained

{recipe}

## Limits

- It reads at most {words} tokens of a sentence, of CLIP's vocabulary, [SOS] and [EOS] included; what is longer is cut, with a
  warning.
- It does not say when a sentence means nothing in the picture.
- Masks are computed at a quarter of {size} pixels: thin and small things are lost.
{data_limits}

## Licence

{licence}
"""
EMBEDDED_LIMITS = """\
- It was trained on English sentences that mean exactly one object of the picture.
- It was trained on drawn scenes of coloured shapes, and knows nothing of photographs: it is for trying the software, for
  examples and for tests."""
REFER_LIMITS = """\
- It was trained on English sentences that mean exactly one object of the picture.
- It inherits the biases of its data, photographs with sentences that crowd workers wrote about them, and of CLIP's. It is not
  for decisions about people."""
CUSTOM_LIMITS = """\
- What its data were is not known here beyond what stands above: whoever publishes it should say whose pictures and sentences
  they are. It inherits their biases, and CLIP's where it started from CLIP. It is not for decisions about people."""
NO_LICENCE = "None is given: ask who published it. crislit's own licence, MIT, is the program's, not the weights'."
COUNTS = ("samples", "empty")
"""Entries of a split's results that are not metrics."""
REQUIRED_KEYS = (
    "dataset.name",
    "image_size",
    "batch_size",
    "seed",
    "recipe.epochs",
    "recipe.optimizer",
)
"""What a card tells of a training."""


def model_card(checkpoint: Checkpoint, name: str, licence: str | None = None) -> str:
    """Write the card of a network.

    Args:
        checkpoint: The network, with its run's configuration and results where they are known.
        name: How it is called, for example its repository on the Hub.
        licence: Of the weights, in the Hub's spelling. None: MIT for what was trained on embedded data alone, else none.

    Raises:
        InputError: If it says something of its training, and not all that the card tells.
    """
    for path in REQUIRED_KEYS if checkpoint.config or checkpoint.results else ():
        found: Any = checkpoint.config
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if found is None:  # somebody's own config.json
            raise InputError(
                f"{checkpoint.source} does not tell enough of its training for a model card: there is no {path}"
            )
    dataset = checkpoint.config.get("dataset", {})
    if dataset.get("embedded"):
        limits = EMBEDDED_LIMITS
        licence = licence or (
            "mit"
            if checkpoint.initial_weights
            in ("random", identify_weights("tiny-clip", shipped_weights()["tiny-clip"]))
            else None
        )
    else:
        limits = REFER_LIMITS if dataset.get("folder") else CUSTOM_LIMITS
    try:
        results = results_table(checkpoint)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{checkpoint.source} has results that no run of crislit left: {error!r:.200}"
        ) from error
    return TEMPLATE.format(
        header=HEADER.strip().format(licence=f"license: {licence}\n" if licence else ""),
        name=name,
        source=name if "/" in name else f"path/to/{name}",
        results=results,
        recipe=training_summary(checkpoint),
        words=checkpoint.network.max_tokens,
        size=checkpoint.image_size,
        data_limits=limits,
        licence=licence or NO_LICENCE,
    )


def results_table(checkpoint: Checkpoint) -> str:
    """Lay a run's results out as Markdown, in percent."""
    results = checkpoint.results
    if not results:
        return "Nothing is recorded with this network: evaluate it (`python -m crislit.evaluate`) before you rely on it."
    blind, ceiling = results.get("blind", {}), results.get("ceiling", {})
    names = [name for name in next(iter(results["splits"].values())) if name not in COUNTS]
    header = ["split", "samples", *names, "blind mIoU", "ceiling mIoU"]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for split, values in results["splits"].items():
        known = [
            f"{100 * table[split]['mIoU']:.2f}" if split in table else "-"
            for table in (blind, ceiling)
        ]
        lines.append(
            [
                split,
                str(values["samples"]),
                *(f"{100 * values[metric]:.2f}" for metric in names),
                *known,
            ]
        )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    measured = (
        f"Data set `{checkpoint.config['dataset']['name']}`, threshold {results['threshold']}, {results['protocol']}; "
        f"commit {results['commit']}, on {results['hardware']}."
    )
    explained = (
        "mIoU is the mean over sentences (the paper's IoU), oIoU total intersection over total union. *Blind* is the same\n"
        "network when sentences change places among a picture's objects, *ceiling* a perfect prediction at its resolution."
    )
    return f"{measured}\n\n{table}\n\n{explained}"


def training_summary(checkpoint: Checkpoint) -> str:
    """Say how a network was trained, as far as it is known."""
    lines = [f"- encoders from: {checkpoint.initial_weights}"]
    config = checkpoint.config
    if checkpoint.steps:
        lines.append(f"- {checkpoint.steps} optimizer steps")
    if config:
        lines += [
            f"- data: `{config['dataset']['name']}`",
            f"- pictures of {config['image_size']} pixels, {config['batch_size']} sentences a step, seed {config['seed']}",
            f"- optimizer: Adam, {config['recipe']['epochs']} epochs, {json.dumps(config['recipe']['optimizer'])}",
        ]
    network = {key: value for key, value in checkpoint.network.to_dict().items() if key != "clip"}
    lines.append(f"- network: {json.dumps(network)}")
    return "\n".join(lines)
