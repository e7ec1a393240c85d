"""Loss, gradient norm, learning rate and speed of a run, to `metrics.csv` and to the configured loggers."""

import math
import time
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import lightning.pytorch as pl
from omegaconf import OmegaConf

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run, Table
from leanlm.launch.ranks import comfort
from leanlm.models import kernels
from leanlm.training.checkpoint import newest


class Record(pl.Callback):
    """Writes a row every `every` steps and after each validation, and validates when training ends.

    Attributes:
        row: the newest values, for the progress bar.
        seconds: spent in training steps, without validation, over all sessions of the run.
        tokens: counted in those steps.
        source_tokens: of `tokens`, those of each source of the text.
        validated: the last step after which the whole split was validated, and `val_loss` its loss in nats per token,
            `val_accuracy` the share that was predicted right (NaN: not measured), `source_losses` the losses of each source.
    """

    def __init__(self, run: Run, every: int, full_speed: float | None = None, sources: Iterable[str] = ()) -> None:
        """`full_speed`: tokens/s at which the devices would multiply all the time, if it is known. `sources`: names of those of
        a mixture, whose shares of the tokens loggers get."""
        self.run, self.every, self.full_speed, self.sources = run, every, full_speed, [*sources]
        self.row: dict[str, float] = {}
        self.seconds, self.tokens = 0.0, 0
        self.source_tokens: list[int] = []
        self.source_losses: list[float] = []
        self.validated, self.val_loss, self.val_accuracy = 0, float("nan"), float("nan")
        self.table: Table | None = None
        self.loggers: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.loggers = list(trainer.loggers)
        self._tell_loggers("log_hyperparams", OmegaConf.to_container(self.run.config()))
        if trainer.is_global_zero:
            self.table = Table(self.run, trainer.global_step, self.full_speed is not None)
        self.logged = self.seconds, self.tokens
        self.mark = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.micro < module.plan.batches_per_step - 1:
            return
        step = trainer.global_step
        writes = step % self.every == 0 or step == 1 or step == trainer.max_steps
        if writes or not kernels.on_gpu(module.grad_norm):  # a GPU would be waited for; a CPU's is there
            self._finite(float(module.grad_norm), "norm of the gradient", step, module)
        loss = float(module.global_loss()) if writes else math.nan  # waits for a GPU: before the clock is read
        now = time.perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now
        self.tokens += batch.step_tokens
        self.source_tokens = [sum(both) for both in zip_longest(self.source_tokens, batch.source_tokens, fillvalue=0)]
        if writes:
            self._finite(loss, "training loss", step, module)
            seconds, tokens = self.seconds - self.logged[0], self.tokens - self.logged[1]
            self.logged = self.seconds, self.tokens
            rate, speed = trainer.optimizers[0].param_groups[0]["lr"], tokens / seconds
            self.row = {"train_loss": loss, "grad_norm": float(module.grad_norm), "lr": rate, "tokens_per_second": speed}
            if self.full_speed is not None:
                self.row["mfu"] = speed / self.full_speed
            for name, mine in zip(self.sources, self.source_tokens, strict=False):
                self.row[f"share/{name}"] = mine / max(1, self.tokens)
            self._write(trainer, step, self.row)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        found = module.split_loss.compute()
        self.validated, self.val_loss, self.source_losses = trainer.global_step, float(found["loss"]), found["losses"].tolist()
        self.val_accuracy = float(found["accuracy"])
        self._finite(self.val_loss, "validation loss", trainer.global_step, module)
        self._write(trainer, trainer.global_step, {"val_loss": self.val_loss})
        self.mark = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.validated != trainer.global_step:
            validate_now(trainer)
        self.flush()

    def flush(self) -> None:
        if self.table is not None:
            self.table.flush()

    def _finite(self, value: float, what: str, step: int, module: Any) -> None:
        """Of something that is the same on all ranks, so that they stop together."""
        if not math.isfinite(value):
            raise UserError(
                f"the {what} is {value} after step {step}: lower optim.lr (now {module.optimizer.lr:g}) or clip "
                f"(now {module.clip:g}); {newest(self.run.checkpoints)}"
            )

    def _write(self, trainer: pl.Trainer, step: int, values: dict[str, float]) -> None:
        if self.table is not None:
            self.table.add(step, values)
            self._tell_loggers("log_metrics", values, step)

    def _tell_loggers(self, method: str, *values: Any) -> None:
        for logger in list(self.loggers):
            with comfort(type(logger).__name__):
                getattr(logger, method)(*values)
                continue
            self.loggers.remove(logger)  # it has failed, and gets nothing more


def validate_now(trainer: pl.Trainer) -> None:
    """Run the validation of a fit outside its turn."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
