"""The head and its loss without ever holding the logits of more than a chunk of tokens.

    logits   = hidden weight' + bias
    loss     = sum over tokens of log(sum(exp(logits))) - logits[target]
    d_logits = softmax(logits), less 1 at the target
    d_hidden = d_logits weight,  d_weight = d_logits' hidden,  d_bias = sum over tokens of d_logits

Plain cross-entropy keeps `tokens x vocabulary` numbers about three times over; at a vocabulary of 33,000 that is more than
everything else in a small model. Here the gradients of a chunk are made right after its logits, in one buffer that all chunks
share (the idea of Liger's FusedLinearCrossEntropy, Hsu et al. 2024, arXiv 2410.10989). On two CPU cores torch's own
`F.linear_cross_entropy` took 2 to 5 times as long as plain cross-entropy, and it has no chunks before torch 2.13.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlm.common.dtensors import is_dtensor
from leanlm.memory import chunks
from leanlm.memory.loss_by_columns import Split, by_columns
from leanlm.memory.loss_by_rows import by_rows
from leanlm.models import kernels
from leanlm.models.head import IGNORE, Head


def token_loss(head: Head, hidden: Tensor, target: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats of `target [b, s]` given `hidden [b, s, h]`; IGNORE is not counted.

    Exact up to the order of summation. The result can be differentiated once.
    """
    choices = head.choices(head.before(hidden).flatten(0, 1), target.flatten())
    losses = [_choice_loss(*choice) for choice in choices]
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def _choice_loss(hidden: Tensor, projection: Any, target: Tensor) -> Tensor:
    weight, bias, split = projection.weight, projection.bias, None
    if is_dtensor(weight):
        split = Split.of(weight)
        weight, bias = (part if part is None else part.to_local() for part in (weight, bias))
    elif chunks.unneeded(hidden, len(weight)):
        logits = projection(hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)  # a sum of 1,000 tokens has few digits left in bf16
        return F.cross_entropy(logits.to(wide), target, reduction="sum", ignore_index=IGNORE)
    hidden = hidden.to(kernels.low_precision(hidden))
    training = torch.is_grad_enabled() and not _Pass.is_repeated
    if torch.compiler.is_compiling() and split is None:
        needs = [training and part is not None and part.requires_grad for part in (hidden, weight, bias)]
        return _loss_in_a_graph(hidden, weight, bias, target, needs)[0]
    return _ChunkedLoss.apply(hidden, weight, bias, target, split, training)


class _Pass:
    is_repeated = False


@contextmanager
def repeated() -> Iterator[None]:
    """For a forward pass that is done again before its backward: the loss is made without its gradients."""
    before, _Pass.is_repeated = _Pass.is_repeated, True
    try:
        yield
    finally:
        _Pass.is_repeated = before


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, split: Split | None, needs: list[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss of tokens `target [n]` given `hidden [n, h]`, and its gradients.

    `split`: of a vocabulary that is split over devices; `weight [vocabulary, h]` and `bias` are then this device's. `needs`:
    whether the gradients of hidden, weight and bias are wanted.
    """
    if kernels.on_gpu(hidden) and split is None:
        return by_rows(hidden, weight, bias, target, needs)
    return by_columns(hidden, weight, bias, target, split, needs)


class _ChunkedLoss(torch.autograd.Function):
    """The loss, whose gradients are there before backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, split: Split | None, training: bool
    ) -> Tensor:
        # `training` is asked before: in here gradients are always off, and what needs one is told as if they were on
        needs = [need and training for need in ctx.needs_input_grad[:3]]
        loss, *gradients = loss_and_gradients(hidden, weight, bias, target, split, needs)
        if not training:  # nothing will read them; recomputation compares their shapes
            gradients = [
                like.new_empty(()).expand_as(like) if like is not None and need else None
                for like, need in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
            ]
        ctx.save_for_backward(*gradients)
        ctx.scaled = False
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # a zero-bubble schedule runs this twice, once for the hidden state and once for the weights; in place, because
        # the gradient of a large head is worth not copying (.data: autograd counts changes of what it has saved)
        gradients = ctx.saved_tensors
        for part in gradients if not ctx.scaled else ():
            if part is not None:
                part.data.mul_(grad)
        ctx.scaled = True
        return *gradients, None, None, None


def chunked_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_ChunkedLoss`, for a compiler's graph, in which it is one operation; an empty tensor where no gradient is needed."""
    loss, *gradients = loss_and_gradients(hidden, weight, bias, target, None, needs)
    return loss, *(hidden.new_empty(0) if part is None else part for part in gradients)  # type: ignore[return-value]


_loss_in_a_graph = torch.library.custom_op("leanlm::chunked_loss", chunked_loss, mutates_args=())


@_loss_in_a_graph.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    parts = zip((hidden, weight, bias), needs, strict=True)
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, *(torch.empty_like(part) if part is not None and need else hidden.new_empty(0) for part, need in parts)


def _keep_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.needs = inputs[4]
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, grad: Tensor, *_: Any) -> Any:
    parts = zip(ctx.saved_tensors, ctx.needs, strict=True)
    return *((part * grad).to(part.dtype) if need else None for part, need in parts), None, None


_loss_in_a_graph.register_autograd(_scale_gradients, setup_context=_keep_gradients)
