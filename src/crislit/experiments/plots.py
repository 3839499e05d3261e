"""Plots of table 1."""

import numpy as np
from matplotlib.figure import Figure

from crislit.experiments.claims import CLAIMS, Differences, evaluate_claims
from crislit.experiments.paper import TABLE1, TABLE1_RESULTS, TITLES
from crislit.experiments.runs import Runs, list_datasets, measure_column

PRECISION_AT = (50, 60, 70, 80, 90)
"""X of Pr@X in percent."""


def plot_layers(runs: Runs, published: bool, paper_rows: bool = False) -> Figure:
    """Plot mIoU against the decoder's layers n, with and without contrastive learning.

    The arguments are those of ``crislit.experiments.tables.table1``.
    """
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, dataset in enumerate(list_datasets(runs, published and paper_rows)):
        color, title = f"C{number}", TITLES.get(dataset, dataset)
        for contrastive, style in ((True, "o-"), (False, "s:")):
            values = {
                row.layers: measure_column(runs.get((dataset, name, "val"), []), "mIoU")
                for name, row in TABLE1.items()
                if row.contrastive == contrastive
            }
            points = [(n, value.mean, value.spread or 0.0) for n, value in values.items() if value]
            if points:
                label = f"{title}, {'with' if contrastive else 'without'} Con."
                n, mean, spread = zip(*points, strict=True)
                axes.errorbar(n, mean, yerr=spread, fmt=style, color=color, capsize=3, label=label)
        if published and dataset in TABLE1_RESULTS:
            paper = {
                TABLE1[name].layers: results[0]
                for name, results in TABLE1_RESULTS[dataset].items()
                if TABLE1[name].contrastive
            }
            n, miou = zip(*paper.items(), strict=True)
            axes.plot(n, miou, "x--", color=color, alpha=0.6, label=f"{title}, the paper")
    axes.set(xlabel="layers of the decoder, n", ylabel="mIoU on val, percent", xticks=range(5))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def plot_claims(runs: Runs) -> Figure:
    """Plot the mean difference and its 95 percent interval for each of the paper's claims."""
    tested = [t for t in evaluate_claims(runs) if t.differences.interval]
    datasets = list(dict.fromkeys(t.dataset for t in tested))
    texts = [claim.text for claim in CLAIMS]
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, dataset in enumerate(datasets):
        whole: dict[str, Differences] = {}
        for test in tested:
            if test.dataset == dataset:
                whole.setdefault(test.claim.text, test.differences)  # its comparisons follow
        heights = [texts.index(text) + 0.2 * (number - (len(datasets) - 1) / 2) for text in whole]
        means = [differences.mean for differences in whole.values()]
        highs = [differences.interval[1] for differences in whole.values() if differences.interval]
        half = np.subtract(highs, means)
        label = f"{TITLES.get(dataset, dataset)}, {len(next(iter(whole.values())).values)} seeds"
        axes.errorbar(means, heights, xerr=half, fmt="o", capsize=3, label=label)
    axes.axvline(0, color="gray", linewidth=1)
    axes.set(xlabel="difference in mIoU on val, points, with its 95 % interval")
    axes.set_yticks(range(len(texts)), texts)
    axes.set_ylim(len(texts) - 0.5, -0.5)
    axes.grid(alpha=0.3)
    if datasets:
        axes.legend(fontsize=8)
    return figure


def plot_precision(runs: Runs, published: bool, paper_rows: bool = False) -> Figure:
    """Plot Pr@X against X for every row of table 1, one panel per data set.

    The arguments are those of ``crislit.experiments.tables.table1``.
    """
    datasets = list_datasets(runs, published and paper_rows)
    figure = Figure(figsize=(4.2 * len(datasets), 3.8), layout="constrained")
    panels = figure.subplots(1, len(datasets), squeeze=False)[0]
    for dataset, axes in zip(datasets, panels, strict=True):
        for number, (name, row) in enumerate(TABLE1.items()):
            color = f"C{number}"
            label = f"{'Con., ' if row.contrastive else ''}n = {row.layers}"
            rows = runs.get((dataset, name, "val"), [])
            values = [measure_column(rows, f"Pr@{x}") for x in PRECISION_AT]
            means = [value.mean for value in values if value]
            if means:
                axes.plot(PRECISION_AT, means, "o-", color=color, label=label)
            if published and name in TABLE1_RESULTS.get(dataset, {}):
                paper, label = TABLE1_RESULTS[dataset][name][1:6], f"{label}, the paper"
                axes.plot(PRECISION_AT, paper, "x--", color=color, alpha=0.6, label=label)
        axes.set_title(TITLES.get(dataset, dataset), fontsize=10)
        axes.set(xlabel="X, percent", ylabel="Pr@X on val, percent", xticks=PRECISION_AT)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure
