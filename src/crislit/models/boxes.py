"""Boxes of the network that are replaced by other classes (``_target_`` in the configuration).

Symbols: see ``cris.py``.
"""

import importlib
import inspect
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crislit.config import TARGET
from crislit.errors import InputError, first_line, require, see
from crislit.models.neck import Maps, Neck, repeat_for_sentences

if TYPE_CHECKING:
    from crislit.models.cris import CRIS

PROTOCOLS = {
    "neck": "forward(c3, c4, c5, sentence), (B, 8w, H/8, W/8), (B, 16w, H/16, W/16), "
    "(B, E, H/32, W/32) and (B, E) -> (B, D, H/16, W/16)",
    "decoder": "forward(fused, words, padding), (B, D, H/16, W/16), (B, L, text_width) and (B, L) "
    "bool -> (B, D, H/16, W/16)",
    "image_projector": "forward(fused), (B, D, H/16, W/16) -> (B, D/2, H/4, W/4)",
    "head": "forward(pixels, sentence), (B, D/2, H/4, W/4) and (B, E) -> (B, 1, H/4, W/4)",
}
"""What goes into each box and what comes out."""
OWN = {
    f"crislit.models.{name}"
    for name in ("Neck", "Decoder", "ImageProjector", "TextProjector", "PixelClassifier")
}
"""The classes that every checkpoint may name. They get their sizes from the configuration."""


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
        # Copied, because a box may change its input.
        repeated = (repeat_for_sentences(v, len(sentence), image_indices).clone() for v in maps)
        fused: Tensor = self.box(*repeated, sentence)
        return fused


def packages(boxes: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the packages of the classes that boxes name, without crislit's own."""
    targets = (str(box[TARGET]) for box in boxes.values())
    return {target.partition(".")[0] for target in targets if target not in OWN}


def require_trust(
    boxes: Mapping[str, Mapping[str, Any]], trust: Iterable[str], source: str
) -> None:
    """Check that boxes name no class of a package that the caller does not trust.

    Args:
        boxes: See ``CRISConfig.boxes``. Other descriptions of classes fit, too.
        trust: Trusted packages.
        source: The checkpoint, for the message.

    Raises:
        InputError: If one does. Nothing has been imported then.
    """
    require(
        isinstance(trust, (list, tuple, set)) and all(isinstance(name, str) for name in trust),
        f"trust must be a list of packages, got {trust!r:.200}",
    )
    if untrusted := packages(boxes) - set(trust):
        named = [
            f"{name}={box[TARGET]}"
            for name, box in boxes.items()
            if str(box[TARGET]).partition(".")[0] in untrusted
        ]
        needed = ",".join(sorted(untrusted))
        raise InputError(
            f"{source} runs code outside crislit ({', '.join(named)}). If you trust it, say so: "
            f"trust=[{needed}], or --trust {needed}{see('trust')}"
        )


def build_box(box: str, spec: Mapping[str, Any], sizes: Mapping[str, Any]) -> nn.Module:
    """Build a box that replaces one of crislit's.

    Args:
        box: ``neck``, ``decoder``, ``image_projector`` or ``head``.
        spec: The class under ``_target_``, and arguments.
        sizes: The arguments of crislit's own box and others. Those that the class names are
            passed, unless ``spec`` has them.

    Raises:
        InputError: If there is no such class, or it cannot be built with these arguments.
    """
    target = str(spec[TARGET])
    made = find_class(box, target)
    given = {name: value for name, value in spec.items() if name != TARGET}
    require(
        not given or target not in OWN,
        f"{box}: {target} gets its sizes from the configuration: leave out {', '.join(given)}",
    )
    signature = inspect.signature(made)
    taken = {name: value for name, value in sizes.items() if name in signature.parameters}
    try:
        signature.bind(**(taken | given))
    except TypeError as error:
        raise InputError(
            f"{box}: {target}{signature} cannot be called: {error}. It gets its keys of {box} and, "
            f"if it names them, {', '.join(sizes)}{see('boxes')}"
        ) from error
    with errors_of(box, target, "cannot be built"):
        module: nn.Module = made(**(taken | given))
    return module


@contextmanager
def errors_of(box: str, target: str, problem: str) -> Iterator[None]:
    """Turn any error of a class that replaces a box into one line that names its place.

    Raises:
        InputError: In place of the error.
    """
    try:
        yield
    except Exception as error:  # the class may raise anything
        last = traceback.extract_tb(error.__traceback__)[-1]
        file = last.filename.replace("\\", "/").rpartition("/")[2]
        raise InputError(
            f"{box}: {target} {problem}: {type(error).__name__}: {first_line(error)} "
            f"({file}, line {last.lineno}). "
            f"Expected: {PROTOCOLS[box]}{see('boxes')}"
        ) from error


def find_class(box: str, target: str) -> type[nn.Module]:
    """Import the class that a box names.

    Raises:
        InputError: If there is none. Of crislit's own, only ``OWN`` are accepted.
    """
    module, _, name = target.rpartition(".")
    require(
        target in OWN or not target.startswith("crislit."),
        f"{box}._target_={target} is none of crislit's boxes: {', '.join(sorted(OWN))}",
    )
    with errors_of(box, target, "cannot be imported"):
        found = getattr(importlib.import_module(module), name, None)
    require(
        isinstance(found, type) and issubclass(found, nn.Module),
        f"{box}._target_={target}: {module} has no such class; expected the class of a "
        f"torch.nn.Module with {PROTOCOLS[box]}{see('boxes')}",
    )
    return found  # type: ignore[return-value]


@torch.no_grad()
def check_boxes(model: "CRIS", image_size: int) -> None:
    """Try replaced boxes on one sentence and on two, and compare the shapes of what they return.

    Args:
        model: The network.
        image_size: Side of the square input in pixels.

    Raises:
        InputError: If one fails or returns something else than a tensor of the expected shape.
    """
    config, was_training = model.config, model.training
    model.eval()
    maps = model.image_encoder(torch.zeros(2, 3, image_size, image_size))
    words, sentence = model.text_encoder(torch.ones(2, config.max_tokens, dtype=torch.long))
    fused = torch.zeros(2, config.neck[1], *maps[1].shape[-2:])
    projected = torch.zeros(2, config.neck[1] // 2, image_size // 4, image_size // 4)
    shapes = {
        "neck": ([*maps, sentence], fused.shape),
        "decoder": ([fused, words, torch.zeros(words.shape[:2], dtype=torch.bool)], fused.shape),
        "image_projector": ([fused], projected.shape),
        "head": ([projected, sentence], (2, 1, *projected.shape[-2:])),
    }
    for box, spec in config.boxes.items():
        module = getattr(model, box)
        if module is None:  # a decoder of no layers
            continue
        inputs, output_shape = shapes[box]
        for count in (2, 1):
            given = [x[:count].clone() for x in inputs]
            received = ", ".join(str(tuple(x.shape)) for x in given)
            with errors_of(box, str(spec[TARGET]), f"fails on inputs of {received}"):
                output = module(*given)
            expected = (count, *output_shape[1:])
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            require(
                found == expected,
                f"{box}: {spec[TARGET]} returns {found} for inputs of {received}, expected "
                f"{expected}: {PROTOCOLS[box]}{see('boxes')}",
            )
    model.train(was_training)
