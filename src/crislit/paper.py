"""Numbers that the paper prints, to stand beside ours."""

from typing import NamedTuple


class Ablation(NamedTuple):
    """A row of table 1: what the network has, and what that costs on a V100.

    Attributes:
        contrastive: "Con.", text-to-pixel contrastive learning.
        layers: "n", layers of the decoder ("Dec."), 0 for none.
        parameters: "Params" of RN50 in millions.
    """

    contrastive: bool
    layers: int
    parameters: float


TABLE1 = {  # by the name of its configuration, ablation=...
    "baseline": Ablation(False, 0, 131.86),
    "con": Ablation(True, 0, 134.22),
    "dec1": Ablation(False, 1, 136.07),
    "con_dec1": Ablation(True, 1, 138.43),
    "con_dec2": Ablation(True, 2, 142.64),
    "con_dec3": Ablation(True, 3, 146.85),
    "con_dec4": Ablation(True, 4, 151.06),
}
