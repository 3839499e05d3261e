"""The golden network's weights, made from the released names and shapes of its tensors.

The file of weights (8.9 MB) is not part of the project: a rule makes it. NumPy's default generator,
seeded with the CRC-32 of a tensor's name, draws standard normal numbers in float32; the kind of the
tensor decides how they are scaled and shifted. The reference numbers in this folder were computed
with exactly these weights.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent

NUMPY_CHECKSUM = -85.22045
"""Checksum of ``standard_normal(1000)`` in float32, seeded with 0."""
CHECKSUMS = {
    "backbone.logit_scale": 2.65926,
    "backbone.positional_embedding": 2.440922,
    "backbone.text_projection": 42.18668,
    "backbone.token_embedding.weight": -10.64088,
    "backbone.transformer.resblocks.1.attn.in_proj_bias": 1.234186,
    "backbone.visual.attnpool.k_proj.weight": -3.553382,
    "backbone.visual.attnpool.connect.1.running_mean": -2.280832,
    "backbone.visual.conv1.weight": -4.577384,
    "backbone.visual.layer2.1.bn3.weight": 57.08629,
    "backbone.visual.layer4.0.bn1.running_var": 220.5937,
    "decoder.norm.weight": 95.23881,
    "proj.txt.bias": -1.837845,
}
"""Checksums of tensors of every kind."""


class WeightsChangedError(Exception):
    """The weights are not those that the golden numbers were computed with."""


def make_tensor(name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return a tensor of the golden network from its released name and its shape."""
    kind = name.rsplit(".", 1)[-1]
    if kind == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if kind == "logit_scale":
        return np.full(shape, math.log(1 / 0.07), np.float32)

    generator = np.random.default_rng(zlib.crc32(name.encode()))
    noise = np.asarray(generator.standard_normal(shape), np.float32)
    is_norm_weight = kind == "weight" and len(shape) == 1
    if kind == "running_var":
        return 0.5 + abs(noise)
    if is_norm_weight:
        # The last BatchNorm of a residual block is small, so that the blocks do not add up.
        return (0.3 if "bn3" in name else 1.0) + 0.1 * noise
    if kind in ("bias", "in_proj_bias", "running_mean", "positional_embedding"):
        return 0.1 * noise
    if "token_embedding" in name:
        return 0.5 * noise
    if kind == "text_projection":
        scale: float = shape[0] ** -0.5
        return scale * noise

    # Matrices and convolutions: by the number of inputs; the latter with a gain for ReLU.
    gain = 1.4 if len(shape) == 4 else 1.0
    scaled = (gain * noise).astype(np.float64) / math.sqrt(math.prod(shape[1:]))
    return scaled.astype(np.float32)


def make_checkpoint() -> dict[str, npt.NDArray[Any]]:
    """Return all weights by their released names.

    Raises:
        WeightsChangedError: If they are not those of the golden numbers; the message says whether
            NumPy's generator or this file has changed.
    """
    noise = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    if not _has_checksum(noise, NUMPY_CHECKSUM):
        raise WeightsChangedError(
            f"NumPy {np.__version__} draws other random numbers than the version that the golden "
            "numbers were computed with. Check them with an older NumPy"
        )
    shapes = json.loads((FOLDER / "tiny_a.shapes.json").read_text())
    weights = {name: make_tensor(name, tuple(shape)) for name, shape in shapes.items()}
    changed = [
        name for name, expected in CHECKSUMS.items() if not _has_checksum(weights[name], expected)
    ]
    if changed:
        raise WeightsChangedError(
            f"tests/golden/weights.py makes other weights for {', '.join(changed)}, although NumPy "
            "draws the same random numbers. Restore its rule"
        )
    return weights


def write_checkpoint(path: Path) -> Path:
    """Write the weights as the safetensors file that the released network would be read from."""
    save_file(make_checkpoint(), path)
    return path


def _has_checksum(values: npt.NDArray[Any], expected: float) -> bool:
    # A sum weighted by position. Not a hash: the last bit of a number may depend on the machine.
    values = values.ravel().astype(np.float64)
    return math.isclose(values @ np.linspace(1, 2, values.size), expected, rel_tol=1e-4)
