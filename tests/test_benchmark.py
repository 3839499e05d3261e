"""``python -m crislit.benchmark``."""

import argparse
import csv
import functools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import profile_network

from crislit import benchmark, data_benchmark, timing, training_benchmark
from crislit.checkpoint import Checkpoint, write_folder
from crislit.config import load_settings
from crislit.data.dataset import read_image
from crislit.data.refer import ReferIndex
from crislit.export import export
from crislit.models.cris import build_cris
from crislit.models.rearranged import for_inference
from crislit.paper import TABLE1
from crislit.plain import plain_logits
from tests.test_models import CLIP, assert_close, experienced, pictures, sentences, tiny
from tests.test_rearranged import ABLATIONS

NECK: dict[str, Any] = {"neck": (32, 64, 128), "decoder_layers": 1, "decoder_heads": 4, "decoder_ffn": 96}

PRINTED = ["131.86", "134.22", "136.07", "138.43", "142.64", "146.85", "151.06"]
"""Table 1's column "Params", row by row."""
RN101 = ["147.44", "148.62", "151.65", "152.83", "157.04", "161.25", "165.46"]
"""What RN101 adds to each of them: 161,251,681 - 146,849,121 with Con., and less without its smaller text projector."""


def test_the_table_shows_all_rows_of_both_backbones_beside_the_papers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # no terminal is too narrow for the second decimal
    benchmark.main(["--parameters"])
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == list(TABLE1)
    for row, printed, rn101 in zip(rows, PRINTED, RN101, strict=True):
        assert row[3:] == [printed, printed, "+0.00", rn101]


def test_the_papers_numbers_are_table_1() -> None:
    assert [f"{row.parameters:.2f}" for row in TABLE1.values()] == PRINTED
    assert [(row.contrastive, row.layers) for row in TABLE1.values()] == [
        (False, 0),
        (True, 0),
        (False, 1),
        (True, 1),
        (True, 2),
        (True, 3),
        (True, 4),
    ]


def test_the_released_networks_counts_are_exact_but_for_the_unused_logit_scale() -> None:
    counts = benchmark.count_all()
    assert counts["con_dec3", "rn50"] == 146_849_122 - 1
    assert counts["con_dec3", "rn101"] == 161_251_682 - 1


def test_a_difference_shows(capsys: pytest.CaptureFixture[str]) -> None:
    counts = benchmark.count_all()
    counts["con", "rn50"] += 20_000
    from rich.console import Console

    Console(width=100).print(benchmark.parameter_table(counts))
    line = next(line for line in capsys.readouterr().out.splitlines() if "│ con " in line)
    assert "134.24" in line
    assert "+0.02" in line


@pytest.mark.parametrize(
    ("given", "chosen"), [([], list(benchmark.PARTS)), (["--latency", "--parameters"], ["parameters", "latency"])]
)
def test_without_a_part_all_are_measured(given: list[str], chosen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(benchmark, "count_all", lambda: seen.append("parameters"))
    monkeypatch.setattr(benchmark, "parameter_table", lambda counts: "")
    monkeypatch.setattr(benchmark, "measure_machine", lambda: timing.Machine(1e9, 1e9))
    monkeypatch.setattr(benchmark, "measure", lambda options, parts, machine, console: filter(None, map(seen.append, parts)))
    benchmark.main(given)
    assert seen == chosen


@pytest.mark.parametrize("given", [["--rounds", "0"], ["--image-size", "100"], ["--model", "vit"], ["--pictures", "0"]])
def test_what_cannot_be_measured_is_one_line(given: list[str]) -> None:
    with pytest.raises(SystemExit, match="error: --") as stop:
        benchmark.main(["--latency", *given])
    assert "\n" not in str(stop.value)


# -- The yardstick


@pytest.mark.parametrize("changes", ABLATIONS)
def test_plain_is_the_network_as_written(changes: dict[str, Any]) -> None:
    model = experienced(tiny(**changes))
    images, tokens = pictures(3, 96, 64), sentences(1, 4, 6)
    with torch.no_grad():
        assert_close(plain_logits(model, images, tokens), model(images, tokens))


def test_plain_uses_no_forward_that_could_be_made_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = experienced(tiny())
    images, tokens = pictures(1), sentences(4)
    with torch.no_grad():
        expected = model(images, tokens)

    def forbidden(*_: Any) -> None:
        raise AssertionError

    for box in (model, *model.children(), model.image_encoder.pool, *model.decoder.layers):  # type: ignore[union-attr]
        monkeypatch.setattr(box, "forward", forbidden)
    with torch.no_grad():
        assert_close(plain_logits(model, images, tokens), expected)


def test_plain_trains_as_the_network_does() -> None:
    gradients = []
    for compute in (plain_logits, lambda model, *given: model(*given)):
        model = tiny().train()
        torch.manual_seed(3)  # of dropout
        torch.autograd.backward(compute(model, pictures(4), sentences(1, 3, 4, 6)).square().mean())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-4


def test_plain_takes_the_operations_it_always_took() -> None:
    model = benchmark.network(argparse.Namespace(model="rn50"))
    with torch.device("meta"):
        images, tokens = torch.empty(1, 3, 416, 416), torch.ones(1, 17, dtype=torch.long)
    cost = timing.count_cost(lambda: plain_logits(model.to("meta"), images, tokens))
    assert cost.flops / 1e9 == pytest.approx(131.9261, abs=1e-4)


def test_what_was_measured_before_stays_beside_what_is_measured_anew(tmp_path: Path) -> None:
    options = argparse.Namespace(model="rn50", image_size=416, checkpoint="shapes-tiny")
    lines = [timing.Measurement("latency", "plain", 2.0, "s"), timing.Measurement("agreement", "plain", 0.5, "mIoU")]
    again = [timing.Measurement("latency", "plain", 3.0, "s", rounds=4)]
    benchmark.write_lines(tmp_path / "speed.csv", lines, options, timing.Machine(5e9, 2e9))
    benchmark.write_lines(tmp_path / "speed.csv", again, options, timing.Machine(6e9, 2e9))
    with (tmp_path / "speed.csv").open(encoding="utf-8") as file:
        columns = ("part", "value", "rounds", "model", "image_size", "GFLOP/s", "GB/s")
        found = [tuple(row[column] for column in columns) for row in csv.DictReader(file)]
    assert found == [
        ("agreement", "0.5", "", "shapes-tiny", "", "5.0", "2.0"),
        ("latency", "3", "4", "rn50", "416", "6.0", "2.0"),
    ]


# -- Time and cost


def test_candidates_take_turns_and_the_first_turn_is_not_counted() -> None:
    turns: list[str] = []
    seconds = timing.interleave(
        {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 2, prepare=lambda name: turns.append(f"for {name}")
    )
    assert turns == ["for a", "a", "for b", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_ratios_are_of_medians_and_floors_are_of_one_thing() -> None:
    plain, other = timing.compare(
        "part", {"plain": [4.0, 9.0, 8.0], "other": [5.0, 4.0, 3.0]}, {"plain": 2, "other": 4}, "s", {"other": (2.0, 6.0)}
    )
    assert (plain.value, plain.ratio) == (4.0, 1.0)
    assert (other.value, other.ratio, other.floor, other.moved, other.spread) == (1.0, 4.0, 0.5, 1.5, 0.5)


def test_a_products_cost_is_two_operations_a_multiplication_and_its_three_matrices() -> None:
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    assert timing.count_cost(lambda: a @ b) == timing.Cost(2 * 5 * 7 * 3, 4 * (5 * 7 + 7 * 3 + 5 * 3))
    assert timing.count_cost(lambda: a.T) == timing.Cost(0, 0), "a view moves nothing"
    assert timing.Cost(10, 20).floor(timing.Machine(5.0, 4.0)) == 2.0
    assert timing.Cost(10, 20).moved(timing.Machine(5.0, 4.0)) == 5.0


def test_attention_is_counted() -> None:
    q = torch.randn(1, 2, 5, 8)
    with torch.no_grad():
        cost = timing.count_cost(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert cost.flops == 2 * 2 * (2 * 5 * 5 * 8)
    q.requires_grad_()
    attend = torch.nn.functional.scaled_dot_product_attention
    trained = timing.count_cost(lambda: torch.autograd.backward(attend(q, q, q).sum()), training=True)
    assert trained.flops == (2 + 5) * 2 * (2 * 5 * 5 * 8), "backward, the scores are computed again"


def test_a_training_steps_cost_is_that_of_three_products() -> None:
    layer, x = torch.nn.Linear(7, 3, bias=False), torch.randn(5, 7, requires_grad=True)
    cost = timing.count_cost(lambda: layer(x).sum().backward(), training=True)
    assert cost.flops == 3 * (2 * 5 * 7 * 3), "the product, and the gradients of both its factors"


def test_the_rearranged_network_multiplies_less() -> None:
    model = build_cris(clip=CLIP, neck=(32, 64, 128), decoder_heads=4).eval()
    images, tokens = torch.randn(1, 3, 128, 128), sentences(1, 3, 4, 5, 6, 8, 9)
    quick = for_inference(model)
    with torch.no_grad():
        plain = timing.count_cost(lambda: [plain_logits(model, images, row[None]) for row in tokens])
        less = timing.count_cost(lambda: quick(images, tokens))
    assert less.flops < plain.flops / 2


def test_a_process_that_a_large_one_starts_has_a_peak_of_its_own() -> None:
    large = np.ones(1_000_000_000, np.uint8)
    code = "import numpy as np; from crislit.timing import peak_memory; a = np.ones(%d, np.uint8); del a; print(peak_memory())"
    peaks = [float(subprocess.check_output([sys.executable, "-c", code % size])) for size in (1, 500_000_000)]
    assert timing.peak_memory() > large.nbytes / 1e9
    assert peaks[0] < 0.8
    assert peaks[1] > 0.5


# -- Data


def test_drawn_photographs_are_a_set_of_cocos_size(tmp_path: Path) -> None:
    index = ReferIndex.open(data_benchmark.draw_photographs(tmp_path, 3), "refcoco", "refs(unc).p")
    assert len(index) == 3
    for ref in range(3):
        assert read_image(index, ref).shape == (480, 640, 3)
        assert 1000 < index.mask(ref).sum() < 100_000
        assert len(index.sentence_rows(ref)) == 3


def test_the_set_of_full_size_has_as_many_of_everything_as_it_says(tmp_path: Path) -> None:
    data_benchmark.write_full_size(tmp_path, {"images": 20, "refs": 50, "sentences": 142, "annotations": 200})
    index = ReferIndex.open(tmp_path, "refcoco", "refs(unc).p")
    assert len({index.image_id(ref) for ref in range(len(index))}) == 20
    rows = [row for ref in range(len(index)) for row in index.sentence_rows(ref)]
    assert (len(index), rows) == (50, list(range(142)))
    assert len(json.loads((tmp_path / "refcoco/instances.json").read_text())["annotations"]) == 200
    assert index.mask(0).any()


def take_memory() -> tuple[float, float]:
    """Take 100 MB; return how much more is this process's own, and all that it has."""
    before = data_benchmark.own()
    mine = np.ones(100_000_000, np.uint8)
    return data_benchmark.own() - before + 0 * mine[0], data_benchmark.resident()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told by /proc")
def test_memory_that_is_a_workers_own_is_told() -> None:
    taken, resident = data_benchmark.in_a_process(take_memory)  # a new one, that gives nothing back meanwhile
    assert 95 < taken < 130
    assert resident > 100


def test_stages_are_compared_to_decoding_and_warping(tmp_path: Path) -> None:
    root = data_benchmark.draw_photographs(tmp_path, 5)
    known = {"root": root, "folder": "refcoco", "refs": "refs(unc).p", "image_size": 64}
    threads = torch.get_num_threads()
    floor, whole, *parts = data_benchmark.stages(known, 1)
    assert "floor" in floor.candidate
    assert whole.ratio == floor.value / whole.value
    assert {"read", "decode", "warp", "mask", "choice and tokens", "made floats"} < {part.candidate for part in parts}
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_every_part_measures_a_tiny_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shapes: Path) -> None:
    monkeypatch.setenv("CRISLIT_DATA", str(small_shapes))
    monkeypatch.setattr(data_benchmark, "FULL_SIZE", {"images": 20, "refs": 50, "sentences": 142, "annotations": 200})
    model = build_cris(clip=CLIP | {"text_cfg": CLIP["text_cfg"] | {"vocab_size": 49408}}, **NECK)
    config = load_settings(["image_size=64"])
    write_folder(Checkpoint(model.settings, model.state_dict(), 64, 0.35, "random", config=config), tmp_path / "net")
    small = ["--model", "tiny", "--image-size", "64", "--rounds", "1", "--pictures", "3", "--checkpoint", str(tmp_path / "net")]
    monkeypatch.setattr(training_benchmark, "PEAKS", ("plain", "recompute"))
    monkeypatch.setattr(data_benchmark, "PICTURES", 40)
    monkeypatch.setattr(benchmark, "TABLE1", {row: TABLE1[row] for row in ("baseline", "con_dec3")})
    once = functools.cache(lambda source, target: export(source, target))  # quantised ones are exported by test_export

    def exported(source: Path, target: Path, calibrate: Path | None) -> None:
        once(source, tmp_path / "onnx")
        target.symlink_to(tmp_path / "onnx")

    monkeypatch.setattr(benchmark, "export", exported)
    parts = ["rows", "evaluation", "latency", "training", "data"]  # a start takes as long as all of them
    benchmark.main([*small, *(f"--{part}" for part in parts), "--output", str(tmp_path)])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxruntime", None)  # the exports were measured above
        benchmark.main([*small, "--agreement", "--output", str(tmp_path)])
    parts.append("agreement")
    with (tmp_path / "speed.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert {line["part"] for line in lines} == {"memory", "gradients", "losses", *parts}
    assert all(float(line["value"]) >= 0 and line["commit"] and line["hardware"] and line["versions"] for line in lines)
    assert all(float(line["GFLOP/s"]) > 0 and float(line["GB/s"]) > 0 for line in lines)
    for part in ("evaluation", "latency"):
        found = {line["candidate"]: line for line in lines if line["part"] == part}
        assert list(found) == ["plain", "for inference", "ONNX Runtime", "ONNX Runtime, int8"]
        for name in ("for inference", "ONNX Runtime"):
            assert float(found[name]["difference"]) < 1e-4
    apart = {line["candidate"]: float(line["difference"]) for line in lines if line["part"] == "gradients"}
    assert apart["plain, float64"] == 0 < apart["rearrange recompute, float64"] < 1e-6
    assert 0 < apart["rearrange recompute, 2 sentences an image, float64"] < 1e-6
    steps = {line["candidate"]: line for line in lines if line["part"] == "training"}
    assert float(steps["recompute"]["floor"]) > float(steps["default"]["floor"]) > float(steps["rearrange"]["floor"]) > 0
    losses = {line["candidate"]: float(line["difference"]) for line in lines if line["part"] == "losses"}
    assert losses["plain"] == 0 < losses["rearrange recompute"] < 1e-3
    # In float32 untrained networks amplify rounding, plain's own as well: ours is of the same size. Compare test_rearranged.
    assert 0 < apart["plain, float32"] < 0.01
    assert 0 < apart["rearrange recompute, float32"] < 3 * apart["plain, float32"]


@pytest.mark.slow
def test_profiles_tell_what_every_part_takes_and_leave_the_network_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    model = build_cris(clip=CLIP, **NECK).eval()
    images, tokens = torch.randn(1, 3, 64, 64), sentences(3)
    before = model(images, tokens)

    def run() -> None:
        time.sleep(0.05)
        model(images, tokens)

    parts = profile_network.time_parts(model, run, 3)
    assert set(parts) == {*profile_network.PARTS, "all"}
    assert sum(seconds for name, seconds in parts.items() if name != "all") < parts["all"] - 0.05, "nothing is counted twice"
    assert torch.equal(model(images, tokens), before)
    assert not any({"forward", "project_maps", "fuse"} & vars(module).keys() for module in model.modules())

    profile_network.main(["--model", "tiny", "--image-size", "64", "--rounds", "1"])
    page = capsys.readouterr().out
    assert page.count(": operations by their own time") == 6 + len(profile_network.TRAINED) + 2
    assert re.search(r"^### ONNX Runtime: .*\n\n.*\n.*\n\| `(Conv|FusedConv)` \|", page, re.MULTILINE)
    for part in profile_network.PARTS:
        assert re.search(rf"^\| {part} \| - \| \d", page, re.MULTILINE), part
