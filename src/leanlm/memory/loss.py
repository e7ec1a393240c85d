"""The head and its loss without ever holding the logits of more than a chunk of tokens.

Plain cross-entropy keeps `tokens x vocabulary` numbers about three times over; at a vocabulary of 33,000 that is more
than everything else in a small model. Here the gradients of a chunk are made right after its logits, in one buffer that
all chunks share (the idea of Liger's FusedLinearCrossEntropy, Hsu et al. 2024, arXiv 2410.10989). On this project's
CPU figures torch's own `F.linear_cross_entropy` took 5 times as long, and it has no chunks before torch 2.13.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlm.data.batches import IGNORE
from leanlm.models.contract import Head

CHUNK = 1 << 21  # logits held at a time: 8 MiB in float32, near what a core's caches hold
SHORTEST = 64  # tokens in a chunk, below which matrix products get slow


def token_loss(head: Head, hidden: Tensor, target: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats of `target [b, s]` given `hidden [b, s, h]`; IGNORE is not counted.

    Exact up to the order of summation. The result can be differentiated once.
    """
    hidden = head.norm(hidden).flatten(0, 1)  # [b*s, h]
    target = target.flatten()
    projection = head.projection
    if target.numel() * projection.out_features <= CHUNK:
        logits = projection(hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)  # a sum of 1,000 tokens has few digits left in bf16
        return F.cross_entropy(logits.to(wide), target, reduction="sum", ignore_index=IGNORE)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return _ChunkedLoss.apply(hidden, projection.weight, projection.bias, target)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        need_hidden, need_weight, need_bias, _ = ctx.needs_input_grad
        matrix = weight.to(hidden.dtype)  # bf16 under autocast, otherwise the weight itself
        wide = torch.promote_types(hidden.dtype, torch.float32)
        size = min(len(target), max(SHORTEST, CHUNK // len(weight)))
        buffer = hidden.new_empty(size, len(weight))
        wide_buffer = buffer if buffer.dtype == wide else buffer.to(wide)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight) if need_weight else None
        d_bias = torch.zeros_like(bias) if bias is not None and need_bias else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for x, y, dx in zip(
            hidden.split(size), target.split(size), d_hidden.split(size) if need_hidden else target.split(size), strict=True
        ):
            narrow, logits = buffer[: len(y)], wide_buffer[: len(y)]
            if bias is None:
                torch.mm(x, matrix.t(), out=narrow)
            else:
                torch.addmm(bias.to(x.dtype), x, matrix.t(), out=narrow)
            if logits is not narrow:
                logits.copy_(narrow)
            torch.log_softmax(logits, -1, out=logits)
            counted = y != IGNORE
            column = y.clamp(min=0)[:, None]
            loss -= logits.gather(1, column)[:, 0].where(counted, 0).sum()
            if need_weight or need_hidden:
                probability = logits.exp_()
                probability.scatter_add_(1, column, torch.full_like(column, -1, dtype=wide))
                if not counted.all():
                    probability.mul_(counted[:, None])
                if logits is not narrow:
                    narrow.copy_(logits)
                if need_hidden:
                    torch.mm(narrow, matrix, out=dx)
                if d_bias is not None:
                    d_bias += logits.sum(0)
                if d_weight is not None and d_weight.dtype == narrow.dtype:
                    d_weight.addmm_(narrow.t(), x)
                elif d_weight is not None:
                    d_weight += narrow.t() @ x
        ctx.gradients = d_hidden, d_weight, d_bias
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, (None, None, None)
        return *(part if part is None else part.mul_(grad) for part in gradients), None
