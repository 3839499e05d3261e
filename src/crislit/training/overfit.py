"""Trains on the same few batches in every epoch, to see whether a network can learn them."""

import lightning as L


class RepeatedBatches(L.Callback):
    """Draws the first epoch's batches in every epoch (``trainer.overfit_batches``).

    Lightning's own way replaces the sampler, on which resuming and the choice of sentences depend.
    """

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go back to the first epoch's order."""
        trainer.train_dataloader.sampler.set_epoch(0)  # type: ignore[union-attr]
