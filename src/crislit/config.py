"""Where the configuration files are, and how a Hydra program starts and fails. The only file that knows."""

import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from crislit import processes
from crislit.errors import InputError, for_want_of_room, printable

if TYPE_CHECKING:
    from omegaconf import DictConfig


NO_ROOM = "the disk is full: {}. What was written before stays; make room and start again"
"""Where something other than a checkpoint cannot be written."""
SWEEP_JOB = "CRISLIT_SWEEP_JOB"
"""Environment variable: the folder that a sweep made for a job, which the job may use although it is not empty."""
FULL_ERROR = "CRISLIT_FULL_ERROR"
"""Environment variable: the user's own ``HYDRA_FULL_ERROR``, for a sweep's jobs."""


def config_dir() -> str:
    """Return the absolute path of ``conf/``: inside the wheel, or beside ``src/`` in a checkout or an editable install."""
    here = Path(__file__).resolve().parent
    for folder in (here.parents[1] / "conf", here / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(
        f"crislit's configuration is neither at {here.parents[1] / 'conf'} nor at {here / 'conf'}; install it again"
    )


def load_config(overrides: Sequence[str] = (), name: str = "train") -> "DictConfig":
    """Compose a program's configuration without running it, for tests and notebooks.

    Args:
        overrides: As on the command line, ``["model=rn101", "decoder.layers=2"]``.
        name: ``train`` or ``evaluate``.
    """
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(config_dir(), version_base="1.3"):
        return compose(name, list(overrides))


def load_settings(overrides: Sequence[str] = (), name: str = "train") -> dict[str, Any]:
    """Compose a program's configuration as plain dictionaries and lists, interpolations resolved; see :func:`load_config`."""
    from omegaconf import OmegaConf

    settings: dict[str, Any] = OmegaConf.to_container(load_config(overrides, name), resolve=True)  # type: ignore[assignment]
    return settings


class RefuseEarlierRun(Callback):
    """Ends a program before it writes anything into a folder that holds an earlier run (``hydra.callbacks``)."""

    def on_run_start(self, config: "DictConfig", **kwargs: Any) -> None:
        """Look into the run's folder; the other processes of a run find the first one's there."""
        folder = Path(config.hydra.run.dir)
        if config.get("resume") == "auto":
            self.check_own_folder(config)
            return
        if os.environ.get(SWEEP_JOB) == str(folder):  # which the sweep looked into, and Hydra has begun to fill
            return
        if os.environ.get("LOCAL_RANK", "0") == "0" and any((folder / name).exists() for name in (".hydra", "results.json")):
            _fail(InputError(f"{folder} holds an earlier run; choose another hydra.run.dir, nothing is written over"))

    @staticmethod
    def check_own_folder(config: "DictConfig") -> None:
        """See to it that a run that shall go on by itself finds its folder again."""
        from omegaconf import OmegaConf

        asked: Any = OmegaConf.to_container(config.hydra.run, resolve=False)
        if "${now:" in str(asked["dir"]):
            _fail(InputError("resume=auto needs a folder that it finds again: add hydra.run.dir=FOLDER"))


def program(name: str) -> Callable[[Callable[["DictConfig"], Any]], Callable[[], None]]:
    """Make a Hydra program of a function; what the user got wrong ends it with one clear message and exit code 1.

    With ``HYDRA_FULL_ERROR=1`` in the environment such errors come with their tracebacks.
    """

    def decorate(function: Callable[["DictConfig"], Any]) -> Callable[[], None]:
        @functools.wraps(function)
        def main() -> None:
            import hydra
            from hydra.core.hydra_config import HydraConfig
            from hydra.errors import HydraException
            from hydra.types import RunMode
            from lightning.pytorch.utilities.exceptions import SIGTERMException
            from omegaconf.errors import OmegaConfBaseException

            wish = os.environ.get("HYDRA_FULL_ERROR")
            verbose = wish == "1" and "LOCAL_RANK" not in os.environ  # the first process's children inherit its own setting
            os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to here
            os.environ[FULL_ERROR] = "1" if verbose else "0"  # what a sweep's jobs shall do

            @functools.wraps(function)
            def job(config: "DictConfig") -> Any:
                try:
                    return function(config)
                except (InputError, OmegaConfBaseException) as error:
                    if verbose or HydraConfig.get().mode == RunMode.MULTIRUN:  # a sweep's other jobs go on
                        raise
                    _fail(error)
                except SIGTERMException as error:  # from an evaluation, which saves nothing
                    processes.go_alone()
                    if os.environ.get("LOCAL_RANK", "0") != "0":
                        raise SystemExit(0) from error  # the first process's is the run's exit code
                    print("error: told to end by SIGTERM before it was done: start it again", file=sys.stderr, flush=True)
                    raise SystemExit(128 + signal.SIGTERM) from error
                except Exception as error:
                    if for_want_of_room(error):
                        _fail(InputError(NO_ROOM.format(error)))
                    if "LOCAL_RANK" in os.environ:  # another process may have failed before: who watches it ends this one
                        time.sleep(processes.PATIENCE)
                    raise

            processes.begin()
            try:
                hydra.main(version_base="1.3", config_path=config_dir(), config_name=name)(job)()
            except (InputError, HydraException, OmegaConfBaseException) as error:
                if verbose:
                    raise
                _fail(error)
            except OSError as error:  # Hydra's own writing
                if not for_want_of_room(error):
                    raise
                _fail(InputError(NO_ROOM.format(error)))
            finally:
                os.environ["HYDRA_FULL_ERROR"] = wish or "0"

        return main

    return decorate


def _fail(error: Exception) -> None:
    """Print an error, Hydra's own shortened to one line, and exit; of several processes that fail alike, the first speaks."""
    message = str(error)
    if isinstance(error, InputError):
        message = message.rsplit(f"{InputError.__name__}: ", 1)[-1].rstrip()  # a data worker's comes with its traceback
    else:
        lines = [line.strip() for text in (error, error.__cause__) if text for line in str(text).splitlines() if line.strip()]
        noise = (
            "Set the environment",
            "To append to your config",
            "Config search path",
            "provider=",
            "full_key:",
            "object_type=",
        )
        message = " ".join(dict.fromkeys(line for line in lines if not line.startswith(noise)))
        key = getattr(error, "full_key", None)
        message += f" ({key})" if key and str(key) not in message else ""
    if os.environ.get("LOCAL_RANK", "0") == "0" or processes.await_the_first():
        sys.stdout.flush()
        print(f"error: {printable(message)}", file=sys.stderr, flush=True)
        if processes.end_the_others():
            logging.shutdown()
            os._exit(1)  # before Lightning takes the others' end for the reason, and ends this one by a signal
    raise SystemExit(1)
