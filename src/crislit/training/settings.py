"""Checks the keys of a run's configuration."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from crislit.config import BOXES, TARGET, known_settings, own_settings, settings_of_choice
from crislit.errors import InputError, require, see

Config = dict[str, Any]
"""A resolved configuration, as plain dictionaries and lists."""

FREE = ("dataset", "augment", "logger", "trainer", "model.clip")
"""Groups whose keys depend on their choice. They are checked where they are used."""
REPLACEABLE = (*BOXES, "loss")
"""Groups whose keys are the arguments of a class, if they name one as ``_target_``."""
REQUIRED = {
    "train": (("trainer", "auto"), ("recipe", "released"), ("model", "rn50")),
    "evaluate": (("trainer", "auto"),),
}
"""Choices of groups that set all keys of their group, by command."""
MAX_LISTED = 12
"""Number of keys up to which a message lists all of them beside the most similar one."""


def check_settings(config: Mapping[str, Any], command: str = "train") -> None:
    """Check that every key is one that a command reads, and that none was removed.

    Args:
        config: The composed configuration, before a checkpoint completes it.
        command: ``train`` or ``evaluate``.

    Raises:
        InputError: If a key is unknown or missing, or a group of keys has a single value.
    """
    _check_group("", config, known_settings(command), replaceable=command == "train")
    _check_present("", config, own_settings(command))
    require(
        "dataset" in config or command == "evaluate",
        "dataset is missing: choose one with dataset=CHOICE",
    )
    for group, choice in REQUIRED[command]:
        require(group in config, f"{group} is missing: choose one with {group}=CHOICE")
        _check_present("", config, settings_of_choice(group, choice))


def _check_group(
    path: str, values: Mapping[str, Any], known: Mapping[str, Any], replaceable: bool
) -> None:
    for name, value in values.items():
        full = f"{path}{name}"
        is_free = replaceable and (full in REPLACEABLE or path == "callbacks.")
        if is_free and isinstance(value, Mapping) and TARGET in value:
            continue
        require(
            full in known or full not in REPLACEABLE or not replaceable,
            f"{full}={value} names no class: {full}._target_ must be the one that replaces it"
            f"{see('boxes')}",
        )
        require(name in known, unknown_setting(path.rstrip("."), str(name), known))
        if full in FREE or not isinstance(known[name], dict):
            continue
        require(
            isinstance(value, Mapping),
            f"{full}={value} is not a choice: set single keys, {full}.KEY=VALUE. --help lists them",
        )
        _check_group(f"{full}.", value, known[name], replaceable)


def _check_present(path: str, values: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        require(name in values, f"{path}{name} is missing: it cannot be removed from the settings")
        if isinstance(value, Mapping) and isinstance(values[name], Mapping):
            _check_present(f"{path}{name}.", values[name], value)


def check_keys(group: str, values: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise an ``InputError`` if a group of the configuration has an unknown key."""
    if unknown := sorted(set(values) - set(known)):
        raise InputError(unknown_setting(group, unknown[0], known))


def unknown_setting(group: str, name: str, known: Iterable[str]) -> str:
    """Return the message about an unknown key.

    Args:
        group: The group that it is in; empty for none.
        name: The key.
        known: The group's keys.
    """
    path, names = f"{group}." if group else "", sorted(known)
    guess = did_you_mean(name, names, path)
    if guess and len(names) > MAX_LISTED:
        return f"{path}{name} is not a setting{guess}{see('unknown-key')}"
    owner = f"{group} has" if group else "there are"
    return (
        f"{path}{name} is not a setting{guess or ';'} {owner} {', '.join(names)}"
        f"{see('unknown-key')}"
    )


def did_you_mean(name: str, choices: Iterable[str], path: str = "") -> str:
    """Return a question with the most similar choice, or nothing if none is similar."""
    similar = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f", did you mean {path}{similar[0]}?" if similar else ""
