"""Every code block of README.md and of the documentation is executed or composed."""

import importlib
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from scripts.pages.commands import capture_parser, script_parser

from crislit.checkpoints.released import to_released
from crislit.config import load_config
from crislit.data import shapes
from crislit.inference import segmenter
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.training.settings import check_settings
from tests.documents.pages import (
    BLOCKS,
    COMMAND,
    PAGES,
    ROOT,
    Command,
    commands,
    python_blocks,
    shell_lines,
)
from tests.runs import run_here
from tests.test_architecture import COMMANDS

NOT_EMBEDDED = re.compile(r"refcoco|table2|model=rn|trainer=ddp|slurm")
"""Matches arguments that need RefCOCO, CLIP's weights or several devices."""
OWN_TESTS = ("docs/own_data.md", "docs/fine_tuning.md")
"""Pages whose commands have tests of their own: they build on each other, or take long."""
OTHER_LINES = (
    *(r"make train PYTHON=/path/to/python3\.11", r'python -c "import torch; .*"'),
    r"python -m pip uninstall -y opencv-python opencv-contrib-python opencv-python-headless",
    r'python -m pip install "opencv-python-headless>=5\.0\.0\.93"',
    r"torchrun --nproc-per-node 2 -m crislit\.train trainer=ddp_cpu hydra\.run\.dir=outputs/two",
    *(r"git clone REPOSITORY crislit && cd crislit", r"\. \.venv/bin/activate"),
    *(r"python3 -m venv \.venv", r"\.venv/bin/python -m pip install -e \."),
    r"python -m pip config set global\.index-url https://MIRROR/simple",
    r"python -m pip download -d wheels hatchling editables \.",
    r"python -m pip install --no-index --find-links wheels -e \.",
    r"\.venv/bin/python -m pip install torch torchvision --index-url https://download.pytorch.org/"
    r"whl/cpu",
)
"""Other lines: most set up a machine, as `make train` in a fresh clone shows."""
SMALL = [
    *("recipe.epochs=1", "image_size=64", "batch_size=8", "dataset.max_images=6", "workers=0"),
    *("callbacks.pictures=0", "dataset.blind_control=false", "eval_batch_size=64"),
]
"""Overrides that reduce a training run to seconds."""


FILE = re.compile(r"# ([\w/]+\.(?:py|yaml))\n")
"""First line of a block that shows a file of the user's folder."""


def needs_more(command: Command) -> bool:
    """Whether a command needs RefCOCO, CLIP's weights or several devices, or takes long."""
    is_advice = command.page == "docs/troubleshooting.md" and command.program == "train"
    return is_advice or any(NOT_EMBEDDED.search(argument) for argument in command.arguments)


COMPOSED = [command for command in commands() if needs_more(command)]
EXECUTED = [
    command
    for command in commands()
    if not needs_more(command) and command.program != "demo" and command.page not in OWN_TESTS
]


def first_job(arguments: Sequence[str]) -> list[str]:
    """Return the overrides of the first job of a sweep."""
    parts = [part.replace("glob(*)", "con") for part in arguments if part != "-m"]
    return [re.sub(r"=([\w+]+),.*", r"=\1", part) for part in parts]


def shorten(command: Command) -> list[str]:
    """Keep one job of every sweep, and make a training run small."""
    if command.program != "train":
        return list(command.arguments)
    parts = [part.replace("glob(*)", "con") for part in command.arguments]
    return [re.sub(r"^([\w.]+=[\w+]+)(,[\w+]+)+$", r"\1", part) for part in parts] + SMALL


def test_the_pages_show_every_command() -> None:
    assert {command.program for command in commands()} == COMMANDS
    assert {command.program for command in COMPOSED} <= {"train", "evaluate"}
    assert len(COMPOSED) >= 8
    assert len(EXECUTED) >= 20


def test_every_line_of_shell_code_is_of_a_kind_that_is_tested() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page, line in shell_lines():
        if install := re.fullmatch(r'(?:python -m )?pip install -e "\.\[([\w,]+)\]"', line):
            assert set(install[1].split(",")) <= set(extras["optional-dependencies"]), line
        elif make := re.fullmatch(r"make ([\w-]+)", line):
            assert make[1] in targets, line
        else:
            known = (COMMAND.pattern, r"python scripts/\w+\.py .*", *OTHER_LINES)
            assert any(re.fullmatch(kind, line) for kind in known) or page in OWN_TESTS, (
                page,
                line,
            )


def test_every_fenced_block_is_of_a_kind_that_is_tested() -> None:
    kinds = {block.language for block in BLOCKS if block.page not in OWN_TESTS}
    assert kinds <= {"", "sh", "python", "yaml", "text"}


@pytest.mark.parametrize("command", COMPOSED, ids=lambda c: " ".join(c.arguments)[:60])
def test_every_command_that_needs_gpus_or_refcoco_composes(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = first_job(command.arguments)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"crislit.{command.program}", *overrides, "--cfg", "job"])
    GlobalHydra.instance().clear()
    importlib.import_module(f"crislit.{command.program}").main()
    shown = OmegaConf.create(capsys.readouterr().out)
    for argument in overrides:
        key, _, value = argument.partition("=")
        if key == "dataset":
            assert shown.dataset.name == value
        elif "." in key and not key.startswith(("hydra", "+")):
            found = OmegaConf.select(shown, key)
            assert str(found) == value or float(found) == float(value), argument
    assert list(tmp_path.iterdir()) == []


class Hub:
    """The Hugging Face Hub's client, which keeps an uploaded folder here."""

    folder: Path

    def __init__(self, token: str | None) -> None:
        assert token is None

    def create_repo(self, repository: str, **options: bool) -> str:
        return f"https://hub/{repository}"

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
        shutil.copytree(folder_path, self.folder)


@pytest.fixture
def workspace(four_networks: list[Path], small_shapes: Path, tmp_path: Path) -> Path:
    """A folder like a clone, with the networks, images and data that the pages name."""
    clip = {
        "embed_dim": 32,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
        "text_cfg": {"context_length": 22, "vocab_size": 99, "width": 64, "heads": 1, "layers": 1},
    }
    model = build_cris(CRISConfig(clip=clip, neck=(8, 64, 16), decoder_layers=1))
    torch.save(to_released(model.state_dict()), tmp_path / "cris_r50.pth")
    for name, network in zip(("BASELINE", "CON", "DEC1", "FULL"), four_networks, strict=True):
        (tmp_path / f"{name}.ckpt").symlink_to(network)
    for block in BLOCKS:
        if file := FILE.match(block.text):
            (tmp_path / file[1]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file[1]).write_text(block.text)
    examples = ROOT / "src/crislit/assets/examples"
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / "IMAGES").mkdir()
    for image in examples.glob("*.jpg"):
        shutil.copy(image, tmp_path / "IMAGES")
    shutil.copy(examples / "places.txt", tmp_path / "SENTENCES.txt")
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results/table1.csv", tmp_path / "results")
    shutil.copytree(small_shapes, tmp_path / "data")
    for name, tests in {"shapes+": ("testA", "testB"), "gshapes": ("test",)}.items():
        scenes = {"train": 12, "val": 6, **dict.fromkeys(tests, 6)}
        folder = shapes.write_shapes(tmp_path / "data", name, scenes=scenes)
        folder.rename(tmp_path / "data" / f"{name}-v{shapes.VERSION}")
    return tmp_path


@pytest.mark.slow
def test_every_other_command_and_all_python_code_runs_on_embedded_data(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    exec(python_blocks("docs/own_data.md")[0], {})  # draws the data of check_data's example
    monkeypatch.syspath_prepend(workspace)  # as `python -m` does
    film = ["--config-dir", "my_conf", "decoder=film", "hydra.run.dir=film", *SMALL]
    run_here("train", film, monkeypatch)
    shutil.copy("film/checkpoints/best.ckpt", "FILM.ckpt")
    # Other commands read the folder of this run.
    first = next(command for command in EXECUTED if "hydra.run.dir=RUN" in command.arguments)
    for command in [first, *EXECUTED]:
        run_here(command.program, shorten(command), monkeypatch)
    monkeypatch.setattr(Hub, "folder", workspace / "hub", raising=False)
    monkeypatch.setattr(segmenter, "HfApi", Hub)
    monkeypatch.setattr(segmenter, "snapshot_download", lambda *_, **__: str(Hub.folder))
    for page in PAGES:
        for code in python_blocks(page) if page not in OWN_TESTS else ():
            names: dict[str, Any] = {"__name__": page}
            exec(code.replace("max_images=40", "max_images=6"), names)

    sentences = (workspace / "SENTENCES.txt").read_text().splitlines()
    assert len(list((workspace / "outputs/predictions").glob("*-mask.png"))) == 2
    assert len(list((workspace / "masks").glob("*-mask.png"))) == 3 * len(sentences)
    written = [
        *("cris_r50/model.safetensors", "mine/model.safetensors", "outputs/onnx/grounding.onnx"),
        *(f"outputs/{kind}.png" for kind in ("compare", "failures", "attention", "threshold")),
        *("outputs/report/report.md", "outputs/mine/report.md", "outputs/table1.csv"),
        *("outputs/mask.png", "outputs/from-python/results.json", "hub/model.safetensors"),
    ]
    for name in written:
        assert (workspace / name).is_file(), name
    released = torch.load(workspace / "ours.pth", weights_only=True)["state_dict"]
    assert all(name.startswith("module.") for name in released)
    shipped = (ROOT / "results/table1.csv").read_text()
    assert (workspace / "results/table1.csv").read_text() == shipped


def test_the_backbone_in_the_pages_is_the_configuration_file() -> None:
    (shown,) = (block.text for block in BLOCKS if "RN50x4-quickgelu" in block.text)
    file = (ROOT / "conf/model/rn50x4.yaml").read_text()
    assert OmegaConf.create(shown) == OmegaConf.create(file)


def test_configuration_files_in_the_pages_compose(tmp_path: Path) -> None:
    blocks = [block for block in BLOCKS if block.language == "yaml"]
    assert blocks
    for block in blocks:
        if file := FILE.match(block.text):
            _, group, name = Path(file[1]).parts
            (tmp_path / "mine" / group).mkdir(parents=True, exist_ok=True)
            (tmp_path / "mine" / group / name).write_text(block.text)
            own = f"hydra.searchpath=[file://{tmp_path}/mine]"
            check_settings(load_config([own, f"{group}={Path(name).stem}"]))
            continue
        assert block.text.startswith("# @package _global_\n")
        folder = tmp_path / ("model" if "\nmodel:" in block.text else "recipe")
        folder.mkdir(exist_ok=True)
        (folder / "mine.yaml").write_text(block.text)
        group = folder.name
        config = load_config([f"hydra.searchpath=[file://{tmp_path}]", f"{group}=mine"])
        check_settings(config)
        shown = OmegaConf.create(block.text.replace("defaults: [", "defaults: # ["))
        assert OmegaConf.merge(OmegaConf.to_container(OmegaConf.create(config)), shown) == {
            **config,
            "defaults": None,
        }


def lines_that_are_only_parsed() -> Iterator[list[str]]:
    """Yield the words of commands that no test executes.

    These are commands of scripts, those of the results, and examples in help texts.
    """
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    lines = [line for _, line in shell_lines() if line.startswith("python scripts/")]
    lines += re.findall(r"^    (python .*)$", results, re.MULTILINE)
    for block in BLOCKS:
        if block.language == "text":
            found = re.findall(r"^(?:[^#|\n]* \| )?(python [^#>\n]*)", block.text, re.MULTILINE)
            lines += [line for line in found if "options]" not in line]
    for words in map(shlex.split, lines):
        yield words[1:] if words[1] != "-m" else words[2:]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by imports of the scripts
def test_commands_that_no_test_executes_are_accepted_by_their_parsers() -> None:
    seen = set()
    for name, *arguments in lines_that_are_only_parsed():
        seen.add(name)
        program = name.removeprefix("crislit.")
        if program in ("train", "evaluate"):
            load_config(first_job(arguments), program)
        elif program == name:
            script_parser(Path(name).stem).parse_args(arguments)
        else:
            main = importlib.import_module(name).main
            capture_parser(partial(main, [])).parse_intermixed_args(arguments)
    assert {"crislit.predict", "crislit.report", "crislit.benchmark", "crislit.train"} <= seen
    assert len([name for name in seen if name.startswith("scripts/")]) >= 5


def test_links_and_images_lead_to_files_and_headings() -> None:
    for page, text in {**PAGES, "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text()}.items():
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        targets = re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]+))?\)", prose)
        targets += re.findall(r'(?:href|src)="(?!http)([^"#]*)(?:#([^"]+))?"', prose)
        for name, heading in targets:
            target = (ROOT / page).parent / name if name else ROOT / page
            assert target.exists(), (page, name)
            if heading and "/api/" not in name:  # the build of the site checks those
                assert heading in headings(target.read_text()), (page, name, heading)


def headings(text: str) -> set[str]:
    """Return the anchors of a page's headings, as Markdown's table of contents makes them."""
    found = re.findall(r'^#+ (?:<a id="([\w-]+)"></a>)?(.*)$', text, re.MULTILINE)
    return {
        given or re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())
        for given, title in found
    }


QUESTIONS = {"dependency-conflict", "slow-loading", "quickgelu", "loss-does-not-fall", "paper"}
QUESTIONS |= {"rounding", "threshold", "mask-size", "many-sentences", "languages", "slow-cpu"}
QUESTIONS |= {"remote-page"}
OF_OTHER_PROGRAMS = {"no-make", "shared-memory", "zsh", "workers-main", "mps"}
BEFORE_INSTALLATION = {"python-version", "mirror"}
OF_A_LINE = {"mask-size-differs", "mask-values"}  # below unusable-lines
MESSAGES = {"recorded", "page-limits"}  # that say what to do
WITHOUT_ERROR = QUESTIONS | OF_OTHER_PROGRAMS | BEFORE_INSTALLATION | OF_A_LINE | MESSAGES
"""Entries of the troubleshooting page that no error of crislit has to name."""


def test_errors_and_entries_of_the_troubleshooting_page_belong_together() -> None:
    page = PAGES["docs/troubleshooting.md"]
    entries = re.findall(r'^### <a id="([\w-]+)"></a>.', page, re.MULTILINE)
    assert len(entries) == len(set(entries)) >= 25
    sources = (path.read_text() for path in (ROOT / "src").rglob("*.py"))
    named = {name for text in sources for name in re.findall(r"\bsee\(['\"]([\w-]+)", text)}
    assert named | WITHOUT_ERROR == set(entries)
    assert not named & WITHOUT_ERROR
