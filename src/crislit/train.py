"""``python -m crislit.train``: train a network and evaluate every split."""

import os
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from crislit.errors import require
from crislit.training import SWEEP_JOB, hydra_command

PASSED_ON = ("hydra.searchpath", "hydra/job_logging", "hydra.job_logging", "hydra.verbose")
"""Hydra's overrides that a sweep passes on to its jobs: they change composition or logging."""


@hydra_command("train")
def main(config: DictConfig) -> float:
    """Train, evaluate every split with the best checkpoint, write results; return the mIoU."""
    # They take seconds to import, and --help needs none of them.
    from crislit.experiments.sweep import run_job
    from crislit.training.run import run

    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    if hydra.mode == RunMode.MULTIRUN:
        # By default, these parts of the path are the date and the time.
        return run_job(plain, job_arguments(hydra), folder, group="-".join(folder.parts[-3:-1]))
    is_recorded = any(text.lstrip("+").startswith("record=") for text in hydra.overrides.task)
    require(
        not (is_recorded and plain["record"]) or SWEEP_JOB in os.environ,
        "record=FILE records the runs of a sweep: add -m, or leave it out",
    )
    return run(plain, folder, hydra.overrides.task)


def job_arguments(hydra: HydraConf) -> list[str]:
    """Return the command line of a single run with the configuration of a sweep's job."""
    sources = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    arguments = [part for path in sources for part in ("--config-dir", path)]
    if hydra.job.config_name != "train":
        arguments += ["--config-name", str(hydra.job.config_name)]
    return [
        *arguments,
        *(text for text in hydra.overrides.hydra if text.lstrip("+").startswith(PASSED_ON)),
        *hydra.overrides.task,
    ]


if __name__ == "__main__":
    main()
