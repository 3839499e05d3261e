"""The paper's results: percentages, parameters in millions, and frames per second on a V100."""

from typing import NamedTuple


class Ablation(NamedTuple):
    """A row of table 1.

    Attributes:
        contrastive: Column "Con.", text-to-pixel contrastive learning.
        layers: Column "n", layers of the decoder; 0 without "Dec.".
        parameters: Column "Params", millions, for RN50.
    """

    contrastive: bool
    layers: int
    parameters: float


TABLE1 = {
    "baseline": Ablation(False, 0, 131.86),
    "con": Ablation(True, 0, 134.22),
    "dec1": Ablation(False, 1, 136.07),
    "con_dec1": Ablation(True, 1, 138.43),
    "con_dec2": Ablation(True, 2, 142.64),
    "con_dec3": Ablation(True, 3, 146.85),
    "con_dec4": Ablation(True, 4, 151.06),
}
"""Rows of table 1 by their names in ``ablation=``."""
TITLES = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "grefcoco": "G-Ref"}
"""The paper's names of its data sets; other data sets keep their names."""
TABLE1_METRICS = ("mIoU", "Pr@50", "Pr@60", "Pr@70", "Pr@80", "Pr@90", "fps")
TABLE1_RESULTS: dict[str, dict[str, tuple[float, ...]]] = {
    "refcoco": {
        "baseline": (62.66, 72.55, 67.29, 59.53, 43.52, 12.72, 27.30),
        "con": (64.64, 74.89, 69.58, 61.70, 45.50, 13.31, 25.79),
        "dec1": (66.31, 77.66, 72.99, 65.67, 48.43, 14.81, 23.02),
        "con_dec1": (68.66, 80.16, 75.72, 68.82, 51.98, 15.94, 22.64),
        "con_dec2": (69.13, 80.96, 76.60, 69.67, 52.23, 16.09, 20.68),
        "con_dec3": (69.52, 81.35, 77.54, 70.79, 52.65, 16.21, 19.22),
    },
    "refcoco+": {
        "baseline": (50.17, 54.55, 47.69, 40.19, 28.75, 8.21, 27.30),
        "con": (53.15, 58.28, 53.74, 46.67, 34.01, 9.30, 25.79),
        "dec1": (54.73, 63.31, 58.89, 52.46, 38.53, 11.70, 23.02),
        "con_dec1": (59.97, 69.19, 64.85, 58.17, 43.47, 13.39, 22.64),
        "con_dec2": (60.75, 70.69, 66.83, 60.74, 45.69, 13.42, 20.68),
        "con_dec3": (61.39, 71.46, 67.82, 61.80, 47.00, 15.02, 19.22),
    },
    "grefcoco": {
        "baseline": (49.24, 53.33, 45.49, 36.58, 23.90, 6.92, 25.72),
        "con": (52.67, 59.27, 52.45, 44.12, 29.53, 8.80, 25.33),
        "dec1": (51.46, 58.68, 53.33, 45.61, 31.78, 10.23, 22.57),
        "con_dec1": (57.82, 66.28, 60.99, 53.21, 38.58, 13.38, 22.34),
        "con_dec2": (58.40, 67.30, 61.72, 54.70, 39.67, 13.40, 20.61),
        "con_dec3": (59.35, 68.93, 63.66, 55.45, 40.67, 14.40, 19.14),
        "con_dec4": (58.79, 67.91, 63.11, 55.43, 39.81, 13.48, 17.84),
    },
}
"""``TABLE1_METRICS`` on val, by data set and row."""
TABLE2_COLUMNS = (
    ("refcoco", "val"),
    ("refcoco", "testA"),
    ("refcoco", "testB"),
    ("refcoco+", "val"),
    ("refcoco+", "testA"),
    ("refcoco+", "testB"),
    ("grefcoco", "val"),
    ("grefcoco", "test"),
)
TABLE2_OTHERS: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("RMI*", "ResNet-101"): (45.18, 45.69, 45.57, 29.86, 30.48, 29.50, None, None),
    ("DMN", "ResNet-101"): (49.78, 54.83, 45.13, 38.88, 44.22, 32.29, None, None),
    ("RRN*", "ResNet-101"): (55.33, 57.26, 53.95, 39.75, 42.15, 36.11, None, None),
    ("MAttNet", "ResNet-101"): (56.51, 62.37, 51.70, 46.67, 52.39, 40.08, 47.64, 48.61),
    ("NMTree", "ResNet-101"): (56.59, 63.02, 52.06, 47.40, 53.01, 41.56, 46.59, 47.88),
    ("CMSA*", "ResNet-101"): (58.32, 60.61, 55.09, 43.76, 47.60, 37.89, None, None),
    ("Lang2Seg", "ResNet-101"): (58.90, 61.77, 53.81, None, None, None, 46.37, 46.95),
    ("BCAN*", "ResNet-101"): (61.35, 63.37, 59.57, 48.57, 52.87, 42.13, None, None),
    ("CMPC*", "ResNet-101"): (61.36, 64.53, 59.64, 49.56, 53.44, 43.23, None, None),
    ("LSCM*", "ResNet-101"): (61.47, 64.99, 59.55, 49.34, 53.12, 43.50, None, None),
    ("MCN", "DarkNet-53"): (62.44, 64.20, 59.71, 50.62, 54.99, 44.69, 49.22, 49.40),
    ("CGAN", "DarkNet-53"): (64.86, 68.04, 62.07, 51.03, 55.51, 44.06, 51.01, 51.69),
    ("EFNet", "ResNet-101"): (62.76, 65.69, 59.67, 51.50, 55.24, 43.01, None, None),
    ("LTS", "DarkNet-53"): (65.43, 67.76, 63.08, 54.21, 58.32, 48.02, 54.40, 54.25),
    ("VLT", "DarkNet-53"): (65.65, 68.29, 62.73, 55.50, 59.20, 49.36, 52.99, 56.65),
}
"""IoU per column by method and backbone. ``*`` marks DenseCRF, None what is not reported."""
TABLE2_CRIS: dict[str, tuple[float, ...]] = {
    "rn50": (69.52, 72.72, 64.70, 61.39, 67.10, 52.48, 59.35, 59.39),
    "rn101": (70.47, 73.18, 66.10, 62.27, 68.08, 53.68, 59.87, 60.36),
}
"""IoU per column of CRIS by backbone."""
