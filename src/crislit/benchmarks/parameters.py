"""Parameter counts of table 1's rows."""

import torch
from rich.table import Table

from crislit.benchmarks.inference import build_network
from crislit.experiments.paper import TABLE1
from crislit.models.cris import count_parameters

BACKBONES = ("rn50", "rn101")


def count_table1_parameters() -> dict[tuple[str, str], int]:
    """Return the parameters of every row of table 1 by (row, backbone), without allocating them."""
    counts = {}
    for row in TABLE1:
        for backbone in BACKBONES:
            with torch.device("meta"):
                counts[row, backbone] = count_parameters(build_network(backbone, row))
    return counts


def parameter_table(counts: dict[tuple[str, str], int]) -> Table:
    """Lay the counts out like table 1, in millions."""
    table = Table(title="Trainable parameters in millions (table 1 has RN50 only)")
    for column in ("ablation=", "Con.", "Dec.", "RN50", "paper", "difference", "RN101"):
        table.add_column(column, justify="left" if column == "ablation=" else "right", no_wrap=True)
    for name, row in TABLE1.items():
        rn50, rn101 = (counts[name, backbone] / 1e6 for backbone in BACKBONES)
        table.add_row(
            name,
            "yes" if row.contrastive else "-",
            f"n={row.layers}" if row.layers else "-",
            f"{rn50:.2f}",
            f"{row.parameters:.2f}",
            f"{round(rn50, 2) - row.parameters:+.2f}",
            f"{rn101:.2f}",
        )
    return table
