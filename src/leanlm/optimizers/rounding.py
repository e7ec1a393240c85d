"""Rounding to bf16 by chance, up with the probability of the part that is cut off, so that small updates are not lost."""

from collections.abc import Iterable

import torch
from torch import Tensor

from leanlm.common.dtensors import local_part
from leanlm.models.contract import stable_hash
from leanlm.models.dropout import random_words

LANES = 4  # numbers that share a word of 64 random bits


class Rounding:
    """Rounds the numbers of named parameters.

    What it draws is a function of (seed, step, name, element of the whole parameter): the copies of a weight stay one, and its
    parts get what the whole would, under every plan and after a resume.
    """

    step = 0  # of the run

    def __init__(self, seed: int, named: Iterable[tuple[str, Tensor]]) -> None:
        self.keys = {parameter: stable_hash(seed, "rounding", name) for name, parameter in named}

    def __call__(self, numbers: Tensor, parameter: Tensor, part: Tensor, piece: slice) -> Tensor:
        """`numbers [n]` of a parameter, in float32, as bf16. They are a `piece` of what this device has of `part`, which is the
        parameter or is distributed otherwise."""
        noise = random_bits(self.keys[parameter] ^ self.step, part, piece, numbers.device)
        bits = numbers.view(torch.int32).add(noise).add_(1 << 15)
        return bits.bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def random_bits(key: int, part: Tensor, piece: slice, device: torch.device) -> Tensor:
    """For each number of a `piece` of what this device has of a tensor 16 random bits, as int16 `[n]`.

    They depend on the key and on the number's place in the whole tensor, whose rows each begin with a word of their own.
    """
    whole = torch.empty(part.shape or (1,), device="meta")
    mine, columns = local_part(whole, part), whole.shape[-1]
    width, (row, column) = max(1, mine.shape[-1]), divmod(int(mine.storage_offset()), columns)
    first, last = piece.start // width, -(-piece.stop // width)  # of the rows that this device has
    skipped, count = piece.start - first * width, piece.stop - piece.start
    if last - first == 1:
        column, width, skipped = column + skipped, count, 0
    begin, end = column // LANES, -(-(column + width) // LANES)
    rows = torch.arange(row + first, row + last, device=device)[:, None] * -(-columns // LANES)
    bits = random_words(key, rows + torch.arange(begin, end, device=device)).view(torch.int16)
    return bits[:, column - begin * LANES :][:, :width].flatten()[skipped:][:count]
