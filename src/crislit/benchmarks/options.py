"""Options of the benchmark, without the imports of what it measures."""

from dataclasses import dataclass
from pathlib import Path

BACKBONES = ("rn50", "rn101")


@dataclass(frozen=True)
class Options:
    """Options shared by the parts of the benchmark.

    Attributes:
        model: Network whose speed is measured: ``rn50``, ``rn101`` or ``tiny``.
        image_size: Side of its input in pixels.
        rounds: Number of timed runs per candidate.
        checkpoint: Trained network whose backends are compared by mIoU.
        images: Number of images in that comparison.
        data_root: Folder that holds RefCOCO; None draws images of COCO's size.
        device: Where networks compute: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ``xpu``.
    """

    model: str = "rn50"
    image_size: int = 416
    rounds: int = 5
    checkpoint: str = "shapes-tiny"
    images: int = 40
    data_root: Path | None = None
    device: str = "cpu"
