"""Parameter counts of table 1's rows."""

import torch
from rich.table import Column, Table

from crislit.benchmarks.inference import build_network
from crislit.benchmarks.options import BACKBONES
from crislit.experiments import TABLE1
from crislit.models import count_parameters


def count_table1_parameters() -> dict[tuple[str, str], int]:
    """Return the parameters of every row of table 1 by (row, backbone), without allocating them."""
    with torch.device("meta"):
        return {
            (row, backbone): count_parameters(build_network(backbone, row))
            for row in TABLE1
            for backbone in BACKBONES
        }


def parameter_table(counts: dict[tuple[str, str], int]) -> Table:
    """Lay the counts out like table 1, in millions."""
    columns = [
        Column(name, justify="left" if name == "ablation=" else "right", no_wrap=True)
        for name in ("ablation=", "Con.", "Dec.", "RN50", "paper", "difference", "RN101")
    ]
    table = Table(*columns, title="Trainable parameters in millions (table 1 has RN50 only)")
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
