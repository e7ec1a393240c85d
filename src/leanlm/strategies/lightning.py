"""Lightning strategies of a plan."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn

from leanlm.strategies.plan import Plan


class BucketsOnly(DDPStrategy):
    """Lightning's DDP, of which micro-batches add to the buckets from the first on.

    Gradients that begin without a sum over the ranks are tensors of their own beside the buckets. So the first micro-batch of
    all is summed at once: the mean that the step's last one takes leaves what is a mean already as it is. `zero_grad` must
    then keep the gradients (`module.py`).
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


class ParallelStrategy(DDPStrategy):
    """Lightning's DDP without its wrapper and its copying: `Cut` has placed and spread the parameters."""

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()


def strategy(plan: Plan) -> Strategy | str:
    if plan.world == 1:
        return "auto"
    kind = ParallelStrategy if plan.splits_model else BucketsOnly
    return kind(gradient_as_bucket_view=True, broadcast_buffers=False)
