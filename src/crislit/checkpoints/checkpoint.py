"""Saves and loads trained networks. Loading executes code only of packages that are trusted.

A run writes Lightning checkpoints. Networks are shared as a folder with ``model.safetensors`` and
``config.json``.
"""

import json
import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIPTextCfg
from torch import Tensor

from crislit.checkpoints.paths import CONFIG, WEIGHTS, find_network
from crislit.checkpoints.released import parse_released, to_released
from crislit.config import VERSION
from crislit.errors import InputError, check_integer, first_line, require, see
from crislit.io import (
    Writer,
    check_checksums,
    check_finite,
    check_names,
    check_storage,
    read_safetensors,
    read_torch,
    refuse_existing,
    save_tensors,
    text_writer,
    to_state_dict,
    write_files,
)
from crislit.models import CRIS, CRISConfig, build_cris, check_boxes, packages, require_trust

log = logging.getLogger(__name__)
KEY = "crislit"
"""Key of ``checkpoint_metadata`` in Lightning checkpoints, and of the version of crislit in
``config.json``."""
MAX_IMAGE_SIZE = 2048
"""Largest side of the square input in pixels; more would exhaust the memory."""
GROUPS = {"model", "decoder", "loss", "projector", "recipe", "dataset", "trainer", "callbacks"}
"""Groups of a run's configuration."""
RESULTS = (
    *("splits", "blind", "ceiling", "threshold", "protocol", "steps", "seed"),
    *("commit", "hardware"),
)
"""Entries of a run's ``results.json`` that are stored with its network."""
MALFORMED = (KeyError, AttributeError, TypeError, ValueError, OverflowError, RecursionError)
"""Errors raised when content that crislit did not write is parsed."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained network.

    Attributes:
        network: Its sizes.
        weights: Its state dict.
        image_size: Side of its square input in pixels.
        threshold: Probability above which a pixel belongs to the mask.
        initial_weights: What its training started from.
        steps: Optimizer steps taken, 0 if unknown.
        epochs: Epochs completed, 0 if unknown.
        config: The configuration of its run, empty if another program trained it.
        fingerprint: Digests of its run's settings and data, empty if unknown.
        results: What its run measured (``splits``, ``blind``, ``ceiling``, ... of
            ``results.json``), empty if unknown.
        source: Its file, for errors and descriptions.
        trust: Packages outside crislit whose classes its network may have.
    """

    network: CRISConfig
    weights: dict[str, Tensor] = field(repr=False)
    image_size: int
    threshold: float
    initial_weights: str
    steps: int = 0
    epochs: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    source: str = "this checkpoint"
    trust: Sequence[str] = ()

    def check(self) -> None:
        """Check that the weights belong to the network, without allocating the network.

        Raises:
            InputError: If they do not, or the network has a class of a package that is not trusted;
                the message has the file's name.
        """
        require_trust(self.network.boxes, self.trust, self.source)
        check_storage(self.weights, self.source)
        check_integer(
            f"{self.source}: image_size",
            self.image_size,
            minimum=32,
            multiple_of=32,
            maximum=MAX_IMAGE_SIZE,
        )
        require(
            0 <= self.threshold < 1,
            f"{self.source}: threshold must be a number in [0, 1), got {self.threshold}",
        )
        # Trusted classes are built as in training: some cannot be built without numbers.
        with torch.device("cpu" if packages(self.network.boxes) else "meta"):
            self._build_untrained()

    def _build_untrained(self) -> CRIS:
        try:
            model = build_cris(self.network)
            if packages(self.network.boxes):
                check_boxes(model, self.image_size)
        except Exception as error:  # odd sizes raise various types in PyTorch and open_clip
            if isinstance(error, InputError) and self.network.boxes:
                raise  # its message says what is wrong
            raise InputError(
                f"{self.source} does not describe a network of crislit: {first_line(error)}"
            ) from error
        check_names(
            self.weights,
            model.state_dict(),
            f"the weights in {self.source} do not fit the network that it describes",
        )
        return model

    def build(self) -> CRIS:
        """Build the network and load its weights, in evaluation mode.

        Raises:
            InputError: If the weights do not belong to the network, or are not finite.
        """
        self.check()
        check_finite(self.weights, self.source)
        model = self._build_untrained()
        model.load_state_dict(self.weights)
        return model.eval()


# -- Reading


def read_any(
    path: Path,
    max_tokens: int | None = None,
    decoder_heads: int | None = None,
    image_size: int | None = None,
    default_max_tokens: int | None = None,
    trust: Sequence[str] = (),
) -> Checkpoint:
    """Read a network in any of its forms, and check that its weights fit.

    Args:
        path: A run's checkpoint, a folder of ``write_folder``, a checkpoint of the authors'
            code, or the bare name of a network that ships with the package.
        max_tokens: L. This and the next two are only for checkpoints of the authors' code, which do
            not store them.
        decoder_heads: Attention heads of the decoder (default 8).
        image_size: Side of the square input (default 416).
        default_max_tokens: L of a checkpoint of the authors' code; any other stores its own.
        trust: Packages outside crislit whose classes the network may have. Loading runs their code.

    Raises:
        InputError: If it cannot be read, has a class of another package, or stores a value that is
            also given as an argument.
    """
    content = _read(path)
    given = {"max_words": max_tokens, "decoder_heads": decoder_heads, "image_size": image_size}
    if isinstance(content, Checkpoint):
        if names := [name for name, value in given.items() if value is not None]:
            raise InputError(
                f"{path} stores {', '.join(names)} itself; leave it out{see('released-sizes')}"
            )
        content = replace(content, trust=trust)
        content.check()
        return content
    size = 416 if image_size is None else image_size
    check_integer("image_size", size, 32, multiple_of=32)
    network, weights = parse_released(
        to_state_dict(content, str(path)),
        str(path),
        default_max_tokens if max_tokens is None else max_tokens,
        8 if decoder_heads is None else decoder_heads,
    )
    sizes = {
        "--decoder-heads": (decoder_heads, f"{network.decoder_heads} heads in the decoder"),
        "--image-size": (image_size, f"images of {size} pixels"),
        "--max-words": (max_tokens, f"{network.max_tokens} tokens per sentence"),
    }
    warn_of_assumptions(
        path, {option: text for option, (value, text) in sizes.items() if value is None}
    )
    return Checkpoint(
        network, weights, size, 0.35, f"released checkpoint {path.name}", source=str(path)
    )


def warn_of_assumptions(path: Path, assumed: Mapping[str, str]) -> None:
    """Log the sizes of a released network that were assumed.

    Args:
        path: Its file.
        assumed: The sizes in words, by the option of ``crislit.convert`` that sets each of them.
    """
    if assumed:
        log.warning(
            "%s does not store all of its sizes; assumed: %s. For others: "
            "python -m crislit.convert %s FOLDER %s%s",
            path,
            ", ".join(assumed.values()),
            path,
            " ".join(f"{option} N" for option in assumed),
            see("released-sizes"),
        )


def read_checkpoint(path: Path, trust: Sequence[str] = ()) -> Checkpoint:
    """Read a run's checkpoint, a folder of ``write_folder``, or a shipped network by its name.

    Args:
        path: The checkpoint.
        trust: Packages outside crislit whose classes its network may have, once it is built.

    Raises:
        DamagedFileError: If it is damaged.
        InputError: If there is none, or another program wrote it.
    """
    content = _read(path)
    if not isinstance(content, Checkpoint):
        if zipfile.is_zipfile(path):  # a damaged name would look like another program's
            check_checksums(path)
        entries = list(content)[:4] if isinstance(content, dict) else [type(content).__name__]
        raise InputError(
            f"{path} is not a checkpoint of crislit: expected the entry {KEY!r}, found "
            f"{', '.join(map(str, entries)) or 'nothing'}. "
            f"`python -m crislit.convert` reads those of the authors' code{see('keys')}"
        )
    return replace(content, trust=trust)


def _read(path: Path) -> Any:
    """Read a file once: return a ``Checkpoint`` if crislit wrote it, else its content."""
    path = find_network(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return _read_shared(path)
    content = read_torch(path)
    if not isinstance(content, dict) or KEY not in content:
        return content
    if zipfile.is_zipfile(path):  # PyTorch's old format holds no checksums
        check_checksums(path)
    try:
        metadata, state = content[KEY], content["state_dict"]
        return Checkpoint(
            network=CRISConfig.from_dict(require_dict(metadata["settings"])),
            weights={
                name.removeprefix("model."): value
                for name, value in state.items()
                if name.startswith("model.")
            },
            image_size=int(metadata["config"]["image_size"]),
            threshold=float(metadata["config"]["threshold"]),
            initial_weights=str(metadata["initial_weights"]),
            steps=int(content["global_step"]),
            epochs=int(content["epoch"]),
            config=require_run_config(metadata["config"]),
            # Absent in version 0.1.
            fingerprint=require_dict(metadata.get("fingerprint", {})),
            results=results_beside(path),
            source=str(path),
        )
    except MALFORMED as error:
        raise InputError(f"{path} lacks a part of crislit's checkpoints: {error}") from error


def _read_shared(path: Path) -> Any:
    """Read safetensors and the ``config.json`` beside them; without it, return the tensors.

    Args:
        path: The safetensors file, or a folder with both files.
    """
    weights = path / WEIGHTS if path.is_dir() else path
    config = weights.with_name(CONFIG)
    for file in (weights, config):
        require(
            path.is_file() or file.is_file(),
            f"{path} is not a network of crislit: there is no {file}. "
            "`python -m crislit.convert` makes both files",
        )
    tensors = read_safetensors(weights)
    is_released = any(name.removeprefix("module.").startswith("backbone.") for name in tensors)
    if not config.is_file() or is_released:
        return tensors
    try:
        stored = json.loads(config.read_bytes())
        return Checkpoint(
            network=CRISConfig.from_dict(require_dict(stored["network"])),
            weights=tensors,
            image_size=int(stored["image_size"]),
            threshold=float(stored["threshold"]),
            initial_weights=str(stored["initial_weights"]),
            steps=int(stored["steps"]),
            config=require_run_config(stored["training"]),
            results=require_dict(stored.get("results", {})),  # absent in version 0.1
            source=str(path),
        )
    except (*MALFORMED, OSError) as error:
        reason = str(error) if isinstance(error, InputError) else repr(error)
        raise InputError(f"{config} does not describe a network of crislit: {reason}") from error


def require_dict(value: Any) -> dict[str, Any]:
    """Return the value if it is a dictionary; raise a TypeError otherwise."""
    if not isinstance(value, dict):
        raise TypeError(f"expected a dictionary, found {type(value).__name__}")
    return value


def require_run_config(value: Any) -> dict[str, Any]:
    """Return a run's configuration; raise a TypeError if it or a group is not a dictionary."""
    config = require_dict(value)
    for group in GROUPS & config.keys():
        if not isinstance(config[group], dict):
            raise TypeError(f"its configuration has {type(config[group]).__name__} for {group}")
    return config


def results_beside(path: Path) -> dict[str, Any]:
    """Return the results that a run measured with this checkpoint, empty if there are none."""
    try:
        file = path.parents[1] / "results.json"
        results = json.loads(file.read_bytes()) if file.is_file() else {}
        is_of_this = Path(results["checkpoint"]).name == path.name
        if not is_of_this:
            return {}
        data = {name: results[name] for name in ("data",) if name in results}  # not in version 0.1
        return {name: results[name] for name in RESULTS} | data
    except (OSError, IndexError, ValueError, KeyError, TypeError, RecursionError):
        return {}


# -- Writing


def checkpoint_metadata(
    network: CRISConfig,
    config: Mapping[str, Any],
    initial_weights: str,
    fingerprint: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what a Lightning checkpoint stores under ``KEY``.

    Args:
        network: The sizes of the network.
        config: The configuration of the run.
        initial_weights: The origin of the initial weights, such as ``random``.
        fingerprint: Digests of the run's settings and data, if known.
    """
    return {
        "settings": network.to_dict(),
        "config": dict(config),
        "initial_weights": initial_weights,
        "fingerprint": dict(fingerprint or {}),
    }


def write_folder(
    checkpoint: Checkpoint, target: Path, texts: Mapping[str, str] | None = None
) -> None:
    """Write a network as safetensors and ``config.json``, both or none; weights keep every bit.

    Paths of this machine are left out.

    Args:
        checkpoint: The network.
        target: A folder, or the path of the safetensors file, beside which ``config.json`` goes.
        texts: Content of further text files beside them, by name.

    Raises:
        InputError: If a file exists or cannot be written.
    """
    require(
        target.suffix not in (".pth", ".pt", ".ckpt", ".bin"),
        f"expected a folder or a .safetensors file, found {target}; --to released writes the "
        "authors' format",
    )
    weights = target if target.suffix == ".safetensors" else target / WEIGHTS
    stored = {
        KEY: VERSION,
        "network": checkpoint.network.to_dict(),
        "image_size": checkpoint.image_size,
        "threshold": checkpoint.threshold,
        "initial_weights": strip_folders(checkpoint.initial_weights),
        "steps": checkpoint.steps,
        "training": without_paths(checkpoint.config),
        "results": checkpoint.results,
    }
    files: dict[Path, Writer] = {
        weights: lambda part: save_tensors(checkpoint.weights, part),
        weights.with_name(CONFIG): text_writer(json.dumps(stored, indent=2) + "\n"),
        **{weights.with_name(name): text_writer(text) for name, text in (texts or {}).items()},
    }
    refuse_existing(*files)
    write_files(files)


def write_released(checkpoint: Checkpoint, target: Path) -> None:
    """Write weights as the authors' programs read them.

    Args:
        checkpoint: The network. Only its weights are written.
        target: A .pth or .pt file, whose names get the prefix ``module.``, or a .safetensors file.
            It must not exist.

    Raises:
        InputError: If the released format cannot hold the network, or the file cannot be written.
    """
    require(
        target.suffix in (".pth", ".pt", ".safetensors"),
        f"the released format is a .pth, .pt or .safetensors file, and {target} is not",
    )
    replaced = ", ".join(f"{box}={x['_target_']}" for box, x in checkpoint.network.boxes.items())
    require(
        not replaced,
        f"the released format cannot hold {replaced}: leave out --to released, which writes "
        "crislit's own",
    )
    state = to_released(checkpoint.weights)
    check_head_widths(checkpoint.network.clip)
    refuse_existing(target)
    if target.suffix == ".safetensors":
        write_files({target: lambda part: save_tensors(state, part)})
    else:
        content = {"state_dict": {f"module.{name}": x.contiguous() for name, x in state.items()}}
        write_files({target: lambda part: torch.save(content, part)})


def check_head_widths(clip: str | Mapping[str, Any]) -> None:
    """Raise an ``InputError`` unless attention heads have 64 channels, as in released ones."""
    if isinstance(clip, str):
        return
    text = clip["text_cfg"]
    heads = text.get("heads", CLIPTextCfg.heads)
    expected = max(text.get("width", CLIPTextCfg.width) // 64, 1)
    require(
        heads == expected,
        f"the released format cannot hold {heads} head{'s' * (heads != 1)} in the text encoder, "
        f"only {expected} of 64 channels each",
    )
    require(
        clip["vision_cfg"].get("head_width", 64) == 64,
        "the released format cannot hold pooling heads of other than 64 channels",
    )


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's configuration without the paths of the machine it ran on."""
    public = {k: v for k, v in config.items() if k not in ("data_root", "resume", "record")}
    if public.get("init_from"):
        public["init_from"] = strip_folders(public["init_from"])
    for group, names in (("model", ["clip_weights"]), ("dataset", ["file", "sentences", "images"])):
        if group in public:
            paths = {name: public[group][name] for name in names if public[group].get(name)}
            public[group] = public[group] | {k: strip_folders(v) for k, v in paths.items()}
    return public


def strip_folders(text: str) -> str:
    """Return the last part of a path, also after ``init_from=``, and any other text as it is."""
    return re.sub(r"^(init_from=)?.*[/\\]", r"\1", text, flags=re.DOTALL)
