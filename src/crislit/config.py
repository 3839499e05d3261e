"""Finds ``conf/`` and composes configurations."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig


def config_dir() -> str:
    """Return the absolute path of ``conf/``: inside the wheel, or beside ``src/`` in a checkout or an editable install."""
    here = Path(__file__).resolve().parent
    for folder in (here.parents[1] / "conf", here / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(
        f"crislit's configuration is neither at {here.parents[1] / 'conf'} nor at {here / 'conf'}; install it again"
    )


def load_config(overrides: Sequence[str] = (), name: str = "train") -> "DictConfig":
    """Compose a program's configuration without running it, for tests and notebooks.

    Args:
        overrides: As on the command line, ``["model=rn101", "decoder.layers=2"]``.
        name: ``train`` or ``evaluate``.
    """
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(config_dir(), version_base="1.3"):
        return compose(name, list(overrides))


def compose_config(overrides: Sequence[str] = (), name: str = "train") -> dict[str, Any]:
    """Compose a program's configuration as plain dictionaries and lists, interpolations resolved; see :func:`load_config`."""
    from omegaconf import OmegaConf

    settings: dict[str, Any] = OmegaConf.to_container(load_config(overrides, name), resolve=True)  # type: ignore[assignment]
    return settings
