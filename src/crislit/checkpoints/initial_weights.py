"""Starts a training from a trained network instead of from CLIP (``init_from``)."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from crislit.checkpoints.checkpoint import read_any
from crislit.checkpoints.clip_weights import identify_weights
from crislit.checkpoints.paths import WEIGHTS, find_network
from crislit.config import list_choices, settings_of_choice
from crislit.errors import InputError, require, see
from crislit.io import check_finite, sha256
from crislit.models import CRIS

log = logging.getLogger(__name__)

ENCODERS = ("image_encoder.", "text_encoder.")


def find_start(source: str) -> Path:
    """Return the file of a network's weights.

    Args:
        source: A checkpoint, a folder or safetensors file of ``crislit.convert``, a ``.pth`` of the
            authors' code, or the name of a shipped network.

    Raises:
        InputError: If there is none.
    """
    try:
        path = find_network(Path(source))
    except InputError as error:
        raise InputError(f"init_from={source}: {error}") from error
    file = path / WEIGHTS if path.is_dir() else path
    require(file.is_file(), f"init_from={source}: {file} does not exist")
    return file


def fingerprint_start(source: str) -> str:
    """Return the SHA-256 of the network's file, or its name if there is no such file here."""
    try:
        return sha256(find_start(source))
    except InputError:  # evaluating a network does not need what its training started from
        return source


def load_start(model: CRIS, source: str, max_tokens: int, trust: Sequence[str] = ()) -> str:
    """Load all weights that fit from a trained network, and log which do not.

    Both encoders must fit. Other parts may differ in depth or size and then keep their random
    weights.

    Args:
        model: The network.
        source: See ``find_start``.
        max_tokens: L, tokens per sentence of a ``.pth`` of the authors' code.
        trust: Packages outside crislit whose classes the trained network may have.

    Returns:
        The source and the beginning of its SHA-256, for ``results.json``.

    Raises:
        InputError: If there is no such network, or its encoders are others.
    """
    file = find_start(source)
    start = read_any(
        Path(source).expanduser(),
        default_max_tokens=max_tokens,
        trust=trust,
    )
    check_finite(start.weights, str(file))
    expected = model.state_dict()
    fitting = {
        name: weights
        for name, weights in start.weights.items()
        if name in expected and weights.shape == expected[name].shape
    }
    encoders = {name for name in expected if name.startswith(ENCODERS)}
    require(
        encoders <= fitting.keys(),
        f"init_from={source} has other encoders than this run ({describe(start.network.clip)}, "
        f"not {describe(model.config.clip)}): {advise(start.network.clip)}{see('other-encoders')}",
    )
    heads = start.network.decoder_heads
    require(
        # A file of the authors' code does not store its number.
        heads == model.config.decoder_heads or start.initial_weights.startswith("released"),
        f"init_from={source} was trained with decoder.heads={heads}, not "
        f"{model.config.decoder_heads}: set decoder.heads={heads}",
    )
    model.load_state_dict(fitting, strict=False)
    log.info("starting from %s: %d of %d weights fit", source, len(fitting), len(expected))
    for text, names in (
        ("these start from random weights", expected.keys() - fitting.keys()),
        ("these are not used", start.weights.keys() - fitting.keys()),
    ):
        if names:
            log.info("init_from: %s: %s", text, summarize_names(names))
    return identify_weights(f"init_from={source}", file)


def describe(clip: object) -> str:
    """Return the name of CLIP's model, or that it has none."""
    return clip if isinstance(clip, str) else find_choice(clip) or "a CLIP without a name"


def advise(clip: object) -> str:
    """Return which model a run that starts from a network with these encoders needs."""
    choice = find_choice(clip)
    return f"choose {choice}" if choice else "choose the model that it was trained with"


def find_choice(clip: object) -> str | None:
    """Return the choice of ``model=`` that has these encoders, if any."""
    return next(
        (
            f"model={choice}"
            for choice in list_choices("model")
            if settings_of_choice("model", choice)["model"]["clip"] == clip
        ),
        None,
    )


def summarize_names(names: Iterable[str]) -> str:
    """Return the parts of the network that weights belong to, with their numbers."""
    parts = Counter(".".join(name.split(".")[:3]) for name in names)
    return ", ".join(f"{part} ({count})" for part, count in sorted(parts.items()))
