"""Explains what is wrong with an override on the command line, in one line."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import InterpolationKeyError

from crislit.config import known_settings, list_choices, settings_of_choice
from crislit.errors import InputError, require, see
from crislit.training.settings import did_you_mean, unknown_setting
from crislit.training.trainer_options import trainer_arguments

PATHS = (
    *("data_root", "dataset.file", "dataset.sentences", "dataset.images", "checkpoint", "record"),
    *("resume", "init_from", "model.clip_weights", "hydra.run.dir", "hydra.sweep.dir"),
)
"""Settings that hold a path, in which ``~`` is the home folder."""
KEY = re.compile(r"[+~]{0,2}[\w.@/:-]+")
"""A key of Hydra's overrides, as far as it can be set."""

HYDRA_NOISE = (
    *("Set the environment", "Config search path", "provider=", "full_key:", "object_type="),
    "See https://hydra.cc",
)
"""Beginnings of the lines that Hydra's errors can do without."""
NULL_GROUP = "Config group override must be a string or a list"
"""Beginning of the ValueError that Hydra raises for GROUP=null."""


def expand_home(arguments: Sequence[str]) -> list[str]:
    """Return a command line with ``~`` replaced by the home folder in settings that hold paths.

    A shell replaces it at the beginning of a word only, and Hydra takes it for a syntax error.
    """
    return [_expand(argument) for argument in arguments]


def _expand(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals or key.lstrip("+") not in PATHS or "~" not in value:
        return argument
    home = str(Path.home())
    return key + equals + re.sub(r"(^|[,'\"])~(?=/|\\|$)", lambda match: match[1] + home, value)


def quote_value(text: str) -> str:
    """Quote a value for Hydra's grammar, in which = ( ~ , and others have a meaning."""
    if '"' not in text and not text.endswith("\\"):
        return f'"{text}"'
    # Backslashes count double before a quotation mark and at the end.
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


def check_options(arguments: Sequence[str], command: str) -> None:
    """Check that no setting is written as an option, ``--epochs 1``, and no sweep is to be shown.

    Raises:
        InputError: If one is.
    """
    options = {argument.partition("=")[0] for argument in arguments}
    require(
        options.isdisjoint(("--cfg", "-c")) or options.isdisjoint(("-m", "--multirun")),
        "--cfg shows one configuration, and -m asks for several: leave out -m and the commas",
    )
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and (found := find_setting(name[2:], command)):
            raise InputError(f"{name} is not an option: write {found}=VALUE")


def find_setting(name: str, command: str) -> str | None:
    """Return the full name of the first setting with a last part, ``recipe.epochs`` for ``epochs``.

    Args:
        name: The last part of the name.
        command: ``train`` or ``evaluate``.
    """
    last = name.rpartition(".")[2].replace("-", "_")
    groups: list[tuple[str, Mapping[str, Any]]] = [("", known_settings(command))]
    for path, settings in groups:  # those of a group before those of groups in it
        if last in settings:
            return f"{path}{last}"
        groups += [(f"{path}{key}.", x) for key, x in settings.items() if isinstance(x, Mapping)]
    return None


def explain_syntax(override: str) -> str:
    """Return the message about an override that Hydra's grammar cannot read."""
    key, equals, value = override.partition("=")
    if not equals or not KEY.fullmatch(key):
        return f"cannot read the argument {override!r}: expected KEY=VALUE; --help lists the keys"
    if value.startswith(("{", "[")):
        return (
            f"cannot read the argument {override!r}: if it continues after a space, quote it all "
            f"for the shell, {key}='{value[0]}...'; if it is text, quote the text inside, too"
        )
    quoted = shlex.quote(f"{key}={quote_value(value)}")
    return f"cannot read the argument {override!r}: quote its value, once for the shell: {quoted}"


def explain_commas(override: str) -> str:
    """Return the message about an override with commas, where one value is expected."""
    key, _, value = override.partition("=")
    quoted = shlex.quote(f"{key}={quote_value(value)}")
    listed = shlex.quote(f"{key}=[{value}]")
    return (
        f"the argument {override!r} has commas: write {quoted} for text, {listed} for a list, or "
        f"add -m to run once per value{see('unknown-key')}"
    )


def explain_choice(missing: str, options: Sequence[str] | None) -> str:
    """Return the message about a choice that a group does not have.

    Args:
        missing: Group and choice, ``model/rn5``.
        options: The group's choices, if Hydra lists them.
    """
    group, _, choice = missing.rpartition("/")
    options = options or list_choices(group)
    guess = did_you_mean(f"{choice}", options, f"{group}=")
    return f"Could not find '{missing}'{guess or ':'} {group} has {', '.join(options)}"


def explain_error(error: Exception, command: str) -> str:
    """Return the message about a command that cannot run, as one line.

    Args:
        error: An error of ours, of Hydra or of OmegaConf.
        command: ``train`` or ``evaluate``.
    """
    if isinstance(error, InputError):  # a data worker's message includes its traceback
        return str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].rstrip()
    if isinstance(error, OverrideParseException):
        return explain_syntax(error.override)
    if isinstance(error, MissingConfigException) and "/" in str(error.missing_cfg_file):
        return explain_choice(str(error.missing_cfg_file), error.options)
    message = _join_lines(error)
    if isinstance(error, ConfigCompositionException):
        first = str(error).splitlines()[0]
        argument = first.partition("'")[2].rpartition("'")[0]
        if first.startswith("Ambiguous value"):
            return explain_commas(argument)
        if first.startswith("Could not override") and argument:
            hint = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
            return explain_key(argument, hint, command)
    key = getattr(error, "full_key", None)
    line = f"{message} ({key})" if key and str(key) not in message else message
    if isinstance(error, InterpolationKeyError):
        line += ". For text with ${, such as a path, write \\${"
    return line


def _join_lines(error: Exception) -> str:
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
    return " ".join(
        dict.fromkeys(line for line in lines if line and not line.startswith(HYDRA_NOISE))
    )


def is_null_group(error: ValueError) -> bool:
    """Whether Hydra refuses GROUP=null."""
    return str(error).startswith(NULL_GROUP)


def explain_null(arguments: Sequence[str]) -> str:
    """Return the message about GROUP=null, which is not a choice."""
    pairs = (argument.split("=") for argument in arguments if argument.endswith("=null"))
    group = next((pair[0] for pair in pairs if list_choices(pair[0])), "GROUP")
    return f"{group}=null is not a choice: {group} has {', '.join(list_choices(group))}"


def explain_key(key: str, hint: str, command: str) -> str:
    """Return the message about a key that the configuration does not have.

    Args:
        key: The key, ``decoder.layer``.
        hint: Hydra's message, for keys that ``+`` may add.
        command: ``train`` or ``evaluate``.
    """
    *path, name = key.split(".")
    known: Any = known_settings(command)
    if key.startswith("hydra.") or (path == ["trainer"] and name in trainer_arguments()):
        return hint
    for part in path:
        known = known.get(part) if isinstance(known, Mapping) else None
    group = ".".join(path)
    if not isinstance(known, Mapping):
        return f"{group} is a single setting without keys of its own: {group}=VALUE"
    if path == ["dataset"] and command == "evaluate":
        return (
            f"which data set? dataset=CHOICE, or +{key}=VALUE to change the one that the network "
            "was trained on"
        )
    if path and name in known:  # a key of another choice
        choices = [choice for choice in list_choices(path[0]) if _sets(path[0], choice, key)]
        return f"{key} is a setting of {' and '.join(f'{path[0]}={c}' for c in choices)} only"
    if path == ["trainer"]:
        known = {*known, *trainer_arguments()}
    if not path and isinstance(known.get(name), Mapping):  # a group of the other command
        return (
            f"{name} has no choices in {command}: set single keys, {name}.KEY=VALUE. "
            "--help lists them"
        )
    found = find_setting(name, command)
    if not path and found and found != name:
        return f"{name} is not a setting, did you mean {found}?{see('unknown-key')}"
    return unknown_setting(group, name, known)


def _sets(group: str, choice: str, key: str) -> bool:
    values: Any = settings_of_choice(group, choice)
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True
