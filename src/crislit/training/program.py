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
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crislit.config import config_dir
from crislit.errors import InputError, is_disk_full, printable, require
from crislit.training import processes
from crislit.training.terminal import quiet_lightning

SWEEP_JOB = "CRISLIT_SWEEP_JOB"
"""Environment variable: the folder that a sweep made for its job, which need not be empty."""
FULL_ERROR = "CRISLIT_FULL_ERROR"
"""Environment variable: the user's ``HYDRA_FULL_ERROR``, for the jobs of a sweep."""
DISK_FULL_MESSAGE = (
    "the disk is full: {}. What was written before is intact; make room, start again"
)
GROUPS = ("decoder", "loss", "projector", "callbacks")
"""Groups of keys in train.yaml, not choices of files."""
HYDRA_NOISE = (
    *("Set the environment", "To append to your config", "Config search path", "provider="),
    *("full_key:", "object_type="),
)
"""Beginnings of the lines that Hydra's errors can do without."""


class RefuseEarlierRun(Callback):
    """Ends a command before it writes to the folder of an earlier run (``hydra.callbacks``)."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the run's folder; child processes find the main process's run there."""
        folder = Path(config.hydra.run.dir)
        if config.get("resume") == "auto":
            if "${now:" in str(OmegaConf.to_container(config.hydra.run, resolve=False)):
                _exit_with_error(
                    InputError(
                        "resume=auto needs a folder that it finds again: add hydra.run.dir=FOLDER"
                    )
                )
        elif (
            any((folder / name).exists() for name in (".hydra", "results.json"))
            and os.environ.get("LOCAL_RANK", "0") == "0"
            and os.environ.get(SWEEP_JOB) != str(folder)
        ):
            _exit_with_error(
                InputError(
                    f"{folder} holds an earlier run; choose another hydra.run.dir, nothing is "
                    "overwritten"
                )
            )


def hydra_command(name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a Hydra command of a function; errors caused by the user end it with one line.

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
                return _run_job(function, verbose, config)

            processes.start_watchdog()
            quiet_lightning()
            try:
                hydra.main(version_base="1.3", config_path=config_dir(), config_name=name)(job)()
            except (InputError, HydraException, OmegaConfBaseException) as error:
                if verbose:
                    raise
                _exit_with_error(error)
            except OSError as error:  # Hydra's own files
                if not is_disk_full(error):
                    raise
                _exit_with_error(InputError(DISK_FULL_MESSAGE.format(error)))
            finally:
                os.environ["HYDRA_FULL_ERROR"] = setting or "0"

        return main

    return decorate


def _run_job(function: Callable[[DictConfig], Any], verbose: bool, config: DictConfig) -> Any:
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        for name in GROUPS:
            require(
                isinstance(config.get(name, {}), (dict, DictConfig)),
                f"{name}={config.get(name)} is not a choice: set single keys, {name}.KEY=VALUE. "
                "--help lists them",
            )
        return function(config)
    except (InputError, OmegaConfBaseException) as error:
        if verbose or HydraConfig.get().mode == RunMode.MULTIRUN:  # a sweep's other jobs continue
            raise
        _exit_with_error(error)
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
        if is_disk_full(error):
            _exit_with_error(InputError(DISK_FULL_MESSAGE.format(error)))
        if "LOCAL_RANK" in os.environ:  # if another process failed first, its watcher ends us
            time.sleep(processes.PATIENCE)
        raise


def _exit_with_error(error: Exception) -> None:
    """Print an error as one line and exit; of several failing processes, the main one prints."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or processes.wait_for_main_process():
        sys.stdout.flush()
        print(f"error: {printable(_to_line(error))}", file=sys.stderr, flush=True)
        if processes.kill_children():
            logging.shutdown()
            os._exit(1)  # before Lightning takes their end for the reason
    raise SystemExit(1)


def _to_line(error: Exception) -> str:
    if isinstance(error, InputError):  # a data worker's message includes its traceback
        return str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].rstrip()
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
    message = " ".join(
        dict.fromkeys(line for line in lines if line and not line.startswith(HYDRA_NOISE))
    )
    key = getattr(error, "full_key", None)
    return f"{message} ({key})" if key and str(key) not in message else message
