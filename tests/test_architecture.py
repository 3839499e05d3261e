"""The house: which file may import which, and who may know of Hydra and Lightning."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import crislit

SOURCE = Path(crislit.__file__).parent
# A file imports only from files of earlier rows. Files of one row do not import each other.
ORDER = [
    ["errors", "memory"],
    ["processes"],
    ["paper"],
    ["config"],
    ["pickles"],
    ["data/refer"],
    ["data/letterbox"],
    ["picture"],
    ["data/tokenizer"],
    ["data/expressions"],
    ["data/workers"],
    ["data/shapes"],
    ["data/transform"],
    ["data/custom"],
    ["data/dataset"],
    ["data/datamodule"],
    ["models/recompute"],
    ["models/image_encoder", "models/text_encoder", "models/neck", "models/decoder", "models/projector"],  # figure 3
    ["models/cris"],
    ["models/rearranged"],
    ["models/released"],
    ["models/clip_weights"],
    ["checkpoint"],
    ["losses"],
    ["metrics"],
    ["task"],
    ["loggers"],
    ["callbacks"],
    ["record"],
    ["resume"],
    ["finite"],
    ["sweep"],
    ["card"],
    ["onnx_network"],
    ["quantise"],
    ["segmenter"],
    ["overlay"],
    ["plain", "timing"],  # of the benchmark
    ["training_benchmark", "data_benchmark"],
    ["train", "evaluate", "predict", "convert", "export", "check_data", "report", "figures", "benchmark", "demo"],
]
SAME_ROW = {
    ("models/projector", "models/neck"),  # conv_bn_relu
    ("evaluate", "train"),
    ("benchmark", "train"),
    ("benchmark", "export"),
    ("demo", "predict"),
    ("figures", "train"),
}
MAY_IMPORT_THE_PACKAGE = {"callbacks", "checkpoint"}  # for its version
MAY_KNOW_HYDRA = {"config", "train", "evaluate", "sweep"}  # sweep by the command lines that it writes
JUNK_DRAWERS = {"utils", "util", "misc", "common", "helpers"}

ROWS = {name: row for row, names in enumerate(ORDER) for name in names}


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").as_posix()


FILES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}
MODULES = {name: path for name, path in FILES.items() if path.name != "__init__.py"}


def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imported_modules(tree: ast.Module, package: str) -> set[str]:
    """Return full names of all that is imported anywhere in a file, inside functions and for types alone included."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            modules |= {f"{module}.{alias.name}" for alias in node.names}
    return modules


def imported_files(name: str, tree: ast.Module | None = None) -> set[str]:
    """Return the names of this package's files that a file imports; the package itself is called ``crislit``."""
    package = ".".join(["crislit", *name.split("/")[:-1]])
    found = set()
    for module in imported_modules(tree or tree_of(name), package):
        if module.split(".")[0] != "crislit":
            continue
        path = module.split(".")[1:]
        # "from crislit.data import shapes" names a file; "from crislit.data.refer import Mask" a thing in one.
        candidates = ["/".join(path[:end]) for end in (len(path), len(path) - 1) if end > 0]
        found.add(next((candidate for candidate in candidates if candidate in MODULES), "crislit"))
    return found


def forbidden(name: str, imports: set[str]) -> set[str]:
    allowed = {other for other in ROWS if ROWS[other] < ROWS[name]} | {b for a, b in SAME_ROW if a == name}
    allowed |= {"crislit"} if name in MAY_IMPORT_THE_PACKAGE else set()
    return imports - allowed


def test_every_file_has_its_place_in_the_order() -> None:
    strangers = set(MODULES) - set(ROWS)
    assert not strangers, f"decide where in ORDER of this test they belong, and what they may import: {sorted(strangers)}"


def test_the_files_that_others_build_on_are_all_there() -> None:
    assert set(ROWS) == set(MODULES)


def test_source_holds_this_package_and_the_sweep_launchers_namespace_only() -> None:
    if SOURCE.parent.name != "src":
        pytest.skip("not an editable install")
    folders = {path.name for path in SOURCE.parent.iterdir() if path.is_dir() and not path.name.endswith((".egg-info", "__"))}
    assert folders <= {"crislit", "hydra_plugins"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name: str) -> None:
    wrong = forbidden(name, imported_files(name))
    assert not wrong, f"{name} imports {sorted(wrong)}, which come after it or beside it"


def test_every_way_to_write_an_import_is_seen() -> None:
    source = """
import crislit
import crislit.metrics as m
from crislit.data import shapes
from crislit.data.refer import Mask, ReferIndex
from .cris import CRIS
from ..errors import InputError
from . import neck
if TYPE_CHECKING:
    from crislit.task import CRISTask
def late():
    from crislit import checkpoint
import crislitter
"""
    found = imported_files("models/released", ast.parse(source))
    assert found == {
        "crislit",
        "metrics",
        "data/shapes",
        "data/refer",
        "models/cris",
        "errors",
        "models/neck",
        "task",
        "checkpoint",
    }
    assert forbidden("models/released", found) == {"crislit", "metrics", "task", "checkpoint"}


def test_boxes_of_the_figure_do_not_import_each_other() -> None:
    assert forbidden("models/decoder", {"models/neck"}) == {"models/neck"}
    assert not forbidden("models/projector", {"models/neck"})
    assert forbidden("models/neck", {"models/projector"}) == {"models/projector"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_is_a_junk_drawer(name: str) -> None:
    assert not JUNK_DRAWERS & set(name.split("/"))


@pytest.mark.parametrize("name", sorted(set(FILES) - MAY_KNOW_HYDRA))
def test_only_the_two_programs_and_the_configuration_know_hydra(name: str) -> None:
    known = {word for node in ast.walk(tree_of(name)) for word in words_of(node)}
    assert not known & {"hydra", "omegaconf", "DictConfig", "ListConfig", "OmegaConf"}


def words_of(node: ast.AST) -> set[str]:
    """Return what a piece of code names; prose in docstrings may say anything."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        return {part for module in [*modules, *(alias.name for alias in node.names)] for part in module.split(".")}
    if isinstance(node, ast.Name):
        return {node.id}
    if isinstance(node, ast.Attribute):
        return {node.attr}
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a quoted type, or import_module("hydra")
        return {node.value, node.value.split(".")[0]} if node.value.isidentifier() or "." in node.value else set()
    return set()


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.startswith("models/") or name in ("losses", "metrics")))
def test_the_network_and_its_loss_do_not_know_lightning(name: str) -> None:
    roots = {module.split(".")[0] for module in imported_modules(tree_of(name), "crislit.models")}
    assert not roots & {"lightning", "pytorch_lightning", "lightning_fabric"}


def test_importing_the_package_starts_neither_torch_nor_lightning_nor_hydra_nor_open_clip() -> None:
    code = "import json, sys, crislit; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = {module.split(".")[0] for module in json.loads(result.stdout)}
    assert "crislit" in loaded
    heavy = {"torch", "lightning", "pytorch_lightning", "hydra", "omegaconf", "open_clip", "albumentations", "cv2", "wandb"}
    assert not loaded & heavy
    assert result.stderr == ""


def test_what_the_package_offers_can_be_asked_for_and_nothing_else() -> None:
    for name in crislit.__all__:
        assert getattr(crislit, name) is not None
    with pytest.raises(AttributeError, match="module 'crislit' has no attribute 'nonsense'"):
        _ = crislit.nonsense
