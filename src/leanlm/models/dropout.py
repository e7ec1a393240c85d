"""Dropout whose masks are a pure function of (seed, step, global row, site, position in the row).

A mask drawn from a device's generator depends on which rows sit on that device and on what was drawn before. Here each
element's bit is the output of a counter-based hash, so cutting the batch, moving a block to another process,
recomputing it or resuming a run gives the same mask. The hash is MurmurHash3's 32-bit finaliser (Appleby, public
domain) with a 64-bit key mixed in twice; keys come from SplitMix64 (Steele et al., OOPSLA 2014).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class _Draw:
    """Which rows of which step are being computed, and the position of their first token; None outside training."""

    key: int = 0
    rows: Tensor | None = None
    first: int = 0


@contextmanager
def rows_of_step(seed: int, step: int, rows: Tensor, first: int = 0) -> Iterator[None]:
    """Within it, dropout draws for the global row numbers `rows [b]` of optimizer step `step`, from position `first` on."""
    before = _Draw.key, _Draw.rows, _Draw.first
    _Draw.key, _Draw.rows, _Draw.first = _splitmix(_splitmix(seed) ^ step), rows, first
    try:
        yield
    finally:
        _Draw.key, _Draw.rows, _Draw.first = before


class RowDropout(nn.Module):
    """Zero elements of `hidden [b, s, h]` with probability `rate`, scale the others by 1 / (1 - rate).

    `locked`: one mask per row for all positions (variational dropout, Gal and Ghahramani 2016). In eval mode, or with
    rate 0, the identity. Raises RuntimeError in training mode outside `rows_of_step`.
    """

    site: int = 0

    def __init__(self, rate: float, locked: bool = False) -> None:
        super().__init__()
        self.rate = rate
        self.locked = locked

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return hidden
        if _Draw.rows is None:
            raise RuntimeError("dropout in training mode needs leanlm.models.dropout.rows_of_step(seed, step, rows)")
        return torch.where(self._keep(hidden), hidden / (1 - self.rate), 0)

    @torch.compiler.disable  # a compiler would take the key, which each step changes, for a constant
    def _keep(self, hidden: Tensor) -> Tensor:
        width = hidden.shape[2]
        positions, first = (1, 0) if self.locked else (hidden.shape[1], _Draw.first)
        assert _Draw.rows is not None
        keep = keep_mask(_Draw.key ^ self.site, _Draw.rows, positions * width, self.rate, first * width)
        return keep.view(len(hidden), positions, width)

    def extra_repr(self) -> str:
        return f"{self.rate}, locked={self.locked}"


def keep_mask(key: int, rows: Tensor, elements: int, rate: float, first: int = 0) -> Tensor:
    """Bool `[rows, elements]`, each True with probability 1 - `rate`: elements from number `first` on of each row's mask."""
    row_keys = _splitmix_tensor(rows.long() ^ _signed(_splitmix(key), 64))[:, None]
    low, high = row_keys.to(torch.int32), (row_keys >> 32).to(torch.int32)
    bits = torch.arange(first, first + elements, dtype=torch.int32, device=rows.device) * _signed(0x9E3779B1, 32) ^ low
    bits = _scramble(bits, 16, 0x85EBCA6B)
    bits = bits.bitwise_xor_(high)
    bits = _scramble(bits, 13, 0xC2B2AE35)
    bits = bits.bitwise_xor_(_shift_right(bits, 16))
    return bits.bitwise_and_(0x7FFFFFFF) >= int(rate * 2**31)


def _scramble(bits: Tensor, shift: int, factor: int) -> Tensor:
    return bits.bitwise_xor_(_shift_right(bits, shift)).mul_(_signed(factor, 32))


def _shift_right(bits: Tensor, by: int) -> Tensor:
    return (bits >> by).bitwise_and_((1 << (32 - by)) - 1)  # torch shifts signed integers arithmetically


def _splitmix(x: int) -> int:
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def _splitmix_tensor(x: Tensor) -> Tensor:
    def shift(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)

    x = x + _signed(0x9E3779B97F4A7C15, 64)
    x = (x ^ shift(x, 30)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ shift(x, 27)) * _signed(0x94D049BB133111EB, 64)
    return x ^ shift(x, 31)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value
