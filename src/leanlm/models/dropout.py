"""Dropout whose masks are a pure function of (seed, step, global row, site, position in the row).

A mask drawn from a device's generator depends on which rows sit on that device and on what was drawn before. Here each
element's bit is the output of a counter-based hash, so cutting the batch, moving a block to another process,
recomputing it or resuming a run gives the same mask. The hash is MurmurHash3's 32-bit finaliser (Appleby, public
domain) with a 64-bit key mixed in twice; keys come from SplitMix64 (Steele et al., OOPSLA 2014).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RowDropout(nn.Module):
    """Zero elements of `hidden [b, s, h]` with probability `rate`, scale the others by 1 / (1 - rate).

    `locked`: one mask per row for all positions (variational dropout, Gal and Ghahramani 2016). In eval mode, or with
    rate 0, the identity. `draw` says which rows of which step it computes; RuntimeError in training mode before that.
    """

    site: int = 0  # a number of the module's global name
    keys: Tensor | None = None  # [b], of the rows at hand
    first: int = 0  # position of their first token
    columns: tuple[int, int] | None = None  # of a part of a hidden state: its first number, and how many there are in all

    def __init__(self, rate: float, locked: bool = False) -> None:
        super().__init__()
        self.rate = rate
        self.locked = locked

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return hidden
        if self.keys is None:
            raise RuntimeError("dropout in training mode needs leanlm.models.dropout.draw(part, keys)")
        place, width = self.columns or (0, hidden.shape[2])
        positions, first = (1, 0) if self.locked else (hidden.shape[1], self.first)
        keep = keep_mask(self.keys, positions * width, self.rate, first * width).view(len(hidden), positions, width)
        return torch.where(keep[..., place : place + hidden.shape[2]], hidden / (1 - self.rate), 0)

    def extra_repr(self) -> str:
        return f"{self.rate}, locked={self.locked}"


def sites(part: nn.Module) -> list[RowDropout]:
    """The dropouts of a model, or of a part of one, that draw masks."""
    return [module for module in part.modules() if isinstance(module, RowDropout) and module.rate > 0]


def draw(dropouts: Sequence[RowDropout], keys: Tensor, first: int = 0) -> None:
    """Let the dropouts draw the masks of the rows with `keys [b, len(dropouts)]`, from position `first` on.

    The keys are tensors on the device: a compiler would take numbers for constants.
    """
    for i, dropout in enumerate(dropouts):
        dropout.keys, dropout.first = keys[:, i], first


def row_keys(seed: int, step: int, rows: Tensor, dropouts: Sequence[RowDropout]) -> Tensor:
    """What the masks of global rows `rows [b]` in optimizer step `step` are made of, `[b, len(dropouts)]`."""
    of_step = _splitmix(_splitmix(seed) ^ step)
    of_sites = [_signed(_splitmix(of_step ^ dropout.site), 64) for dropout in dropouts]
    return _splitmix_tensor(rows.long()[:, None] ^ torch.tensor(of_sites, dtype=torch.long))


def keep_mask(keys: Tensor, elements: int, rate: float, first: int = 0) -> Tensor:
    """Bool `[b, elements]`, each True with probability 1 - `rate`: elements from number `first` on of each row's mask."""
    low, high = keys[:, None].to(torch.int32), (keys[:, None] >> 32).to(torch.int32)
    bits = torch.arange(first, first + elements, dtype=torch.int32, device=keys.device) * _signed(0x9E3779B1, 32) ^ low
    bits = _scramble(bits, 16, 0x85EBCA6B)
    bits = bits.bitwise_xor_(high)
    bits = _scramble(bits, 13, 0xC2B2AE35)
    bits = bits.bitwise_xor_(_shift_right(bits, 16))
    return bits.bitwise_and_(0x7FFFFFFF) >= int(rate * 2**31)


def random_words(key: int, counters: Tensor) -> Tensor:
    """64 random bits for each of the counters (int64), a function of these and of a key of at most 64 bits."""
    return _splitmix_tensor(counters ^ _signed(_splitmix(key), 64))


def _scramble(bits: Tensor, shift: int, factor: int) -> Tensor:
    return bits.bitwise_xor_(_shift_right(bits, shift)).mul_(_signed(factor, 32))


def _shift_right(bits: Tensor, by: int) -> Tensor:
    width = 8 * bits.itemsize
    return (bits >> by).bitwise_and_((1 << (width - by)) - 1)  # torch shifts signed integers arithmetically


def _splitmix(x: int) -> int:
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def _splitmix_tensor(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15, 64)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB, 64)
    return x ^ _shift_right(x, 31)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value
