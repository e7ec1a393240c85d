"""The chunked loss on a CPU, and on every device where the vocabulary is split over several."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from leanlm.memory import chunks
from leanlm.models import kernels
from leanlm.models.head import IGNORE

LOST = 80  # nats of a token whose probability is near the smallest number of float32: they are taken from its logits
ROWS = 4096  # of a weight's gradient that a CPU adds bf16 products to at a time: adding makes a float32 copy of them


class Split(NamedTuple):
    """The part of a vocabulary that one of several devices has.

    They do not gather logits, but exchange for each token the largest logit, the sum of exponentials and the target's logit
    (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
    """

    group: dist.ProcessGroup
    first: int  # type of this device
    classes: int  # of this device
    most: int  # of any device

    @classmethod
    def of(cls, weight: Any) -> "Split":
        """Of a projection's weight that is sharded in its rows (a DTensor)."""
        mesh = weight.device_mesh
        most = -(-len(weight) // mesh.size())
        first = min(len(weight), mesh.get_local_rank() * most)
        return cls(mesh.get_group(), first, min(most, len(weight) - first), most)

    def softmax_(self, logits: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_softmax_`, whose last result is whether the target is counted and of this device."""
        row = target - self.first
        here = counted & (row >= 0) & (row < self.classes)
        row = row.where(here, 0)[None]
        largest, aim = logits.amax(0), logits.gather(0, row)[0]
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        logits.sub_(largest).exp_()
        total, aim = sums = torch.stack((logits.sum(0), aim.where(here, 0)))
        dist.all_reduce(sums, group=self.group)
        logits.div_(total)
        return largest + total.log() - aim, row, here


def by_columns(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, split: Split | None, needs: list[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As `loss.loss_and_gradients`, with logits `[vocabulary, tokens of a chunk]`: a CPU makes their product twice as fast.

    Those of a GPU lie in memory by tokens all the same.
    """
    need_hidden, need_weight, need_bias = needs
    matrix = weight.to(hidden.dtype)  # bf16 under autocast, otherwise the weight itself
    wide = torch.promote_types(hidden.dtype, torch.float32)
    gpu = kernels.on_gpu(hidden)
    empty = torch.empty_like if len(hidden) else torch.zeros_like  # the first chunk fills them, if there is one
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_weight = empty(weight) if need_weight else None
    d_bias = torch.zeros_like(bias) if bias is not None and need_bias else None
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    product = hidden.new_empty(0)  # in the type of `hidden`; one buffer for all chunks of a size
    some_ignored = gpu or bool((target == IGNORE).any())  # asked once, and not of a GPU, which would be waited for
    for chunk in chunks.chunks(len(hidden), chunks.chunk_size(hidden, split.most if split else len(weight))):
        x, y = hidden[chunk], target[chunk]
        tokens = len(x)
        if tokens % chunks.EVEN:
            x, y = F.pad(x, (0, 0, 0, -tokens % chunks.EVEN)), F.pad(y, (0, -tokens % chunks.EVEN), value=IGNORE)
        if product.shape[1:] != (len(x),):
            product = hidden.new_empty(len(x), len(weight)).t() if gpu else hidden.new_empty(len(weight), len(x))
            logits = product if product.dtype == wide else torch.empty_like(product, dtype=wide)
        if bias is None:
            torch.mm(matrix, x.t(), out=product)
        else:
            torch.addmm(bias.to(x.dtype)[:, None], matrix, x.t(), out=product)
        if logits is not product:
            logits.copy_(product)
        counted = y != IGNORE
        if split is None:
            nats, row, here = _softmax_(logits, y, counted, x, matrix, bias)
        else:
            nats, row, here = split.softmax_(logits, y, counted)
        loss += nats.where(counted, 0).sum()
        if not any(needs):
            continue
        d_logits = logits.scatter_add_(0, row, -here.to(wide)[None])  # probability, less 1 for the target
        if some_ignored or tokens < len(x):
            d_logits.mul_(counted)
        if d_bias is not None:
            d_bias += d_logits.sum(1)
        if d_logits is not product:
            product.copy_(d_logits)
        if d_hidden is not None:
            d_hidden[chunk] = (matrix.t() @ product).t()[:tokens]
        if d_weight is not None:
            _add_product_(d_weight, product, x, anew=chunk.start == 0)
    if d_hidden is not None and split is not None:
        dist.all_reduce(d_hidden, group=split.group)
    return loss, d_hidden, d_weight, d_bias


def _softmax_(
    logits: Tensor, target: Tensor, counted: Tensor, hidden: Tensor, matrix: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits `[vocabulary, tokens]` into probabilities, in place.

    Returns:
        Nats of each target `[tokens]`, of which those that are not `counted` mean nothing; the rows of the targets
        `[1, tokens]`; `counted`.
    """
    row = target.where(counted, 0)[None]
    nats = -torch.softmax(logits, 0, out=logits).gather(0, row)[0].log()
    lost = counted & (nats > LOST)
    if lost.any():
        again = F.linear(hidden[lost], matrix, bias if bias is None else bias.to(hidden.dtype)).to(logits.dtype)
        nats[lost] = F.cross_entropy(again, target[lost], reduction="none")
    return nats, row, counted


def _add_product_(total: Tensor, left: Tensor, right: Tensor, anew: bool) -> None:
    """`total += left right`, where a CPU's total may be in float32 and the factors in bf16; `anew`: of an empty total."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=int(not anew), out=total)
        return
    for part, rows in zip(total.split(ROWS), left.split(ROWS), strict=True):
        part.copy_(rows @ right) if anew else part.add_(rows @ right)
