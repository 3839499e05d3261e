"""Benchmarks the time until a first mask."""

import os
import subprocess
import sys
from functools import partial

from crislit.benchmarks.measurements import Measurement, compare_to_reference
from crislit.benchmarks.options import Options
from crislit.benchmarks.timing import interleave
from crislit.io import EXAMPLES


def measure_startup(options: Options) -> list[Measurement]:
    """Time whole processes: the libraries' imports, the package's, and a first prediction."""
    image = min(EXAMPLES.glob("*.jpg"))
    commands = {
        "import torch, open_clip": ["-c", "import torch, open_clip"],
        "import crislit": ["-c", "import crislit"],
        "crislit.predict": ["-m", "crislit.predict", str(image), "red star", "--output", "-"],
    }
    # Bytecode is written in the first round, which is not counted, as on a user's machine.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run = partial(subprocess.run, check=True, capture_output=True, env=environment)
    work = {name: partial(run, [sys.executable, *command]) for name, command in commands.items()}
    seconds = interleave(work, options.rounds)
    return compare_to_reference("start", seconds, dict.fromkeys(work, 1), "s")
