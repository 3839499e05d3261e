"""Create the project's workspace in Weights & Biases: curves, table 1 as bars, samples with masks.

python scripts/wandb_dashboard.py ENTITY --project crislit

Needs the extra `dashboard` and a key (`wandb login`).
"""

import argparse

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.expr import Config, Metric

from crislit.training.metrics import METRICS

TEST_SPLITS = ("testA", "testB", "test")


def workspace(entity: str, project: str) -> ws.Workspace:
    """Return the unsaved workspace, which shows the values that ``logger=wandb`` logs."""
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
    """Show loss, learning rates and the metrics of val over the steps."""
    return ws.Section(
        name="Training",
        is_open=True,
        panels=[
            wr.LinePlot(title="loss", x="trainer/global_step", y=["train/loss"]),
            wr.LinePlot(
                title="learning rates",
                x="trainer/global_step",
                y=["lr-Adam/encoders", "lr-Adam/rest"],
                log_y=True,
            ),
            wr.LinePlot(title="IoU on val", x="trainer/global_step", y=["val/mIoU", "val/oIoU"]),
            wr.LinePlot(
                title="Pr@X on val",
                x="trainer/global_step",
                y=[f"val/Pr@{x}" for x in (50, 60, 70, 80, 90)],
            ),
        ],
    )


def ablation() -> ws.Section:
    """Show table 1: the final numbers of the runs, grouped by data set, Con. and n."""
    bars = {f"{metric} on val": f"val/{metric}" for metric in METRICS}
    bars |= {f"mIoU on {split}": f"{split}/mIoU" for split in TEST_SPLITS}
    bars["blind control on val"] = "val-blind/mIoU"
    return ws.Section(
        name="Table 1",
        is_open=True,
        panels=[wr.BarPlot(title=title, metrics=[name]) for title, name in bars.items()],
    )


def samples() -> ws.Section:
    """Show evaluated images; their target and predicted masks can be switched on and off."""
    return ws.Section(
        name="Samples",
        is_open=True,
        panels=[
            wr.MediaBrowser(title="masks", media_keys=["overlays"]),
            wr.MediaBrowser(title="figures", media_keys=["figures"]),
        ],
    )


def main() -> None:
    """Create and save the workspace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("entity", help="user or team")
    parser.add_argument("--project", default="crislit", help="the runs' project (default: crislit)")
    options = parser.parse_args()
    board = workspace(options.entity, options.project)
    board.save()
    print(board.url)


if __name__ == "__main__":
    main()
