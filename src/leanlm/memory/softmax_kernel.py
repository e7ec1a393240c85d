"""The kernel of `softmax.cross_entropy_` for GPUs, in Triton; imported where one is used."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # logits that a program has in registers


def cross_entropy_(logits: Tensor, target: Tensor, classes: int, gradient: bool) -> Tensor:
    """As `softmax.cross_entropy_`, in float32."""
    nats = logits.new_empty(len(logits), dtype=torch.float32)
    if len(logits):
        rows: Any = _rows
        shape = logits.stride(0), classes, logits.shape[1]
        rows[(len(logits),)](logits, target, nats, *shape, GRADIENT=gradient, BLOCK=BLOCK, num_warps=16)
    return nats


@triton.jit
def _rows(logits, target, nats, stride, classes, columns, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One row: its maximum and sum of exponentials block by block, then its gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    wanted = tl.load(target + row)
    aim = tl.load(logits + tl.maximum(wanted, 0)).to(tl.float32)  # before it is written over
    counted = (wanted >= 0).to(tl.float32)
    place = tl.arange(0, BLOCK)
    largest = float("-inf")
    total = 0.0
    for first in range(0, columns, BLOCK):
        at = first + place  # whole vectors are read where columns, not classes, bound them
        x = tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        x = tl.where(at < classes, x, float("-inf"))
        higher = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(x - higher), 0)
        largest = higher
    log_total = largest + tl.log(total)
    tl.store(nats + row, (log_total - aim) * counted)
    if GRADIENT:
        for first in range(0, columns, BLOCK):
            at = first + place
            x = tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32)
            x = tl.where(at < classes, x, float("-inf"))
            x = (tl.exp(x - log_total) - tl.where(at == wanted, 1.0, 0.0)) * counted
            tl.store(logits + at, x.to(logits.dtype.element_ty), mask=at < columns)
