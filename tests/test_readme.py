"""The README's commands are accepted, its links lead somewhere, and its numbers are the recorded ones."""

import csv
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from crislit import report
from crislit.data import shapes
from crislit.models.cris import build_cris
from crislit.models.released import to_released
from tests.runs import environment, run_here

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    (program, shlex.split(rest))
    for program, rest in re.findall(r"^    python -m crislit\.(\w+)(.*?)(?:\s{2,}#.*)?$", README, re.MULTILINE)
]
ELSEWHERE = re.compile(r"refcoco|table2|openai|trainer=ddp|slurm")
"""What shows that a command needs RefCOCO, CLIP's weights or GPUs."""
SMALL = ["recipe.epochs=1", "image_size=64", "batch_size=8", "dataset.max_images=6", "callbacks.pictures=0", "workers=0"]
SMALL += ["dataset.blind_control=false", "eval_batch_size=64"]
"""What makes a training of the README one of seconds."""


def elsewhere(arguments: list[str]) -> bool:
    return any(ELSEWHERE.search(part) for part in arguments)


def shorten(program: str, arguments: list[str]) -> list[str]:
    """Leave one job of every sweep, and make a training small."""
    if program != "train":
        return arguments
    parts = [part.replace("glob(*)", "con") for part in arguments]
    return [re.sub(r"^([\w.]+=[\w+]+)(,[\w+]+)+$", r"\1", part) for part in parts] + SMALL


def test_the_readme_shows_the_two_commands_and_every_program() -> None:
    assert "make train" in README
    programs = {"train", "evaluate", "predict", "convert", "export", "check_data", "report", "demo", "figures"}
    assert {program for program, _ in COMMANDS} == programs
    assert "python -m crislit.benchmark" in README
    assert all(program in ("train", "evaluate") for program, arguments in COMMANDS if elsewhere(arguments))


@pytest.mark.parametrize(("program", "arguments"), [command for command in COMMANDS if elsewhere(command[1])])
def test_every_command_that_needs_gpus_or_refcoco_composes(
    program: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts = [re.sub(r"=([\w+]+),.*", r"=\1", part) for part in arguments if part != "-m"]  # a sweep's first job
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"crislit.{program}", *parts, "--cfg", "job"])
    GlobalHydra.instance().clear()
    importlib.import_module(f"crislit.{program}").main()
    shown = OmegaConf.create(capsys.readouterr().out)
    assert shown.dataset.name in ("refcoco", "refcoco+", "grefcoco", "custom", "shapes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", ["export", "report", "figures"])
def test_a_program_runs_as_a_module(  # the others do in the tests of their own
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, f"crislit.{program}", raising=False)
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module(f"crislit.{program}", run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: python -m crislit.{program}")


@pytest.mark.slow
def test_every_other_command_runs_on_embedded_data(
    four_networks: list[Path], small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = {
        "embed_dim": 32,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
        "text_cfg": {"context_length": 22, "vocab_size": 99, "width": 64, "heads": 1, "layers": 1},
    }
    model = build_cris(clip=clip, neck=(8, 64, 16), decoder_layers=1)
    torch.save(to_released(model.state_dict()), tmp_path / "cris_r50.pth")
    for name, network in zip(("BASELINE", "CON", "DEC1", "FULL"), four_networks, strict=True):
        (tmp_path / f"{name}.ckpt").symlink_to(network)
    examples = ROOT / "src/crislit/assets/examples"
    (tmp_path / "src").symlink_to(ROOT / "src")
    shutil.copytree(examples, tmp_path / "PICTURES", ignore=shutil.ignore_patterns("*.txt"))
    shutil.copy(examples / "places.txt", tmp_path / "SENTENCES.txt")
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results/table1.csv", tmp_path / "results")
    shutil.copytree(small_shapes, tmp_path / "data")
    for name in ("shapes+", "gshapes"):
        scenes = {"train": 12, "val": 6, "testA": 6, "testB": 6} if name == "shapes+" else {"train": 12, "val": 6, "test": 6}
        shapes.write(tmp_path / "data", name, scenes=scenes).rename(tmp_path / "data" / f"{name}-v{shapes.VERSION}")
    draw = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own_data.md").read_text(), re.DOTALL)[0]
    subprocess.run([sys.executable, "-c", draw], cwd=tmp_path, check=True)

    here = [(program, arguments) for program, arguments in COMMANDS if not elsewhere(arguments) and program != "demo"]
    first = next(command for command in here if "hydra.run.dir=RUN" in command[1])  # whose folder others name
    monkeypatch.chdir(tmp_path)
    for program, arguments in [first, *here]:
        run_here(program, shorten(program, arguments), monkeypatch)
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)

    assert len(list((tmp_path / "predictions").glob("*-mask.png"))) == 2
    assert len(list((tmp_path / "masks").glob("*-mask.png"))) == 3 * len((tmp_path / "SENTENCES.txt").read_text().splitlines())
    assert all((tmp_path / folder / "model.safetensors").is_file() for folder in ("cris_r50", "mine"))
    assert (tmp_path / "onnx/grounding.onnx").is_file()
    assert all((tmp_path / f"{kind}.png").is_file() for kind in ("compare", "failures", "attention", "threshold"))
    assert (tmp_path / "report/report.md").is_file()
    assert all(name.startswith("module.") for name in torch.load(tmp_path / "ours.pth", weights_only=True)["state_dict"])
    recorded = len((ROOT / "results/table1.csv").read_text().splitlines())
    assert len((tmp_path / "results/table1.csv").read_text().splitlines()) > recorded


def test_the_backbone_that_the_readme_shows_is_the_file() -> None:
    shown = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[0]
    file = (ROOT / "conf/model/rn50x4.yaml").read_text()
    assert shown.startswith("# @package _global_")
    assert file.startswith("# @package _global_")
    assert OmegaConf.create(shown) == OmegaConf.create(file)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what scripts import
def test_the_scripts_that_the_readme_calls_know_the_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = re.findall(r"^    python (scripts/\w+\.py)(.*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert len(called) >= 2
    for script, rest in called:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        told = capsys.readouterr().out
        assert all(option in told for option in re.findall(r"--[\w-]+", rest))


def test_every_key_and_choice_that_the_readme_lists_composes() -> None:
    from crislit.config import load_config

    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) >= 9
    for key, cell in rows:
        for choice in re.findall(r"`([\w+]+)`", cell):
            load_config([f"{key}={choice}"])


def test_links_and_pictures_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_tables_of_the_report_show_the_recorded_runs() -> None:
    records = [ROOT / "results/table1.csv", ROOT / "results/random_weights.csv"]
    assert report.fill_blocks(README, report.blocks(report.by_setting(report.collect(records)))) == README


def test_the_result_table_shows_the_recorded_run() -> None:
    with (ROOT / "results/make_train.csv").open() as file:
        recorded = {row["split"]: row for row in csv.DictReader(file)}
    assert list(recorded) == ["val", "testA", "testB"]
    for split, row in recorded.items():
        shown = re.search(rf"^\| {split} \| (.*) \|$", README, re.MULTILINE)
        assert shown, split
        cells = [cell.strip() for cell in shown.group(1).split("|")]
        names = ("mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90", "blind", "ceiling")
        expected = [f"{100 * float(row[name]):.2f}" if row[name] else "-" for name in names]
        assert cells == [row["samples"], *expected]
    assert float(recorded["val"]["mIoU"]) >= 2 * float(recorded["val"]["blind"])


@pytest.fixture(scope="module")
def speed() -> dict[tuple[str, str], dict[str, str]]:
    """What the benchmark found, by part and candidate."""
    with (ROOT / "results/speed.csv").open() as file:
        return {(row["part"], row["candidate"]): row for row in csv.DictReader(file)}


def row_of(page: str, label: str) -> list[str]:
    """Return the cells of a table's row."""
    (found,) = re.findall(rf"^\| {re.escape(label)} \| (.*) \|$", page, re.MULTILINE)
    return [cell.strip() for cell in found.split("|")]


def test_the_speeds_are_those_that_the_benchmark_found(speed: dict[tuple[str, str], dict[str, str]]) -> None:
    def times(part: str, *names: str) -> list[str]:
        ratios = [f"{float(speed[part, name]['ratio']):.2f} x" for name in names]
        return [f"{float(speed[part, 'plain']['value']):.2f}", *ratios]

    every = ("for inference", "ONNX Runtime", "ONNX Runtime, int8")
    assert row_of(README, "evaluation, seven sentences a picture") == times("evaluation", *every)
    assert row_of(README, "one picture, one sentence") == times("latency", *every)
    training = {
        "training, batch of 4": "default",
        "`rearrange=true`": "rearrange",
        "`dataset.sentences_per_image=4`": "4 sentences an image",
        "both": "rearrange, 4 sentences an image",
    }
    for label, name in training.items():
        assert row_of(README, label) == [*times("training", name), "-", "-"]

    text = " ".join(README.split())
    whole, floor, made = (
        1e3 * float(speed["data", name]["value"])
        for name in (
            "whole sample, collated",
            "decode and cubic warp: the floor",
            "and made floats, as the training process does",
        )
    )
    opened = float(speed["data", "index of RefCOCO's size, opened"]["value"])
    recomputed = 1 / float(speed["memory", "recompute"]["ratio"])
    lost = -100 * float(speed["agreement", "ONNX Runtime, int8"]["difference"])
    for told in (
        f"A training sample takes {whole:.1f} ms of a core, {floor:.1f} of which",
        f"another {made - whole:.1f} ms",
        f"opens in {opened:.1f} s",
        f"`recompute=true` trains in {recomputed:.2f} of the memory as written",
        f"`shapes-tiny` loses {lost:.2f} points of mIoU",
    ):
        assert told in text, told


def test_the_log_of_speeds_has_what_the_benchmark_found(speed: dict[tuple[str, str], dict[str, str]]) -> None:
    log = (ROOT / "results/speed_log.md").read_text()

    def ratio(part: str, name: str) -> str:
        return f"{float(speed[part, name]['ratio']):.2f}"

    memory = 1 / float(speed["memory", "recompute"]["ratio"])
    expected = {
        "evaluation, seven sentences a picture": ratio("evaluation", "for inference"),
        "one picture, one sentence": ratio("latency", "for inference"),
        "training step as it comes": ratio("training", "default"),
        "`rearrange=true`": ratio("training", "rearrange"),
        "four sentences a picture, as written": ratio("training", "4 sentences an image"),
        "`rearrange=true`, four sentences a picture": ratio("training", "rearrange, 4 sentences an image"),
        "memory, `recompute=true`, over plain's": f"{memory:.2f}",
        "loading, over the floor": ratio("data", "whole sample, collated"),
        "the same with floats": ratio("data", "and made floats, as the training process does"),
        "`import crislit`, s": f"{float(speed['start', 'import crislit']['value']):.2f}",
        "a prediction, over its libraries' imports": f"{1 / float(speed['start', 'crislit.predict']['ratio']):.2f}",
    }
    assert {label: row_of(log, label)[1] for label in expected} == expected
    places = [f"{float(speed['gradients', f'{name}, float32']['value']):.1e}" for name in ("plain", "default")]
    assert [row_of(log, label)[1].replace("e-", "e-0") for label in ("plain", "as it comes (channels last)")] == places
