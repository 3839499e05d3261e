"""``python -m crislit.evaluate checkpoint=PATH``: evaluate a trained network."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from crislit.training import evaluate_checkpoint, hydra_command


@hydra_command("evaluate")
def main(config: DictConfig) -> None:
    """Evaluate every split of a data set, or the one named."""
    hydra = HydraConfig.get()
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    evaluate_checkpoint(plain, Path(hydra.runtime.output_dir), hydra.overrides.task)


if __name__ == "__main__":
    main()
