"""Hostile checkpoints and shared networks."""

import copy
import functools
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import crislit
from crislit.checkpoints.checkpoint import Checkpoint, write_folder
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.models.cris import CRIS
from tests.checkpoints.test_released import SIZES, filled
from tests.commands.test_convert import lightning
from tests.io.hostile.case import MANY, Case, Cases
from tests.io.hostile.images import photo
from tests.io.hostile.pickles import costly_checkpoints
from tests.io.test_pickles import Runs

Content = dict[str, Any]
Change = Callable[[Content], object]
"""Changes weights, or the content of a run's checkpoint, in place."""
INVALID_NETWORK = (
    "does not describe a network|do not fit the network|lacks a part of crislit's|must be (at|a )"
    "|larger than what it holds"
)
DAMAGED = "cannot read .*best.ckpt: it is damaged"


CLIP = SIZES["clip"] | {"text_cfg": SIZES["clip"]["text_cfg"] | {"vocab_size": 49408}}
CONFIG = CRISConfig(**SIZES | {"clip": CLIP})


@functools.cache
def network() -> CRIS:
    """Return a tiny network."""
    return filled(build_cris(CONFIG))


def sizes_with(tower: str, key: str, value: Any) -> dict[str, Any]:
    """Return the network's sizes with one value of an encoder changed."""
    sizes = copy.deepcopy(CONFIG.to_dict())
    sizes["clip"][tower][key] = value
    return sizes


# -- Write and load


def load(source: Path) -> list[Any]:
    """Load a network and use it."""
    segmenter = crislit.load(source, device="cpu")
    assert isinstance(segmenter.model, torch.nn.Module)
    (result,) = segmenter(photo(), "the dog")
    assert np.isfinite(result.probability).all()
    return [segmenter.image_size, len(segmenter.model.state_dict())]


def write_shared(folder: Path, weights: dict[str, Tensor]) -> Path:
    """Write a shared network."""
    checkpoint = Checkpoint(CONFIG, weights, 64, 0.4, "random")
    write_folder(checkpoint, folder / "net")
    return folder / "net"


def load_shared(folder: Path, change: Change | None = None, **config: Any) -> list[Any]:
    """Load a shared network with changed weights and configuration."""
    weights = {name: value.clone() for name, value in network().state_dict().items()}
    if change:
        change(weights)
    path = write_shared(folder, weights) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return load(folder / "net")


def load_safetensors(folder: Path, header: Any, data: bytes, length: int | None) -> list[Any]:
    """Load a shared network whose weights have another header."""
    path = write_shared(folder, dict(network().state_dict())) / "model.safetensors"
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(content) if length is None else length)
    path.write_bytes(size + content + data)
    return load(folder / "net")


def load_run(folder: Path, change: Change, zipped: bool = True) -> list[Any]:
    """Load the changed checkpoint of a run."""
    content = lightning(network())
    change(content)
    torch.save(content, folder / "best.ckpt", _use_new_zipfile_serialization=zipped)
    return load(folder / "best.ckpt")


def load_beside(folder: Path, make: Callable[[Path], object]) -> list[Any]:
    """Load the checkpoint of a run with something else in place of its results."""
    path = folder / "run/checkpoints/best.ckpt"
    path.parent.mkdir(parents=True)
    make(folder / "run/results.json")
    torch.save(lightning(network()), path)
    return load(path)


def load_repacked(
    folder: Path, rewrite: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], object]
) -> list[Any]:
    """Load the checkpoint of a run with every part of its archive rewritten."""
    torch.save(lightning(network()), folder / "valid.ckpt")
    with (
        zipfile.ZipFile(folder / "valid.ckpt") as source,
        zipfile.ZipFile(folder / "best.ckpt", "w") as target,
    ):
        for part in source.infolist():
            rewrite(target, part, source.read(part))
    return load(folder / "best.ckpt")


def load_pickle(folder: Path, content: bytes) -> list[Any]:
    """Load a checkpoint with another pickle."""

    def rewrite(target: zipfile.ZipFile, part: zipfile.ZipInfo, old: bytes) -> None:
        target.writestr(part, content if part.filename.endswith("data.pkl") else old)

    return load_repacked(folder, rewrite)


def inflate(target: zipfile.ZipFile, part: zipfile.ZipInfo, content: bytes) -> None:
    """Write a part, and in place of the pickle 64 MB of zeros, compressed to 64 kB."""
    if part.filename.endswith("data.pkl"):
        target.writestr(part, bytes(2**26), zipfile.ZIP_DEFLATED)
    else:
        target.writestr(part, content)


# -- Changes of weights


def first(weights: Content) -> str:
    """Return the name of the first convolution."""
    return next(name for name, value in weights.items() if value.ndim == 4)


def in_state_dict(change: Change) -> Change:
    """Apply a change of weights to the content of a run's checkpoint."""
    return lambda content: change(content["state_dict"])


def set_number(weights: Content, value: float) -> None:
    """Set one number of a weight."""
    weights[first(weights)][0, 0, 0, 0] = value


def replace_weight(weights: Content, convert: Callable[[Tensor], Tensor]) -> None:
    """Replace a weight by a converted one."""
    weights[first(weights)] = convert(weights[first(weights)])


def expand_all(weights: Content) -> None:
    """Replace all weights by views of the same shape on a single zero."""
    for name, value in weights.items():
        weights[name] = torch.zeros((), dtype=value.dtype).expand(value.shape)


def limit_vocabulary(weights: Content) -> None:
    """Remove all but fifty tokens."""
    name = next(name for name in weights if name.endswith("token_embedding.weight"))
    weights[name] = weights[name][:50].clone()


# -- Cases


def checkpoints() -> Cases:
    """Yield all hostile checkpoints and shared networks."""
    yield Case("shared network, valid", load_shared)
    yield from invalid_weights()
    yield from invalid_sizes()
    yield from invalid_configs()
    yield from invalid_headers()
    yield from invalid_pickles()
    yield from other_checkpoints()


def invalid_weights() -> Cases:
    """Yield weights of wrong names, shapes, types and values."""
    for name, number in {"NaN": math.nan, "infinity": math.inf}.items():
        set_value: Change = partial(set_number, value=number)
        act = partial(load_shared, change=set_value)
        yield Case(f"shared network, weight of {name}", act, error="NaN or infinite")
        act = partial(load_run, change=in_state_dict(set_value))
        yield Case(f"checkpoint, weight of {name}", act, error="NaN or infinite")
    changes: dict[str, Change] = {
        "weight of another shape": lambda w: w.update({first(w): w[first(w)][:1].clone()}),
        "unexpected weight": lambda w: w.update(extra=w[first(w)].clone()),
        "missing weight": lambda w: w.pop(first(w)),
        "no weights": lambda w: w.clear(),
    }
    for name, change in changes.items():
        act = partial(load_shared, change=change)
        yield Case(f"shared network, {name}", act, error="do not fit the network")
        if name != "unexpected weight":
            act = partial(load_run, change=in_state_dict(change))
            yield Case(f"checkpoint, {name}", act, error=INVALID_NETWORK)
    conversions: dict[str, Callable[[Tensor], Tensor]] = {
        "float8": lambda x: x.to(torch.float8_e4m3fn),
        "complex": lambda x: x.to(torch.complex64),
        "boolean": lambda x: x > 0,
        "integer": lambda x: x.long(),
        "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "sparse": lambda x: x.to_sparse(),
        "nested": lambda x: torch.nested.nested_tensor([x]),
        "meta": lambda x: x.to("meta"),
    }
    not_plain = "tensors that are not plain numbers|do not fit the network"
    for name, convert in conversions.items():
        change = partial(replace_weight, convert=convert)
        # Not all versions of safetensors can write the others.
        if name in ("float8", "boolean", "integer"):
            act = partial(load_shared, change=change)
            yield Case(f"shared network, {name} weight", act, error=not_plain)
        act = partial(load_run, change=in_state_dict(change))
        yield Case(f"checkpoint, {name} weight", act, error=not_plain)
    yield Case(
        "shared network, weights of 10^38",
        partial(
            load_shared,
            change=lambda weights: [x.fill_(1e38) for x in weights.values() if x.ndim == 4],
        ),
        error="computes NaN or infinity",
        names_file=False,
    )


def invalid_sizes() -> Cases:
    """Yield sizes of networks that cannot be built."""
    changes: dict[str, dict[str, Any]] = {
        "a billion decoder layers": {"decoder_layers": 10**9},
        "negative number of layers": {"decoder_layers": -1},
        "kernel of 2^40": {"kernel_size": 2**40},
        "width of 2^62": {"neck": [2**62, 32, 24]},
        "width of 10^300": {"neck": [10**300, 32, 24]},
        "dropout of NaN": {"decoder_dropout": math.nan},
        "model on the hub": {"clip": "hf-hub:example/model"},
        "path as a model": {"clip": "../../etc/passwd"},
        "key with a meaning in Python": {"__class__": "os.system"},
        "lists nested a hundred deep": {"clip": json.loads("[" * 100 + "]" * 100)},
    }
    for name, changed in changes.items():
        act = partial(load_shared, network=CONFIG.to_dict() | changed)
        yield Case(f"shared network, {name}", act, error=INVALID_NETWORK)
        act = partial(load_run, change=partial(update, keys=("settings",), changes=changed))
        yield Case(f"checkpoint, {name}", act, error=INVALID_NETWORK)
    towers = {
        "a billion blocks in the image encoder": ("vision_cfg", "layers", [10**9, 1, 1, 1]),
        "images of 2^40": ("vision_cfg", "image_size", 2**40),
        "a billion layers in the text encoder": ("text_cfg", "layers", 10**9),
        "vocabulary of 2^50": ("text_cfg", "vocab_size", 2**50),
        "context of 2^40": ("text_cfg", "context_length", 2**40),
        "text encoder on the hub": ("text_cfg", "hf_model_name", "example/model"),
    }
    for name, tower in towers.items():
        act = partial(load_shared, network=sizes_with(*tower))
        yield Case(f"shared network, {name}", act, error=INVALID_NETWORK)
    fifty = sizes_with("text_cfg", "vocab_size", 50)
    yield Case(
        "shared network, fifty tokens",
        partial(load_shared, change=limit_vocabulary, network=fifty),
        error="knows 50 tokens",
        names_file=False,
    )


def update(content: Content, keys: tuple[str, ...], changes: dict[str, Any]) -> None:
    """Update a dictionary within crislit's entry of a run's checkpoint."""
    part = content["crislit"]
    for key in keys:
        part = part[key]
    part.update(changes)


def invalid_configs() -> Cases:
    """Yield invalid values beside the sizes and the weights."""
    configs: dict[str, dict[str, Any]] = {
        "images of 32 billion pixels": {"image_size": 32 * 10**9},
        "images of 10^300 pixels": {"image_size": 10**300},
        "images of 65 pixels": {"image_size": 65},
        "infinite image size": {"image_size": math.inf},
        "threshold of NaN": {"threshold": math.nan},
        "list as its training": {"training": [1]},
        "string as its results": {"results": "x"},
        "no sizes": {"network": None},
    }
    for name, config in configs.items():
        act = partial(load_shared, **config)
        yield Case(f"shared network, {name}", act, error=INVALID_NETWORK)
    changes: dict[str, Change] = {
        "string as its weights": lambda content: content.update(state_dict="x"),
        "numbers as names": lambda content: content.update(state_dict={1: 2}),
        "string as its configuration": partial(update, keys=(), changes={"config": "x"}),
        "list as its settings": partial(update, keys=(), changes={"settings": []}),
        "infinite number of steps": lambda content: content.update(global_step=math.inf),
        "one number expanded to all weights": in_state_dict(expand_all),
    }
    for name, change in changes.items():
        act = partial(load_run, change=change)
        yield Case(f"checkpoint, {name}", act, error=INVALID_NETWORK)
    for group in ("dataset", "trainer", "recipe"):
        for value in ([1], "x", 7):
            name = f"{value!r} for {group}"
            reason = f"its configuration has {type(value).__name__} for {group}"
            change = partial(update, keys=("config",), changes={group: value})
            act = partial(load_run, change=change)
            error = f"best.ckpt lacks a part of .*{reason}"
            yield Case(f"checkpoint, {name}", act, error=error)
            act = partial(load_shared, training={group: value})
            error = f"config.json does not .*{reason}"
            yield Case(f"shared network, {name}", act, error=error)


def invalid_headers() -> Cases:
    """Yield safetensors files with other headers."""
    tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    outside = {"shape": [2**40], "data_offsets": [0, 2**42]}
    headers: dict[str, tuple[Any, bytes, int | None]] = {
        "header of claimed 2^63 bytes": ({}, b"", 2**63),
        "header of claimed 2^40 bytes": ({}, b"", 2**40),
        "header longer than the file": ({"a": tensor}, b"", 10**6),
        "header that is not JSON": (b"\xff" * 100, b"", None),
        "header of lists nested 100,000 deep": (b'{"a":' + b"[" * MANY, b"", None),
        "tensor outside the file": ({"a": tensor | outside}, bytes(16), None),
        "tensor larger than its bytes": ({"a": tensor | {"shape": [2**40]}}, bytes(16), None),
        "shape that overflows": ({"a": tensor | {"shape": [2**62, 2**62]}}, bytes(16), None),
        "negative shape": ({"a": tensor | {"shape": [-4]}}, bytes(16), None),
        "overlapping tensors": ({"a": tensor, "b": tensor}, bytes(16), None),
        "unknown type": ({"a": tensor | {"dtype": "F7"}}, bytes(16), None),
        "no tensors": ({}, b"", None),
    }
    error = "model.safetensors: it is damaged|/net do not fit the network that it describes"
    for name, (header, data, length) in headers.items():
        act = partial(load_safetensors, header=header, data=data, length=length)
        yield Case(f"safetensors, {name}", act, error=error)


def invalid_pickles() -> Cases:
    """Yield checkpoints that run code, or take years or all memory."""
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    code = {"epoch": Runs(os.system, "touch mark")}
    changes: dict[str, tuple[Change, str]] = {
        "code": (lambda content: content.update(code), r"best\.ckpt: .*it holds posix\.system"),
        "nested tuple as a source": (
            partial(update, keys=(), changes={"initial_weights": nested}),
            DAMAGED,
        ),
        "nested tuple as a setting": (
            partial(update, keys=("settings",), changes={"clip": nested}),
            DAMAGED,
        ),
    }
    for name, (change, error) in changes.items():
        act = partial(load_run, change=change)
        yield Case(f"checkpoint, {name}", act, error=error)
        act = partial(load_run, change=change, zipped=False)
        yield Case(f"checkpoint, {name}, in the old format", act, error=error)
    for name, content in costly_checkpoints().items():
        act = partial(load_pickle, content=content)
        yield Case(f"checkpoint, pickle: {name}", act, error=DAMAGED)


def other_checkpoints() -> Cases:
    """Yield valid checkpoints with unusual entries and neighbors, and other archives."""
    extra = {"extra": [1, "x", None], "loops": {}}
    act = partial(load_run, change=lambda content: content.update(extra))
    yield Case("checkpoint, additional entries", act)
    act = partial(load_run, change=lambda content: content.update(extra), zipped=False)
    yield Case("checkpoint, additional entries, in the old format", act)
    results: dict[str, Callable[[Path], object]] = {
        "lists nested 100,000 deep": lambda path: path.write_text("[" * MANY),
        "a pipe": os.mkfifo,
        "a folder": Path.mkdir,
        "a list": lambda path: path.write_text("[1]"),
    }
    for name, make in results.items():
        yield Case(f"checkpoint, results that are {name}", partial(load_beside, make=make))
    act = partial(load_repacked, rewrite=inflate)
    error = "best.ckpt: .*it is compressed"
    yield Case("checkpoint, archive that inflates", act, error=error)
    act = partial(load_run, change=in_state_dict(add_long_name))
    yield Case("checkpoint, name of 10 MB", act, error="best.ckpt.*kkk")


def add_long_name(weights: Content) -> None:
    """Add a weight with a name of 10 MB."""
    weights["model." + "k" * 10**7] = next(iter(weights.values())).clone()
