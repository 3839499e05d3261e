"""Writes the page about the configuration from ``conf/`` and its comments."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from scripts.pages.conf_files import ConfigFile, read_config_file
from scripts.pages.text import code, escape, join_blocks

from crislit.errors import require
from crislit.experiments.tables import markdown

GROUPS = {
    **{"dataset": "shapes", "model": "tiny", "recipe": "shapes", "trainer": "auto"},
    **{"augment": "none", "logger": "csv"},
    **dict.fromkeys(("neck", "decoder", "image_projector", "head", "loss", "callbacks"), ""),
    **{"ablation": "", "experiment": ""},
}
"""The groups in the order of the page, and their default choices."""
NOT_DEFAULTS = ("ablation", "experiment")
"""Groups that are not part of the defaults of a run."""
INTRODUCTION = """
Set a key with `KEY=VALUE`, and select a file of a group with `GROUP=CHOICE`:

    python -m crislit.train dataset=gshapes recipe.epochs=1 decoder.layers=2

With `-m`, commas make a sweep: `-m decoder.layers=1,2 seed=0,1`. The command line overrides the
files of `conf/`. Of the groups, a later one of this list overrides an earlier one: `neck`,
`decoder`, `image_projector`, `head`, `loss`, `callbacks`, `augment`, `logger`, `trainer`, `recipe`,
`dataset`, `model`, `ablation`, `experiment`. A data set also selects its recipe.
`python -m crislit.train --cfg job` prints the complete configuration, and every run stores its own
in `.hydra/config.yaml`. [Extend](../extend.md) shows how to add files.

Hydra's own keys are not listed: `hydra.run.dir=FOLDER` chooses the folder of a run, and
`hydra/launcher=joblib` or `hydra/launcher=slurm` run the jobs of a sweep in parallel.
"""
OF_EVALUATION = """
The keys of `python -m crislit.evaluate`. The network comes from the checkpoint, and so does the
data set, unless `dataset=CHOICE` names another. `trainer=CHOICE` is the same as in training.
"""


def read_group(conf: Path, group: str) -> dict[str, ConfigFile]:
    """Return the choices of a group, the default one first.

    Raises:
        InputError: If a file has no comment at its top.
    """
    names = sorted(path.stem for path in (conf / group).glob("*.yaml"))
    names.sort(key=lambda name: name != GROUPS[group])
    files = {name: read_config_file(conf, f"{group}/{name}") for name in names}
    for file in files.values():
        require(file.title, f"conf/{file.name} has no comment at its top: say what the choice is")
    return files


def flatten(values: Mapping[str, Any], whole: Collection[str], prefix: str = "") -> dict[str, Any]:
    """Return nested values by their full names.

    Args:
        values: Nested dictionaries.
        whole: Names of dictionaries that are one value.
        prefix: Stands before the names.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        is_group = isinstance(value, dict) and value and name not in whole
        flat |= flatten(value, whole, f"{name}.") if is_group else {name: value}
    return flat


def format_value(value: Any) -> str:
    """Format a value as on the command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {format_value(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(format_value, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value) if value != "" else '""'


def format_choices(values: Mapping[str, Any], count: int) -> str:
    """Format what a key's value is with each choice of a group.

    Args:
        values: The value of each choice that sets the key.
        count: The number of choices that the group has.
    """
    if all(value == choice for choice, value in values.items()):
        return "the choice"
    by_value = group_by_value(values)
    if len(by_value) == 1 and len(values) == count:
        return next(iter(by_value))
    return "; ".join(f"{value} ({choices})" for value, choices in by_value.items())


def group_by_value(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the choices that give each value, both formatted as code."""
    by_value: dict[str, list[str]] = {}
    for choice, value in values.items():
        by_value.setdefault(code(format_value(value)), []).append(code(choice))
    return {value: ", ".join(choices) for value, choices in by_value.items()}


class Configuration:
    """All files of ``conf/``, and the meaning of each key.

    Args:
        conf: The folder.

    Raises:
        InputError: If a choice has no comment at its top.
    """

    def __init__(self, conf: Path) -> None:
        self.train, self.evaluate = (read_config_file(conf, x) for x in ("train", "evaluate"))
        self.groups = {group: read_group(conf, group) for group in GROUPS}
        self.explaining = [group for group in GROUPS if group not in NOT_DEFAULTS]
        files = [x for group in self.explaining for _, x in sorted(self.groups[group].items())]
        self.meanings: dict[str, str] = {}
        for file in [self.train, *files]:
            self.meanings = {**file.comments, **self.meanings}

    def meaning(self, key: str, file: ConfigFile) -> str:
        """Return what a key means.

        Args:
            key: Its full name.
            file: A file that sets it.

        Raises:
            InputError: If it has no comment.
        """
        meanings = file.comments if file is self.evaluate else self.meanings
        require(
            key in meanings,
            f"conf/{file.name}: the key {key} has no comment: write its meaning beside it",
        )
        return escape(meanings[key])

    def own_keys(self, file: ConfigFile) -> str:
        """Return the keys of a command's primary file, their defaults and meanings."""
        rows = [
            [code(key), self.default(key, value, file), self.meaning(key, file)]
            for key, value in flatten(file.values, ()).items()
        ]
        return markdown([["key", "default", "meaning"], *rows], left=3)

    def default(self, key: str, value: Any, file: ConfigFile) -> str:
        """Format the value of a key, and the values that choices of groups give it in training."""
        parts = [code(format_value(value))] if value != "???" else []
        return "; ".join(parts + (self.set_by_others(key) if file is self.train else []))

    def set_by_others(self, key: str, but: str = "") -> list[str]:
        """Format the values that choices of groups give a key.

        Args:
            key: Its full name.
            but: A group to leave out.
        """
        parts: list[str] = []
        for group in self.explaining:
            choices = {} if group == but else self.groups[group]
            flat = {f"{group}={x}": flatten(y.values, self.meanings) for x, y in choices.items()}
            by_value = group_by_value({x: keys[key] for x, keys in flat.items() if key in keys})
            parts += [f"{value} with {names}" for value, names in by_value.items()]
        return parts

    def key_table(self, group: str) -> str:
        """Return the keys of a group, their values and meanings."""
        choices = {name: flatten(x.values, self.meanings) for name, x in self.groups[group].items()}
        table = [["key", "value", "meaning"]]
        for key in dict.fromkeys(key for flat in choices.values() for key in flat if key != group):
            values = {name: flat[key] for name, flat in choices.items() if key in flat}
            parts = [format_choices(values, len(choices))]
            if key.startswith(f"{group}."):
                parts += self.set_by_others(key, group)
            meaning = self.meaning(key, self.groups[group][next(iter(values))])
            table.append([code(key), "; ".join(parts), meaning])
        return markdown(table, left=3)

    def choice_table(self, group: str) -> str:
        """Return the choices of a group."""
        table = [["choice", "what it is", "also selects"]]
        for name, file in self.groups[group].items():
            default = " (default)" if name == GROUPS[group] else ""
            selected = ", ".join(f"`{key}={choice}`" for key, choice in file.selects.items())
            table.append([f"`{group}={name}`{default}", describe(file), selected or "-"])
        if all(row[2] == "-" for row in table[1:]):
            table = [row[:2] for row in table]
        return markdown(table, left=3)


def describe(file: ConfigFile) -> str:
    """Return the comment at a file's top, with overrides as code."""
    override = r"[\w./]+=[^\s;]*\w"
    return re.sub(
        rf"(`[^`]+`)|((?:-m )?{override}(?: {override})*)",
        lambda match: match[1] or f"`{match[2]}`",
        escape(file.title),
    )


def experiment_table(file: ConfigFile) -> str:
    """Return what an experiment sets, with its comments."""
    values = {f"defaults.{key}": choice for key, choice in file.selects.items()}
    rows = [
        [code(key.removeprefix("defaults.")), code(format_value(value))]
        + [escape(file.comments.get(key, ""))]
        for key, value in {**values, **flatten(file.values, ())}.items()
    ]
    return markdown([["key", "value", "reason"], *rows], left=3)


def configuration_page(conf: Path) -> str:
    """Return the reference of all keys.

    Args:
        conf: The folder of the configuration.

    Raises:
        InputError: If a key or a choice has no comment.
    """
    files = Configuration(conf)
    blocks = ["# Configuration", INTRODUCTION.strip(), "## train", files.own_keys(files.train)]
    for group in GROUPS:
        blocks += [f"## {group}", files.choice_table(group)]
        if group == "trainer":
            blocks.append(
                "The keys are arguments of `lightning.Trainer`. Add others with "
                "`+trainer.NAME=VALUE`."
            )
        if group != "experiment":
            blocks.append(files.key_table(group))
            continue
        for name, file in files.groups[group].items():
            blocks += [f"### experiment={name}", experiment_table(file)]
    evaluation = ["## evaluate", OF_EVALUATION.strip(), files.own_keys(files.evaluate)]
    return join_blocks([*blocks, *evaluation])
