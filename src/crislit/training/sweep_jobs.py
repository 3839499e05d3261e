"""Lists the jobs of a sweep, so that they can be checked before the first one runs."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict

from crislit.errors import require

BASIC_SWEEPER = "BasicSweeper"
"""Hydra's own sweeper, whose jobs are known when it starts. Others choose them as they run."""


def list_jobs(config: DictConfig) -> Iterator[tuple[str, DictConfig, Path]]:
    """Yield the swept overrides, the configuration and the folder of every job, in their order.

    Args:
        config: The configuration of the sweep.

    Raises:
        InputError: If a sweep needs another sweeper.
    """
    sweeper = config.hydra.sweeper
    if not str(sweeper.get("_target_")).endswith(BASIC_SWEEPER):
        return
    loader, hydra = GlobalHydra.instance().config_loader(), HydraConfig.instance()
    before = hydra.cfg
    parameters = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    try:
        for number, (overrides, swept) in enumerate(
            expand([*parameters, *config.hydra.overrides.task], loader)
        ):
            job = loader.load_sweep_config(config, overrides)
            with open_dict(job):
                job.hydra.job.id, job.hydra.job.num = str(number), number
            hydra.set_config(job)  # for ${hydra:job.num}
            yield " ".join(swept), job, Path(job.hydra.sweep.dir, job.hydra.sweep.subdir)
    finally:
        hydra.cfg = before


def expand(
    arguments: Sequence[str], loader: ConfigLoader | None = None
) -> list[tuple[list[str], list[str]]]:
    """Return all overrides of each job, and those of them that differ between the jobs.

    Args:
        arguments: The arguments of the sweep; every combination of their values is a job.
        loader: Lists the choices of a group for ``glob``.

    Raises:
        InputError: If values are not listed.
    """
    choices: dict[str, list[str]] = {}
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(arguments)):
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [f"{key}={override.get_value_element_as_str()}"]
            continue
        require(
            override.is_discrete_sweep(),
            f"{override.input_line} has no list of values: write {key}=VALUE,VALUE or range(...)",
        )
        choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
    swept = {key for key, values in choices.items() if len(values) > 1}
    return [
        (list(job), [text for key, text in zip(choices, job, strict=True) if key in swept])
        for job in itertools.product(*choices.values())
    ]
