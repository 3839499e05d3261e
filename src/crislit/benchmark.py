"""python -m crislit.benchmark: what the network costs, row by row of table 1."""

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from crislit.config import load_settings
from crislit.errors import one_line_errors
from crislit.models.cris import count_parameters
from crislit.paper import TABLE1
from crislit.train import build_model

BACKBONES = ("rn50", "rn101")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser("python -m crislit.benchmark", description=__doc__)
    parser.add_argument("--parameters", action="store_true", required=True, help="count them, beside the paper's")
    parser.parse_args(arguments)
    with one_line_errors():
        console = Console(width=max(Console().width, 80))
        console.print(parameter_table(count_all()))


def count_all() -> dict[tuple[str, str], int]:
    """Return the parameters of every row of table 1, by (row, backbone), of networks that exist as shapes alone."""
    counts = {}
    for row in TABLE1:
        for backbone in BACKBONES:
            with torch.device("meta"):
                model = build_model(load_settings([f"model={backbone}", f"ablation={row}", "dataset=refcoco"]))
            counts[row, backbone] = count_parameters(model)
    return counts


def parameter_table(counts: dict[tuple[str, str], int]) -> Table:
    """Lay the counts out like table 1, in millions."""
    table = Table(title="Parameters that the optimizer can train, in millions (table 1, which has RN50 only)")
    for column in ("ablation=", "Con.", "Dec.", "RN50", "paper", "difference", "RN101"):
        table.add_column(column, justify="left" if column == "ablation=" else "right", no_wrap=True)
    for name, row in TABLE1.items():
        rn50, rn101 = (counts[name, backbone] / 1e6 for backbone in BACKBONES)
        difference = round(rn50, 2) - row.parameters
        table.add_row(
            name,
            "yes" if row.contrastive else "-",
            f"n={row.layers}" if row.layers else "-",
            f"{rn50:.2f}",
            f"{row.parameters:.2f}",
            f"{difference:+.2f}",
            f"{rn101:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
