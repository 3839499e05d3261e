"""Keys that no command reads are refused, and so is what the program sets itself."""

import inspect
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from crislit.config import compose_config, config_dir
from crislit.errors import InputError
from crislit.training.settings import check_settings
from crislit.training.trainer_options import (
    OURS,
    check_trainer,
    parse_time,
    trainer_arguments,
)

CHOICES = [
    f"{group}={path.stem}"
    for group in ("ablation", "augment", "dataset", "experiment", "logger", "model", "recipe")
    for path in sorted(Path(config_dir(), group).glob("*.yaml"))
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_the_configuration_passes(choice: str) -> None:
    file = ["dataset.file=data.jsonl"] if choice == "dataset=custom" else []
    check_settings(compose_config([choice, *file]))


def test_every_data_set_passes_for_evaluations() -> None:
    for choice in (None, *(choice for choice in CHOICES if choice.startswith("dataset="))):
        overrides = [choice] if choice else []
        file = ["dataset.file=data.jsonl"] if choice == "dataset=custom" else []
        check_settings(compose_config([*overrides, *file], "evaluate"), "evaluate")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+callbacks.x=1", "callbacks.x is not a setting; callbacks has early_stopping, pictures"),
        ("+neck.x=1", r"neck={'x': 1} names no class: neck._target_ must be the one that replaces"),
        ("+decoder.dropuot=0.9", r"not a setting, did you mean decoder.dropout\? decoder has"),
        ("+loss.dice=1", "loss.dice is not a setting"),
        ("+recipe.warmup=5", "recipe.warmup is not a setting; recipe has epochs, optimizer"),
        ("+recipe.optimizer.weight_decay=0.1", "optimizer.weight_decay is not a setting"),
        ("+optimizer=adamw", "optimizer is not a setting; there are augment, batch_size"),
        ("+batchsize=3", r"batchsize is not a setting, did you mean batch_size\?"),
        ("+projector.x=1", "projector.x is not a setting"),
        ("+model.x=1", "model.x is not a setting; model has clip, clip_weights, neck"),
        ("recipe.optimizer=adam", "recipe.optimizer=adam is not a choice"),
        ("~seed", "seed is missing: it cannot be removed"),
        ("~decoder.layers", "decoder.layers is missing"),
        ("~recipe.optimizer.gamma", "recipe.optimizer.gamma is missing"),
        ("~dataset", "dataset is missing: choose one with dataset=CHOICE"),
    ],
)
def test_a_key_that_is_not_read_or_was_removed_is_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_settings(compose_config([override]))


def test_the_network_of_an_evaluation_comes_from_its_checkpoint() -> None:
    with pytest.raises(InputError, match="model is not a setting; there are"):
        check_settings(compose_config(["+model.x=1"], "evaluate"), "evaluate")


# -- Arguments of Lightning's trainer


def test_every_argument_of_the_trainer_is_passed_on_or_refused_with_a_reason() -> None:
    names = set(inspect.signature(L.Trainer).parameters)
    assert set(OURS) <= names, "what Lightning does not have need not be refused"
    assert set(trainer_arguments()) == names - set(OURS)
    assert set(trainer_arguments()) == {
        *("accelerator", "strategy", "devices", "num_nodes", "precision", "sync_batchnorm"),
        *("max_epochs", "max_steps", "max_time", "fast_dev_run", "overfit_batches"),
        *("limit_train_batches", "limit_val_batches", "limit_test_batches"),
        *("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"),
        *("log_every_n_steps", "enable_progress_bar", "profiler"),
        *("gradient_clip_val", "gradient_clip_algorithm", "detect_anomaly", "deterministic"),
        *("benchmark", "inference_mode"),
    }, "a new argument of Lightning needs a decision"


def options(**extra: Any) -> dict[str, Any]:
    trainer: dict[str, Any] = compose_config()["trainer"]
    return trainer | extra


@pytest.mark.parametrize("name", OURS)
def test_what_the_program_sets_itself_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"^trainer.{name} is set by the program: {OURS[name]}"):
        check_trainer(options(**{name: None}))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"max_epoch": 3}, r"trainer.max_epoch is not a setting, did you mean trainer.max_epochs"),
        (
            {"max_epochs": "abc"},
            r"recipe.epochs \(trainer.max_epochs\) must be a whole number, at least 0, got 'abc'",
        ),
        ({"num_sanity_val_steps": "abc"}, "num_sanity_val_steps must be a whole number"),
        ({"limit_test_batches": 0}, "limit_test_batches=0 leaves nothing to test: set 1"),
        ({"limit_train_batches": 0.0}, "limit_train_batches=0.0 leaves nothing to train"),
        ({"limit_val_batches": 1.5}, "limit_val_batches must be a number of batches or a share"),
        ({"overfit_batches": -1}, "overfit_batches must be a number of batches or a share"),
        ({"overfit_batches": 1, "limit_train_batches": 2}, "leave out trainer.limit_train"),
        ({"gradient_clip_val": "abc"}, "gradient_clip_val must be a number, at least 0"),
        ({"gradient_clip_algorithm": "x"}, "gradient_clip_algorithm must be norm or value"),
        ({"profiler": "fast"}, "profiler must be simple or advanced or pytorch, got 'fast'"),
        ({"val_check_interval": 1.5}, "val_check_interval must be a number of batches or a share"),
        ({"fast_dev_run": "yes"}, "fast_dev_run must be true, false or a number of batches"),
        ({"detect_anomaly": 1.5}, "detect_anomaly must be true or false, got 1.5"),
        ({"max_time": "1 hour"}, "max_time must be DD:HH:MM:SS, .* got '1 hour'"),
        ({"max_time": "00:00:00:00"}, "max_time must be DD:HH:MM:SS"),
        ({"max_time": {"weeks": 1}}, "max_time must be DD:HH:MM:SS"),
    ],
)
def test_values_that_the_trainer_cannot_use_are_refused(
    extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_trainer(options(**extra))


def test_a_time_limit_is_days_hours_minutes_and_seconds() -> None:
    assert parse_time("01:02:03:04") == timedelta(days=1, hours=2, minutes=3, seconds=4)
    assert parse_time({"hours": 11, "minutes": 30}) == timedelta(hours=11.5)
