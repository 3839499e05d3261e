"""The README's commands are valid, its links lead to files, its numbers are the recorded ones."""

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

from crislit.checkpoints.released import to_released
from crislit.config import load_config
from crislit.data import shapes
from crislit.experiments import runs, tables
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from tests.runs import environment, run_here

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    (program, shlex.split(rest))
    for program, rest in re.findall(
        r"^    python -m crislit\.(\w+)(.*?)(?:\s{2,}#.*)?$", README, re.MULTILINE
    )
]
NOT_EMBEDDED = re.compile(r"refcoco|table2|model=rn|trainer=ddp|slurm")
"""Matches arguments that need RefCOCO, CLIP's weights or GPUs."""
SMALL = [
    *("recipe.epochs=1", "image_size=64", "batch_size=8", "dataset.max_images=6", "workers=0"),
    *("callbacks.pictures=0", "dataset.blind_control=false", "eval_batch_size=64"),
]
"""Overrides that reduce a training run to seconds."""


def needs_more(arguments: list[str]) -> bool:
    """Whether a command needs RefCOCO, CLIP's weights or GPUs."""
    return any(NOT_EMBEDDED.search(argument) for argument in arguments)


def shorten(program: str, arguments: list[str]) -> list[str]:
    """Keep one job of every sweep, and make a training run small."""
    if program != "train":
        return arguments
    parts = [part.replace("glob(*)", "con") for part in arguments]
    return [re.sub(r"^([\w.]+=[\w+]+)(,[\w+]+)+$", r"\1", part) for part in parts] + SMALL


def test_the_readme_shows_every_command() -> None:
    assert "make train" in README
    programs = {
        *("train", "evaluate", "predict", "convert", "export", "check_data", "report"),
        *("demo", "figures"),
    }
    assert {program for program, _ in COMMANDS} == programs
    assert "python -m crislit.benchmark" in README
    large = {program for program, arguments in COMMANDS if needs_more(arguments)}
    assert large <= {"train", "evaluate"}


@pytest.mark.parametrize(
    ("program", "arguments"), [command for command in COMMANDS if needs_more(command[1])]
)
def test_every_command_that_needs_gpus_or_refcoco_composes(
    program: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first_job = [re.sub(r"=([\w+]+),.*", r"=\1", part) for part in arguments if part != "-m"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"crislit.{program}", *first_job, "--cfg", "job"])
    GlobalHydra.instance().clear()
    importlib.import_module(f"crislit.{program}").main()
    shown = OmegaConf.create(capsys.readouterr().out)
    assert shown.dataset.name in ("refcoco", "refcoco+", "grefcoco", "custom", "shapes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", ["export", "report", "figures"])
def test_a_command_runs_as_a_module(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The other commands run as modules in their own tests.
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
    model = build_cris(CRISConfig(clip=clip, neck=(8, 64, 16), decoder_layers=1))
    torch.save(to_released(model.state_dict()), tmp_path / "cris_r50.pth")
    for name, network in zip(("BASELINE", "CON", "DEC1", "FULL"), four_networks, strict=True):
        (tmp_path / f"{name}.ckpt").symlink_to(network)
    examples = ROOT / "src/crislit/assets/examples"
    (tmp_path / "src").symlink_to(ROOT / "src")
    shutil.copytree(examples, tmp_path / "IMAGES", ignore=shutil.ignore_patterns("*.txt"))
    shutil.copy(examples / "places.txt", tmp_path / "SENTENCES.txt")
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results/table1.csv", tmp_path / "results")
    shutil.copytree(small_shapes, tmp_path / "data")
    for name, tests in {"shapes+": ("testA", "testB"), "gshapes": ("test",)}.items():
        scenes = {"train": 12, "val": 6, **dict.fromkeys(tests, 6)}
        folder = shapes.write_shapes(tmp_path / "data", name, scenes=scenes)
        folder.rename(tmp_path / "data" / f"{name}-v{shapes.VERSION}")
    draw = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own_data.md").read_text(), re.DOTALL)[0]
    subprocess.run([sys.executable, "-c", draw], cwd=tmp_path, check=True)

    commands = [
        (program, arguments)
        for program, arguments in COMMANDS
        if not needs_more(arguments) and program != "demo"
    ]
    # Other commands read the folder of this run.
    first = next(command for command in commands if "hydra.run.dir=RUN" in command[1])
    monkeypatch.chdir(tmp_path)
    for program, arguments in [first, *commands]:
        run_here(program, shorten(program, arguments), monkeypatch)
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)

    sentences = (tmp_path / "SENTENCES.txt").read_text().splitlines()
    assert len(list((tmp_path / "outputs/predictions").glob("*-mask.png"))) == 2
    assert len(list((tmp_path / "masks").glob("*-mask.png"))) == 3 * len(sentences)
    written = [
        *("cris_r50/model.safetensors", "mine/model.safetensors", "onnx/grounding.onnx"),
        *(f"outputs/{kind}.png" for kind in ("compare", "failures", "attention", "threshold")),
        *("outputs/report/report.md", "outputs/mine/report.md", "outputs/table1.csv"),
    ]
    for name in written:
        assert (tmp_path / name).is_file(), name
    released = torch.load(tmp_path / "ours.pth", weights_only=True)["state_dict"]
    assert all(name.startswith("module.") for name in released)
    shipped = (ROOT / "results/table1.csv").read_text()
    assert (tmp_path / "results/table1.csv").read_text() == shipped


def test_the_backbone_in_the_readme_is_the_configuration_file() -> None:
    shown = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[0]
    file = (ROOT / "conf/model/rn50x4.yaml").read_text()
    assert shown.startswith("# @package _global_")
    assert file.startswith("# @package _global_")
    assert OmegaConf.create(shown) == OmegaConf.create(file)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by imports of the scripts
def test_scripts_accept_the_options_in_the_readme(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = re.findall(r"^    python (scripts/\w+\.py)(.*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert len(called) >= 2
    for script, rest in called:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        usage = capsys.readouterr().out
        assert all(option in usage for option in re.findall(r"--[\w-]+", rest))


def test_every_key_and_choice_in_the_readme_composes() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) >= 9
    for key, cell in rows:
        for choice in re.findall(r"`([\w+]+)`", cell):
            load_config([f"{key}={choice}"])


def test_links_and_images_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_tables_of_the_report_show_the_recorded_runs() -> None:
    records = [ROOT / "results/table1.csv", ROOT / "results/random_weights.csv"]
    recorded = tables.readme_tables(runs.group_by_setting(runs.collect(records)))
    assert tables.fill_blocks(README, recorded) == README


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
    """Rows of the recorded benchmark on a CPU, by part and candidate."""
    return {(row["part"], row["candidate"]): row for row in speed_rows() if row["device"] == "cpu"}


def speed_rows() -> list[dict[str, str]]:
    with (ROOT / "results/speed.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_readme_and_the_speed_log_say_whether_a_gpu_was_measured() -> None:
    without = {row["device"] for row in speed_rows()} == {"cpu"}
    for page in (README, (ROOT / "results/speed_log.md").read_text()):
        assert ("No GPU was measured." in " ".join(page.split())) == without


def row_of(page: str, label: str) -> list[str]:
    """Return the cells of a table's row."""
    (cells,) = re.findall(rf"^\| {re.escape(label)} \| (.*) \|$", page, re.MULTILINE)
    return [cell.strip() for cell in cells.split("|")]


def test_the_speeds_in_the_readme_are_the_recorded_ones(
    speed: dict[tuple[str, str], dict[str, str]],
) -> None:
    def times(part: str, *names: str) -> list[str]:
        ratios = [f"{float(speed[part, name]['ratio']):.2f} x" for name in names]
        return [f"{float(speed[part, 'plain']['value']):.2f}", *ratios]

    every = ("for inference", "ONNX Runtime", "ONNX Runtime, int8")
    assert row_of(README, "evaluation, seven sentences per image") == times("evaluation", *every)
    assert row_of(README, "one image, one sentence") == times("latency", *every)
    training = {
        "training, batch of 4": "default",
        "`rearrange=true`": "rearrange",
        "`dataset.sentences_per_image=4`": "4 sentences an image",
        "both": "rearrange, 4 sentences an image",
    }
    for label, name in training.items():
        assert row_of(README, label) == [*times("training", name), "-", "-"]

    text = " ".join(README.split())
    sample, floor, with_floats = (
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
    for statement in (
        f"Loading a training sample takes {sample:.1f} ms of one core, of which {floor:.1f} ms",
        f"another {with_floats - sample:.1f} ms",
        f"opens in {opened:.1f} s",
        f"`recompute=true` needs {recomputed:.2f} of the baseline's memory",
        f"`shapes-tiny` loses {lost:.2f} points of mIoU",
    ):
        assert statement in text, statement


def test_the_speed_log_shows_the_recorded_numbers(
    speed: dict[tuple[str, str], dict[str, str]],
) -> None:
    log = (ROOT / "results/speed_log.md").read_text()

    def ratio(part: str, name: str) -> str:
        return f"{float(speed[part, name]['ratio']):.2f}"

    memory = 1 / float(speed["memory", "recompute"]["ratio"])
    start = float(speed["start", "import crislit"]["value"])
    prediction = 1 / float(speed["start", "crislit.predict"]["ratio"])
    expected = {
        "evaluation, seven sentences per image": ratio("evaluation", "for inference"),
        "one image, one sentence": ratio("latency", "for inference"),
        "training step, default": ratio("training", "default"),
        "`rearrange=true`": ratio("training", "rearrange"),
        "four sentences per image": ratio("training", "4 sentences an image"),
        "`rearrange=true`, four sentences per image": ratio(
            "training", "rearrange, 4 sentences an image"
        ),
        "memory, `recompute=true`, relative to the baseline": f"{memory:.2f}",
        "loading, relative to the floor": ratio("data", "whole sample, collated"),
        "the same with floats": ratio("data", "and made floats, as the training process does"),
        "`import crislit`, s": f"{start:.2f}",
        "a prediction, relative to the imports of its libraries": f"{prediction:.2f}",
    }
    assert {label: row_of(log, label)[1] for label in expected} == expected
    labels = {"baseline": "plain", "default (channels last)": "default"}
    errors = {
        label: f"{float(speed['gradients', f'{name}, float32']['value']):.1e}"
        for label, name in labels.items()
    }
    assert {label: row_of(log, label)[1].replace("e-", "e-0") for label in labels} == errors
