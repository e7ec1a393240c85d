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

from leanlm.common.dtensors import is_dtensor
from leanlm.memory.softmax import cross_entropy_
from leanlm.models import kernels
from leanlm.models.head import IGNORE, Head

CHUNK = 1 << 22  # logits that a CPU holds at a time: 16 MiB in float32
SHARE = 128  # one part in so many of a GPU's memory may be logits
LEAST = 32 << 20  # bytes of a GPU's logits, below which its kernels are slow, and so many in float32 need no chunks
SUM = 8  # bytes that adding to a number of a weight's gradient moves: a chunk has as many of logits, or adding would cost more
SHORTEST = 128  # tokens in a chunk, below which matrix products get slow
LOST = 80  # nats of a token whose probability is near the smallest number of float32: it is taken from the logits
EVEN = 32  # a CPU takes two to four times as long for the softmax of a number of tokens that this does not divide
ROWS = 4096  # of a weight's gradient that a CPU adds bf16 products to at a time: adding makes a float32 copy of them
ALIGNED = 64  # a GPU multiplies at half the speed where this does not divide the vocabulary

Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # the loss, gradients of hidden, weight and bias


def token_loss(head: Head, hidden: Tensor, target: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats of `target [b, s]` given `hidden [b, s, h]`; IGNORE is not counted.

    Exact up to the order of summation. The result can be differentiated once.
    """
    choices = head.choices(head.norm(hidden).flatten(0, 1), target.flatten())
    return torch.stack([_choice_loss(*choice) for choice in choices]).sum() if len(choices) > 1 else _choice_loss(*choices[0])


def _choice_loss(hidden: Tensor, projection: Any, target: Tensor) -> Tensor:
    split = is_dtensor(projection.weight)
    if not split and target.numel() * projection.out_features <= (LEAST // 4 if kernels.on_gpu(hidden) else CHUNK):
        logits = projection(hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)  # a sum of 1,000 tokens has few digits left in bf16
        return F.cross_entropy(logits.to(wide), target, reduction="sum", ignore_index=IGNORE)
    hidden = hidden.to(kernels.low_precision(hidden))
    weight, bias, rows = projection.weight, projection.bias, None
    if split:
        rows = _Rows.of(weight)
        weight, bias = (part if part is None else part.to_local() for part in (weight, bias))
    training = torch.is_grad_enabled() and not _Pass.is_repeated
    if torch.compiler.is_compiling() and not split:
        needs = [training and part is not None and part.requires_grad for part in (hidden, weight, bias)]
        return _loss_in_a_graph(hidden, weight, bias, target, needs)[0]
    return _ChunkedLoss.apply(hidden, weight, bias, target, rows, training)


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


class _ChunkedLoss(torch.autograd.Function):
    """The loss, whose gradients are there before backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rows: _Rows | None,
        training: bool,  # in here gradients are always off, and what needs one is told as if they were on
    ) -> Tensor:
        needs = [need and training for need in ctx.needs_input_grad[:3]]
        loss, *gradients = _in_chunks(hidden, weight, bias, target, rows, needs)
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
    loss, *gradients = _in_chunks(hidden, weight, bias, target, None, needs)
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


def _in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: _Rows | None, needs: list[bool]
) -> Results:
    """Loss of tokens `target [n]` given `hidden [n, h]`, and the gradients that are needed of hidden, weight and bias."""
    if kernels.on_gpu(hidden) and rows is None:
        return _by_rows(hidden, weight, bias, target, needs)
    return _by_columns(hidden, weight, bias, target, rows, needs)


def chunks(tokens: int, size: int) -> Iterable[int]:
    """The first token of each chunk."""
    return range(0, tokens, size)


def logits_memory(device: torch.device) -> int:
    """Bytes that a GPU has for logits: a share of its memory, whatever else is in it at the moment."""
    return share_of(torch.cuda.get_device_properties(device).total_memory)


def share_of(memory: int) -> int:
    """The same for every card that is sold with so much: of a power of two, since each keeps some of it to itself."""
    return (1 << (memory * 9 // 8).bit_length() - 1) // SHARE


def _chunk(hidden: Tensor, classes: int) -> int:
    """Logits that are held at a time."""
    if not kernels.on_gpu(hidden):
        return CHUNK
    pays = SUM * hidden.shape[1] * classes
    return max(LEAST, min(pays, logits_memory(hidden.device))) // kernels.low_precision(hidden).itemsize


def _even(tokens: int, size: int) -> int:
    """A chunk size near `size` that leaves no short rest."""
    return max(EVEN, round(tokens / max(1, round(tokens / size)) / EVEN) * EVEN)


def _by_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, needs: list[bool]) -> Results:
    """Logits are `[tokens of a chunk, vocabulary]`, as a GPU's softmax wants them: its neighbours are those of a token."""
    need_hidden, need_weight, need_bias = needs
    more = -len(weight) % ALIGNED
    matrix = weight.to(hidden.dtype)
    if more and hidden.dtype.itemsize == 2:
        matrix = F.pad(matrix, (0, 0, 0, more))
    added = None if bias is None else F.pad(bias.to(hidden.dtype), (0, len(matrix) - len(bias)))
    size = _even(len(hidden), max(SHORTEST, _chunk(hidden, len(weight)) // (len(weight) + more)))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    buffer = hidden.new_empty(min(size, len(hidden)), len(weight) + more)[:, : len(matrix)]
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_weight = torch.zeros_like(matrix, dtype=wide) if need_weight else None
    d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and need_bias else None
    nats = [hidden.new_zeros(0, dtype=wide)]
    for first in chunks(len(hidden), size):
        x, y = hidden[first : first + size], target[first : first + size]
        logits = buffer[: len(x)]
        if added is None:
            torch.mm(x, matrix.t(), out=logits)
        else:
            torch.addmm(added, x, matrix.t(), out=logits)
        nats.append(cross_entropy_(logits, y, len(weight), any(needs)))
        gradient = logits
        if d_hidden is not None:
            torch.mm(gradient, matrix, out=d_hidden[first : first + size])
        if d_weight is not None:
            kernels.add_product_(d_weight, gradient.t(), x)
        if d_bias is not None:
            d_bias += gradient[:, : len(d_bias)].sum(0, dtype=wide)
    return (
        torch.cat(nats).sum(),
        d_hidden,
        None if d_weight is None else d_weight[: len(weight)].to(weight.dtype),
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


def _by_columns(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: _Rows | None, needs: list[bool]
) -> Results:
    """Logits are `[vocabulary, tokens of a chunk]`: on a CPU their product is then twice as fast. And for a vocabulary that is
    split over devices; those of a GPU lie in memory by tokens all the same."""
    need_hidden, need_weight, need_bias = needs
    matrix = weight.to(hidden.dtype)  # bf16 under autocast, otherwise the weight itself
    wide = torch.promote_types(hidden.dtype, torch.float32)
    gpu = kernels.on_gpu(hidden)
    longest = rows.longest if rows else len(weight)
    size = _even(len(hidden), max(SHORTEST, _chunk(hidden, longest) // longest))
    empty = torch.empty_like if len(hidden) else torch.zeros_like  # the first chunk fills them, if there is one
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_weight = empty(weight) if need_weight else None
    d_bias = torch.zeros_like(bias) if bias is not None and need_bias else None
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    narrow = hidden.new_empty(0)  # the products' results; one buffer for all chunks of a size
    some_ignored = gpu or bool((target == IGNORE).any())  # asked once, and not of a GPU, which would be waited for
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
        if not any(needs):
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
    return loss, d_hidden, d_weight, d_bias
