"""``python -m crislit.evaluate checkpoint=PATH``: evaluate a trained network."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from crislit.training import hydra_command


@hydra_command("evaluate")
def main(config: DictConfig) -> None:
    """Evaluate every split of a data set, or the one named."""
    from crislit.training import evaluate_checkpoint  # takes seconds, and --help needs none of it

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    evaluate_checkpoint(plain, folder, hydra.overrides.task)


if __name__ == "__main__":
    main()
