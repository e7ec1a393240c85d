"""An average of the weights over the steps (Polyak and Juditsky 1992; exponential as in Tarvainen and Valpola 2017)."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from leanlm.common.dtensors import local
from leanlm.common.precision import PRECISIONS


class WeightAverage(pl.Callback):
    """Keeps an exponential moving average of this rank's part of each weight, and puts it in place of the weights for each
    validation and when training has ended.

    Each number is averaged by itself, so a part of a weight has a part of the average, under every plan. A checkpoint holds
    both.

    Args:
        decay: share of the average that each step keeps.
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = decay
        self.in_place = False  # of the weights
        self.named: list[tuple[str, Tensor]] = []

    @classmethod
    def problems(cls, precision: str, decay: float = 0.999, **_: Any) -> list[str]:
        found = [] if 0 < decay < 1 else [f"decay={decay}: a share above 0 and below 1"]
        if PRECISIONS.get(precision, PRECISIONS["fp32"])[0] == torch.bfloat16:
            found.append(f"precision={precision}: bf16 weights round such small changes away; write precision=bf16-mixed")
        return found

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        parts = chain(module.parallel.net.modules(), module.parallel.stages.values())
        self.sharded = [part for part in parts if hasattr(part, "reshard")]  # under FSDP2
        weights = [(name, weight.detach()) for name, weight in module.parallel.named_parameters()]
        self.named = [(name, weight.clone()) for name, weight in weights]
        self.weights, self.averages = ([local(part) for _, part in pairs] for pairs in (weights, self.named))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.micro == module.plan.batches_per_step - 1 and module.counts:  # a step without targets changes nothing
            torch._foreach_lerp_(self.averages, self.weights, 1 - self.decay)

    def swap(self, *_: Any, **__: Any) -> None:
        """Averages to the place of the weights, or back."""
        self.in_place = not self.in_place
        for part in self.sharded:  # FSDP2 may have kept the whole weights of a part after its forward pass
            part.reshard()
        for weight, average in zip(self.weights, self.averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    on_validation_epoch_start = on_validation_epoch_end = swap
    on_train_end = swap  # what follows, such as a sample, is made with the averages


def averages(trainer: pl.Trainer) -> list[tuple[str, Tensor]]:
    """Global name and average of each weight of this rank; none where the run keeps none."""
    return [pair for each in _kept(trainer) for pair in each.named]


@contextmanager
def training_weights(trainer: pl.Trainer) -> Iterator[None]:
    """Within it, the weights that are trained are in their place."""
    away = [each for each in _kept(trainer) if each.in_place]
    for each in away:
        each.swap()
    yield
    for each in away:
        each.swap()


def _kept(trainer: Any) -> list[WeightAverage]:
    return [each for each in trainer.callbacks if isinstance(each, WeightAverage)]
