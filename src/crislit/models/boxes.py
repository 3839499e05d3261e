"""Boxes of the network that are replaced by other classes (``_target_`` in the configuration).

Symbols: see ``cris.py``.
"""

import importlib
import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crislit.config import TARGET
from crislit.errors import InputError, first_line, require, see
from crislit.models.neck import Maps, Neck, repeat_for_sentences

PROTOCOLS = {
    "neck": "forward(c3, c4, c5, sentence), (B, 8w, H/8, W/8), (B, 16w, H/16, W/16), "
    "(B, E, H/32, W/32) and (B, E) -> (B, D, H/16, W/16)",
    "decoder": "forward(fused, words, padding), (B, D, H/16, W/16), (B, L, D) and (B, L) bool "
    "-> (B, D, H/16, W/16)",
    "image_projector": "forward(fused), (B, D, H/16, W/16) -> (B, D/2, H/4, W/4)",
    "head": "forward(pixels, sentence), (B, D/2, H/4, W/4) and (B, E) -> (B, 1, H/4, W/4)",
}
"""What goes into each box and what comes out."""
OWN = "crislit"
"""The package whose classes every checkpoint may name."""
SENTENCES, TOKENS, CELLS = 2, 3, 4
"""B, L, and H/16 and W/16, of the inputs that a box is tried on."""


class SeparateNeck(Neck):
    """Lets a box replace the neck that knows nothing of images which sentences share.

    Args:
        neck: The box.
    """

    def __init__(self, neck: nn.Module) -> None:
        nn.Module.__init__(self)
        self.box = neck

    def project_maps(self, c3: Tensor, c4: Tensor, c5: Tensor) -> Maps:
        """Return the encoder's maps as they are."""
        return c3, c4, c5

    def fuse(self, maps: Maps, sentence: Tensor, image_indices: Tensor | None = None) -> Tensor:
        """Repeat the maps of images for their sentences, and fuse them: see ``Neck.fuse``."""
        repeated = (repeat_for_sentences(v, len(sentence), image_indices) for v in maps)
        fused: Tensor = self.box(*repeated, sentence)
        return fused


def packages(boxes: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the packages outside crislit whose classes boxes name."""
    return {str(box[TARGET]).partition(".")[0] for box in boxes.values()} - {OWN}


def require_trust(
    boxes: Mapping[str, Mapping[str, Any]], trust: Collection[str], source: str
) -> None:
    """Check that boxes name no class of a package that the caller does not trust.

    Args:
        boxes: See ``CRISConfig.boxes``.
        trust: Trusted packages.
        source: The checkpoint, for the message.

    Raises:
        InputError: If one does. Nothing has been imported then.
    """
    require(
        not isinstance(trust, str) and all(isinstance(name, str) for name in trust),
        f"trust must be a list of packages, got {trust!r}",
    )
    if untrusted := sorted(packages(boxes) - set(trust)):
        named = ", ".join(f"{name}={box[TARGET]}" for name, box in boxes.items())
        raise InputError(
            f"{source} runs code outside crislit ({named}). If you trust it, say so: "
            f"trust=[{','.join(untrusted)}], or --trust {','.join(untrusted)}{see('trust')}"
        )


def build_box(box: str, spec: Mapping[str, Any], sizes: Mapping[str, Any]) -> nn.Module:
    """Build a box that replaces one of crislit's.

    Args:
        box: ``neck``, ``decoder``, ``image_projector`` or ``head``.
        spec: The class under ``_target_``, and arguments.
        sizes: The arguments of crislit's own box. Those that the class takes are passed, unless
            ``spec`` has them.

    Raises:
        InputError: If there is no such class, or it cannot be called with these arguments.
    """
    made = find_class(box, str(spec[TARGET]))
    given = {name: value for name, value in spec.items() if name != TARGET}
    signature = inspect.signature(made)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    taken = {k: v for k, v in sizes.items() if takes_any or k in signature.parameters}
    try:
        signature.bind(**(taken | given))
    except TypeError as error:
        raise InputError(
            f"{box}: {spec[TARGET]}{signature} cannot be called: {error}. It gets its keys of "
            f"{box} and, if it takes them, {', '.join(sizes)}{see('boxes')}"
        ) from error
    module: nn.Module = made(**(taken | given))
    require(
        isinstance(module, nn.Module),
        f"{box}: {spec[TARGET]} must make a torch.nn.Module with {PROTOCOLS[box]}, "
        f"and makes a {type(module).__name__}{see('boxes')}",
    )
    return module


def find_class(box: str, target: str) -> Any:
    """Import the class that a box names.

    Raises:
        InputError: If there is none. Of crislit's own names, only modules of networks are accepted.
    """
    module, _, name = target.rpartition(".")
    expected = f"expected the class of a torch.nn.Module with {PROTOCOLS[box]}"
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, SyntaxError, ValueError) as error:
        raise InputError(
            f"{box}._target_={target} cannot be imported: {first_line(error)}. Modules are found "
            f"in the working directory and among installed packages; {expected}{see('boxes')}"
        ) from error
    is_own = target.startswith(f"{OWN}.")
    is_network = isinstance(found, type) and issubclass(found, nn.Module)
    require(
        callable(found) and (not is_own or is_network),
        f"{box}._target_={target}: {module} has no such class; {expected}{see('boxes')}",
    )
    return found


@torch.no_grad()
def check_boxes(boxes: Iterable[str], model: nn.Module, sizes: Mapping[str, int]) -> None:
    """Try replaced boxes on zeros, and compare the shapes of what they return.

    Args:
        boxes: The boxes that are replaced.
        model: The network.
        sizes: ``c3``, ``c4``, ``embed`` (E), ``width`` (D) and ``text_width`` by name.

    Raises:
        InputError: If one fails or returns something else than a tensor of the expected shape.
    """
    embed, width = sizes["embed"], sizes["width"]
    cells, pixels = (CELLS, CELLS), (4 * CELLS, 4 * CELLS)
    fused, projected = (width, *cells), (width // 2, *pixels)
    c3, c4 = (sizes["c3"], 2 * CELLS, 2 * CELLS), (sizes["c4"], *cells)
    c5 = (embed, CELLS // 2, CELLS // 2)
    shapes: dict[str, tuple[list[tuple[int, ...]], tuple[int, ...]]] = {
        "neck": ([c3, c4, c5, (embed,)], fused),
        "decoder": ([fused, (TOKENS, sizes["text_width"]), (TOKENS,)], fused),
        "image_projector": ([fused], projected),
        "head": ([projected, (embed,)], (1, *pixels)),
    }
    for box in boxes:
        module = getattr(model, box)
        module = module.box if isinstance(module, SeparateNeck) else module
        given = [torch.zeros(SENTENCES, *shape) for shape in shapes[box][0]]
        if box == "decoder":
            given[2] = given[2].bool()
        received = ", ".join(str(tuple(x.shape)) for x in given)
        expected = (SENTENCES, *shapes[box][1])
        was_training = module.training
        try:
            output = module.eval()(*given)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(
                f"{box}: {type(module).__name__} fails on inputs of {received}: "
                f"{first_line(error)}. Expected: {PROTOCOLS[box]}{see('boxes')}"
            ) from error
        finally:
            module.train(was_training)
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        require(
            found == expected,
            f"{box}: {type(module).__name__} returns {found} for inputs of {received}, expected "
            f"{expected}: {PROTOCOLS[box]}{see('boxes')}",
        )
