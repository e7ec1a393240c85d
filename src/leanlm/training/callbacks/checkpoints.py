"""Saving, resuming, and stopping in good order."""

import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from leanlm import __version__
from leanlm.common.run_folder import Run
from leanlm.config.schema import Config
from leanlm.config.words import pasted
from leanlm.launch.processes import Stopped
from leanlm.launch.ranks import patient, rank
from leanlm.launch.signals import Heard
from leanlm.training import checkpoint
from leanlm.training.callbacks.average import averages, training_weights
from leanlm.training.callbacks.record import Record, validate_now

KEPT = ("seconds", "tokens", "source_tokens", "validated", "val_loss", "val_accuracy", "source_losses")  # of `Record`


class Checkpoints(pl.Callback):
    """Saves every `checkpoint_every` steps and at the end; resumes; on Ctrl-C and a batch system's signals saves, then raises
    Stopped.

    A checkpoint is taken before the first micro-batch of a step, when the validation of the step before is in it too.
    """

    def __init__(self, run: Run, record: Record, config: Config, fingerprint: str, start: Path | None = None,
                 base: str | None = None) -> None:  # fmt: skip
        """`fingerprint`: of the text. `base`: of what its adapter stands on. `start`: a checkpoint to resume from."""
        self.run, self.record, self.config, self.start = run, record, config, start
        self.made_of = {"text": fingerprint} | ({"base": base} if base else {})
        self.saved = -1  # step of the last checkpoint
        self.heard = Heard(_say_so, self._leave)
        self.told = Told()

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        if self.start is None:
            return
        parallel, average = module.parallel, averages(trainer)
        carried, state = checkpoint.load(self.start, parallel.named_parameters(), trainer.optimizers[0], average)
        states = checkpoint.callback_states(self.start)
        for callback in _others(trainer):
            if callback.state_key in states:
                callback.load_state_dict(states[callback.state_key])
        parallel.carry(carried, self.config.global_batch)
        step, micros = state["step"], state["step"] * module.plan.batches_per_step
        loop = trainer.fit_loop.epoch_loop
        loop.manual_optimization.optim_step_progress.total.completed = self.saved = step
        loop.batch_progress.total.load_state_dict(dict.fromkeys(("ready", "started", "processed", "completed"), micros))
        loop._batches_that_stepped = micros
        loop.max_steps = -1  # for Lightning would pass over a training that lacks only what comes after its last step
        for key in state.keys() & KEPT:  # one of an earlier version has fewer
            setattr(self.record, key, state[key])

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self.config.max_steps
        self.heard.begin()
        step = trainer.global_step
        if step and step % self.config.val_every == 0 and self.record.validated != step:
            validate_now(trainer)  # the run was stopped before it came to this

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch.micro == 0:
            self._stop_if_told(trainer, module)
            if batch.step % self.config.checkpoint_every == 0 and batch.step not in (0, self.saved):
                self.save(trainer, module)

    def on_validation_batch_start(self, trainer: pl.Trainer, module: Any, *batch: Any) -> None:
        if trainer.state.fn == "fit":
            self._stop_if_told(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.told.wait()
        if self.saved != trainer.global_step:
            self.save(trainer, module)
        self.heard.end()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        with suppress(OSError):  # of a full disk the exception may be
            self.record.flush()
        self.heard.end()

    def save(self, trainer: pl.Trainer, module: Any, folder: Path | None = None, keep: int | None = None) -> None:
        """Write a checkpoint of the state after the last whole step, to a `folder` of its own or among those of the run. All
        ranks must call it."""
        self.record.flush()
        state = {
            "step": trainer.global_step,
            **{key: getattr(self.record, key) for key in KEPT},
            "plan": module.plan.asdict(),
            **self.made_of,
            "versions": {"leanlm": __version__, "torch": torch.__version__},
        }
        named = module.parallel.owned_parameters()
        states = {each.state_key: found for each in _others(trainer) if (found := each.state_dict())}
        with training_weights(trainer):
            checkpoint.save(
                folder or self.run.checkpoints, named, trainer.optimizers[0], module.parallel.carried(), state,
                keep or self.config.keep_checkpoints, averages(trainer), states,
            )  # fmt: skip
        if folder is None:
            self.saved = trainer.global_step

    def _leave(self, number: int) -> None:
        """End this process at once, while it is in a step or a save."""
        for part in self.run.path.glob("*/.writing-*"):
            shutil.rmtree(part, ignore_errors=True)
        os._exit(128 + number)

    def _stop_if_told(self, trainer: pl.Trainer, module: Any) -> None:
        if number := self.told(self.heard.number) if module.plan.world > 1 else self.heard.number:
            if self.saved != trainer.global_step:
                self.save(trainer, module)
            name, again = signal.Signals(number).name, pasted("leanlm.train", f"resume={self.run.path}")
            message = f"stopped by {name} after step {trainer.global_step}; to go on: {again}"
            if trainer.is_global_zero:
                print(message, file=sys.stderr, flush=True)
            raise Stopped(number, message)


def _say_so(number: int) -> None:
    with suppress(BrokenPipeError):
        if rank() == 0:
            print(f"\n{signal.Signals(number).name}: saving a checkpoint (again to leave at once)", flush=True)


def _others(trainer: pl.Trainer) -> list[pl.Callback]:
    """The callbacks that the configuration names."""
    return [each for each in trainer.callbacks if not isinstance(each, Checkpoints | Record)]  # type: ignore[attr-defined]


class Told:
    """Whether a signal has reached any rank: signals come to them at different times, and all must stop at the same step.

    Each call begins an exchange between the ranks' processors (gloo), which the next one reads: no device is waited for, nor a
    rank that is less than a step behind. All ranks must make the same calls.
    """

    def __init__(self) -> None:
        self.number, self.work = torch.tensor(0), None

    def __call__(self, number: int) -> int:
        """The largest number of any rank in the call before."""
        if found := self.wait():
            return found
        self.number = torch.tensor(number)
        self.work = dist.all_reduce(self.number, dist.ReduceOp.MAX, patient(), async_op=True)
        return 0

    def wait(self) -> int:
        """What the last call has begun comes to; none is under way any more."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return int(self.number)
