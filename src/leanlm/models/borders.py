"""Rows of several documents that do not see each other."""

from typing import NamedTuple

import torch
from torch import Tensor


class Borders(NamedTuple):
    """Where the documents of some rows begin. In training it stands for the state of a block.

    Attributes:
        positions: of the tokens in their documents, `[b, s]`; a row begins with 0.
        attends: whether a token attends to another: to those of its own document, in a causal model up to it, `[b, 1, s, s]`.
    """

    positions: Tensor
    attends: Tensor

    @classmethod
    def of(cls, positions: Tensor, causal: bool = True) -> "Borders":
        document = (positions == 0).cumsum(1)
        same = document[:, None, :, None] == document[:, None, None, :]
        return cls(positions, same.tril() if causal else same)

    def apart(self, hidden: Tensor) -> Tensor:
        """`hidden [b, s, h]` with each document in a row of its own, `[documents, longest, h]`."""
        return torch.nn.utils.rnn.pad_sequence(hidden.flatten(0, 1).split(self._lengths()), batch_first=True)

    def together(self, hidden: Tensor) -> Tensor:
        """`apart` undone."""
        rows = [row[:length] for row, length in zip(hidden, self._lengths(), strict=True)]
        return torch.cat(rows).view(*self.positions.shape, -1)

    def _lengths(self) -> list[int]:
        first = torch.nonzero(self.positions.flatten() == 0)[:, 0]
        return first.diff(append=first.new_tensor([self.positions.numel()])).tolist()
