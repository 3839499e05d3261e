"""Checks the keys of a run's configuration."""

from collections.abc import Collection, Mapping
from typing import Any

from crislit.errors import InputError

Config = dict[str, Any]
"""A resolved configuration, as plain dictionaries and lists."""


def check_keys(group: str, values: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise an :class:`InputError` if a group of the configuration has an unknown key."""
    if unknown := sorted(set(values) - set(known)):
        raise InputError(
            f"{group}.{unknown[0]} is not a setting; {group} has {', '.join(sorted(known))}"
        )
