"""Which allocations are alive when."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from leanlm.launch.ranks import rank, say


class MemorySnapshot(pl.Callback):
    """Records the allocations of a few steps on a GPU and writes them to `memory-rank-N.pickle` in the run's folder, for
    pytorch.org/memory_viz.

    Args:
        skip: steps before the first that is recorded.
        steps: that are recorded.
    """

    def __init__(self, skip: int = 2, steps: int = 2) -> None:
        self.skip, self.steps = skip, steps

    @classmethod
    def problems(cls, accelerator: str, **_: Any) -> list[str]:
        on_gpu = accelerator != "cpu" and torch.cuda.is_available()
        return [] if on_gpu else ["it records a GPU's allocations, and this run is on a CPU; leave it out"]

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.first = trainer.global_step + self.skip

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch.micro == 0 and batch.step == self.first:
            torch.cuda.memory._record_memory_history()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.micro == module.plan.batches_per_step - 1 and batch.step == self.first + self.steps - 1:
            file = Path(trainer.default_root_dir, f"memory-rank-{rank()}.pickle")
            torch.cuda.memory._dump_snapshot(str(file))
            torch.cuda.memory._record_memory_history(enabled=None)
            say(f"\nallocations of {self.steps} steps: {file}")
