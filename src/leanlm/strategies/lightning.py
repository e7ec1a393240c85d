"""Lightning strategies of a plan."""

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn

from leanlm.strategies.patches import BucketedDDP
from leanlm.strategies.plan import Plan


class PlacedStrategy(DDPStrategy):
    """Lightning's DDP without its wrapper and its copying: `ParallelModel` has placed and divided the parameters."""

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()


def strategy(plan: Plan) -> Strategy | str:
    """What Lightning's Trainer takes."""
    if plan.world == 1:
        return "auto"
    kind = PlacedStrategy if plan.splits_model else BucketedDDP
    return kind(gradient_as_bucket_view=True, broadcast_buffers=False)
