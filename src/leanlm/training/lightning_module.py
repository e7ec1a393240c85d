"""The LightningModule: one global batch a step, normalised by its own count of tokens, under any plan."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric

from leanlm.common.dtensors import local
from leanlm.common.errors import UserError
from leanlm.data.batches import Batch
from leanlm.models import kernels
from leanlm.models.head import IGNORE
from leanlm.optimizers.build import build
from leanlm.optimizers.rounding import Rounding
from leanlm.optimizers.settings import Optim, factor
from leanlm.strategies import gradients
from leanlm.strategies.parallel_model import ParallelModel
from leanlm.strategies.relay import relay

if TYPE_CHECKING:
    from leanlm.strategies.pipeline import Pipeline


class LanguageModel(pl.LightningModule):
    """Trains what this rank holds of a model on global batches.

    Args:
        parallel: the model as the plan cuts it.
        pipeline: trains its stages, if there are several; None is enough for evaluation.
        optimizer: optimizer and schedule.
        max_steps: optimizer steps in the whole run, for the schedule.
        clip: largest global norm of the gradient; 0: no clipping.
        chance: a seed: bf16 weights are rounded by chance; None: to the nearest.
        sources: of the text.

    Attributes:
        counts: whether any target of the step at hand does.
        step_nats: loss of this rank's rows in the step at hand, divided by the tokens of the global batch; the sum over
            ranks is the loss of the step.
        grad_norm: global norm of the last step's gradient before clipping.
        gradient_bytes: the most that this rank held at a time in a step.
    """

    def __init__(self, parallel: ParallelModel, pipeline: "Pipeline | None", optimizer: Optim, max_steps: int, clip: float,
                 chance: int | None = None, sources: int = 1) -> None:  # fmt: skip
        super().__init__()
        # Lightning's order of forward, zero_grad and backward leaves no room for a pipeline
        self.automatic_optimization = False
        self.net, self.parallel, self.pipeline, self.plan = parallel.net, parallel, pipeline, parallel.plan
        self.stages = nn.ModuleList(parallel.stages.values())
        self.optimizer, self.max_steps, self.clip = optimizer, max_steps, clip
        self.rounding = None if chance is None else Rounding(chance, parallel.named_parameters())
        self.in_backward: gradients.StepInBackward | None = None
        self.counts = True
        self.step_nats = torch.zeros(())
        self.grad_norm = torch.zeros(())
        self.gradient_bytes = 0
        self.split_loss = TokenLoss(sources).to(parallel.device)

    def training_step(self, batch: Batch, index: int) -> None:
        """One micro-batch, from its tokens to its gradient; after the last of a step, the weights are updated.

        The loss of a step is the sum over the global batch divided by its tokens, so that it does not matter how it is cut.
        Where none of them counts, it is 0, and the step changes nothing but carried state.
        """
        parallel, plan, tokens = self.parallel, self.plan, max(1, batch.step_tokens)
        self.counts = batch.step_tokens > 0
        if self.in_backward is not None:
            self.in_backward.updates = self.counts
        if self.rounding is not None:
            self.rounding.step = batch.step
        parallel.begin(batch.step, batch.fresh)
        self.set_rate()
        mean = plan.data_parallel_size  # DDP and FSDP2 divide the sum of gradients by it
        if self.pipeline is not None:  # forward and backward of all micro-batches, as its schedule mixes them
            nats = self.pipeline.step(batch, mean / tokens) / mean
        else:
            with parallel.gradient_sync(batch.micro, self.trainer.strategy):
                nats = parallel.stage(batch.input, batch.rows, batch.target, batch.positions) / tokens
                self.manual_backward(nats * mean)
        self.step_nats = nats.detach() + (self.step_nats if batch.micro else 0)
        if batch.micro == plan.batches_per_step - 1:
            self.update()

    def update(self) -> None:
        """Clip the gradients, which are whole now, and take the optimizer's step; without them, if no target has counted."""
        if self.in_backward is not None:
            self.grad_norm, self.gradient_bytes = self.in_backward.done()
        else:
            gradients.complete(self.parallel)
            self.gradient_bytes = self.gradient_bytes or held_bytes(parameter.grad for parameter in self.net.parameters())
            self.grad_norm = gradients.clip(self.parallel, self.clip)
        optimizer: Any = self.optimizers()
        if not self.counts:  # an optimizer leaves alone what has no gradient, and Lightning counts the step
            optimizer.zero_grad(set_to_none=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not self.plan.adds_to_buckets)
        self.parallel.advance()

    def set_rate(self) -> None:
        """The learning rates of the step at hand; before backward, in which weights may be updated already."""
        share = factor(self.optimizer, self.trainer.global_step, self.max_steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["peak_lr"] * share

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parallel, plan = self.parallel, self.plan
        copies = parallel.mesh["replicate"] if parallel.mesh is not None and plan.zero1 else None
        optimizer = build(parallel.named_parameters(), self.optimizer, copies, plan.offloads("optimizer"), self.rounding)
        if plan.step_in_backward:
            self.in_backward = gradients.StepInBackward(parallel, optimizer)
        return optimizer

    def on_validation_epoch_start(self) -> None:
        self.split_loss.reset()

    def validation_step(self, batch: Batch, index: int) -> None:
        self.parallel.begin(batch.step, batch.fresh)
        scores = relay(self.parallel, batch.input, batch.rows, batch.target, batch.positions)
        if scores is None or not self.parallel.counts_loss:  # another rank counts these rows
            scores, batch = torch.zeros(2), batch._replace(target=batch.target[:0])
        self.split_loss.update(scores.to(self.parallel.device), (batch.target != IGNORE).sum(), batch.source)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == "fit":
            self.log("val_loss", self.split_loss.compute()["loss"].float(), logger=False)  # for callbacks that watch it

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """What is not there yet, such as the batches of a validation."""
        return batch.moved(lambda part: part if part.device == device else kernels.to_device(part, device))

    def cpu(self) -> "LanguageModel":
        """Nothing: Lightning calls it when a fit or an evaluation ends, and the model is still needed on its device."""
        return self

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


class TokenLoss(Metric):
    """Mean negative log-likelihood per counted token, in nats, over all batches and ranks, summed in float64."""

    full_state_update = False
    nats: Tensor
    hits: Tensor
    tokens: Tensor

    def __init__(self, sources: int = 1) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(sources, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("hits", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(sources, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, tokens: Tensor, source: int = 0) -> None:
        """`scores`: nats of so many tokens, or these and how many of the tokens were the likeliest, `[2]`."""
        nats, *hits = scores.detach().double().flatten()
        self.nats[source] += nats
        self.hits += hits[0] if hits else torch.nan
        self.tokens[source] += tokens

    def compute(self) -> dict[str, Tensor]:
        """`loss`, `accuracy` (NaN if it is not measured), `tokens`, and `losses [sources]`, NaN for one without tokens."""
        nats, tokens = self.nats.sum(), self.tokens.sum()
        if not tokens:
            raise UserError("there is no loss: no token of this text is counted (data.ignore)")
        return {"loss": nats / tokens, "accuracy": self.hits / tokens, "tokens": tokens, "losses": self.nats / self.tokens}


def held_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of these tensors on this rank."""
    return sum(local(tensor).nbytes for tensor in tensors if tensor is not None)


def measures(loss: float, tokens: int, size: int, accuracy: float = math.nan) -> dict[str, float]:
    """A loss in nats per token, and what it comes to for a text of so many tokens, `size` bytes: as if the tokens that are not
    counted cost the mean. With an accuracy it is of hidden tokens, and says nothing of the size of a text."""
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700))}
    if not math.isnan(accuracy):
        return found | {"accuracy": accuracy}
    return found | {"bits_per_byte": loss * tokens / size / math.log(2)}
