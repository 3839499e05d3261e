"""Fuzz the readers of untrusted data sets and checkpoints, guided by coverage.

    python -m venv FUZZ && FUZZ/bin/pip install atheris
    PYTHONPATH=src:SITE_PACKAGES FUZZ/bin/python scripts/fuzz_reader.py --seconds 3600

Run it from the top of a checkout. SITE_PACKAGES belongs to an environment with crislit's
development extra and the same version of Python. atheris (Apache-2.0) includes libFuzzer.

Inputs are refs files, pickles of checkpoints, instances.json, polygons and run lengths. They start
from the hostile and valid files of tests/io/hostile and are mutated with a fixed seed. A crash is
any exception other than InputError, an input that takes more than 10 seconds, or a process of more
than 2 GB. The results, with all inputs that crashed, are written to --output as JSON;
results/fuzz.json is such a file.
"""

import argparse
import contextlib
import datetime
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LIMITS = ("-timeout=10", "-rss_limit_mb=2048", "-max_len=4096")
CRASHES = ("crash", "timeout", "oom", "leak")
"""Prefixes of the files in which libFuzzer keeps inputs that failed."""


def main() -> None:
    """Fuzz in a separate process, which libFuzzer ends, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/fuzz.json")
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)  # for the fuzzing process
    options = parser.parse_args()
    if options.inputs:
        fuzz(options.inputs, options.seconds, options.seed)
        return
    commit = describe_commit()
    settings = [f"--seconds={options.seconds}", f"--seed={options.seed}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, f"--inputs={folder}", *settings]
        start, begun = time.perf_counter(), datetime.datetime.now(datetime.UTC)
        process = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        seconds = time.perf_counter() - start
        crashes = {
            path.name: path.read_bytes().hex()
            for path in Path(folder).glob("*-*")
            if path.stem.split("-")[0] in CRASHES
        }
    record = {
        "command": f"python scripts/fuzz_reader.py {' '.join(settings)}",
        "limits": " ".join(LIMITS),
        "begun": begun.isoformat(timespec="seconds"),
        "seconds": round(seconds),
        "seed": options.seed,
        **parse_statistics(process.stderr),
        "exit_code": process.returncode,
        "crashes": crashes,
        "commit": commit,
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({**record, "crashes": len(crashes)}, indent=2))
    if process.returncode or crashes:
        print(process.stderr[-4000:], file=sys.stderr)
        raise SystemExit(1)


def parse_statistics(log: str) -> dict[str, int]:
    """Return the last value of each number that libFuzzer printed, 0 if there is none."""
    patterns = {
        "seeds": r"(\d+) files found",
        "executions": r"stat::number_of_executed_units:\s*(\d+)",
        "coverage": r"cov: (\d+)",
        "features": r"ft: (\d+)",
        "corpus": r"corp: (\d+)",
        "slowest_input_seconds": r"stat::slowest_unit_time_sec:\s*(\d+)",
        "peak_rss_mb": r"stat::peak_rss_mb:\s*(\d+)",
    }
    return {name: int([0, *re.findall(text, log)][-1]) for name, text in patterns.items()}


def describe_commit() -> str:
    """Return the commit of the checkout, with ``-dirty`` if files are changed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def fuzz(folder: Path, seconds: int, seed: int) -> None:
    """Let libFuzzer call ``read_input`` until the time is over; it ends the process."""
    import pickle

    import atheris

    unpickler: type = pickle._Unpickler
    for code, function in list(unpickler.dispatch.items()):  # type: ignore[attr-defined]
        unpickler.dispatch[code] = atheris.instrument_func(function)  # type: ignore[attr-defined]
    with atheris.instrument_imports(include=["crislit.io", "crislit.data"]):
        from crislit.data import refer_index  # noqa: F401
        from crislit.io import pickles  # noqa: F401
    from tests.io.hostile.refer import reader_seeds

    logging.disable(logging.WARNING)
    seeds = folder / "seeds"
    seeds.mkdir()
    for number, content in enumerate(reader_seeds()):
        (seeds / f"{number:04d}").write_bytes(content)
    options = (
        f"-seed={seed}",
        f"-max_total_time={seconds}",
        f"-artifact_prefix={folder}/",
        "-print_final_stats=1",
    )
    read = partial(read_input, folder / "refs(unc).p")
    atheris.Setup([sys.argv[0], *LIMITS, *options, str(seeds)], read)
    atheris.Fuzz()


def read_input(path: Path, content: bytes) -> None:
    """Read one input by way of a file. Its first byte is the kind, see ``reader_seeds``."""
    from tests.io.hostile.refer import draw_all
    from tests.refer_data import one_ref

    from crislit.data.refer_index import build_index
    from crislit.errors import InputError
    from crislit.io.files import read_json
    from crislit.io.pickles import check_torch_pickle, load_pickle

    kind, content = content[:1], content[1:]
    refs, instances = one_ref()
    path.write_bytes(content)
    if kind == b"c":
        # Any exception is allowed here, since its caller turns all into an InputError.
        with contextlib.suppress(Exception):
            check_torch_pickle(path, zipped=False)
        return
    try:
        if kind == b"p":
            refs = load_pickle(path)
        elif kind == b"j":
            instances = read_json(path)
        elif kind == b"s":
            instances["annotations"][0]["segmentation"] = read_json(path)
        else:
            instances["annotations"][0]["segmentation"] = {"size": [12, 20], "counts": content}
        draw_all(build_index(refs, instances, path))
    except InputError as error:
        if str(path.parent) not in str(error) or len(str(error)) > 1000:
            raise RuntimeError("an error must name the file, in a few words") from error


if __name__ == "__main__":
    main()
