"""The version, and the configuration: finds ``conf/`` and composes it."""

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
    """Compose a configuration as plain dictionaries and lists, see :func:`load_config`."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(  # type: ignore[return-value]
        load_config(overrides, name), resolve=True
    )
