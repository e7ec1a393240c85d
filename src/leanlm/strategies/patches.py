"""What is replaced in Lightning and torch, with the versions for which it was read. tests/strategies/test_patches.py notices
when one no longer fits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage


class BucketedDDP(DDPStrategy):
    """Lightning's DDP (2.6), of which micro-batches add to the buckets from the first on.

    Gradients that begin without a sum over the ranks are tensors of their own beside the buckets. So the first micro-batch of
    all is summed at once: the mean that the step's last one takes leaves what is a mean already as it is. The gradients must
    then be kept from step to step (`Plan.adds_to_buckets`).
    """

    def determine_ddp_device_ids(self) -> None:
        """None: with a device's number DDP would copy row numbers to it, which Python reads on the CPU."""

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        assert self.model is not None
        if any(parameter.requires_grad and parameter.grad is None for parameter in self.model.parameters()):
            yield
            return
        with super().block_backward_sync():
            yield


def without_asking_for_sigterm(trainer: pl.Trainer) -> pl.Trainer:
    """Lightning (2.6) asks all ranks for a SIGTERM before each batch and waits for the device's answer: `Checkpoints` has that
    signal."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def without_warm_up(stage: "PipelineStage") -> "PipelineStage":
    """torch 2.11 warms up connections by sending to itself where a V turns, and gloo fails; 2.13 does it in another way."""
    if torch.__version__ < "2.13":
        stage._get_init_p2p_neighbors_ops = list  # type: ignore[method-assign]
    return stage
