"""python -m crislit.figures: figures 4 and 5 of the paper, attention to words, and thresholds."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from crislit.errors import InputError, one_line_errors, require
from crislit.experiments.figures import (
    FAILURE_COLUMNS,
    Subject,
    check_same_samples,
    draw_attention,
    draw_comparison,
    draw_failures,
    draw_threshold,
    evenly_spaced,
    find_failures,
    threshold_curve,
)
from crislit.io import write_csv

KINDS = {
    "compare": "figure 4: the same samples by several networks (the paper's four are baseline, "
    "con, dec1 and con_dec3)",
    "failures": "figure 5: the worst failures by kind",
    "attention": "attention of the last decoder layer's cells to each word",
    "threshold": "mIoU against the threshold",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure named on the command line."""
    parser = argparse.ArgumentParser("python -m crislit.figures", description=__doc__)
    parser.add_argument("kind", choices=KINDS, help="; ".join(map(": ".join, KINDS.items())))
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the image (default: KIND.png)")
    parser.add_argument(
        "--data-root",
        default=os.environ.get("CRISLIT_DATA", "data"),
        help="folder of all data (default: $CRISLIT_DATA, else data)",
    )
    parser.add_argument("--split", default="val")
    parser.add_argument(
        "--samples",
        type=int,
        help="number of samples, evenly spaced (default: 6; all for failures and threshold)",
    )
    options = parser.parse_args(arguments)
    output = options.output or Path(f"{options.kind}.png")
    table = output.with_suffix(".csv")
    with one_line_errors():
        require(
            options.samples is None or options.samples >= 1,
            f"--samples must be 1 or more, got {options.samples}",
        )
        count = len(options.checkpoints)
        if options.kind in ("failures", "attention") and count > 1:
            raise InputError(f"{options.kind} takes one checkpoint, not {count}")
        subjects = [Subject(path, options.data_root, options.split) for path in options.checkpoints]
        check_same_samples(subjects)
        first, total = subjects[0], len(subjects[0].data)
        default = total if options.kind in ("failures", "threshold") else 6
        numbers = evenly_spaced(total, options.samples or default)
        output.parent.mkdir(parents=True, exist_ok=True)
        if options.kind == "compare":
            figure = draw_comparison(subjects, numbers)
        elif options.kind == "failures":
            failures = find_failures(first, numbers)
            figure = draw_failures(first, failures, per_kind=3)
            rows = [{name: failure[name] for name in FAILURE_COLUMNS} for failure in failures]
            write_csv(table, FAILURE_COLUMNS, rows)
        elif options.kind == "attention":
            figure = draw_attention(first, numbers)
        else:
            curves = {
                label: threshold_curve(subject, numbers)
                for label, subject in zip(unique_titles(subjects), subjects, strict=True)
            }
            rows = [
                {"network": label, "threshold": threshold, "mIoU": f"{value:.4f}"}
                for label, curve in curves.items()
                for threshold, value in curve
            ]
            write_csv(table, ("network", "threshold", "mIoU"), rows)
            figure = draw_threshold(curves)
        figure.savefig(output, dpi=110, bbox_inches="tight", pad_inches=0.1)
        print(f"written: {output}")


def unique_titles(subjects: Sequence[Subject]) -> list[str]:
    """Return the networks' titles, numbered where several have the same."""
    titles = [subject.title for subject in subjects]
    return [
        f"{title} ({number})" if titles.count(title) > 1 else title
        for number, title in enumerate(titles, start=1)
    ]


if __name__ == "__main__":
    main()
