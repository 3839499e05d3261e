"""CLIP's weights for both encoders: open_clip's download, OpenAI's archive, a state dict, or safetensors (section 4.2)."""

import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from huggingface_hub import constants
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from torch import Tensor

from crislit.checkpoints.released import clip_sizes, from_released, to_released
from crislit.errors import InputError
from crislit.io.assets import shipped_weights
from crislit.io.files import sha256
from crislit.io.tensors import check_names, read_state_dict
from crislit.models.cris import CRIS

OPENAI = "openai"
NON_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""What archives keep beside the weights: OpenAI's numbers, and the mask of a traced text encoder."""


def load_clip_weights(model: CRIS, source: str) -> str:
    """Start both encoders of a network from CLIP's weights; the pooling's shortcut, which CLIP has not, stays as it is.

    The text encoder keeps all of CLIP's positions and uses the first L; the pooling keeps its native grid and resizes it when
    it is used. Half precision becomes float32.

    Args:
        model: The network.
        source: ``openai`` for open_clip's download of the model that the network was built from; the bare name of weights in
            :data:`SHIPPED`; or a path to OpenAI's TorchScript archive (``RN50.pt``), a state dict that PyTorch saved, or
            safetensors.

    Returns:
        What ``results.json`` shall say: the source, and the beginning of its SHA-256.

    Raises:
        InputError: If there are no such weights, or they are another architecture's.
    """
    path = find_weights(model.config.clip, source)
    state = read_clip(path)
    ours = to_released(
        {
            k: v
            for k, v in model.state_dict().items()
            if k.startswith(("image_encoder.", "text_encoder."))
        }
    )
    wanted = {
        name.removeprefix("backbone."): value
        for name, value in ours.items()
        if ".connect." not in name
    }
    found, built = clip_sizes(state, str(path)), clip_sizes(wanted, "the network")
    if found != built:
        raise InputError(
            f"{path} holds the weights of {describe_clip(found)}, and the network is built on {describe_clip(built)}"
        )
    # What nothing uses may be missing.
    unused = {
        name: value
        for name, value in wanted.items()
        if name.endswith(("num_batches_tracked", "logit_scale"))
    }
    state = unused | state
    check_names(state, wanted, f"{path} is not all of CLIP")
    model.load_state_dict(
        from_released({f"backbone.{name}": value for name, value in state.items()}), strict=False
    )
    return identify_weights(source, path)


def identify_weights(source: str, path: Path) -> str:
    """Return how ``results.json`` says what a network started from."""
    return f"{source} (sha256 {sha256(path)[:16]})"


def find_weights(clip: str | Mapping[str, Any], source: str) -> Path:
    """Return the file of the weights that ``model.clip_weights`` names, for a model.

    Raises:
        InputError: If it is neither here nor within reach.
    """
    path = find_openai(clip) if source == OPENAI else find_weights_file(source)
    if not path.is_file():
        raise InputError(
            f"no weights at {path}: model.clip_weights is openai, the path of a .pt, .pth or .safetensors file, or one of the "
            f"shipped {', '.join(shipped_weights()) or '(none)'}"
        )
    return path


def find_weights_file(source: str) -> Path:
    """Return the file of shipped weights, which are called by a bare name, or of a path."""
    return shipped_weights().get(source) or Path(source).expanduser()


def fingerprint_source(source: str | None) -> str | None:
    """Return what identifies weights on every machine: a file's SHA-256, or their name."""
    if source in (None, OPENAI):
        return source
    path = find_weights_file(str(source))
    return sha256(path) if path.is_file() else str(source)


def read_clip(path: Path) -> dict[str, Tensor]:
    """Read CLIP's state dict, under OpenAI's names.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    if not path.is_file() or not is_torchscript(path):
        state = read_state_dict(path)
    else:
        try:
            with (
                warnings.catch_warnings()
            ):  # PyTorch 2.14 says that TorchScript has no future; OpenAI's files are what they are
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                state = torch.jit.load(path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"cannot read {path}: it is a damaged TorchScript archive ({reason})"
            ) from error
    return {name: value for name, value in state.items() if name not in NON_WEIGHTS}


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, code and all, not a state dict."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def find_openai(clip: str | Mapping[str, Any]) -> Path:
    """Return OpenAI's weights of a model: where OpenAI's own package keeps them, or as open_clip downloads them.

    Raises:
        InputError: If OpenAI published no such model, or it is neither here nor within reach.
    """
    name = clip.removesuffix("-quickgelu") if isinstance(clip, str) else ""
    known = open_clip.get_pretrained_cfg(name, OPENAI) if name else {}
    if not known.get("url"):
        raise InputError(
            f"OpenAI published no weights of model.clip={clip}: set model.clip_weights to a path"
        )
    place: Path = Path.home() / ".cache" / "clip" / known["url"].rsplit("/", 1)[-1]
    if place.is_file():
        expected = known["url"].split("/")[-2]  # OpenAI's addresses hold the checksum
        if sha256(place) != expected:
            raise InputError(
                f"{place} is not OpenAI's file, whose SHA-256 is {expected}: fetch it again from {known['url']}"
            )
        return place
    repository = known.get("hf_hub", "").rstrip("/")
    for file in (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME) if repository else ():
        cached = huggingface_hub.try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(str(cached))
    reason = (
        "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)
    )
    if not reason:
        try:
            return Path(open_clip.download_pretrained(known))
        except (OSError, RuntimeError) as error:
            reason = str(error)
    raise InputError(
        f"model.clip_weights=openai needs OpenAI's {name}, which is not on this machine and cannot be fetched ({reason}). "
        f"Fetch {known['url']} (or {HF_SAFE_WEIGHTS_NAME} of {constants.ENDPOINT}/{repository}) where there is a network, and "
        f"put it at {place}, or anywhere with model.clip_weights=PATH"
    )


def unreachable(address: str, seconds: float = 5) -> str:
    """Return why a server does not answer, or nothing if it does: open_clip's own download takes a minute to find out."""
    try:
        urllib.request.urlopen(
            urllib.request.Request(address, method="HEAD"), timeout=seconds
        ).close()
    except urllib.error.HTTPError:
        return ""  # it answers
    except OSError as error:
        return f"{address} does not answer: {error}"
    return ""


def describe_clip(sizes: Mapping[str, Any]) -> str:
    """Return an architecture's name if it is one of OpenAI's, and what distinguishes it."""
    vision, text = sizes["vision_cfg"], sizes["text_cfg"]
    names = [
        name
        for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")
        if _published(name) == _key(sizes)
    ]
    parts = (
        f"stages {vision['layers']} of width {vision['width']} at {vision['image_size']} pixels, "
        f"embedding {sizes['embed_dim']}, text {text['layers']} layers of width {text['width']}, "
        f"context {text['context_length']}, vocabulary {text['vocab_size']}"
    )
    return (
        f"CLIP's {names[0]} ({parts})" if names else f"a CLIP that OpenAI did not publish ({parts})"
    )


def _published(name: str) -> tuple[Any, ...]:
    config: dict[str, Any] = open_clip.get_model_config(name)
    return _key(config)


def _key(sizes: Mapping[str, Any]) -> tuple[Any, ...]:
    vision = sizes["vision_cfg"]
    return (
        sizes["embed_dim"],
        tuple(vision["layers"]),
        vision["width"],
        sizes["text_cfg"]["width"],
    )
