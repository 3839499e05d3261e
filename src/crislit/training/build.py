"""Builds model, data and task from a configuration.

The configuration is read here and in ``run.py``, ``resume.py``, ``evaluation.py`` and
``provenance.py``. Network, data and task get typed values.
"""

import logging
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from torch import nn

from crislit.checkpoints import (
    checkpoint_metadata,
    find_start,
    find_weights,
    load_clip_weights,
    load_start,
)
from crislit.config import TARGET
from crislit.data import DataSource, ReferDataModule, build_source
from crislit.errors import InputError, check_integer, first_line, require, see
from crislit.models import (
    CRIS,
    CRISConfig,
    build_cris,
    check_boxes,
    optimize_for_training,
    recompute_activations,
    require_trust,
)
from crislit.training.losses import Loss, check_loss, text_to_pixel_contrastive_loss
from crislit.training.settings import Config, check_keys
from crislit.training.task import CRISTask, check_task_options
from crislit.transforms.augmentation import Augmentation

log = logging.getLogger(__name__)

DATASET_KEYS = (
    *("max_words", "evaluation_splits", "select_split", "sentences_per_image", "max_images"),
    "on_error",
)
LOADER_KEYS = (
    *("batch_size", "batch_size_per_device", "eval_batch_size", "image_size", "protocol"),
    *("workers", "seed"),
)
SOURCE_KEYS = (
    *("folder", "refs", "embedded", "file", "sentences", "images", "val_share", "mask_value"),
)


OPTIMIZER_KEYS = (
    *("learning_rate", "encoder_factor", "encoder_from", "milestones", "gamma", "cooldown"),
)


def check_values(config: Config) -> None:
    """Check the values of a training's settings, before any file is read.

    Raises:
        InputError: If one cannot be used.
    """
    check_integer("callbacks.pictures", config["callbacks"]["pictures"], 0)
    check_integer("checkpoint_every", config["checkpoint_every"], 1)
    check_switches(config, "rearrange", "recompute", "compile")
    check_keys("recipe.optimizer", config["recipe"]["optimizer"], OPTIMIZER_KEYS)
    check_task_options(**config["recipe"]["optimizer"], threshold=config["threshold"])
    CRISConfig.from_run_config(config)
    build_loss(config)
    build_callbacks(config)
    build_data(config)


def check_switches(config: Config, *names: str) -> None:
    """Raise an ``InputError`` unless the settings of these names are true or false."""
    for name in names:
        value = config[name]
        require(isinstance(value, bool), f"{name} must be true or false, got {value!r}")


def build_model(config: Config) -> CRIS:
    """Build the network with random weights.

    Raises:
        InputError: If its sizes do not fit.
    """
    model = build_cris(CRISConfig.from_run_config(config))
    if model.config.boxes:
        check_boxes(model, config["image_size"])
    return model


def find_initial_weights(config: Config) -> None:
    """Find the file of the weights that a run starts from, before any long work.

    Raises:
        InputError: If there is none, and it cannot be downloaded.
    """
    clip, start = config["model"]["clip_weights"], config["init_from"]
    if start is not None:
        find_start(str(start))
    elif clip is not None:
        find_weights(config["model"]["clip"], str(clip))


def load_initial_weights(model: CRIS, config: Config) -> str:
    """Load the weights that a run starts from; return their name for ``results.json``.

    These are a trained network's (``init_from``), or else CLIP's for both encoders
    (``model.clip_weights``, section 4.2), or none.
    """
    clip, start = config["model"]["clip_weights"], config["init_from"]
    if start is not None:
        return load_start(model, str(start), config["dataset"]["max_words"], config["trust"])
    if clip is not None:
        return load_clip_weights(model, str(clip))
    log.warning("the encoders start from random weights (model.clip_weights=null)")
    return "random"


def apply_training_form(model: CRIS, config: Config) -> CRIS:
    """Return the form of the network that is trained: same weights, same names."""
    network = optimize_for_training(model) if config["rearrange"] else model
    recompute_activations(network, config["recompute"])
    return network


def build_data(config: Config) -> ReferDataModule:
    """Build the data module.

    Raises:
        InputError: If a setting is unknown or out of its range.
    """
    dataset, root = config["dataset"], str(config["data_root"] or "").strip()
    require(root, "data_root is empty: expected the folder of all data, such as data_root=data")
    own = (*DATASET_KEYS, "name", "blind_control")
    if TARGET not in dataset:
        check_keys("dataset", dataset, (*SOURCE_KEYS, *own))
    options = {
        **{name: dataset[name] for name in DATASET_KEYS if name in dataset},
        **{name: config[name] for name in LOADER_KEYS if name in config},
    }
    if "max_words" in options:
        options["max_tokens"] = options.pop("max_words")
    folder = Path(root).expanduser()
    return ReferDataModule(
        build_own_source(
            {name: value for name, value in dataset.items() if name not in own}, folder
        )
        if TARGET in dataset
        else build_source(dataset, folder),
        **options,
        augmentation=build_augmentation(config),
    )


def build_own_source(options: Mapping[str, Any], root: Path) -> DataSource:
    """Build a data set of a user's class.

    Args:
        options: The class under ``_target_``, and its arguments.
        root: The folder of all data, an argument if the class takes it.

    Raises:
        InputError: If the class cannot be built, or has no ``name`` and ``open``.
    """
    target = str(options[TARGET])
    try:
        takes_root = "root" in signature(get_class(target)).parameters
        given = {"root": root} if takes_root else {}
        source = instantiate({**options, **given, "_recursive_": False})
    except (InstantiationException, ImportError, ValueError, TypeError) as error:
        raise InputError(f"cannot build dataset={target}: {reason(error)}") from error
    require(
        isinstance(getattr(source, "name", None), str) and callable(getattr(source, "open", None)),
        f"dataset: {target} needs a name, and open(skip_unusable), which returns a ReferIndex: "
        f"crislit.data.DataSource{see('boxes')}",
    )
    return source  # type: ignore[no-any-return]


def require_trust_of_data(dataset: Config, trust: Sequence[str], source: str) -> None:
    """Check that a checkpoint's data set has no class of a package that is not trusted.

    Args:
        dataset: The group ``dataset`` of its run. crislit's own data sets name no class.
        trust: Trusted packages.
        source: The checkpoint, for the message.

    Raises:
        InputError: If it has one. Nothing has been imported then.
    """
    target = dataset.get(TARGET)
    if target:
        require_trust({"dataset": dataset}, trust, source)


def build_augmentation(config: Config) -> Augmentation | None:
    """Build the augmentation of the group ``augment``; None without one.

    Raises:
        InputError: If it or a transform cannot be built.
    """
    if config.get("augment") is None:
        return None
    augment = config["augment"]
    if TARGET in augment:
        try:
            built = instantiate(augment)
        except InstantiationException as error:
            raise InputError(f"cannot build augment: {reason(error)}") from error
        require(
            isinstance(built, Augmentation),
            f"augment: {augment[TARGET]} must derive from "
            f"crislit.transforms.augmentation.Augmentation{see('boxes')}",
        )
        return built  # type: ignore[no-any-return]
    check_keys("augment", augment, ("flip", "transforms"))
    try:
        transforms = [instantiate(transform) for transform in augment.get("transforms") or []]
    except InstantiationException as error:
        raise InputError(f"cannot build augment.transforms: {first_line(error)}") from error
    return Augmentation(augment.get("flip", 0.0), transforms)


def reason(error: Exception) -> str:
    """Return why Hydra could not build an object, without its advice."""
    text = first_line(error.__cause__ or error)
    return text.partition(", set env var")[0]


def build_callbacks(config: Config) -> list[L.Callback]:
    """Build the callbacks of the group ``callbacks``, in its order.

    Raises:
        InputError: If one cannot be built, or is not a callback.
    """
    callbacks: list[L.Callback] = []
    for name, options in config["callbacks"].items():
        if name == "pictures":
            continue
        try:
            callback = instantiate(options)
        except InstantiationException as error:
            raise InputError(f"cannot build callbacks.{name}: {reason(error)}") from error
        require(
            isinstance(callback, L.Callback),
            f"callbacks.{name}: {options} makes a {type(callback).__name__}, expected a "
            f"lightning.Callback{see('boxes')}",
        )
        callbacks.append(callback)
    return callbacks


def build_loss(config: Config) -> Loss:
    """Build the loss of the group ``loss``.

    Raises:
        InputError: If its class cannot be built, or does not return a scalar.
    """
    options = {name: value for name, value in config["loss"].items() if name != "contrastive"}
    if TARGET not in options:
        check_keys("loss", config["loss"], ("contrastive",))
        return text_to_pixel_contrastive_loss
    try:
        loss: Loss = instantiate(options)
    except InstantiationException as error:
        raise InputError(f"cannot build loss={options[TARGET]}: {reason(error)}") from error
    has_weights = isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters())
    require(not has_weights, f"loss: {options[TARGET]} has weights, which no optimizer would train")
    check_loss(loss, options[TARGET])
    return loss


def prepare_data(config: Config) -> ReferDataModule:
    """Build the data module, seed everything, and write and index the data.

    Raises:
        InputError: If the data or a setting cannot be used.
    """
    data = build_data(config)  # checks the seed
    L.seed_everything(config["seed"], workers=True, verbose=False)
    data.prepare_data()
    if config["dataset"].get("blind_control") and data.select_split in data.splits:
        data.blind_splits = [data.select_split]
    return data


def build_task(
    model: CRIS,
    data: ReferDataModule,
    config: Config,
    initial_weights: str,
    fingerprint: Mapping[str, str] | None = None,
) -> CRISTask:
    """Build the LightningModule that trains a network."""
    return CRISTask(
        model,
        **config["recipe"]["optimizer"],
        threshold=config["threshold"],
        compile=config["compile"],
        splits=loader_names(data),
        select_split=data.select_split,
        criterion=build_loss(config),
        metadata=checkpoint_metadata(model.config, config, initial_weights, fingerprint),
    )


def loader_names(data: ReferDataModule) -> list[str]:
    """Return the names of the test loaders, in their order: splits, then blind controls."""
    return [*data.splits, *(f"{split}-blind" for split in data.blind_splits)]
