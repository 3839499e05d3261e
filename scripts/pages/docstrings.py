"""Checks that docstrings document public names, their parameters, shapes, errors and sources."""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import griffe

ARRAY = re.compile(r"\b(?:Tensor|NDArray|Masks?|Image|ProbabilityMap)\b")
"""An annotation of an array."""
SHAPE = re.compile(r"\([^()]*\w[^()]*\)|\bshapes?\b|\bscalars?\b|\bstate dict\b|by name|weights")
"""A shape, or a word that says that there is none to state."""
SOURCE = re.compile(r"[Ss]ection \d|[Ee]quation|paper|CLIP|released|[Tt]able \d")
"""Where a part of the network is from."""
MODULES = {"nn.Module", "nn.Sequential", "Recomputable"}
RAISING = {"InputError", "DamagedFileError"}
CHECKS = {"require", "check_integer"}
"""Functions that raise an ``InputError``."""


def docstring_violations(source: Path, package: str = "crislit") -> list[str]:
    """List public names without a docstring, and what docstrings omit.

    Public is what a package's ``__all__`` lists, and the public methods of its classes. A docstring
    mentions every parameter, under ``Args:`` or in its text (an only one may be obvious), the
    shapes of tensors and arrays, the errors for users that its function raises, and, if it is of a
    module of the network, the source.

    Args:
        source: The folder of the package.
        package: The package, whose packages are checked, too.
    """
    root = griffe.load(package, search_paths=[str(source)], try_relative_path=False)
    packages = [root, *(x for x in root.modules.values() if x.is_init_module and x.exports)]
    found: list[str] = []
    for module in packages:
        for name in (x for x in map(str, module.exports or ()) if not x.startswith("__")):
            try:
                member = module[name]
                target = member.final_target if isinstance(member, griffe.Alias) else member
                found += object_violations(target)
            except (KeyError, griffe.AliasResolutionError):
                found.append(f"{module.path}.{name}: not found, define it alone in a statement")
    return list(dict.fromkeys(found))


def object_violations(item: griffe.Object) -> Iterator[str]:
    """Yield what is missing in the docstring of a name, and of its public methods."""
    if not item.docstring:
        yield f"{item.path}: no docstring"
        return
    text = item.docstring.value
    if isinstance(item, griffe.Class):
        constructor = item.members.get("__init__")
        if isinstance(constructor, griffe.Function):
            yield from function_violations(constructor, text)
        if MODULES & set(map(str, item.bases)) and not SOURCE.search(text):
            yield f"{item.path}: no section, equation or other source"
        for name, method in item.members.items():
            if not name.startswith("_") and isinstance(method, griffe.Function):
                yield from object_violations(method)
    elif isinstance(item, griffe.Function):
        yield from function_violations(item, text)


def function_violations(function: griffe.Function, text: str) -> Iterator[str]:
    """Yield what a docstring omits.

    Args:
        function: The function.
        text: The docstring of it or of its class.
    """
    parameters = [x for x in function.parameters if x.name not in ("self", "cls")]
    names = [x.name.lstrip("*") for x in parameters]
    missing = [name for name in names if not name.startswith("_") and not mentions(text, name)]
    if missing and len(names) > 1:
        yield f"{function.path}: nothing about {', '.join(missing)}"
    annotations = [str(x.annotation) for x in parameters] + [str(function.returns)]
    if any(map(ARRAY.search, annotations)) and not SHAPE.search(text):
        yield f"{function.path}: no shapes"
    if unnamed := sorted(error for error in errors(function) if error not in text):
        yield f"{function.path}: nothing about {', '.join(unnamed)}"


def errors(function: griffe.Function) -> set[str]:
    """Return which errors for users the statements of a function raise."""
    raised: set[str] = set()
    for node in ast.walk(ast.parse(textwrap.dedent("\n".join(function.lines)))):
        called = getattr(node, "exc", None) if isinstance(node, ast.Raise) else node
        name = ast.unparse(called.func) if isinstance(called, ast.Call) else ""
        raised |= {"InputError"} if name in CHECKS else {name} & RAISING
    return raised


def mentions(text: str, name: str) -> bool:
    """Whether a text has a word of a parameter's name, in singular or plural."""
    words = (word.removesuffix("s") for word in name.split("_"))
    return any(re.search(rf"\b{word}", text, re.IGNORECASE) for word in words)
