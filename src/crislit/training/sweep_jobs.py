"""Lists the jobs of a sweep, so that they can be checked before the first one runs."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict

BASIC_SWEEPER = "BasicSweeper"
"""Hydra's own sweeper, whose jobs are known when it starts. Others choose them as they run."""


def list_jobs(config: DictConfig) -> Iterator[tuple[str, DictConfig, Path]]:
    """Yield the overrides, the configuration and the folder of every job, in their order.

    Args:
        config: The configuration of the sweep.
    """
    sweeper = config.hydra.sweeper
    if not str(sweeper.get("_target_")).endswith(BASIC_SWEEPER):
        return
    loader = GlobalHydra.instance().config_loader()
    parameters = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    for number, overrides in enumerate(expand([*parameters, *config.hydra.overrides.task])):
        job = loader.load_sweep_config(config, list(overrides))
        with open_dict(job):
            job.hydra.job.id, job.hydra.job.num = str(number), number
        yield " ".join(overrides), job, Path(job.hydra.sweep.dir, job.hydra.sweep.subdir)


def expand(arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the overrides of each job: every combination of the values of a sweep's arguments."""
    choices: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        key = override.get_key_element()
        if override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            choices[key] = [f"{key}={override.get_value_element_as_str()}"]
    return list(itertools.product(*choices.values()))
