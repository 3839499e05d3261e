"""python -m crislit.benchmark: measures parameters, speed and memory against a baseline.

Without a part, all are measured. The baseline, "plain", is the released implementation's forward
pass: float32, contiguous tensors, one image and one sentence at a time, without reading and
preprocessing. The candidates of a part run in turn. Candidates that the machine cannot run are left
out, with one line on the standard error. Columns of speed.csv:

  value       in the row's unit; a time is the median over the rounds
  unit        s, s per sentence, s per sample and core, images/s, GFLOP, GB, MB, %, mIoU (0 to 1);
              of losses and gradients, what the value is; of the machine, GFLOP/s and GB/s
  ratio       how many times better than the baseline: "plain", or the first row of --start, --data
  floor       the value if only arithmetic took time, at the device's rate in the row's precision
  moved       the value if only memory traffic took time ("memory" in the printed tables)
  spread      largest minus smallest value, as a share of the median
  difference  relative difference from the baseline's result; for --agreement, in mIoU
  rounds      number of timed runs; 10 N on a GPU, after 3 that warm up
  device      cpu, or the GPU's model; measuring replaces the rows of its parts on the same device

Candidates of inference. float32 is without TF32, float16 and bfloat16 are by autocast:

  plain, channels last     one image and one sentence at a time, the second in another layout
  for inference            as crislit.load and evaluation compute: images once, all sentences
  ..., TF32, float16, ...  the same in another precision (a GPU's)
  ..., compiled            the same by torch.compile; the time to compile is not counted
  ..., counted at image size
                           and masks of 640 x 480 pixels, counted as evaluation does
  ONNX Runtime             on a CPU only

Training on a GPU takes 8 sentences per step and measures its kinds one after another; 16-mixed
scales the loss. Memory is the largest of a process on a CPU, of all tensors on a GPU. Waiting is
the share of the time that steps would not take with all data in the device's memory.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from crislit.benchmarks.options import BACKBONES, Options
from crislit.errors import check_integer, one_line_errors, require
from crislit.inference import command_parser

PARTS = {
    "parameters": "parameters of table 1's rows in millions, beside the paper's (printed only)",
    "start": "s until a first mask, beside the imports alone",
    "rows": "GFLOP per image and sentence, and images/s, of every row of table 1",
    "evaluation": "s per sentence, with seven sentences per image",
    "latency": "s per sentence, for one image and one sentence",
    "agreement": "mIoU of a trained network on every backend",
    "training": "a training step: s per sentence, memory in GB, losses, gradients",
    "data": "loading: s per sample and core stage by stage, %% of a step spent waiting, and s and "
    "MB of an index of RefCOCO's size",
}
DEFAULT = "(default: %(default)s)"
ARGUMENTS: dict[tuple[str, ...], dict[str, Any]] = {
    ("--model",): {"help": f"rn50, rn101 or tiny, with random weights {DEFAULT}"},
    ("--image-size",): {"type": int, "metavar": "S", "help": f"side of its input {DEFAULT}"},
    ("--rounds",): {"type": int, "metavar": "N", "help": f"timed rounds {DEFAULT}"},
    ("--checkpoint",): {"help": f"trained network for --agreement {DEFAULT}"},
    ("--images", "--pictures"): {
        "type": int,
        "metavar": "N",
        "help": f"images for --agreement {DEFAULT}",
    },
    ("--data-root",): {
        "type": Path,
        "metavar": "DIR",
        "help": "folder of RefCOCO for --data (default: generated images)",
    },
    ("--device",): {"help": f"cpu, cuda, cuda:1, mps or xpu {DEFAULT}"},
    ("--output",): {"type": Path, "metavar": "DIR", "help": "also write DIR/speed.csv"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts named on the command line."""
    parser = command_parser("benchmark", "--parameters", __doc__)
    parts = parser.add_argument_group("parts")
    for part, text in PARTS.items():
        parts.add_argument(f"--{part}", action="store_true", help=text)
    parser.set_defaults(**vars(Options()))
    for flags, settings in ARGUMENTS.items():
        parser.add_argument(*flags, **settings)
    parsed = parser.parse_args(arguments)
    if "--pictures" in (sys.argv if arguments is None else arguments):
        print("--pictures is now --images", file=sys.stderr)
    chosen = [part for part in PARTS if getattr(parsed, part)] or list(PARTS)
    options = Options(**{field.name: getattr(parsed, field.name) for field in fields(Options)})
    with one_line_errors():
        check_integer("--image-size", options.image_size, 32, multiple_of=32)
        check_integer("--rounds", options.rounds, 1)
        check_integer("--images", options.images, 1)
        require(
            options.model in (*BACKBONES, "tiny"),
            f"--model must be tiny, rn50 or rn101, got {options.model}",
        )
        # Imported after the command line is checked: it takes seconds.
        from crislit.benchmarks.program import run_benchmark

        run_benchmark(options, chosen, parsed.output)


if __name__ == "__main__":
    main()
