"""``python -m crislit.evaluate checkpoint=PATH``: evaluate a trained network."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from crislit.callbacks import commit
from crislit.checkpoint import read_checkpoint
from crislit.config import program
from crislit.errors import InputError
from crislit.models.cris import check_words
from crislit.task import CRISTask
from crislit.train import Settings, blind_splits, build_trainer, evaluate_splits, finish, prepare


@program("evaluate")
def main(config: DictConfig) -> None:
    """Evaluate every split of a data set, or one; by default the data set that the checkpoint was trained on."""
    settings: Settings = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    folder = Path(HydraConfig.get().runtime.output_dir)
    start = time.perf_counter()
    commit()
    if not settings["checkpoint"]:
        raise InputError("which checkpoint? evaluate needs checkpoint=PATH, such as checkpoint=RUN/checkpoints/best.ckpt")
    checkpoint = read_checkpoint(Path(settings["checkpoint"]).expanduser())
    trained = checkpoint.config
    otherwise = {"protocol": "all_sentences", "eval_batch_size": 16, "seed": 0}  # for networks of other programs
    otherwise |= {"image_size": checkpoint.image_size, "threshold": checkpoint.threshold}
    for name, value in otherwise.items():
        if settings[name] is None:
            settings[name] = trained.get(name, value)
    settings["dataset"] = trained.get("dataset", {}) | settings.get("dataset", {})
    if not settings["dataset"]:
        raise InputError(f"which data? {settings['checkpoint']} does not say what it was trained on: dataset=refcoco, ...")
    if settings["split"] is not None:
        settings["dataset"]["evaluation_splits"] = [settings["split"]]
    data = prepare(settings)
    model = checkpoint.build()
    check_words(model, data.max_words)
    blind = blind_splits(settings, data)
    task = CRISTask(
        model,
        threshold=settings["threshold"],
        splits=[*data.splits, *(f"{split}-blind" for split in blind)],
        select_split=data.select_split,
    )
    trainer = build_trainer(settings, folder, callbacks=[], logger=False)
    # What the network is stays known: the training's model, decoder, loss and recipe under the evaluation's own settings.
    known = describe_network(checkpoint.settings) | trained | settings | {"recipe": trained.get("recipe")}
    known |= {name: trained[name] for name in ("trainer", "resume") if name in trained}
    results = evaluate_splits(trainer, task, data, known, folder, blind)
    results |= {
        "steps": checkpoint.steps,
        "checkpoint": str(settings["checkpoint"]),
        "initial_weights": checkpoint.initial_weights,
        "seconds": time.perf_counter() - start,
    }
    finish(trainer, results, folder)


def describe_network(built: Mapping[str, Any]) -> Settings:
    """Return the configuration keys that build such a network."""
    return {
        "model": {"clip": built["clip"], "neck": built["neck"]},
        "decoder": {name: built[f"decoder_{name}"] for name in ("layers", "heads", "ffn", "dropout")},
        "loss": {"contrastive": built["contrastive"]},
        "projector": {"kernel_size": built["kernel_size"]},
    }


if __name__ == "__main__":
    main()
