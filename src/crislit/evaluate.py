"""``python -m crislit.evaluate checkpoint=PATH``: evaluate a trained network."""

import time
from pathlib import Path

import lightning as L
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from crislit.checkpoint import read_checkpoint
from crislit.config import program
from crislit.errors import InputError
from crislit.task import CRISTask
from crislit.train import Settings, build_data, build_trainer, evaluate_splits, finish


@program("evaluate")
def main(config: DictConfig) -> None:
    """Evaluate every split of a data set, or one; by default the data set that the checkpoint was trained on."""
    settings: Settings = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    folder = Path(HydraConfig.get().runtime.output_dir)
    start = time.perf_counter()
    if not settings["checkpoint"]:
        raise InputError("which checkpoint? evaluate needs checkpoint=PATH, such as checkpoint=RUN/checkpoints/best.ckpt")
    checkpoint = read_checkpoint(Path(settings["checkpoint"]))
    trained = checkpoint.config
    settings["dataset"] = settings.get("dataset") or trained["dataset"]
    for name in ("image_size", "threshold", "seed"):
        if settings[name] is None:
            settings[name] = trained[name]
    if settings["split"] is not None:
        settings["dataset"]["evaluation_splits"] = [settings["split"]]
    L.seed_everything(settings["seed"], workers=True, verbose=False)
    data = build_data(settings)
    data.prepare_data()
    blind = [data.select_split] if settings["dataset"]["blind_control"] and data.select_split in data.splits else []
    task = CRISTask(
        checkpoint.build(),
        threshold=settings["threshold"],
        splits=[*data.splits, *(f"{split}-blind" for split in blind)],
        select_split=data.select_split,
    )
    trainer = build_trainer(settings, folder, callbacks=[], logger=False)
    results = evaluate_splits(trainer, task, data, settings, folder, blind)
    results |= {
        "steps": checkpoint.steps,
        "checkpoint": str(settings["checkpoint"]),
        "initial_weights": str(settings["checkpoint"]),
        "seconds": time.perf_counter() - start,
    }
    finish(trainer, results, folder)


if __name__ == "__main__":
    main()
