"""The model card (README) of a shared network."""

import json
from pathlib import Path
from typing import Any

from crislit.checkpoints import Checkpoint, identify_weights, read_checkpoint
from crislit.errors import InputError, counted, require
from crislit.io import shipped_weights
from crislit.models import packages

TEMPLATE = """---
{license_tag}library_name: crislit
pipeline_tag: image-segmentation
tags: [referring-image-segmentation, cris, clip]
---
# {name}

Referring image segmentation: given an image and a sentence, segments what the sentence refers to.
The network is CRIS
([CLIP-Driven Referring Image Segmentation](https://arxiv.org/abs/2111.15174), CVPR 2022)
as implemented by crislit.

## Use

In Python, with crislit installed:

    import crislit

    segmenter = crislit.Segmenter.from_pretrained("{source}"{trust})
    result = segmenter("photo.jpg", ["the man in red"])[0]
    result.mask         # (h, w) bool at the image's own size

The files are `model.safetensors` and `config.json`. {code}

## Results

{results}

## Training

{recipe}

## Limits

- It reads at most {tokens} tokens of CLIP's vocabulary per sentence, including [SOS] and [EOS].
  Longer sentences are truncated, with a warning.
- It does not detect that a sentence refers to nothing in the image.
- Masks are computed at a quarter of {size} pixels: thin and small objects are lost.
{data_limits}

## License

{license}
"""
EMBEDDED_LIMITS = """\
- It was trained on English sentences that refer to exactly one object of the image.
- It was trained on drawn scenes of colored shapes and knows nothing about photos. It is meant
  for trying the software, for examples and for tests."""
REFER_LIMITS = """\
- It was trained on English sentences that refer to exactly one object of the image.
- It inherits the biases of its data, photos with sentences by crowd workers, and of CLIP.
  Do not use it for decisions about people."""
CUSTOM_LIMITS = """\
- Its training data is unknown beyond what this card says. Whoever publishes it should describe the
  images and sentences.
- It inherits the biases of its data, and of CLIP if it was initialized from CLIP. Do not use it for
  decisions about people."""
NO_LICENSE = (
    "No license is given: ask the publisher. crislit's own license, MIT, covers the program, not "
    "the weights."
)
REQUIRED_KEYS = (
    *("dataset.name", "image_size", "batch_size", "seed", "recipe.epochs", "recipe.optimizer"),
)
"""Entries of a run's configuration that appear in its card."""


def model_card(checkpoint: Checkpoint, name: str, license: str | None = None) -> str:
    """Write the model card of a network.

    Args:
        checkpoint: The network, with its run's configuration and results if they are known.
        name: The network's name, for example its repository on the Hub.
        license: The license of the weights, as the Hub spells it. None: MIT if the network was
            trained on embedded data only, else none.

    Raises:
        InputError: If the configuration or the results are incomplete.
    """
    config, needed = checkpoint.config, sorted(packages(checkpoint.network.boxes))
    if config or checkpoint.results:
        check_config(checkpoint)
    dataset = config.get("dataset", {})
    if dataset.get("embedded"):
        limits = EMBEDDED_LIMITS
        tiny_clip = identify_weights("tiny-clip", shipped_weights()["tiny-clip"])
        shapes_tiny = read_checkpoint(Path("shapes-tiny")).initial_weights
        if checkpoint.initial_weights in ("random", tiny_clip, shapes_tiny):
            license = license or "mit"
    else:
        limits = REFER_LIMITS if dataset.get("folder") else CUSTOM_LIMITS
    try:
        results = results_table(checkpoint)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{checkpoint.source} has results that crislit did not write: {error!r:.200}"
        ) from error
    return TEMPLATE.format(
        license_tag=f"license: {license}\n" if license else "",
        name=name,
        source=name if "/" in name else f"path/to/{name}",
        trust=f", trust={json.dumps(needed)}" if needed else "",
        code=f"Loading them runs the code of {', '.join(needed)}, which must be installed."
        if needed
        else "Loading them runs no code.",
        results=results,
        recipe=training_summary(checkpoint),
        tokens=checkpoint.network.max_tokens,
        size=checkpoint.image_size,
        data_limits=limits,
        license=license or NO_LICENSE,
    )


def check_config(checkpoint: Checkpoint) -> None:
    """Raise an ``InputError`` unless the configuration has all ``REQUIRED_KEYS``."""
    for path in REQUIRED_KEYS:
        value: Any = checkpoint.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        require(
            value is not None,  # a config.json that crislit did not write
            f"{checkpoint.source} does not describe its training well enough for a model card: "
            f"there is no {path}",
        )


def results_table(checkpoint: Checkpoint) -> str:
    """Format a run's results as Markdown, in percent."""
    results = checkpoint.results
    if not results:
        return (
            "No results are stored with this network: evaluate it (`python -m crislit.evaluate`) "
            "before you rely on it."
        )
    metrics = [
        name
        for name in next(iter(results["splits"].values()))
        if name not in ("samples", "empty")  # counts
    ]
    header = ["split", "samples", *metrics, "blind mIoU", "ceiling mIoU"]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    bounds = (results.get("blind", {}), results.get("ceiling", {}))
    for split, values in results["splits"].items():
        scores = [f"{100 * values[metric]:.2f}" for metric in metrics]
        limits = [f"{100 * b[split]['mIoU']:.2f}" if split in b else "-" for b in bounds]
        rows.append([split, str(values["samples"]), *scores, *limits])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"""\
Data set `{checkpoint.config["dataset"]["name"]}`, threshold {results["threshold"]}, \
{results["protocol"]}; commit {results["commit"]}, on {results["hardware"]}.

{table}

mIoU is the mean over sentences (the paper's IoU), oIoU total intersection over total union. *Blind*
is the same network with sentences exchanged among the objects of an image, *ceiling* a perfect
prediction at the network's resolution."""


def training_summary(checkpoint: Checkpoint) -> str:
    """List what is known about a network's training."""
    lines = [f"- encoders from: {checkpoint.initial_weights}"]
    config = checkpoint.config
    if checkpoint.steps:
        lines.append(f"- {counted(checkpoint.steps, 'optimizer step')}")
    if config:
        size, batch_size, recipe = config["image_size"], config["batch_size"], config["recipe"]
        lines += [
            f"- data: `{config['dataset']['name']}`",
            f"- images of {size} pixels, {counted(batch_size, 'sentence')} per step, "
            f"seed {config['seed']}",
            f"- optimizer: Adam, {counted(recipe['epochs'], 'epoch')}, "
            f"{json.dumps(recipe['optimizer'])}",
        ]
    network = {key: value for key, value in checkpoint.network.to_dict().items() if key != "clip"}
    return "\n".join([*lines, f"- network: {json.dumps(network)}"])
