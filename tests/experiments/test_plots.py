"""Plots show the measured and the paper's numbers."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from crislit.experiments.plots import PRECISION_AT, plot_layers, plot_precision
from tests.experiments.measured_runs import group, run


def curves(axes: Axes) -> dict[str, list[list[float]]]:
    """Return the points of each curve by its label."""
    handles, labels = axes.get_legend_handles_labels()
    lines = [getattr(handle, "lines", [handle])[0] for handle in handles]
    points = [line.get_xydata().round(6).tolist() for line in lines]
    return dict(zip(labels, points, strict=True))


def test_the_plot_against_n_shows_means_and_spreads_beside_the_papers() -> None:
    refcoco = ("model=rn50", "dataset=refcoco")
    results = [
        run(*refcoco, "ablation=con", "seed=0", mIoU=0.60),
        run(*refcoco, "ablation=con", "seed=1", mIoU=0.64),
        run(*refcoco, "ablation=con_dec2", mIoU=0.7),
        run(*refcoco, "ablation=dec1", mIoU=0.5),
    ]
    ((_, runs),) = group(*results).items()
    (axes,) = plot_layers(runs, published=True).axes
    drawn = curves(axes)
    assert drawn["RefCOCO, with Con."] == [[0, 62], [2, 70]]
    assert drawn["RefCOCO, without Con."] == [[1, 50]]
    assert drawn["RefCOCO, the paper"] == [[0, 64.64], [1, 68.66], [2, 69.13], [3, 69.52]]
    # The error bars of the first curve.
    bars = next(lines for lines in axes.collections if isinstance(lines, LineCollection))
    spread = 2 * 2**0.5
    ends = np.asarray(bars.get_segments()[0])[:, 1].tolist()
    assert ends == pytest.approx([62 - spread, 62 + spread])


def test_the_plot_of_precision_shows_every_row_beside_the_papers() -> None:
    values = (0.9, 0.8, 0.7, 0.6, 0.1)
    metrics = {f"Pr@{x}": value for x, value in zip(PRECISION_AT, values, strict=True)}
    ((_, runs),) = group(run("model=rn50", "dataset=refcoco", "ablation=con", **metrics)).items()
    assert len(plot_precision(runs, published=True).axes) == 1
    panels = plot_precision(runs, published=True, paper_rows=True).axes
    assert [axes.get_title() for axes in panels] == ["RefCOCO", "RefCOCO+", "G-Ref"]
    drawn = curves(panels[0])
    assert drawn["Con., n = 0"] == [[50, 90], [60, 80], [70, 70], [80, 60], [90, 10]]
    paper = [[50, 74.89], [60, 69.58], [70, 61.7], [80, 45.5], [90, 13.31]]
    assert drawn["Con., n = 0, the paper"] == paper
    assert len(drawn) == 1 + 6, "ours, and the paper's rows"
