"""The queue of a GPU never drains between two rows of the record: a step neither asks a device for a number nor copies from
pageable memory. Counted on a CPU that takes a GPU's paths; tests/equivalence/test_gpu.py lets a GPU itself say it."""

import itertools
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.data.prefetch import in_a_thread
from leanlm.launch.processes import Stopped, launch
from leanlm.launch.ranks import of_ranks, process_group, rank
from leanlm.memory import chunks
from leanlm.models import kernels
from leanlm.training import checkpoint
from leanlm.training.callbacks.checkpoints import Told
from leanlm.training.callbacks.record import Record
from leanlm.training.fit import fit
from leanlm.training.lightning_module import LanguageModel

STEPS = 6
MODELS = {
    "transformer": ["model=transformer", "model.heads=2", "optim=muon"],
    "lstm": ["model=lstm", "optim=adamw"],
}
ASKS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal")


def overrides(model: str, text: Path, *more: str) -> list[str]:
    return [
        *MODELS[model], "model.width=16", "model.depth=2", "model.dropout=0.1", "data=text", f"data.path={text}", "clip=0.1",
        "data.tokenizer=char", "global_batch=8", "sequence=12", f"max_steps={STEPS}", "log_every=100", "val_every=100",
        "checkpoint_every=100", "device=cpu", "logger=csv", "sample_tokens=2", "strategy.accumulate_grad_batches=2", *more,
    ]  # fmt: skip


class Waits(TorchDispatchMode):
    """Where a GPU's queue would be waited for, if all tensors but those in `host` were there: operations whose result Python
    needs, and ..."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.found, self.steps = False, list[str](), set[int]()
        self.host: list[Tensor] = []

    def is_host(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and any(
            tensor.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() for own in self.host
        )

    def waits(self, name: str) -> None:
        if self.on:
            frames = traceback.extract_stack(limit=7)[:-2]
            self.found.append(f"{name} in " + ", ".join(f"{frame.name}:{frame.lineno}" for frame in frames))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = "index" in function.name() and len(args) > 1 and isinstance(args[1], list | tuple) and any(
            isinstance(part, Tensor) and part.dtype == torch.bool for part in args[1]
        )  # fmt: skip
        if (function.name() in ASKS or by_mask) and not self.is_host(args[0]):
            self.waits(function.name())
        return function(*args, **(kwargs or {}))


class Moves(TorchFunctionMode):
    """... ways from one device to another that are none on a CPU."""

    def __init__(self, waits: Waits) -> None:
        self.counter = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        sends = function == Tensor.to and any(isinstance(part, torch.device | str) for part in (*args, *kwargs.values()))
        host = bool(args) and self.counter.is_host(args[0])
        makes = function == torch.tensor and kwargs.get("device") is not None
        if (sends and host) or (function in (Tensor.cpu, Tensor.tolist, Tensor.numpy) and not host) or makes:
            self.counter.waits(function.__name__)
        return function(*args, **kwargs)


def counted(arguments: list[str], path: Path) -> list[str]:
    """What waited in the steps of a run, but for the first two and the last."""
    waits, step, read = Waits(), LanguageModel.training_step, Told.wait

    def training_step(self, batch, index):
        waits.on = 2 <= batch.step < STEPS - 1
        waits.steps |= {batch.step} if waits.on else set()
        waits.host.append(batch.rows)
        return step(self, batch, index)

    def wait(self):
        waits.host.append(self.number)
        return read(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "training_step", training_step)
        patch.setattr(Told, "wait", wait)
        patch.setattr("leanlm.training.fit.loss_curve", lambda *_: None)
        patch.setattr(kernels, "on_gpu", lambda tensor: True)
        patch.setattr(kernels, "to_device", lambda tensor, device: tensor)  # which does not wait
        patch.setattr(chunks, "logits_memory", lambda device: 1 << 20)
        config = composed(*arguments)
        with Moves(waits), waits:
            fit(check(config), path)
    assert waits.steps == {2, 3, 4}
    return waits.found


@pytest.mark.parametrize("model", MODELS)
def test_nothing_waits_for_a_device_between_two_rows(model: str, text: Path, tmp_path: Path) -> None:
    assert counted(overrides(model, text), tmp_path) == []


def several(arguments: list[str], path: Path) -> tuple[list[str], list[str]]:
    """On each rank: what waited in a run, and what another says when a signal has reached rank 1 alone after its third step."""
    step = Record.on_train_batch_end

    def kill_at_3(self, trainer, *args):
        step(self, trainer, *args)
        if rank() == 1 and trainer.global_step == 3 and args[2].micro == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with process_group("cpu"), pytest.MonkeyPatch.context() as patch:
        found = counted(arguments, path / "whole")
        patch.setattr(Record, "on_train_batch_end", kill_at_3)
        config = composed(*arguments)
        with pytest.raises(Stopped) as stopped:
            fit(check(config), path / "stopped")
        return found, of_ranks(stopped.value.message)


def test_ranks_wait_for_no_device_and_stop_at_the_same_step(text: Path, tmp_path: Path) -> None:
    found, messages = launch(several, (overrides("transformer", text, "strategy.replicate=2"), tmp_path), 2)
    assert found == []
    assert len(messages) == 2
    assert all("stopped by SIGTERM after step 4" in message for message in messages)
    assert [path.name for path in checkpoint.checkpoints(Run(tmp_path / "stopped").checkpoints)] == ["step-00000004"]


def test_a_thread_makes_the_same_items_and_no_more_than_asked_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    got = in_a_thread(items(), 3)
    first = [next(got) for _ in range(5)]
    time.sleep(0.05)
    assert 5 < len(made) <= 5 + 3
    assert [*first, *got] == list(range(20))


def test_what_a_thread_raises_reaches_the_one_who_asks() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the disk is gone")

    got = in_a_thread(items(), 3)
    assert next(got) == 1
    with pytest.raises(ValueError, match="the disk is gone"):
        next(got)
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
def test_a_thread_ends_with_the_one_who_asks(error: type[BaseException]) -> None:
    got = in_a_thread(itertools.count(), 3)
    assert next(got) == 0
    if error is GeneratorExit:
        got.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            got.throw(error())
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())
