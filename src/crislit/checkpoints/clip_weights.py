"""CLIP's weights for both encoders: downloads by open_clip, archives by OpenAI, state dicts."""

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
from crislit.errors import InputError, first_line, require, see
from crislit.io import check_names, read_state_dict, sha256, shipped_weights
from crislit.models import CRIS

OPENAI = "openai"
"""Value of ``model.clip_weights`` for the weights that OpenAI published."""
OPENAI_MODELS = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")
"""OpenAI's models with a ResNet, by their names in open_clip."""
NON_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""Entries of archives that are not weights: OpenAI's numbers, a traced text encoder's mask."""


def load_clip_weights(model: CRIS, source: str) -> str:
    """Initialise both encoders from CLIP's weights (section 4.2).

    The text encoder keeps all of CLIP's positions and uses the first L; the pooling keeps its
    native grid and resizes it when it is used. The pooling's shortcut, which CLIP does not have,
    stays as it is. Half precision becomes float32.

    Args:
        model: The network.
        source: ``openai`` for open_clip's download of the network's model; the bare name of weights
            that ship with the package; or a path to OpenAI's TorchScript archive (``RN50.pt``), a
            state dict that PyTorch saved, or safetensors.

    Returns:
        The source and the beginning of its SHA-256, for ``results.json``.

    Raises:
        InputError: If there are no such weights, or they belong to another architecture.
    """
    path = find_weights(model.config.clip, source)
    state = read_clip(path)
    parts = ("image_encoder.", "text_encoder.")
    encoders = {k: v for k, v in model.state_dict().items() if k.startswith(parts)}
    expected = {
        name.removeprefix("backbone."): value
        for name, value in to_released(encoders).items()
        if ".connect." not in name
    }
    stored, built = clip_sizes(state, str(path)), clip_sizes(expected, "the network")
    if stored != built:
        raise InputError(
            f"{path} holds the weights of {describe_clip(stored)}, and the network is built on "
            f"{describe_clip(built)}{see('wrong-clip')}"
        )
    unused = ("num_batches_tracked", "logit_scale")  # may be missing
    state = {name: value for name, value in expected.items() if name.endswith(unused)} | state
    check_names(state, expected, f"{path} is not a complete CLIP")
    model.load_state_dict(
        from_released({f"backbone.{name}": value for name, value in state.items()}), strict=False
    )
    return identify_weights(source, path)


def identify_weights(source: str, path: Path) -> str:
    """Return a network's initial weights as ``results.json`` records them.

    Args:
        source: Their name, such as ``openai`` or ``tiny-clip``.
        path: Their file, of which the first 16 characters of the SHA-256 are added.
    """
    return f"{source} (sha256 {sha256(path)[:16]})"


def find_weights(clip: str | Mapping[str, Any], source: str) -> Path:
    """Return the file of CLIP's weights.

    Args:
        clip: A name of open_clip, or the sizes of a CLIP.
        source: ``model.clip_weights``: ``openai``, the bare name of shipped weights, or a path.

    Raises:
        InputError: If there is none, and it cannot be downloaded.
    """
    path = find_openai(clip) if source == OPENAI else find_weights_file(source)
    require(
        path.is_file(),
        f"no weights at {path}: model.clip_weights is openai, the path of a .pt, .pth or "
        f".safetensors file, or one of the shipped {', '.join(shipped_weights()) or '(none)'}",
    )
    return path


def find_weights_file(source: str) -> Path:
    """Return the file of shipped weights by their bare name, or of any others by their path."""
    return shipped_weights().get(source) or Path(source).expanduser()


def fingerprint_source(source: str | None) -> str | None:
    """Return the SHA-256 of the weights' file, or their name if there is no such file here."""
    if source in (None, OPENAI):
        return source
    path = find_weights_file(str(source))
    return sha256(path) if path.is_file() else str(source)


def read_clip(path: Path) -> dict[str, Tensor]:
    """Read CLIP's state dict, under OpenAI's names.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    if path.is_file() and is_torchscript(path):
        try:
            # TorchScript is deprecated, but OpenAI's files use it.
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                warnings.simplefilter("ignore", DeprecationWarning)
                state = torch.jit.load(path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise InputError(
                f"cannot read {path}: it is a damaged TorchScript archive "
                f"({str(error).strip().splitlines()[0]}){see('wrong-clip')}"
            ) from error
    else:
        state = read_state_dict(path)
    return {name: value for name, value in state.items() if name not in NON_WEIGHTS}


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, which holds code, rather than a state dict."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def find_openai(clip: str | Mapping[str, Any]) -> Path:
    """Return the file of OpenAI's weights for a model.

    Searches the cache of OpenAI's ``clip`` package, then open_clip's. If neither has the file,
    open_clip downloads it.

    Raises:
        InputError: If OpenAI published no such model, or it cannot be downloaded.
    """
    name = clip.removesuffix("-quickgelu") if isinstance(clip, str) else ""
    published = open_clip.get_pretrained_cfg(name, OPENAI)  # empty for an unknown name
    url = published.get("url")
    require(
        url, f"OpenAI published no weights of model.clip={clip}: set model.clip_weights to a path"
    )
    *_, checksum, file_name = url.split("/")
    archive: Path = Path.home() / ".cache" / "clip" / file_name
    if archive.is_file():
        require(
            sha256(archive) == checksum,
            f"{archive} is not OpenAI's file, whose SHA-256 is {checksum}: download it again from "
            f"{url}{see('wrong-clip')}",
        )
        return archive
    repository = published.get("hf_hub", "").rstrip("/")
    for file in (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME) if repository else ():
        cached = huggingface_hub.try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    reason = (
        "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)
    )
    if not reason:
        try:
            return Path(open_clip.download_pretrained(published))
        except (OSError, RuntimeError) as error:
            reason = first_line(error)
    raise InputError(
        f"model.clip_weights=openai needs OpenAI's {name}, which is not on this machine\n"
        f"  and cannot be downloaded: {reason}\n"
        f"  on a machine with a network, download {url}\n"
        f"    (or {HF_SAFE_WEIGHTS_NAME} of {constants.ENDPOINT}/{repository})\n"
        f"  and put it at {archive}\n"
        "    (or anywhere, with model.clip_weights=PATH)\n"
        f"  to train from random weights instead: model.clip_weights=null{see('clip-weights')}"
    )


def unreachable(address: str, seconds: float = 5) -> str:
    """Return why a server does not answer, or an empty string if it does.

    open_clip's own download takes a minute to give up.

    Args:
        address: A URL of the server.
        seconds: How long to wait for the connection and for an answer.
    """
    request = urllib.request.Request(address, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError:
        return ""  # it answers
    except OSError as error:
        return f"{address} does not answer: {error}"
    return ""


def describe_clip(sizes: Mapping[str, Any]) -> str:
    """Return an architecture's sizes in words, with its name if OpenAI published it."""
    vision, text = sizes["vision_cfg"], sizes["text_cfg"]
    details = (
        f"stages {vision['layers']} of width {vision['width']} at {vision['image_size']} pixels, "
        f"embedding {sizes['embed_dim']}, text {text['layers']} layers of width {text['width']}, "
        f"context {text['context_length']}, vocabulary {text['vocab_size']}"
    )
    published = (
        f"CLIP's {name}"
        for name in OPENAI_MODELS
        if _main_sizes(open_clip.get_model_config(name)) == _main_sizes(sizes)
    )
    return f"{next(published, 'a CLIP that OpenAI did not publish')} ({details})"


def _main_sizes(sizes: Mapping[str, Any]) -> tuple[Any, ...]:
    vision, text = sizes["vision_cfg"], sizes["text_cfg"]
    return sizes["embed_dim"], vision["layers"], vision["width"], text["width"]
