"""Checks that docstrings document public names and their parameters."""

import re
from collections.abc import Iterator
from pathlib import Path

import griffe


def docstring_violations(source: Path, package: str = "crislit") -> list[str]:
    """List public names without a docstring, and functions whose docstring omits parameters.

    Public is what a package's ``__all__`` lists, and the public methods of its classes. A docstring
    mentions a parameter under ``Args:`` or in its text; it may omit one that is obvious, not two.

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
            yield from parameter_violations(constructor, text)
        for name, method in item.members.items():
            if not name.startswith("_") and isinstance(method, griffe.Function):
                yield from object_violations(method)
    elif isinstance(item, griffe.Function):
        yield from parameter_violations(item, text)


def parameter_violations(function: griffe.Function, text: str) -> Iterator[str]:
    """Yield the parameters that a docstring does not mention, if there are at least two.

    Args:
        function: The function.
        text: The docstring of it or of its class.
    """
    names = [x.name.lstrip("*") for x in function.parameters if x.name not in ("self", "cls")]
    missing = [name for name in names if not name.startswith("_") and not mentions(text, name)]
    if len(missing) > 1:
        yield f"{function.path}: nothing about {', '.join(missing)}"


def mentions(text: str, name: str) -> bool:
    """Whether a text has a word of a parameter's name, in singular or plural."""
    words = (word.removesuffix("s") for word in name.split("_"))
    return any(re.search(rf"\b{word}", text, re.IGNORECASE) for word in words)
