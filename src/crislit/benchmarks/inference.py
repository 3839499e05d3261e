"""The networks whose inference is measured: the baseline and its faster forms, on one device."""

import copy
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crislit.benchmarks.devices import Precision, compile_forward, computing_in, has_tf32
from crislit.benchmarks.reference import reference_logits
from crislit.checkpoints import Checkpoint, write_folder
from crislit.config import compose_config
from crislit.inference import OnnxNetwork, export_onnx
from crislit.io import EXAMPLES
from crislit.models import CRIS, optimize_for_inference
from crislit.training import build_model

SENTENCES = (
    "the man in red",
    "leftmost dog",
    "woman with an umbrella",
    "second pizza from the right",
    "blue car",
    "the child that is closest to us",
    "a cat on the sofa",
)
"""Sentences about one image; RefCOCO has about seven per image."""
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Images, tokens and image indices to logits, as ``crislit.CRIS.forward``."""
ONE_AT_A_TIME = ("plain", "channels last")
"""Candidates that compute one image and one sentence at a time."""
ACCELERATED: dict[str, tuple[Precision, bool]] = {
    "for inference": ("float32", False),
    "for inference, TF32": ("TF32", False),
    "for inference, float16": ("float16", False),
    "for inference, bfloat16": ("bfloat16", False),
    "for inference, compiled": ("float32", True),
    "for inference, float16, compiled": ("float16", True),
}
"""Forms for inference on an accelerator: their precision, and whether they are compiled."""


@dataclass(frozen=True)
class Candidate:
    """A network that is measured.

    Attributes:
        compute: The network.
        eager: The same network as PyTorch runs it without compiling, by which its operations are
            counted; None for another runtime's.
        precision: What it computes in.
    """

    compute: Network
    eager: Network | None
    precision: Precision = "float32"

    @property
    def is_compiled(self) -> bool:
        """Whether ``torch.compile`` compiles the network."""
        return self.eager is not None and self.compute is not self.eager

    def __call__(self, images: Tensor, tokens: Tensor, image_indices: Tensor) -> Tensor:
        """Compute logits in the candidate's precision."""
        with computing_in(self.precision, images.device):
            return self.compute(images, tokens, image_indices)


def build_network(model: str, row: str = "con_dec3", overrides: Sequence[str] = ()) -> CRIS:
    """Build a network with random weights, on which speed does not depend.

    Args:
        model: ``rn50``, ``rn101`` or ``tiny``.
        row: Row of table 1, as in ``ablation=``.
        overrides: More overrides of the configuration.
    """
    torch.manual_seed(0)
    config = compose_config([f"model={model}", f"ablation={row}", "dataset=refcoco", *overrides])
    return build_model(config).eval()


def all_candidates(
    model: CRIS, device: torch.device, image_size: int, folder: Path, threshold: float = 0.35
) -> dict[str, Candidate]:
    """Return the network in every form that its device can be measured with, the baseline first.

    Args:
        model: The network, on the CPU.
        device: Where it computes.
        image_size: See ``backends``, as the others.
        folder: Where it is exported to.
        threshold: Written into the exports.
    """
    if device.type == "cpu":
        return backends(model, image_size, folder, threshold)
    return accelerated(model, device)


def backends(
    model: CRIS, image_size: int, folder: Path, threshold: float = 0.35
) -> dict[str, Candidate]:
    """Return a network on all backends of a CPU, the baseline first.

    Args:
        model: The network.
        image_size: Side of its input in pixels.
        folder: Where it is exported to, for ONNX Runtime if that is installed.
        threshold: Written into the exports.
    """
    reference, forward = reference_network(model), optimized_copy(model).forward
    optimized, compiled = map(in_channels_last, (forward, compile_forward(forward)))
    candidates = {
        "plain": Candidate(reference, reference),
        "for inference": Candidate(optimized, optimized),
        "for inference, compiled": Candidate(compiled, optimized),
    }
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        print("ONNX Runtime is not installed: not measured", file=sys.stderr)
        return candidates
    checkpoint = Checkpoint(model.config, model.state_dict(), image_size, threshold, "random")
    write_folder(checkpoint, folder / "network")
    for name, calibrate in (("ONNX Runtime", None), ("ONNX Runtime, int8", EXAMPLES)):
        export_onnx(folder / "network", folder / name, calibrate=calibrate)
        candidates[name] = Candidate(OnnxNetwork(folder / name), None)
    return candidates


def accelerated(
    model: CRIS, device: torch.device, without: Collection[str] = ()
) -> dict[str, Candidate]:
    """Return a network in all its forms on an accelerator, the baseline first.

    Args:
        model: The network; it is copied.
        device: Where it computes; may be the CPU.
        without: Names of forms to leave out.
    """
    model = copy.deepcopy(model).to(device)
    reference = reference_network(model)
    fast_layout = copy.deepcopy(model).to(memory_format=torch.channels_last)
    same_steps = in_channels_last(reference_network(fast_layout))
    candidates = {
        "plain": Candidate(reference, reference),
        "channels last": Candidate(same_steps, same_steps),
    }
    forward = optimized_copy(model).forward
    eager = in_channels_last(forward)
    for name, (precision, is_compiled) in ACCELERATED.items():
        if name not in without and (precision != "TF32" or has_tf32(device)):
            compute = in_channels_last(compile_forward(forward)) if is_compiled else eager
            candidates[name] = Candidate(compute, eager, precision)
    return candidates


def optimized_copy(model: CRIS) -> CRIS:
    """Return a copy in the form that crislit.load and evaluation use; it shares no weights."""
    return optimize_for_inference(copy.deepcopy(model).to(memory_format=torch.channels_last))


def in_channels_last(network: Network) -> Network:
    """Return a network whose images are converted to channels last."""
    return lambda images, tokens, image_indices: network(
        images.contiguous(memory_format=torch.channels_last), tokens, image_indices
    )


def reference_network(model: CRIS) -> Network:
    """Return the baseline: one image and one sentence at a time."""

    def compute(images: Tensor, tokens: Tensor, image_indices: Tensor) -> Tensor:
        pairs = zip(image_indices.tolist(), tokens, strict=True)
        return torch.cat([reference_logits(model, images[i, None], row[None]) for i, row in pairs])

    return compute
