"""The head and its loss without ever holding the logits of more than a chunk of tokens.

Plain cross-entropy keeps `tokens x vocabulary` numbers about three times over; at a vocabulary of 33,000 that is more
than everything else in a small model. Here the gradients of a chunk are made right after its logits, in one buffer that
all chunks share (the idea of Liger's FusedLinearCrossEntropy, Hsu et al. 2024, arXiv 2410.10989). On two CPU
cores torch's own `F.linear_cross_entropy` took 2 to 5 times as long as plain cross-entropy, and it has no chunks before
torch 2.13.

A projection that is split over the vocabulary (a DTensor sharded in its rows) gives the loss without gathering logits:
the devices exchange the largest logit, the sum of exponentials and the target's logit of each token (Shoeybi et al. 2019, arXiv
1909.08053, section 3).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from leanlm.data.batches import IGNORE
from leanlm.memory import kernels
from leanlm.models.head import Head
from leanlm.spread import is_spread

CHUNK, CHUNK_GPU = 1 << 22, 1 << 24  # logits held at a time: 16 MiB in float32; a GPU is slow at small pieces: 64 MiB
SHORTEST = 128  # tokens in a chunk, below which matrix products get slow
LOST = 80  # nats of a token whose probability is near the smallest number of float32: it is taken from the logits
EVEN = 32  # a CPU takes two to four times as long for the softmax of a number of tokens that this does not divide
ROWS = 4096  # of a weight's gradient that bf16 products are added to at a time: adding makes a float32 copy of them


def token_loss(head: Head, hidden: Tensor, target: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats of `target [b, s]` given `hidden [b, s, h]`; IGNORE is not counted.

    Exact up to the order of summation. The result can be differentiated once.
    """
    choices = head.choices(head.norm(hidden).flatten(0, 1), target.flatten())
    return torch.stack([_choice_loss(*choice) for choice in choices]).sum() if len(choices) > 1 else _choice_loss(*choices[0])


def _choice_loss(hidden: Tensor, projection: Any, target: Tensor) -> Tensor:
    split = is_spread(projection.weight)
    if not split and target.numel() * projection.out_features <= _chunk(hidden):
        logits = projection(hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)  # a sum of 1,000 tokens has few digits left in bf16
        return F.cross_entropy(logits.to(wide), target, reduction="sum", ignore_index=IGNORE)
    hidden = hidden.to(kernels.low_precision(hidden))
    weight, bias, rows = projection.weight, projection.bias, None
    if split:
        rows = _Rows.of(weight)
        weight, bias = (part if part is None else part.to_local() for part in (weight, bias))
    return _ChunkedLoss.apply(hidden, weight, bias, target, rows, torch.is_grad_enabled() and not _Pass.is_repeated)


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


class _Rows(NamedTuple):
    """This device's rows of a projection that is split over the vocabulary: the first, the count where it is largest."""

    group: dist.ProcessGroup
    first: int
    longest: int

    @classmethod
    def of(cls, weight: Any) -> "_Rows":
        mesh = weight.device_mesh
        longest = -(-len(weight) // mesh.size())
        return cls(mesh.get_group(), min(len(weight), mesh.get_local_rank() * longest), longest)


def chunks(tokens: int, size: int) -> Iterable[int]:
    """The first token of each chunk."""
    return range(0, tokens, size)


def _chunk(hidden: Tensor) -> int:
    return CHUNK_GPU if kernels.on_gpu(hidden) else CHUNK


def _even(tokens: int, size: int) -> int:
    """A chunk size near `size` that leaves no short rest."""
    return max(EVEN, round(tokens / max(1, round(tokens / size)) / EVEN) * EVEN)


class _ChunkedLoss(torch.autograd.Function):
    """Logits are `[vocabulary, tokens of a chunk]`. On a CPU they also lie so in memory: their product is then twice as fast. A
    GPU's softmax wants those of a token to be neighbours (H200: 267 of a step's 534 ms where they were not, 0.6 ms now)."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rows: _Rows | None,
        training: bool,  # in here gradients are always off, and what needs one is told as if they were on
    ) -> Tensor:
        need_hidden, need_weight, need_bias = (need and training for need in ctx.needs_input_grad[:3])
        matrix = weight.to(hidden.dtype)  # bf16 under autocast, otherwise the weight itself
        wide = torch.promote_types(hidden.dtype, torch.float32)
        gpu = kernels.on_gpu(hidden)
        size = _even(len(hidden), max(SHORTEST, _chunk(hidden) // (rows.longest if rows else len(weight))))
        empty = torch.empty_like if len(hidden) else torch.zeros_like  # the first chunk fills them, if there is one
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = empty(weight) if need_weight else None
        d_bias = torch.zeros_like(bias) if bias is not None and need_bias else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        narrow = hidden.new_empty(0)  # the products' results; one buffer for all chunks of a size
        some_ignored = bool((target == IGNORE).any())  # asked once: a GPU is waited for
        for first in chunks(len(hidden), size):
            x, y = hidden[first : first + size], target[first : first + size]
            tokens = len(x)
            if tokens % EVEN:
                x, y = F.pad(x, (0, 0, 0, -tokens % EVEN)), F.pad(y, (0, -tokens % EVEN), value=IGNORE)
            if narrow.shape[1:] != (len(x),):
                narrow = hidden.new_empty(len(x), len(weight)).t() if gpu else hidden.new_empty(len(weight), len(x))
                logits = narrow if narrow.dtype == wide else torch.empty_like(narrow, dtype=wide)
            if bias is None:
                torch.mm(matrix, x.t(), out=narrow)
            else:
                torch.addmm(bias.to(x.dtype)[:, None], matrix, x.t(), out=narrow)
            if logits is not narrow:
                logits.copy_(narrow)
            counted = y != IGNORE
            if rows is None:
                here, row = counted, y.where(counted, 0)[None]
                if gpu:
                    torch.log_softmax(logits.t(), 1, out=logits.t())
                    each = -logits.gather(0, row)[0]
                    probability = logits.exp_()
                else:
                    probability = torch.softmax(logits, 0, out=logits)
                    each = -probability.gather(0, row)[0].log()
                    lost = counted & (each > LOST)
                    if lost.any():
                        again = F.linear(x[lost], matrix, bias if bias is None else bias.to(x.dtype)).to(wide)
                        each[lost] = F.cross_entropy(again, y[lost], reduction="none")
            else:
                position = y - rows.first
                here = counted & (position >= 0) & (position < len(weight))
                row = position.where(here, 0)[None]
                largest, aim = logits.amax(0), logits.gather(0, row)[0]
                dist.all_reduce(largest, dist.ReduceOp.MAX, rows.group)
                probability = logits.sub_(largest).exp_()
                total, aim = sums = torch.stack((probability.sum(0), aim.where(here, 0)))
                dist.all_reduce(sums, group=rows.group)
                probability.div_(total)
                each = largest + total.log() - aim
            loss += each.where(counted, 0).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            gradient = probability.scatter_add_(0, row, -here.to(wide)[None])
            if some_ignored or tokens < len(x):
                gradient.mul_(counted)
            if d_bias is not None:
                d_bias += gradient.sum(1)
            if gradient is not narrow:
                narrow.copy_(gradient)
            if d_hidden is not None:
                d_hidden[first : first + size] = (matrix.t() @ narrow).t()[:tokens]
            if d_weight is not None and d_weight.dtype == narrow.dtype:
                torch.addmm(d_weight, narrow, x, beta=int(first > 0), out=d_weight)
            elif d_weight is not None:
                for part, some in zip(d_weight.split(ROWS), narrow.split(ROWS), strict=True):
                    part.copy_(some @ x) if first == 0 else part.add_(some @ x)
        if d_hidden is not None and rows is not None:
            dist.all_reduce(d_hidden, group=rows.group)
        if not training:  # nothing will read them; recomputation compares their shapes
            d_hidden, d_weight, d_bias = (
                like.new_empty(()).expand_as(like) if like is not None and need else None
                for like, need in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
            )
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.scaled = False
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        # a zero-bubble schedule runs this twice, once for the hidden state and once for the weights; in place, because
        # the gradient of a large head is worth not copying (.data: autograd counts changes of what it has saved)
        gradients = ctx.saved_tensors
        for part in gradients if not ctx.scaled else ():
            if part is not None:
                part.data.mul_(grad)
        ctx.scaled = True
        return *gradients, None, None, None
