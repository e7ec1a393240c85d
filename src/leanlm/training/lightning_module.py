"""The LightningModules: one global batch a step, normalised by its own count of tokens, under any plan."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric

from leanlm.common.dtensors import local
from leanlm.data.batches import Batch
from leanlm.models import kernels
from leanlm.models.head import IGNORE
from leanlm.optimizers import build as optimizers
from leanlm.optimizers import settings as optim
from leanlm.optimizers.settings import Optim
from leanlm.strategies import gradients
from leanlm.strategies.parallel_model import ParallelModel
from leanlm.strategies.relay import relay

if TYPE_CHECKING:
    from leanlm.strategies.pipeline import Pipeline


class TokenLoss(Metric):
    """Mean negative log-likelihood per counted token, in nats, over all batches and ranks, summed in float64."""

    full_state_update = False
    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: Tensor) -> None:
        self.nats += nats.detach().double()
        self.tokens += tokens

    def compute(self) -> dict[str, Tensor]:
        return {"loss": self.nats / self.tokens, "tokens": self.tokens}


class LanguageModel(pl.LightningModule):
    """Trains what this rank holds of a model on global batches.

    Args:
        parallel: the model as the plan cuts it.
        pipeline: trains its stages, if there are several; None is enough for evaluation.
        optimizer: optimizer and schedule.
        max_steps: optimizer steps in the whole run, for the schedule.
        clip: largest global norm of the gradient; 0: no clipping.
        stochastic: round weights up or down by chance.

    Attributes:
        step_nats: loss of this rank's rows in the step at hand, divided by the tokens of the global batch; the sum over
            ranks is the loss of the step.
        grad_norm: global norm of the last step's gradient before clipping.
        gradient_bytes: the most that this rank held at a time in a step.
    """

    def __init__(self, parallel: ParallelModel, pipeline: "Pipeline | None", optimizer: Optim, max_steps: int, clip: float,
                 stochastic: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.net, self.parallel, self.pipeline, self.plan = parallel.net, parallel, pipeline, parallel.plan
        self.stages = nn.ModuleList(parallel.stages.values())
        self.optimizer, self.max_steps, self.clip, self.stochastic = optimizer, max_steps, clip, stochastic
        self.in_backward: gradients.StepInBackward | None = None
        self.step_nats = torch.zeros(())
        self.grad_norm = torch.zeros(())
        self.gradient_bytes = 0
        self.split_loss = TokenLoss().to(parallel.device)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """What is not there yet, such as the batches of a validation; row numbers stay on the CPU, where Python reads them."""
        there = [part if part.device == device else kernels.to_device(part, device) for part in (batch.input, batch.target)]
        return batch._replace(input=there[0], target=there[1])

    def cpu(self) -> "LanguageModel":
        """Nothing: Lightning calls it when a fit or an evaluation ends, and the model is still needed on its device."""
        return self

    def training_step(self, batch: Batch, index: int) -> Tensor:
        for stage in self.parallel.stages.values():
            stage.begin(batch.step, batch.fresh)
        # Lightning divides by its batches of a step, DDP and FSDP2 by the readers; the sum over all is what counts
        self.scale = self.plan.batches_per_step * self.plan.data_parallel_size
        if self.pipeline is not None:
            self.batch = batch
            return torch.zeros((), device=self.parallel.device)  # a schedule mixes forward and backward: see `backward`
        self.parallel.reduce_after(batch.micro)
        (stage,) = self.parallel.stages.values()
        share = stage(batch.input, batch.rows, batch.target) / batch.step_tokens
        self.step_nats = share.detach() + (self.step_nats if batch.micro else 0)
        return share * self.scale

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.pipeline is None:
            super().backward(loss, *args, **kwargs)
            return
        with self.trainer.precision_plugin.train_step_context():
            scaled = self.pipeline.step(self.batch, self.scale / self.batch.step_tokens)
        self.step_nats = scaled / self.scale

    def validation_step(self, batch: Batch, index: int) -> None:
        for stage in self.parallel.stages.values():
            stage.begin(batch.step, batch.fresh)
        nats = relay(self.parallel, batch.input, batch.rows, batch.target)
        if nats is None or not self.parallel.counts_loss:  # another rank counts these rows
            nats, batch = torch.zeros(()), batch._replace(target=batch.target[:0])
        self.split_loss.update(nats.to(self.parallel.device), (batch.target != IGNORE).sum())

    def on_validation_epoch_start(self) -> None:
        self.split_loss.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        copies = self.parallel.mesh["replicate"] if self.parallel.mesh is not None and self.plan.zero1 else None
        named = self.parallel.named_parameters()
        optimizer = optimizers.build(named, self.optimizer, copies, self.plan.offloads_optimizer, self.stochastic)
        if self.plan.step_in_backward:
            self.in_backward = gradients.StepInBackward(self.parallel, optimizer)
        return optimizer

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        share = optim.factor(self.optimizer, self.trainer.global_step, self.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Lightning would hold the gradients through the next forward pass
        optimizer.zero_grad(set_to_none=not self.plan.adds_to_buckets)

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Nothing: they are zero, or gone, since the last step."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if self.in_backward is not None:
            self.grad_norm, self.gradient_bytes = self.in_backward.done()
            return
        gradients.complete(self.parallel)
        self.gradient_bytes = self.gradient_bytes or held_bytes(parameter.grad for parameter in self.net.parameters())
        self.grad_norm = gradients.clip(self.parallel, self.clip)

    def global_loss(self) -> Tensor:
        """Loss of the step just done over the whole global batch. All ranks must call it."""
        loss = self.step_nats.double() * int(self.parallel.counts_loss)  # one type on all ranks
        if self.plan.world > 1:
            dist.all_reduce(loss)
        return loss

    def held_bytes(self, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        """Bytes of parameters, gradients and optimizer state that this rank holds."""
        state = [value for values in optimizer.state.values() for value in values.values()]
        return {
            "parameters": held_bytes(self.net.parameters()),
            "gradients": self.gradient_bytes,
            "optimizer_state": held_bytes(value for value in state if isinstance(value, Tensor)),
        }

    def carried(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside weights and optimizer, by global name; rows of all ranks together."""
        return {}

    def carry(self, state: dict[str, Tensor], global_batch: int) -> None:
        """Take up what `carried` returned, perhaps under another plan."""


class RecurrentLanguageModel(LanguageModel):
    """A model whose state after step s, cut from its history, is where step s + 1 begins (truncated BPTT)."""

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if batch.micro == self.plan.batches_per_step - 1:
            for stage in self.parallel.stages.values():
                stage.advance()

    def carried(self) -> dict[str, Tensor]:
        parts = {name: part for stage in self.parallel.stages.values() for name, part in stage.carried().items()}
        return {name: self.parallel.gather_rows(part) for name, part in parts.items()}

    def carry(self, state: dict[str, Tensor], global_batch: int) -> None:
        plan, rows = self.plan, global_batch // self.plan.data_parallel_size
        first = self.parallel.data_parallel_rank * rows
        mine = {name: part[first : first + rows].to(self.parallel.device) for name, part in state.items()}
        for stage in self.parallel.stages.values():
            stage.carry(mine, first, plan.accumulate_grad_batches)


def held_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of these tensors on this rank."""
    return sum(part.numel() * part.element_size() for part in (local(t) for t in tensors if t is not None))
