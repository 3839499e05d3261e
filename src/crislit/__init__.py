"""CLIP-driven referring image segmentation (CRIS): segments what a sentence refers to."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from crislit.config import VERSION
from crislit.errors import InputError

if TYPE_CHECKING:
    from crislit.checkpoints.released import load_released
    from crislit.inference.segmentation import Segmentation
    from crislit.inference.segmenter import Segmenter, load
    from crislit.models.cris import CRIS
    from crislit.training.from_python import train_network
    from crislit.transforms.tokenizer import tokenize

__version__ = VERSION
__all__ = [
    "CRIS",
    "InputError",
    "Segmentation",
    "Segmenter",
    "__version__",
    "load",
    "load_released",
    "tokenize",
    "train_network",
]


def import_on_use(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__``, which imports names on first use.

    So importing the package does not take the seconds that some of its modules take. ``dir()`` of
    the package lists its ``__all__``.

    Args:
        package: The package's full name.
        modules: The module of each name, relative to the package.
    """

    def import_name(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    contents = vars(sys.modules[package])
    contents["__dir__"] = lambda: sorted(contents["__all__"])
    return import_name


__getattr__ = import_on_use(
    __name__,
    {
        "CRIS": "models.cris",
        "Segmentation": "inference.segmentation",
        "Segmenter": "inference.segmenter",
        "load": "inference.segmenter",
        "load_released": "checkpoints.released",
        "tokenize": "transforms.tokenizer",
        "train_network": "training.from_python",
    },
)

importlib.import_module("crislit.inference.forks")  # notices forks from now on
