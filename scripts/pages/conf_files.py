"""Reads the files of ``conf/`` with their comments."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

LINE = re.compile(r"( *)(- )?(?:override /)?([\w.]+):(?: .*?)??(?:\s+# (.*))?")


@dataclass(frozen=True)
class ConfigFile:
    """A file of ``conf/``.

    Attributes:
        name: Its path in ``conf/``.
        title: The comment at its top.
        comments: The comment of each key that has one.
        values: Its values, with those of the files that it includes, as nested dictionaries.
        selects: The choices of other groups that it selects.
    """

    name: str
    title: str
    comments: Mapping[str, str]
    values: Mapping[str, Any]
    selects: Mapping[str, str]


def read_comments(text: str) -> dict[str, str]:
    """Return the comments beside or above the keys of a YAML file, by the keys' full names.

    The comments at the top of the file belong to no key. Entries of the defaults list are named
    ``defaults.GROUP``.
    """
    comments: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    above: list[str] = []
    lines = text.splitlines()
    for line in itertools.dropwhile(lambda line: line.startswith("#"), lines):
        if line.lstrip().startswith("#"):
            above.append(line.strip("# "))
            continue
        if match := LINE.fullmatch(line):
            indent = len(match[1]) + len(match[2] or "")
            path = [*(parent for parent in path if parent[0] < indent), (indent, match[3])]
            if comment := match[4] or " ".join(above):
                comments[".".join(name for _, name in path)] = comment
        above = []
    return comments


def read_title(text: str) -> str:
    """Return the comment at the top of a YAML file, up to its first command."""
    top = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    lines = (line[2:] for line in top if "@package" not in line)
    return " ".join(itertools.takewhile(lambda line: not line.startswith("python "), lines))


def read_config_file(conf: Path, name: str) -> ConfigFile:
    """Read a file of ``conf/`` and those that it includes.

    Args:
        conf: The folder.
        name: ``train`` or ``dataset/shapes``.
    """
    text = (conf / f"{name}.yaml").read_text(encoding="utf-8")
    content: Any = OmegaConf.to_container(OmegaConf.create(text))
    defaults, _ = content.pop("defaults", []), content.pop("hydra", None)
    group = name.rpartition("/")[0].partition("/")[0]
    comments = read_comments(text)
    if group and "@package _global_" not in text:
        content, comments = {group: content}, {f"{group}.{k}": v for k, v in comments.items()}
    selects: dict[str, str] = {}
    for base in (x for x in defaults if group and isinstance(x, str)):
        included = read_config_file(conf, f"{group}/{base}")
        content = OmegaConf.to_container(OmegaConf.merge(included.values, content))
        selects |= included.selects
    entries = [item for x in defaults if isinstance(x, dict) for item in x.items()]
    selects |= {k.removeprefix("override /"): x for k, x in entries if k.startswith("override /")}
    return ConfigFile(f"{name}.yaml", read_title(text), comments, content, selects)
