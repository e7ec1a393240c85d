"""Keeping the best checkpoint."""

import math
from typing import Any

import lightning.pytorch as pl

from leanlm.training.callbacks.checkpoints import Checkpoints

FOLDER = "best"  # in the run's folder


class Best(pl.Callback):
    """After each validation whose loss is the lowest so far, saves a checkpoint in the run's folder `best`, in place of the one
    before."""

    def __init__(self) -> None:
        self.lowest = math.inf

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        loss = float(trainer.callback_metrics["val_loss"])
        if trainer.state.fn == "fit" and loss < self.lowest:
            self.lowest = loss
            checkpoints = next(each for each in trainer.callbacks if isinstance(each, Checkpoints))  # type: ignore[attr-defined]
            checkpoints.save(trainer, module, checkpoints.run.path / FOLDER, keep=1)

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self.lowest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lowest = state["lowest"]
