"""python -m crislit.figures: figures 4 and 5 of the paper, where the words look, and mIoU against the threshold."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from crislit.errors import InputError, one_line_errors
from crislit.experiments.figures import (
    Subject,
    check_same_samples,
    draw_attention,
    draw_comparison,
    draw_failures,
    draw_threshold,
    evenly_spaced,
    threshold_curve,
    write_table,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser("python -m crislit.figures", description=__doc__)
    kinds = {
        "compare": "figure 4: the same samples by several networks (baseline, con, dec1, con_dec3 are the paper's four)",
        "failures": "figure 5: the worst failures, sorted",
        "attention": "where the pixels of the last decoder layer look for each word",
        "threshold": "mIoU against the threshold",
    }
    told = "; ".join(f"{kind}: {what}" for kind, what in kinds.items())
    parser.add_argument("kind", choices=kinds, help=told)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the picture (default: KIND.png)"
    )
    root = os.environ.get("CRISLIT_DATA", "data")
    parser.add_argument(
        "--data-root", default=root, help="where the data are (default: $CRISLIT_DATA, else data)"
    )
    parser.add_argument("--split", default="val")
    parser.add_argument(
        "--samples",
        type=int,
        help="how many, evenly over the split (default: 6; all for failures, threshold)",
    )
    options = parser.parse_args(arguments)
    output = options.output or Path(f"{options.kind}.png")
    with one_line_errors():
        if options.samples is not None and options.samples < 1:
            raise InputError(f"--samples must be 1 or more, got {options.samples}")
        if options.kind in ("failures", "attention") and len(options.checkpoints) > 1:
            raise InputError(
                f"{options.kind} looks at one checkpoint, not {len(options.checkpoints)}"
            )
        subjects = [Subject(path, options.data_root, options.split) for path in options.checkpoints]
        check_same_samples(subjects)
        total = len(subjects[0].data)
        whole = options.kind in ("failures", "threshold")
        numbers = evenly_spaced(total, options.samples or (total if whole else 6))
        output.parent.mkdir(parents=True, exist_ok=True)
        if options.kind == "compare":
            figure = draw_comparison(subjects, numbers)
        elif options.kind == "failures":
            figure, table = draw_failures(subjects[0], numbers, each=3)
            write_table(output.with_suffix(".csv"), table)
        elif options.kind == "attention":
            figure = draw_attention(subjects[0], numbers)
        else:
            titles = [subject.title for subject in subjects]
            labels = [
                f"{title} ({i + 1})" if titles.count(title) > 1 else title
                for i, title in enumerate(titles)
            ]
            curves = {
                label: threshold_curve(subject, numbers)
                for label, subject in zip(labels, subjects, strict=True)
            }
            rows = [
                {"network": title, "threshold": t, "mIoU": f"{v:.4f}"}
                for title, curve in curves.items()
                for t, v in curve
            ]
            write_table(output.with_suffix(".csv"), rows)
            figure = draw_threshold(curves)
        figure.savefig(output, dpi=110, bbox_inches="tight", pad_inches=0.1)
        print(f"written: {output}")


if __name__ == "__main__":
    main()
