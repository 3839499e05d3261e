"""``python -m crislit.evaluate checkpoint=PATH``: evaluate a trained network."""

import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from crislit.checkpoint import read_checkpoint
from crislit.config import program
from crislit.errors import InputError
from crislit.task import CRISTask
from crislit.train import Settings, blind_splits, build_trainer, check_words, evaluate_splits, finish, prepare


@program("evaluate")
def main(config: DictConfig) -> None:
    """Evaluate every split of a data set, or one; by default the data set that the checkpoint was trained on."""
    settings: Settings = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    folder = Path(HydraConfig.get().runtime.output_dir)
    start = time.perf_counter()
    if not settings["checkpoint"]:
        raise InputError("which checkpoint? evaluate needs checkpoint=PATH, such as checkpoint=RUN/checkpoints/best.ckpt")
    checkpoint = read_checkpoint(Path(settings["checkpoint"]).expanduser())
    trained = checkpoint.config
    if not trained:
        raise InputError(f"{settings['checkpoint']} does not say how it was trained; it was not written by crislit.train")
    for name in ("image_size", "threshold", "protocol", "eval_batch_size", "seed"):
        if settings[name] is None:
            settings[name] = trained[name]
    settings["dataset"] = trained["dataset"] | settings.get("dataset", {})
    if settings["split"] is not None:
        settings["dataset"]["evaluation_splits"] = [settings["split"]]
    data = prepare(settings)
    model = checkpoint.build()
    check_words(data, model)
    blind = blind_splits(settings, data)
    task = CRISTask(
        model,
        threshold=settings["threshold"],
        splits=[*data.splits, *(f"{split}-blind" for split in blind)],
        select_split=data.select_split,
    )
    trainer = build_trainer(settings, folder, callbacks=[], logger=False)
    # What the network is stays known: the training's model, decoder, loss and recipe under the evaluation's own settings.
    results = evaluate_splits(trainer, task, data, trained | settings | {"recipe": trained["recipe"]}, folder, blind)
    results |= {
        "steps": checkpoint.steps,
        "checkpoint": str(settings["checkpoint"]),
        "initial_weights": "random",
        "seconds": time.perf_counter() - start,
    }
    finish(trainer, results, folder)


if __name__ == "__main__":
    main()
