"""A progress bar with loss, speed and time left; plain lines where there is no terminal."""

import sys
import time
from typing import Any

import lightning.pytorch as pl

from leanlm.launch.ranks import say
from leanlm.training.callbacks.record import Record


class Progress(pl.Callback):
    """Shows what `record` measured. Only rank 0 should have it."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.bar: Any = None
        self.shown = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.first_step, self.first_seconds, self.shown = trainer.global_step, self.record.seconds, 0.0
        if sys.stdout.isatty():
            from rich import progress

            columns = (
                progress.MofNCompleteColumn(), progress.BarColumn(), progress.TextColumn("{task.fields[status]}  left"),
                progress.TimeRemainingColumn(compact=True),
            )  # fmt: skip
            self.bar = progress.Progress("step", *columns, refresh_per_second=4)
            self.task = self.bar.add_task("", total=module.max_steps, completed=trainer.global_step, status="")
            self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        if now - self.shown < (0.2 if self.bar else 10) and trainer.global_step < trainer.max_steps:
            return
        self.shown = now
        if self.bar:
            self.bar.update(self.task, completed=trainer.global_step, status=self._status())
        elif self.record.row:
            say(f"step {trainer.global_step}/{trainer.max_steps}  {self._status()}  {self._left(trainer)} left")

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        say(f"step {trainer.global_step}/{trainer.max_steps}  validation loss {self.record.val_loss:.4f}")  # above the bar

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    on_exception = on_train_end

    def _status(self) -> str:
        row = self.record.row
        if not row:
            return ""
        mfu = f"  mfu {row['mfu']:.1%}" if "mfu" in row else ""
        return f"loss {row['train_loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s{mfu}"

    def _left(self, trainer: pl.Trainer) -> str:
        steps = trainer.global_step - self.first_step
        seconds = (self.record.seconds - self.first_seconds) / max(1, steps) * (trainer.max_steps - trainer.global_step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
