"""The version, and the configuration: finds ``conf/`` and composes it."""

import functools
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

try:
    VERSION = version("crislit")
except PackageNotFoundError:  # src/ is on the path, and nothing is installed
    VERSION = "0+unknown"


BOXES = ("neck", "decoder", "image_projector", "head")
"""Groups of the network's boxes (figure 3 of the paper) that another class can replace."""
TARGET = "_target_"
"""Key of the class that replaces a box or the loss."""


def config_dir() -> str:
    """Return the absolute path of ``conf/``: inside the wheel, or beside ``src/`` in a checkout."""
    package = Path(__file__).resolve().parent
    folders = (package.parents[1] / "conf", package / "conf")
    for folder in folders:
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(
        f"crislit's configuration is neither at {folders[0]} nor at {folders[1]}: install it again"
    )


@functools.cache
def known_settings(name: str = "train") -> dict[str, Any]:
    """Return every key that a command's configuration files set, as nested dictionaries.

    Args:
        name: ``train`` or ``evaluate``.
    """
    primary = _read_yaml(Path(config_dir(), f"{name}.yaml"))
    known = own_settings(name)
    for group in (next(iter(entry)) for entry in primary["defaults"] if isinstance(entry, dict)):
        for file in sorted(Path(config_dir()).glob(f"{group}/**/*.yaml")):
            known = _merge(known, _read_choice(file, group))
    return known


@functools.cache
def own_settings(name: str = "train") -> dict[str, Any]:
    """Return what a command's primary file sets itself, without its groups."""
    primary = _read_yaml(Path(config_dir(), f"{name}.yaml"))
    return {key: value for key, value in primary.items() if key not in ("defaults", "hydra")}


@functools.cache
def settings_of_choice(group: str, choice: str) -> dict[str, Any]:
    """Return what one file of a group sets, without the files that it includes."""
    return _read_choice(Path(config_dir(), group, f"{choice}.yaml"), group)


def list_choices(group: str) -> list[str]:
    """Return the choices of a group; none if there is no such group."""
    return sorted(path.stem for path in Path(config_dir(), group).glob("*.yaml"))


def _read_yaml(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(file)) or {}  # type: ignore[return-value]


def _read_choice(file: Path, group: str) -> dict[str, Any]:
    content = _read_yaml(file)
    content.pop("defaults", None)
    is_global = "# @package _global_" in file.read_text(encoding="utf-8")
    return content if is_global else {group: content}


def _merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries; a dictionary wins over a single value."""
    merged = dict(first)
    for key, value in second.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            merged[key] = _merge(before, value)
        elif not isinstance(before, dict):
            merged[key] = value
    return merged


def load_config(overrides: Sequence[str] = (), name: str = "train") -> "DictConfig":
    """Compose a command's configuration without running it.

    Args:
        overrides: As on the command line, ``["model=rn101", "decoder.layers=2"]``.
        name: ``train`` or ``evaluate``.
    """
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(config_dir(), version_base="1.3"):
        return compose(name, list(overrides))


def compose_config(overrides: Sequence[str] = (), name: str = "train") -> dict[str, Any]:
    """Compose a configuration as plain dictionaries and lists, see ``load_config``."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(  # type: ignore[return-value]
        load_config(overrides, name), resolve=True
    )
