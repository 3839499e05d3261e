"""What a trained network is kept in, and how it is read: nothing in it can run code.

A run writes Lightning checkpoints. For everybody else there is a folder with ``model.safetensors`` and ``config.json``.
"""

import errno
import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import crislit
from crislit.errors import InputError, check_whole
from crislit.models.clip_weights import SHIPPED
from crislit.models.cris import CRIS, build_cris
from crislit.models.released import check_finite, check_held, check_names, read_released, read_safetensors, read_torch

KEY = "crislit"
"""Under this key a Lightning checkpoint keeps what :func:`record` returns, and ``config.json`` the version that wrote it."""

LARGEST_INPUT = 2048
"""Pixels of the square input's side; what asks for more would exhaust the memory."""

WEIGHTS, CONFIG = "model.safetensors", "config.json"
GROUPS = {"model", "decoder", "loss", "projector", "recipe", "dataset", "trainer", "callbacks"}
"""Of a run's configuration."""
RESULTS = ("splits", "blind", "ceiling", "threshold", "protocol", "steps", "seed", "commit", "hardware")
"""What a network takes along of its run's ``results.json``."""


@dataclass(frozen=True)
class Checkpoint:
    """A network as training left it.

    Attributes:
        settings: Arguments of :func:`crislit.models.cris.build_cris`.
        weights: The network's state dict.
        image_size: Side of its square input in pixels.
        threshold: Where its probabilities become a mask.
        initial_weights: What its training started from.
        steps: Optimizer steps taken, 0 if unknown.
        config: The configuration of its run, empty if another program trained it.
        results: What its run measured (of ``results.json``: splits, blind, ceiling, ...), empty if unknown.
        source: What an error shall call it.
    """

    settings: dict[str, Any]
    weights: dict[str, Tensor]
    image_size: int
    threshold: float
    initial_weights: str
    steps: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    source: str = "this checkpoint"

    def check(self) -> None:
        """Raise an :class:`InputError` that names the file unless the weights are the network's; takes no memory."""
        blocks = count_layers(self.settings)
        if blocks > len(self.weights):  # before they are built, which may take years
            raise InputError(
                f"{self.source} does not describe a network of crislit: {blocks} layers, {len(self.weights)} tensors"
            )
        check_held(self.weights, self.source)
        check_whole(f"{self.source}: image_size", self.image_size, 32, multiple_of=32, most=LARGEST_INPUT)
        if not 0 <= self.threshold < 1:
            raise InputError(f"{self.source}: threshold must be a number in [0, 1), got {self.threshold}")
        with torch.device("meta"):
            self._network()

    def _network(self) -> CRIS:
        try:
            model = build_cris(**self.settings)
        except Exception as error:  # whatever a stranger's numbers lead PyTorch and open_clip to
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
            raise InputError(f"{self.source} does not describe a network of crislit: {reason}") from error
        expected = model.state_dict()
        weights = {name: v if isinstance(v, Tensor) else torch.zeros(0, device="meta") for name, v in self.weights.items()}
        check_names(weights, expected, f"the weights in {self.source} are not the network's that the checkpoint describes")
        return model

    def build(self) -> CRIS:
        """Build the network and load its weights, in evaluation mode.

        Raises:
            InputError: If the weights are not the network's, or not finite.
        """
        self.check()
        check_finite(self.weights, self.source)
        model = self._network()
        model.load_state_dict(self.weights)
        return model.eval()


def count_layers(settings: Any) -> int:
    """Return how many layers a network's settings ask for, as far as they are numbers."""
    if isinstance(settings, Mapping):
        own = [value for name, value in settings.items() if name in ("layers", "decoder_layers")]
        counts = [n for value in own for n in (value if isinstance(value, list) else [value])]
        return sum(n for n in counts if isinstance(n, int)) + sum(map(count_layers, settings.values()))
    return 0


def mapping(value: Any) -> dict[str, Any]:
    """Return what should be a dictionary.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(value, dict):
        raise TypeError(f"expected a dictionary, found {type(value).__name__}")
    return value


def run_config(value: Any) -> dict[str, Any]:
    """Return what should be a run's configuration, as far as its groups are groups.

    Raises:
        TypeError: If it is none.
    """
    config = mapping(value)
    for group in GROUPS & config.keys():
        if not isinstance(config[group], dict):
            raise TypeError(f"its configuration has {type(config[group]).__name__} for {group}")
    return config


def damage(path: Path) -> str | None:
    """Return what is wrong with a run's checkpoint, by its archive's checksums and by what PyTorch says of it, or None.

    Raises:
        InputError: If the disk does not give it out, which says nothing of the file.
    """
    reason = wrong_checksum(path)
    if reason is None:
        try:
            read_torch(path)
        except InputError as error:
            return str(error.__cause__ or error).splitlines()[0][:200]
    return reason


def wrong_checksum(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's bytes, by the checksums that its archive holds, or None.

    Raises:
        InputError: If the disk does not give it out.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # a place before the file's beginning
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        return str(error)
    except Exception as error:  # zipfile raises whatever damaged bytes lead it to
        return " ".join(str(error).split())[:200] or type(error).__name__
    return f"the checksum of {record} is wrong" if record else None


# -- A run's own --------------------------------------------------------------------------------------------------------------


def record(settings: Mapping[str, Any], config: Mapping[str, Any], initial_weights: str) -> dict[str, Any]:
    """Return what a Lightning checkpoint must keep under :data:`KEY`."""
    return {"settings": dict(settings), "config": dict(config), "initial_weights": initial_weights}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a run's checkpoint, a folder (or its safetensors file) that :func:`write_folder` wrote, or what ships by its name.

    Raises:
        InputError: If there is none, it is damaged, or another program wrote it.
    """
    path = find_shipped(path)
    if path.is_dir() or (path.suffix == ".safetensors" and path.is_file()):
        return _read_folder(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; a run keeps its own under checkpoints/best.ckpt and checkpoints/last.ckpt")
    content = read_torch(path)
    if not isinstance(content, dict) or KEY not in content:
        found = ", ".join(map(str, list(content)[:4])) if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{path} is no checkpoint of crislit: expected the entry {KEY!r}, found {found or 'nothing'}. "
            "`python -m crislit.convert` reads those of the authors' code"
        )
    if zipfile.is_zipfile(path) and (reason := wrong_checksum(path)):
        raise InputError(f"{path} is damaged ({reason}): a run keeps last.ckpt and the one before it, previous.ckpt, too")
    try:
        kept = content[KEY]
        return Checkpoint(
            settings=mapping(kept["settings"]),
            weights={name.removeprefix("model."): v for name, v in content["state_dict"].items() if name.startswith("model.")},
            image_size=int(kept["config"]["image_size"]),
            threshold=float(kept["config"]["threshold"]),
            initial_weights=str(kept["initial_weights"]),
            steps=int(content["global_step"]),
            config=run_config(kept["config"]),
            results=results_beside(path),
            source=str(path),
        )
    except (KeyError, AttributeError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} lacks a part of crislit's checkpoints: {error}") from error


def results_beside(path: Path) -> dict[str, Any]:
    """Return what a run measured with one of its checkpoints, without configuration; empty if that is not known."""
    try:
        file = path.parents[1] / "results.json"
        results = json.loads(file.read_bytes()) if file.is_file() else {}  # a pipe would be waited for
        measured = Path(results["checkpoint"]).name == path.name
        return {name: results[name] for name in RESULTS} if measured else {}
    except (OSError, IndexError, ValueError, KeyError, TypeError, RecursionError):
        return {}


# -- Anybody's ----------------------------------------------------------------------------------------------------------------


def read_any(
    path: Path, max_words: int | None = None, decoder_heads: int | None = None, image_size: int | None = None
) -> Checkpoint:
    """Read a network in any of its forms.

    Args:
        path: A checkpoint of the authors' code, a run's, a folder of :func:`write_folder`, or the bare name of a network that
            ships with the package.
        max_words: For a checkpoint of the authors' code, which does not tell; and so the next two.
        decoder_heads: Attention heads of the decoder.
        image_size: Side of the square input.

    Raises:
        InputError: If it cannot be read, or says itself what is given here.
    """
    told = {"max_words": max_words, "decoder_heads": decoder_heads, "image_size": image_size}
    path = find_shipped(path.expanduser())
    if not path.exists():
        raise InputError(f"no checkpoint at {path}; a run keeps its own under checkpoints/best.ckpt and checkpoints/last.ckpt")
    if is_ours(path):
        given = [name for name, value in told.items() if value is not None]
        if given:
            raise InputError(f"{path} says itself what {', '.join(given)} would; leave it out")
        checkpoint = read_checkpoint(path)
        checkpoint.check()
        return checkpoint
    size = 416 if image_size is None else image_size
    check_whole("image_size", size, 32, multiple_of=32)
    settings, weights = read_released(path, max_words, 8 if decoder_heads is None else decoder_heads)
    return Checkpoint(settings, weights, size, 0.35, initial_weights=f"released checkpoint {path.name}")


def is_ours(path: Path) -> bool:
    """Whether crislit wrote a checkpoint, not the authors' code."""
    if path.is_dir():
        return True
    if path.suffix == ".safetensors":
        if not path.with_name(CONFIG).is_file() or not path.is_file():
            return False
        try:
            with safe_open(path, "pt") as file:
                return not any(name.removeprefix("module.").startswith("backbone.") for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return True  # whose reader says what is wrong
    content = read_torch(path) if path.is_file() else None
    return isinstance(content, dict) and KEY in content


def find_shipped(path: Path) -> Path:
    """Return the folder of a network that ships with the package, where that is what a bare name means.

    Raises:
        InputError: If a bare name is neither a file here nor such a network.
    """
    if path.name != str(path) or path.suffix or path.exists():
        return path
    names = sorted(folder.parent.name for folder in SHIPPED.glob(f"*/{CONFIG}"))
    if path.name not in names:
        raise InputError(f"no network {path.name!r}: neither a file here nor one of the shipped {', '.join(names) or '(none)'}")
    return SHIPPED / path.name


# -- For everybody else -------------------------------------------------------------------------------------------------------


def _read_folder(path: Path) -> Checkpoint:
    weights = path / WEIGHTS if path.is_dir() else path
    config = weights.with_name(CONFIG)
    for file in (weights, config):
        if not file.is_file():
            raise InputError(
                f"{path} is no network of crislit: there is no {file}. `python -m crislit.convert` makes both files"
            )
    try:
        about = json.loads(config.read_bytes())
        return Checkpoint(
            settings=mapping(about["network"]),
            weights=read_safetensors(weights),
            image_size=int(about["image_size"]),
            threshold=float(about["threshold"]),
            initial_weights=str(about["initial_weights"]),
            steps=int(about["steps"]),
            config=run_config(about["training"]),
            results=mapping(about.get("results", {})),  # files of version 0.1 have none
            source=str(path),
        )
    except (KeyError, AttributeError, TypeError, ValueError, OverflowError, RecursionError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{config} does not describe a network of crislit: {error!r}") from error


def write_folder(checkpoint: Checkpoint, target: Path, more: Mapping[str, str] | None = None) -> None:
    """Write a network as safetensors and ``config.json``, all or nothing; the tensors stay bit for bit what they are.

    What would tell where files lie on this machine is left out.

    Args:
        checkpoint: The network.
        target: A folder, or the path of the safetensors file, beside which ``config.json`` goes.
        more: Texts of further files beside them, by name.

    Raises:
        InputError: If one of the files exists, or cannot be written.
    """
    if target.suffix in (".pth", ".pt", ".ckpt", ".bin"):
        raise InputError(f"expected a folder or a .safetensors file, found {target}; --to released writes the authors' format")
    weights = target if target.suffix == ".safetensors" else target / WEIGHTS
    about = {
        KEY: crislit.__version__,
        "network": checkpoint.settings,
        "image_size": checkpoint.image_size,
        "threshold": checkpoint.threshold,
        "initial_weights": last_part(checkpoint.initial_weights),
        "steps": checkpoint.steps,
        "training": without_paths(checkpoint.config),
        "results": checkpoint.results,
    }
    texts = {CONFIG: json.dumps(about, indent=2) + "\n", **(more or {})}
    files: dict[Path, Callable[[Path], Any]] = {weights: lambda part: save_tensors(checkpoint.weights, part)}
    files |= {weights.with_name(name): writes(text) for name, text in texts.items()}
    refuse_existing(*files)
    write_whole(files)


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's configuration without what names places on the machine it ran on."""
    kept = {key: value for key, value in config.items() if key not in ("data_root", "resume", "record")}
    for group, names in (("model", ["clip_weights"]), ("dataset", ["file", "sentences", "images"])):
        if group in kept:
            named = {name: last_part(kept[group][name]) for name in names if kept[group].get(name)}
            kept[group] = kept[group] | named
    return kept


def last_part(text: str) -> str:
    """Return what stands after the folders of a path, and the text itself where it is none."""
    return re.split(r"[/\\]", text)[-1]


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, which knows no strides."""
    path.touch()
    usual = path.stat().st_mode  # save_file makes a file that nobody else may read
    save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}, path)
    path.chmod(usual)


def refuse_existing(*paths: Path) -> None:
    """Raise an :class:`InputError` if a file is there already."""
    for path in paths:
        if path.exists():
            raise InputError(f"{path} exists, and nothing is written over: choose another place")


def writes(text: str) -> Callable[[Path], Any]:
    """Return what writes a text to a path."""
    return lambda path: path.write_text(text, encoding="utf-8")


def write_whole(files: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Make files of one folder, all or none: each under another name, and when all are complete they get their own.

    Args:
        files: What writes each file, given a path.

    Raises:
        InputError: If that fails, for want of space or rights.
    """
    parent = next(iter(files)).parent
    done: list[Path] = []
    path = parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".crislit-") as folder:
            for path, write in files.items():
                write(Path(folder) / path.name)
            for path in files:
                (Path(folder) / path.name).replace(path)
                done.append(path)
    except BaseException as error:
        for path_done in done:
            path_done.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):
            raise InputError(f"cannot write {path}: {error}") from error
        raise
