"""The command ``python -m crislit.benchmark``."""

import csv
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crislit import benchmark
from crislit.benchmarks import data, inference, program, speed, training
from crislit.benchmarks.measurements import Measurement
from crislit.benchmarks.timing import Machine, run_in_new_process
from crislit.checkpoints.checkpoint import Checkpoint, write_folder
from crislit.config import compose_config
from crislit.experiments.paper import TABLE1
from crislit.inference.onnx_export import export_onnx
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from tests.benchmarks.test_parameters import PAPER
from tests.models.networks import CLIP

RN101 = ["147.44", "148.62", "151.65", "152.83", "157.04", "161.25", "165.46"]
"""Parameters of table 1's rows with RN101.

It adds 161,251,681 - 146,849,121 with "Con.", and less without, as its text projector is smaller.
"""


def test_the_table_shows_all_rows_with_both_backbones_beside_the_papers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # the second decimal shows in any terminal
    benchmark.main(["--parameters"])
    printed = capsys.readouterr().out.splitlines()
    rows = [line.replace("│", " ").split() for line in printed if line.startswith("│")]
    assert [row[0] for row in rows] == list(TABLE1)
    for row, rn50, rn101 in zip(rows, PAPER, RN101, strict=True):
        assert row[3:] == [rn50, rn50, "+0.00", rn101]


@pytest.mark.parametrize(
    ("options", "chosen"),
    [([], list(benchmark.PARTS)), (["--latency", "--parameters"], ["parameters", "latency"])],
)
def test_all_parts_are_measured_without_a_choice(
    options: list[str], chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(program, "count_table1_parameters", lambda: measured.append("parameters"))
    monkeypatch.setattr(program, "parameter_table", lambda counts: "")
    monkeypatch.setattr(program, "measure_machine", lambda device: Machine(1e9, 1e9))
    monkeypatch.setattr(
        program,
        "measure",
        lambda options, parts, machine, device, report: measured.extend(parts),
    )
    benchmark.main(options)
    assert measured == chosen


def test_a_part_that_is_interrupted_writes_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Iterator[Measurement]:
        yield Measurement("rows", "con, plain", 2.5, "images/s")
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "measure_machine", lambda device: Machine(1e9, 1e9))
    monkeypatch.setattr(program, "measure_table1_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(["--rows", "--output", str(tmp_path)])
    assert 'rows,"con, plain",2.5,images/s' in (tmp_path / "speed.csv").read_text()


@pytest.mark.parametrize(
    "options",
    [
        *(["--rounds", "0"], ["--image-size", "100"], ["--model", "vit"]),
        *(["--images", "0"], ["--pictures", "0"]),
        *(["--device", "gpu"], ["--device", ""], ["--device", "meta"], ["--device", "cpu:x"]),
    ],
)
def test_a_wrong_option_ends_in_one_line(options: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"^error: (--|this machine cannot)") as stop:
        benchmark.main(["--latency", *options])
    assert "\n" not in str(stop.value)


def test_the_former_name_of_an_option_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--parameters", "--pictures", "2"])
    assert capsys.readouterr().err == "--pictures is now --images\n"


@pytest.mark.slow
@pytest.mark.usefixtures("eager_compiler")
def test_every_part_measures_a_tiny_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shapes: Path
) -> None:
    monkeypatch.setenv("CRISLIT_DATA", str(small_shapes))
    sizes = {"images": 20, "refs": 50, "sentences": 142, "annotations": 200}
    monkeypatch.setattr(data, "FULL_SIZE", sizes)
    monkeypatch.setattr(data, "IMAGES", 40)
    monkeypatch.setattr(training, "MEMORY_KINDS", ("plain", "recompute"))
    monkeypatch.setattr(speed, "TABLE1", {row: TABLE1[row] for row in ("baseline", "con_dec3")})
    # The export to int8 is tested in test_onnx_export.
    export_once = functools.cache(export_onnx)

    def export(source: Path, target: Path, calibrate: Path | None) -> None:
        export_once(source, tmp_path / "onnx")
        target.symlink_to(tmp_path / "onnx")

    monkeypatch.setattr(inference, "export_onnx", export)
    started: list[Any] = []

    def run_first_in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
        """Start a process for each function once, as starting takes longest.

        Peaks of memory need one each: the peak of this process is that of earlier tests.
        """
        if work is data.measure_stages:  # which a test of its own calls
            return work(*arguments)
        if work in started and work is not training.training_peak:
            return work(*arguments)
        started.append(work)
        return run_in_new_process(work, *arguments)

    for module in (data, training):
        monkeypatch.setattr(module, "run_in_new_process", run_first_in_new_process)
    clip: dict[str, Any] = CLIP | {"text_cfg": CLIP["text_cfg"] | {"vocab_size": 49408}}
    network = CRISConfig(
        clip=clip, neck=(32, 64, 128), decoder_layers=1, decoder_heads=4, decoder_ffn=96
    )
    config = compose_config(["image_size=64"])
    weights = build_cris(network).state_dict()
    checkpoint = Checkpoint(network, weights, 64, 0.35, "random", config=config)
    write_folder(checkpoint, tmp_path / "net")

    small = ["--model", "tiny", "--image-size", "64", "--rounds", "1", "--images", "3"]
    small += ["--checkpoint", str(tmp_path / "net"), "--output", str(tmp_path)]
    # Not "start", which takes as long as all others.
    parts = ["rows", "evaluation", "latency", "training", "data"]
    benchmark.main([*small, *(f"--{part}" for part in parts)])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxruntime", None)  # the exports were measured above
        benchmark.main([*small, "--agreement"])

    assert started == [training.training_peak, training.training_peak, data.use_index]
    with (tmp_path / "speed.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    more = {"machine", "memory", "gradients", "losses", "agreement"}
    assert {row["part"] for row in rows} == more | {*parts}
    assert {row["device"] for row in rows} == {"cpu"}
    for row in rows:
        assert float(row["value"]) >= 0
        assert row["commit"]
        assert row["hardware"]
        assert row["versions"]
        assert float(row["GFLOP/s"]) > 0
        assert float(row["GB/s"]) > 0

    def column(part: str, name: str) -> dict[str, float]:
        return {row["candidate"]: float(row[name]) for row in rows if row["part"] == part}

    for part in ("evaluation", "latency"):
        measured = [row["candidate"] for row in rows if row["part"] == part]
        same = ["plain", "for inference", "ONNX Runtime"]
        counted = ["for inference, counted at image size"] if part == "evaluation" else []
        assert measured == [*same, "ONNX Runtime, int8", *counted, "for inference, compiled"]
        differences = column(part, "difference")
        assert all(differences[name] < 1e-4 for name in [*same, *counted, measured[-1]])
    floors = column("training", "floor")
    assert floors["recompute"] > floors["default"] > floors["rearrange"] > 0
    losses = column("losses", "difference")
    assert losses["plain"] == 0 < losses["rearrange recompute"] < 1e-3
    gradients = column("gradients", "difference")
    assert gradients["plain, float64"] == 0 < gradients["rearrange recompute, float64"] < 1e-6
    assert 0 < gradients["rearrange recompute, 2 sentences an image, float64"] < 1e-6
    # Untrained networks amplify rounding in float32, the reference too; compare test_optimized.
    assert 0 < gradients["plain, float32"] < 0.01
    assert 0 < gradients["rearrange recompute, float32"] < 3 * gradients["plain, float32"]
    memory = column("memory", "value")
    assert list(memory) == ["plain", "recompute"]
    assert all(0.2 < peak < 5 for peak in memory.values())
