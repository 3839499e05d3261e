"""CLIP-driven referring image segmentation (CRIS): segments what a sentence refers to."""

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from crislit.config import VERSION

if TYPE_CHECKING:
    from crislit.checkpoints.released import load_released
    from crislit.inference.segmenter import Segmenter, load
    from crislit.models.cris import CRIS
    from crislit.transforms.tokenizer import tokenize

__version__ = VERSION
__all__ = ["CRIS", "Segmenter", "__version__", "load", "load_released", "tokenize"]


def import_on_use(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__``, which imports names on first use.

    So importing the package does not take the seconds that some of its modules take.

    Args:
        package: The package's full name.
        modules: The module of each name, relative to the package.
    """

    def import_name(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return import_name


__getattr__ = import_on_use(
    __name__,
    {
        "CRIS": "models.cris",
        "Segmenter": "inference.segmenter",
        "load": "inference.segmenter",
        "load_released": "checkpoints.released",
        "tokenize": "transforms.tokenizer",
    },
)
