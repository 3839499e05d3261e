"""How a Hydra command starts and fails."""

import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from crislit.config import config_dir
from crislit.errors import (
    InputError,
    discard_unwritten,
    escape_unencodable,
    first_line,
    is_disk_full,
    printable,
    require,
    see,
)
from crislit.training import processes, run_folder
from crislit.training.command_line import (
    check_options,
    expand_home,
    explain_error,
    explain_null,
    is_null_group,
)
from crislit.training.launch import check_launch, check_numbers, started_processes
from crislit.training.settings import Config, check_settings
from crislit.training.sweep_jobs import list_jobs
from crislit.training.terminal import log_warnings, quiet_lightning
from crislit.training.trainer_options import check_trainer

SWEEP_JOB = "CRISLIT_SWEEP_JOB"
"""Environment variable: the folder that a sweep made for its job, which need not be empty."""
FULL_ERROR = "CRISLIT_FULL_ERROR"
"""Environment variable: the user's ``HYDRA_FULL_ERROR``, for the jobs of a sweep."""
DISK_FULL_MESSAGE = (
    "the disk is full: {}. Files written before are intact; make room, start again"
    f"{see('disk-space')}"
)
CONTINUE = ". To continue a run that was interrupted: resume=auto"


class RunGuard(Callback):
    """Checks a command and reserves its folder before anything is written (``hydra.callbacks``).

    Args:
        command: ``train`` or ``evaluate``.
        job_check: Name of a function that checks configuration and folder of each job of a sweep;
            None for one that refuses results. A name, since importing it takes seconds.
    """

    def __init__(self, command: str, job_check: str | None = None) -> None:
        self.command = command
        self.job_check = job_check

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check settings, processes and the run's folder, and reserve the folder."""
        try:
            check_config(config, self.command)
            check_launch(config.trainer)
            if not processes.is_main_process():
                with open_dict(config):
                    config.hydra.output_subdir = None  # the main process saves the configuration
            self._check_folder_name(config)
            if processes.is_main_process():
                self._reserve(Path(config.hydra.run.dir), config.get("resume") == "auto")
        except (InputError, OmegaConfBaseException) as error:
            _exit_with_error(error)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Reserve the folder of a sweep, and check all of its jobs."""
        try:
            check_numbers()
            folder = Path(config.hydra.sweep.dir)
            run_folder.reserve(folder, "hydra.sweep.dir")
            for lock in folder.glob(f"*/{run_folder.LOCK}"):  # of a job whose sweep was killed
                owner = run_folder.find_owner(lock.parent)
                require(
                    owner is None,
                    f"{lock.parent} is in use by {owner}: choose another hydra.sweep.dir, or wait "
                    f"until it has ended{see('folder-in-use')}",
                )
            check = hydra.utils.get_method(self.job_check) if self.job_check else check_unused
            for overrides, job, job_folder in list_jobs(config):
                try:
                    check(check_config(job, self.command), job_folder)
                except InputError as error:
                    job_name = f" (in the job {overrides})" if overrides else ""
                    raise InputError(f"{error}{job_name}") from error
        except (InputError, HydraException, OmegaConfBaseException) as error:
            _exit_with_error(error, self.command)

    def _check_folder_name(self, config: DictConfig) -> None:
        """Check that processes and starts that belong together find the same folder."""
        named_by_time = "${now:" in str(OmegaConf.to_container(config.hydra.run, resolve=False))
        require(
            not named_by_time or config.get("resume") != "auto",
            "resume=auto needs a folder that it finds again: add hydra.run.dir=FOLDER"
            f"{see('interrupted')}",
        )
        require(
            not named_by_time or (started_processes() or 1) == 1,
            "processes that torchrun or Slurm starts need one folder: add hydra.run.dir=FOLDER"
            f"{see('one-folder')}",
        )

    def _reserve(self, folder: Path, continues: bool) -> None:
        reserved = run_folder.reserve(folder, "hydra.run.dir")
        is_earlier = any(
            (folder / name).exists() for name in (".hydra", "results.json", "checkpoints")
        )
        if is_earlier and not continues and os.environ.get(SWEEP_JOB) != str(folder):
            reserved.release()
            raise InputError(
                f"{folder} holds an earlier run; choose another hydra.run.dir, nothing is "
                f"overwritten{CONTINUE if self.command == 'train' else ''}{see('folder-in-use')}"
            )


def check_unused(config: Config, folder: Path) -> None:
    """Check that a folder has no results.

    Raises:
        InputError: If it has.
    """
    require(
        not (folder / "results.json").exists(),
        f"{folder} holds an earlier run; choose another hydra.sweep.dir, nothing is overwritten"
        f"{see('folder-in-use')}",
    )


def check_config(config: DictConfig, command: str) -> Config:
    """Check the keys of a command's configuration, and return it as plain dictionaries.

    Raises:
        InputError: If a key is unknown or missing, or if the program sets it itself.
    """
    names = [str(name) for name in config if name != "hydra"]
    plain: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, names), resolve=True)
    check_settings(plain, command)
    check_trainer(plain["trainer"])
    return plain  # type: ignore[no-any-return]


def hydra_command(name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a Hydra command of a function; an ``InputError`` ends it with one line.

    With ``HYDRA_FULL_ERROR=1`` in the environment they come with their tracebacks.

    Args:
        name: Name of the primary configuration, ``train`` or ``evaluate``.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(function)
        def main() -> None:
            setting = os.environ.get("HYDRA_FULL_ERROR")
            verbose = setting == "1" and "LOCAL_RANK" not in os.environ  # children inherit ours
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on to here
            os.environ[FULL_ERROR] = "1" if verbose else "0"

            @functools.wraps(function)
            def job(config: DictConfig) -> Any:
                return _run_job(function, verbose, name, config)

            escape_unencodable()
            processes.start_watchdog()
            quiet_lightning()
            log_warnings()
            sys.argv = [sys.argv[0], *expand_home(sys.argv[1:])]
            try:
                check_options(sys.argv[1:], name)
                hydra.main(version_base="1.3", config_path=config_dir(), config_name=name)(job)()
            except (InputError, HydraException, OmegaConfBaseException) as error:
                if verbose:
                    raise
                _exit_with_error(error, name)
            except ValueError as error:
                if not is_null_group(error):
                    raise
                _exit_with_error(InputError(explain_null(sys.argv[1:])))
            except BrokenPipeError as error:  # the help, as by `| head`
                discard_unwritten()
                raise SystemExit(1) from error
            except OSError as error:  # Hydra's own files
                if not is_disk_full(error):
                    raise
                _exit_with_error(InputError(DISK_FULL_MESSAGE.format(error)))
            finally:
                run_folder.release_all()
                os.environ["HYDRA_FULL_ERROR"] = setting or "0"

        return main

    return decorate


def _run_job(
    function: Callable[[DictConfig], Any], verbose: bool, command: str, config: DictConfig
) -> Any:
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    logging.getLogger("lightning").handlers.clear()  # Hydra's handlers print its messages
    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        if is_sweep:  # of a sweeper that chooses its jobs as it runs
            check_config(config, command)
        return function(config)
    except (InputError, OmegaConfBaseException) as error:
        if verbose or is_sweep:  # a sweep's other jobs continue
            raise
        _exit_with_error(error, command)
    except MisconfigurationException as error:  # such as a share of batches below one batch
        _exit_with_error(InputError(f"Lightning cannot use these settings: {error}"))
    except SIGTERMException as error:  # from an evaluation, which has nothing to save
        processes.detach()
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(0) from error  # the main process's exit code is the run's
        print(
            "error: interrupted by SIGTERM before evaluation finished; start it again",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(128 + signal.SIGTERM) from error
    except Exception as error:
        if isinstance(error, ValueError) and "`val_check_interval`" in str(error):
            message = str(error).partition(". ")[0].strip().replace("`", "")
            _exit_with_error(InputError(f"trainer.{message}"))
        if is_disk_full(error):
            _exit_with_error(InputError(DISK_FULL_MESSAGE.format(error)))
        if isinstance(error, torch.OutOfMemoryError):
            reason = f"{first_line(error)}{see('out-of-memory')}"
            _exit_with_error(InputError(f"the device's memory is exhausted: {reason}"))
        if "LOCAL_RANK" in os.environ:  # if another process failed first, its watcher ends us
            time.sleep(processes.PATIENCE)
        raise


def _exit_with_error(error: Exception, command: str = "train") -> None:
    """Print an error as one line and exit; of several failing processes, the main one prints."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or processes.wait_for_main_process():
        sys.stdout.flush()
        print(f"error: {printable(explain_error(error, command))}", file=sys.stderr, flush=True)
        run_folder.release_all(refused=True)
        if processes.kill_children():
            logging.shutdown()
            os._exit(1)  # before Lightning takes their end for the reason
    raise SystemExit(1)
