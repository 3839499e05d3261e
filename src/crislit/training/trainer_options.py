"""Which arguments of ``lightning.Trainer`` a run passes on, and which the program decides."""

import inspect
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from crislit.config import settings_of_choice
from crislit.errors import InputError, check_integer, require
from crislit.training.settings import unknown_setting

OURS = {
    "accumulate_grad_batches": "batch_size_per_device=N accumulates gradients up to batch_size",
    "barebones": "logger=none callbacks.pictures=0 leave out most of what takes time",
    "callbacks": "the group callbacks adds callbacks, and callbacks.pictures sets the plots",
    "default_root_dir": "choose the folder with hydra.run.dir=FOLDER",
    "enable_autolog_hparams": "logger=none logs no settings",
    "enable_checkpointing": "checkpoints are always written, every checkpoint_every=N steps",
    "enable_model_summary": "a run logs how many parameters its network has",
    "limit_predict_batches": "a run predicts nothing; `python -m crislit.predict` does",
    "logger": "logger=none logs nothing, logger=csv and others choose one",
    "min_epochs": "nothing ends a training early but recipe.epochs and trainer.max_steps",
    "min_steps": "nothing ends a training early but recipe.epochs and trainer.max_steps",
    "model_registry": "logger=wandb uploads the best checkpoint",
    "plugins": "trainer.strategy and trainer.precision choose what Lightning needs",
    "reload_dataloaders_every_n_epochs": "the samplers change with every epoch by themselves",
    "use_distributed_sampler": "the samplers divide the data over the processes themselves",
}
"""Arguments that the program sets itself, and what to use instead."""
BATCH_LIMITS = (
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches"),
)
"""Arguments that limit an epoch: a number of batches, or a share in [0, 1]."""

INTEGERS = {
    **{"max_epochs": 0, "max_steps": -1, "num_sanity_val_steps": -1, "num_nodes": 1},
    **{"check_val_every_n_epoch": 1, "log_every_n_steps": 1},
}
"""Arguments that are integers, and their least values."""
LABELS = {"max_epochs": "recipe.epochs (trainer.max_epochs)"}
"""Names of arguments that another setting sets."""
SWITCH = (True, False)
CHOICES = {
    **{"detect_anomaly": SWITCH, "enable_progress_bar": SWITCH},
    **{"inference_mode": SWITCH, "benchmark": SWITCH, "deterministic": (*SWITCH, "warn")},
    "gradient_clip_algorithm": ("norm", "value"),
    "profiler": ("simple", "advanced", "pytorch"),
}
"""Arguments with a few values."""


def check_trainer(options: Mapping[str, Any]) -> None:
    """Check the group ``trainer`` of a configuration.

    Args:
        options: The group.

    Raises:
        InputError: If the program sets one of them itself, if Lightning has no such argument, or
            if a value cannot be used.
    """
    for name in options:
        require(
            name not in OURS,
            f"trainer.{name} is set by the program: {OURS.get(name)}",
        )
    if set(options) - set(settings_of_choice("trainer", "auto")["trainer"]):
        available = trainer_arguments()
        for name in options:
            require(name in available, unknown_setting("trainer", str(name), available))
    for name, minimum in INTEGERS.items():
        if name in options:
            check_integer(LABELS.get(name, f"trainer.{name}"), options[name], minimum)
    for name in BATCH_LIMITS:
        _check_limit(name, options.get(name))
    require(
        not options.get("overfit_batches") or options.get("limit_train_batches") is None,
        "trainer.overfit_batches limits the training batches itself: leave out "
        "trainer.limit_train_batches",
    )
    if options.get("max_time") is not None:
        parse_time(options["max_time"])
    _check_values(options)


def _check_values(options: Mapping[str, Any]) -> None:
    """Check values that Lightning would refuse later, after other work, or with a traceback."""
    for name, choices in CHOICES.items():
        value = options.get(name)
        require(
            value is None or any(value == x and type(value) is type(x) for x in choices),
            f"trainer.{name} must be {' or '.join(map(_as_typed, choices))}, got {value!r}",
        )
    clip = options.get("gradient_clip_val")
    require(
        clip is None or (_is_number(clip) and clip >= 0),
        f"trainer.gradient_clip_val must be a number, at least 0, got {clip!r}",
    )
    interval = options.get("val_check_interval")
    require(
        interval is None
        or (_is_number(interval) and interval > 0 and (isinstance(interval, int) or interval <= 1)),
        "trainer.val_check_interval must be a number of batches or a share of an epoch between "
        f"0.0 and 1.0, got {interval!r}",
    )
    quick = options.get("fast_dev_run")
    require(
        quick is None or isinstance(quick, bool) or (isinstance(quick, int) and quick >= 0),
        f"trainer.fast_dev_run must be true, false or a number of batches, got {quick!r}",
    )


def _as_typed(choice: Any) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def trainer_arguments() -> list[str]:
    """Return the arguments of Lightning's trainer that a run passes on; takes seconds."""
    import lightning as L

    names = inspect.signature(L.Trainer).parameters
    return sorted(set(names) - set(OURS))


def _check_limit(name: str, value: Any) -> None:
    if value is None:
        return
    require(
        _is_number(value) and value >= 0 and (isinstance(value, int) or value <= 1),
        f"trainer.{name} must be a number of batches or a share between 0.0 and 1.0, got {value!r}",
    )
    require(
        value > 0 or name in ("limit_val_batches", "overfit_batches"),
        f"trainer.{name}={value} leaves nothing to {name.split('_')[1]}: set 1 for one batch",
    )


def parse_time(value: Any) -> timedelta:
    """Return a time limit, ``DD:HH:MM:SS`` or a dictionary of days, hours, minutes and seconds.

    Raises:
        InputError: If it is neither, or not positive.
    """
    message = (
        f"trainer.max_time must be DD:HH:MM:SS, such as '00:11:30:00' in quotation marks, got "
        f"{value!r}"
    )
    units = ("days", "hours", "minutes", "seconds")
    try:
        if isinstance(value, str):
            days, hours, minutes, seconds = map(int, value.split(":"))
            parts: Mapping[str, Any] = dict(
                zip(units, (days, hours, minutes, seconds), strict=True)
            )
        else:
            parts = dict(value)
        require(set(parts) <= set(units), message)
        limit = timedelta(**parts)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(message) from error
    require(limit > timedelta(0), message)
    return limit
