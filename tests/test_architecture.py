"""Files in the root are commands, folders are libraries, and imports go one way."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import crislit

SOURCE = Path(crislit.__file__).parent
MAY_IMPORT = {
    "io": {"root"},
    "models": {"root"},
    "transforms": {"root", "io", "models"},
    "checkpoints": {"root", "io", "models"},
    "data": {"root", "io", "models", "transforms", "checkpoints"},
    "inference": {"root", "io", "models", "transforms", "checkpoints"},
    "training": {"root", "io", "models", "transforms", "checkpoints", "data"},
    "experiments": {"root", "io", "models", "transforms", "checkpoints", "data", "training"},
    "benchmarks": {
        *("root", "io", "models", "transforms", "checkpoints", "data", "inference", "training"),
        "experiments",
    },
}
"""One row per folder: the folders that it imports from. "root" is errors, config, the version."""
COMMANDS = {
    *("train", "evaluate", "predict", "demo", "convert", "export", "check_data", "report"),
    *("figures", "benchmark"),
}
LIBRARIES_IN_THE_ROOT = {"__init__", "__main__", "errors", "config"}
KNOW_LIGHTNING = {"data", "training", "experiments", "benchmarks"}
KNOW_HYDRA = {
    *("config", "train", "evaluate", "training/program", "training/build", "training/trainer"),
    *("training/command_line", "training/sweep_jobs", "training/from_python", "experiments/sweep"),
}
JUNK_DRAWERS = {"utils", "util", "misc", "common", "helpers"}


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").as_posix()


FILES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imported_modules(tree: ast.Module, package: str) -> set[str]:
    """Return the full names of all imports of a file, those inside functions included."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            modules |= {f"{module}.{alias.name}" for alias in node.names}
    return modules


def imported_files(name: str, tree: ast.Module | None = None) -> set[str]:
    """Return the names of crislit's files that a file imports; ``__init__`` is the package."""
    package = ".".join(["crislit", *name.split("/")[:-1]])
    files = set()
    for module in imported_modules(tree or tree_of(name), package):
        if module.split(".")[0] != "crislit":
            continue
        path = module.split(".")[1:]
        # "from crislit.data import shapes" names a file, "from crislit.errors import X" does not.
        candidates = ["/".join(path[:end]) for end in range(len(path), 0, -1)]
        packages = [f"{candidate}/__init__" for candidate in candidates]
        known = (candidate for candidate in (*candidates, *packages) if candidate in FILES)
        files.add(next(known, "__init__"))
    return files


def folder_of(name: str) -> str:
    return name.split("/")[0] if "/" in name else "root"


def forbidden(name: str, imports: set[str]) -> set[str]:
    """Return those of the imported files that a file may not import."""
    if name == "__init__":  # exports the public API, lazily
        return set()
    folder = folder_of(name)
    if folder == "root":
        allowed = {"root", *MAY_IMPORT} if name in COMMANDS else {"root"}
    else:
        allowed = MAY_IMPORT[folder] | {folder}
    return {other for other in imports if folder_of(other) not in allowed or other in COMMANDS}


def test_every_folder_has_a_row() -> None:
    assert {folder_of(name) for name in FILES} - {"root"} == set(MAY_IMPORT)


def test_rows_go_one_way() -> None:
    order = list(MAY_IMPORT)
    for place, (folder, allowed) in enumerate(MAY_IMPORT.items()):
        assert allowed <= {"root", *order[:place]}, folder


def test_a_file_in_the_root_is_a_command() -> None:
    assert {name for name in FILES if "/" not in name} == COMMANDS | LIBRARIES_IN_THE_ROOT


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_one_way(name: str) -> None:
    wrong = forbidden(name, imported_files(name))
    assert not wrong, f"{name} imports {sorted(wrong)}, which MAY_IMPORT does not list"


def test_prediction_knows_no_data_set_and_no_lightning() -> None:
    prediction = {"transforms", "models", "checkpoints", "inference", "io"}
    for name in FILES:
        if folder_of(name) in prediction:
            folders = {folder_of(other) for other in imported_files(name)}
            assert not folders & {"data", "training", "experiments", "benchmarks"}, name


@pytest.mark.parametrize("name", sorted(FILES))
def test_only_training_knows_lightning(name: str) -> None:
    roots = {module.split(".")[0] for module in imported_modules(tree_of(name), "crislit")}
    if folder_of(name) not in KNOW_LIGHTNING and name not in COMMANDS:
        assert not roots & {"lightning", "pytorch_lightning", "lightning_fabric"}


@pytest.mark.parametrize("name", sorted(set(FILES) - KNOW_HYDRA))
def test_few_files_know_hydra(name: str) -> None:
    words = {word for node in ast.walk(tree_of(name)) for word in words_of(node)}
    assert not words & {"hydra", "omegaconf", "DictConfig", "ListConfig", "OmegaConf"}


def words_of(node: ast.AST) -> set[str]:
    """Return the names in a node of code; docstrings may mention anything."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names = [*modules, *(alias.name for alias in node.names)]
        return {part for module in names for part in module.split(".")}
    if isinstance(node, ast.Name):
        return {node.id}
    if isinstance(node, ast.Attribute):
        return {node.attr}
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        dotted = node.value.isidentifier() or "." in node.value  # import_module("hydra")
        return {node.value, node.value.split(".")[0]} if dotted else set()
    return set()


def test_every_form_of_import_is_recognized() -> None:
    source = """
import crislit
import crislit.training.metrics as m
from crislit.data import shapes
from crislit.data.refer_index import ReferIndex
from .cris import CRIS
from ..errors import InputError
from . import neck
if TYPE_CHECKING:
    from crislit.training.task import CRISTask
def late():
    from crislit.checkpoints import checkpoint
import crislitter
"""
    imports = imported_files("models/decoder", ast.parse(source))
    assert imports == {
        *("__init__", "training/metrics", "data/shapes", "data/refer_index", "models/cris"),
        *("errors", "models/neck", "training/task", "checkpoints/checkpoint"),
    }
    assert forbidden("models/decoder", imports) == {
        *("training/metrics", "data/shapes", "data/refer_index", "training/task"),
        "checkpoints/checkpoint",
    }
    assert forbidden("training/task", {"train"}) == {"train"}, "no file imports a command"
    assert forbidden("demo", {"predict"}) == {"predict"}


def test_models_read_no_file() -> None:
    for name in FILES:
        if folder_of(name) == "models":
            words = {word for node in ast.walk(tree_of(name)) for word in words_of(node)}
            assert not words & {"open", "Path", "pathlib", "safetensors", "load_file"}, name


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_is_a_junk_drawer(name: str) -> None:
    assert not JUNK_DRAWERS & set(name.split("/"))


def test_tests_mirror_the_folders() -> None:
    tests = Path(__file__).parent
    folders = {path.name for path in tests.iterdir() if (path / "__init__.py").is_file()}
    assert set(MAY_IMPORT) <= folders
    assert folders - set(MAY_IMPORT) == {"commands", "documents", "scripts", "golden"}


def run_python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_importing_the_package_imports_no_large_library() -> None:
    result = run_python("import json, sys, crislit; print(json.dumps(sorted(sys.modules)))")
    loaded = {module.split(".")[0] for module in json.loads(result.stdout)}
    assert "crislit" in loaded
    heavy = {"torch", "lightning", "hydra", "omegaconf", "open_clip", "albumentations", "cv2"}
    assert not loaded & heavy
    assert result.stderr == ""


def test_imports_have_no_side_effects() -> None:
    """Only commands change warning filters, loggers and the environment."""
    libraries = [
        "crislit." + name.replace("/", ".").removesuffix(".__init__")
        for name in FILES
        if folder_of(name) != "root"
    ]
    code = f"""
import importlib, json, logging, os, warnings
import albumentations, cv2, gradio, lightning, matplotlib, open_clip, onnxruntime, torch, wandb
import hydra, huggingface_hub, torchmetrics, pycocotools.mask, rich.table, lightning.pytorch.loggers
before = dict(os.environ), list(warnings.filters)
watched = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
levels = [(logger.level, len(logger.filters)) for logger in watched]
for name in {libraries!r}:
    importlib.import_module(name)
assert dict(os.environ) == before[0], set(os.environ.items()) ^ set(before[0].items())
assert list(warnings.filters) == before[1]
assert levels == [(logger.level, len(logger.filters)) for logger in watched]
"""
    run_python(code)


def test_the_package_offers_its_public_names_and_nothing_else() -> None:
    for name in crislit.__all__:
        assert getattr(crislit, name) is not None
    with pytest.raises(AttributeError, match="module 'crislit' has no attribute 'nonsense'"):
        _ = crislit.nonsense
