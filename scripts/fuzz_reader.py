"""Fuzz what reads strangers' files: refs and checkpoints' pickles, instances.json, polygons, run lengths; guided by coverage.

    python -m venv FUZZ && FUZZ/bin/pip install atheris
    PYTHONPATH=src:SITE_PACKAGES FUZZ/bin/python scripts/fuzz_reader.py --seconds 3600

from the top of a checkout, SITE_PACKAGES being that of an environment in which crislit's development extra is installed, of the
same version of Python. atheris (Apache-2.0) brings libFuzzer.

Inputs begin as the hostile cases of the tests and sound files (tests/io/hostile.py), and are mutated by a fixed seed. Every
exception but InputError is a crash; so are an input that takes longer than 10 seconds and a process of more than 2 GB. What
remains of the fuzzing is --output, a JSON file, and the inputs that crashed, which it names.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LIMITS = ("-timeout=10", "-rss_limit_mb=2048", "-max_len=4096")


def main() -> None:
    """Fuzz for a while in a process of its own, which libFuzzer ends, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "results/fuzz.json")
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)  # the fuzzing process's own
    options = parser.parse_args()
    if options.inputs:
        fuzz(options.inputs, options.seconds, options.seed)
        return
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run(
        [*git, "describe", "--always", "--abbrev=40", "--dirty"],
        capture_output=True,
        text=True,
        check=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            "--inputs",
            folder,
            "--seconds",
            str(options.seconds),
            "--seed",
            str(options.seed),
        ]
        start, begun = time.perf_counter(), datetime.datetime.now(datetime.UTC)
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        seconds = time.perf_counter() - start
        crashes = {
            path.name: path.read_bytes().hex()
            for path in Path(folder).glob("*-*")
            if path.stem.split("-")[0] in KINDS
        }
        report(options, done, seconds, begun, crashes, commit.stdout.strip())


KINDS = ("crash", "timeout", "oom", "leak")
"""How libFuzzer calls inputs that it complains of."""


def report(
    options: argparse.Namespace,
    done: "subprocess.CompletedProcess[str]",
    seconds: float,
    begun: datetime.datetime,
    crashes: dict[str, str],
    commit: str,
) -> None:
    """Write what libFuzzer printed as a record, and end with 1 if anything crashed."""

    def last(pattern: str) -> int:
        return int(([0, *re.findall(pattern, done.stderr)])[-1])

    record = {
        "command": f"python scripts/fuzz_reader.py --seconds {options.seconds} --seed {options.seed}",
        "limits": " ".join(LIMITS),
        "begun": begun.isoformat(timespec="seconds"),
        "seconds": round(seconds),
        "seed": options.seed,
        "seeds": last(r"(\d+) files found"),
        "executions": last(r"stat::number_of_executed_units:\s*(\d+)"),
        "coverage": last(r"cov: (\d+)"),
        "features": last(r"ft: (\d+)"),
        "corpus": last(r"corp: (\d+)"),
        "slowest_input_seconds": last(r"stat::slowest_unit_time_sec:\s*(\d+)"),
        "peak_rss_mb": last(r"stat::peak_rss_mb:\s*(\d+)"),
        "exit_code": done.returncode,
        "crashes": crashes,
        "commit": commit,
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({**record, "crashes": len(crashes)}, indent=2))
    if done.returncode or crashes:
        print(done.stderr[-4000:], file=sys.stderr)
        raise SystemExit(1)


def fuzz(inputs: Path, seconds: int, seed: int) -> None:
    """Let libFuzzer call :func:`read` until the time is over; it ends the process."""
    import pickle

    import atheris

    unpickler: type = pickle._Unpickler
    for code, function in list(unpickler.dispatch.items()):  # type: ignore[attr-defined]
        unpickler.dispatch[code] = atheris.instrument_func(function)  # type: ignore[attr-defined]
    with atheris.instrument_imports(include=["crislit.io", "crislit.data"]):
        from crislit.data import refer_index  # noqa: F401
        from crislit.io import pickles  # noqa: F401
    from tests.io.hostile import reader_seeds

    PLACE.append(inputs / "refs(unc).p")
    logging.disable(logging.WARNING)
    seeds = inputs / "seeds"
    seeds.mkdir()
    for number, content in enumerate(reader_seeds()):
        (seeds / f"{number:04d}").write_bytes(content)
    more = (
        f"-seed={seed}",
        f"-max_total_time={seconds}",
        f"-artifact_prefix={inputs}/",
        "-print_final_stats=1",
    )
    atheris.Setup([sys.argv[0], *LIMITS, *more, str(seeds)], read)
    atheris.Fuzz()


PLACE: list[Path] = []
"""Of the one file that is written again and again."""


def read(content: bytes) -> None:
    """Read one input: its first byte says as what."""
    from tests.io.hostile import draw_all, one_ref

    from crislit.data.refer_index import build_index
    from crislit.errors import InputError
    from crislit.io.files import read_json
    from crislit.io.pickles import check_torch_pickle, load_pickle

    kind, content = content[:1], content[1:]
    refs, instances = one_ref()
    path = PLACE[0]
    path.write_bytes(content)
    if kind == b"c":
        with contextlib.suppress(
            Exception
        ):  # whose reader turns any into an InputError; here it is time and memory
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
