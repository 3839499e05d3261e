"""python -m crislit.figures: figures 4 and 5 of the paper, attention to words, and thresholds."""

import os
from collections.abc import Sequence
from pathlib import Path

from crislit.errors import InputError, one_line_errors, require
from crislit.inference import add_trust, command_parser

KINDS = {
    "compare": "figure 4: the same samples by several networks (the paper's four are baseline, "
    "con, dec1 and con_dec3)",
    "failures": "figure 5: the worst failures by kind",
    "attention": "attention of the last decoder layer's cells to each word",
    "threshold": "mIoU against the threshold",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure named on the command line."""
    parser = command_parser("figures", "failures shapes-tiny", __doc__)
    parser.add_argument("kind", choices=KINDS, help="; ".join(map(": ".join, KINDS.items())))
    parser.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="networks of runs (best.ckpt), or shapes-tiny; one for failures and attention",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the image (default: outputs/KIND.png)"
    )
    parser.add_argument(
        "--data-root",
        default=os.environ.get("CRISLIT_DATA", "data"),
        help="folder of all data (default: $CRISLIT_DATA, else data)",
    )
    parser.add_argument("--split", default="val", help="split of their data set (default: val)")
    parser.add_argument(
        "--samples",
        type=int,
        help="number of samples, evenly spaced (default: 6; all for failures and threshold)",
    )
    add_trust(parser)
    options = parser.parse_args(arguments)
    with one_line_errors():
        require(
            options.samples is None or options.samples >= 1,
            f"--samples must be 1 or more, got {options.samples}",
        )
        count = len(options.checkpoints)
        if options.kind in ("failures", "attention") and count > 1:
            raise InputError(f"{options.kind} takes one checkpoint, not {count}")
        # Imported after the command line is checked: it takes seconds.
        from crislit.experiments.figures import draw_figure

        output = options.output or Path("outputs", f"{options.kind}.png")
        checkpoints, root = options.checkpoints, options.data_root
        draw_figure(
            *(options.kind, checkpoints, root, options.split, options.samples, output),
            options.trust,
        )
        print(f"written: {output}")


if __name__ == "__main__":
    main()
