"""The LightningModules: one global batch a step, normalised by its own count of tokens, under any plan."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from leanlm import optim
from leanlm.data.batches import IGNORE, Batch
from leanlm.memory.loss import token_loss
from leanlm.models.contract import Model
from leanlm.models.dropout import rows_of_step
from leanlm.optim import Optim
from leanlm.strategies.plan import Plan


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
    """Trains a model on global batches.

    Args:
        net: the model.
        plan: how a global batch is cut; only its sizes are used here.
        optimizer: optimizer and schedule.
        seed: of the dropout masks.
        max_steps: optimizer steps in the whole run, for the schedule.
        clip: largest global norm of the gradient; 0: no clipping.

    Attributes:
        step_nats: loss of this rank's rows in the step at hand, divided by the tokens of the global batch; the sum over
            ranks is the loss of the step.
        grad_norm: global norm of the last step's gradient before clipping.
    """

    def __init__(self, net: Model, plan: Plan, optimizer: Optim, seed: int, max_steps: int, clip: float) -> None:
        super().__init__()
        self.net, self.plan, self.optimizer, self.seed = net, plan, optimizer, seed
        self.max_steps, self.clip = max_steps, clip
        self.step_nats = torch.zeros(())
        self.grad_norm = torch.zeros(())
        self.split_loss = TokenLoss()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)[0]

    def training_step(self, batch: Batch, index: int) -> Tensor:
        with rows_of_step(self.seed, batch.step, batch.rows):
            nats = token_loss(self.net.head, self.hidden(batch), batch.target)
        share = nats / batch.step_tokens
        self.step_nats = share.detach() + (self.step_nats if batch.micro else 0)
        # Lightning divides by the micro-batches, DDP by the replicas; the sum over both is what counts
        return share * (self.plan.accumulate_grad_batches * self.plan.replicate)

    def hidden(self, batch: Batch) -> Tensor:
        """`batch` -> hidden `[b, s, h]` before the head."""
        return self.net.hidden(batch.input)[0]

    def validation_step(self, batch: Batch, index: int) -> None:
        nats = token_loss(self.net.head, self.hidden(batch), batch.target)
        self.split_loss.update(nats, (batch.target != IGNORE).sum())

    def on_validation_epoch_start(self) -> None:
        self.split_loss.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optim.build(self.net, self.optimizer)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        share = optim.factor(self.optimizer, self.trainer.global_step, self.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # Lightning would hold the gradients through the next forward pass

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        parameters = [parameter for parameter in self.net.parameters() if parameter.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, self.grad_norm)

    def global_loss(self) -> Tensor:
        """Loss of the step just done over the whole global batch. All ranks must call it."""
        loss = self.step_nats.clone()
        if self.plan.world > 1:
            dist.all_reduce(loss)
        return loss

    def carried(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside weights and optimizer, by global name; rows of all ranks together."""
        return {}

    def carry(self, state: dict[str, Tensor]) -> None:
        """Take up what `carried` returned, perhaps under another plan."""


class RecurrentLanguageModel(LanguageModel):
    """A model whose state after step s, cut from its history, is where step s + 1 begins (truncated BPTT).

    The new states of a step become the carried ones only when the step is done, so that a checkpoint taken in the
    middle of an accumulation is the state after the last whole step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.before: dict[int, list[Any]] = {}  # micro-batch -> states after the last step
        self.after: dict[int, list[Any]] = {}
        self.evaluation: list[Any] | None = None

    def hidden(self, batch: Batch) -> Tensor:
        if not self.training:
            hidden, self.evaluation = self.net.hidden(batch.input, None if batch.fresh else self.evaluation)
            return hidden
        hidden, states = self.net.hidden(batch.input, None if batch.fresh else self.before.get(batch.micro))
        self.after[batch.micro] = [tuple(part.detach() for part in state) for state in states]
        return hidden

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if batch.micro == self.plan.accumulate_grad_batches - 1:
            self.before, self.after = self.after, {}

    def carried(self) -> dict[str, Tensor]:
        if not self.before:
            return {}
        names = self.net.blocks.keys()
        micros = [self.before[micro] for micro in sorted(self.before)]
        parts = {
            f"{name}.{i}": torch.cat([states[block][i] for states in micros])
            for block, name in enumerate(names)
            for i in range(len(micros[0][block]))
        }
        return {name: _gather_rows(part, self.plan.replicate) for name, part in parts.items()}

    def carry(self, state: dict[str, Tensor]) -> None:
        if not state:
            return
        cut = self.plan.replicate * self.plan.accumulate_grad_batches
        first = (dist.get_rank() if self.plan.world > 1 else 0) * self.plan.accumulate_grad_batches
        for micro in range(self.plan.accumulate_grad_batches):
            rows = {name: part.chunk(cut)[first + micro].to(self.device) for name, part in state.items()}
            self.before[micro] = [
                tuple(rows[key] for key in sorted(rows) if key.rpartition(".")[0] == name) for name in self.net.blocks
            ]


def _gather_rows(part: Tensor, replicas: int) -> Tensor:
    """`[rows of this rank, h]` -> `[global batch, h]`."""
    if replicas == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(replicas)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)
