"""Builds the project's workspace in Weights & Biases: training curves, table 1 as bars, samples with masks.

python scripts/wandb_dashboard.py ENTITY [--project crislit]     # needs the extra `dashboard` and a key (wandb login)
"""

import argparse

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.expr import Config, Metric

from crislit.metrics import METRICS

SPLITS = ("val", "testA", "testB", "test")


def workspace(entity: str, project: str) -> ws.Workspace:
    """Return the workspace, not saved yet; it shows what ``logger=wandb`` logs."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name="CRIS",
        sections=[training(), ablation(), samples()],
        settings=ws.WorkspaceSettings(x_axis="trainer/global_step", smoothing_type="none"),
        runset_settings=ws.RunsetSettings(
            groupby=[Config("dataset.name"), Config("loss.contrastive"), Config("decoder.layers")],
            order=[ws.Ordering(Metric("val/mIoU"), ascending=False)],
        ),
    )


def training() -> ws.Section:
    """Loss, rates and the selecting split's metrics over the steps."""
    return ws.Section(
        name="Training",
        is_open=True,
        panels=[
            wr.LinePlot(title="loss", x="trainer/global_step", y=["train/loss"]),
            wr.LinePlot(title="learning rates", x="trainer/global_step", y=["lr-Adam/encoders", "lr-Adam/rest"], log_y=True),
            wr.LinePlot(title="IoU on val", x="trainer/global_step", y=["val/mIoU", "val/oIoU"]),
            wr.LinePlot(title="Pr@X on val", x="trainer/global_step", y=[f"val/Pr@{x}" for x in (50, 60, 70, 80, 90)]),
        ],
    )


def ablation() -> ws.Section:
    """Table 1: the runs' final numbers side by side, grouped by data set, Con. and n."""
    return ws.Section(
        name="Table 1",
        is_open=True,
        panels=[
            *(wr.BarPlot(title=f"{metric} on val", metrics=[f"val/{metric}"]) for metric in METRICS),
            *(wr.BarPlot(title=f"mIoU on {split}", metrics=[f"{split}/mIoU"]) for split in SPLITS[1:]),
            wr.BarPlot(title="the blind control on val", metrics=["val-blind/mIoU"]),
        ],
    )


def samples() -> ws.Section:
    """Evaluated samples; truth and prediction can be switched on and off over the picture."""
    return ws.Section(
        name="Samples",
        is_open=True,
        panels=[
            wr.MediaBrowser(title="masks", media_keys=["overlays"]),
            wr.MediaBrowser(title="drawn", media_keys=["figures"]),
        ],
    )


def main() -> None:
    """Build it and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entity", help="user or team")
    parser.add_argument("--project", default="crislit")
    options = parser.parse_args()
    built = workspace(options.entity, options.project)
    built.save()
    print(built.url)


if __name__ == "__main__":
    main()
