"""Recurrent language models: Elman (tanh or relu), LSTM and GRU, one block per layer, state carried between steps."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanlm.models.borders import Borders
from leanlm.models.contract import Model
from leanlm.models.dropout import RowDropout
from leanlm.models.head import make_head

CELLS = {"elman_tanh": nn.RNN, "elman_relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class RNN(Model):
    """A stack of recurrent layers between an embedding and a head.

    Args:
        vocabulary: number of token types.
        sequence: tokens per row and step, the length of truncated back-propagation through time.
        cell: the recurrence.
        width: size of every layer.
        embedding: size of the embedding, and of what the head's projection reads; None: as the layers. Another size is met by a
            linear map after the one and before the other, which for a large vocabulary saves most of the model.
        depth: number of layers.
        tied: share the embedding's weights with the head's.
        head_bias: whether the head adds a bias.
        cutoffs: numbers of the types at which the bands of an adaptive softmax begin; None: a plain one.
        dropout: rate on the embedding and after each layer.
        locked: one dropout mask per row for all positions (variational) instead of one per position.
        init: embedding and head are drawn uniformly from [-init, init].
    """

    carries_state = isolates = True
    tensor_split = {"embed.tokens": "vocabulary", "head.projection": "vocabulary"}  # a recurrence reads all of its state

    def __init__(
        self,
        vocabulary: int,
        sequence: int,
        *,
        cell: Literal["elman_tanh", "elman_relu", "lstm", "gru"] = "lstm",
        width: int = 256,
        embedding: int | None = None,
        depth: int = 1,
        tied: bool = False,
        head_bias: bool = True,
        cutoffs: list[int] | None = None,
        dropout: float = 0.0,
        locked: bool = True,
        init: float = 0.1,
    ) -> None:
        super().__init__(vocabulary, sequence)
        self.cell, self.init, self._width, size = cell, init, width, embedding or width
        self.embed = Embedding(vocabulary, size, width, RowDropout(dropout, locked))
        self.blocks = nn.ModuleDict({str(i): Layer(cell, width, RowDropout(dropout, locked)) for i in range(depth)})
        self.head = make_head(size, vocabulary, _linear(width, size), head_bias, cutoffs)
        if tied:
            self.head.projection.weight = self.embed.tokens.weight
        self.name_sites()

    @property
    def width(self) -> int:
        return self._width

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        if name.startswith("blocks."):
            bound = parameter.shape[0] / {"lstm": 4, "gru": 3}.get(self.cell, 1)
            parameter.uniform_(-(bound**-0.5), bound**-0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()
        elif name in ("embed.resize.weight", "head.norm.weight") or ".tail." in name:
            parameter.uniform_(-(parameter.shape[1] ** -0.5), parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.uniform_(-self.init, self.init, generator=generator)


class Embedding(nn.Module):
    def __init__(self, vocabulary: int, size: int, width: int, dropout: RowDropout) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, size)
        self.resize = _linear(size, width)
        self.dropout = dropout

    def forward(self, tokens: Tensor, position: int | Tensor = 0) -> Tensor:
        return self.dropout(self.resize(self.tokens(tokens)))


class Layer(nn.Module):
    """One recurrent layer. Its state is a tuple of tensors `[b, h]`: (hidden,), or (hidden, cell) for an LSTM."""

    def __init__(self, cell: str, width: int, dropout: RowDropout) -> None:
        super().__init__()
        extra = {"nonlinearity": cell.removeprefix("elman_")} if cell.startswith("elman_") else {}
        self.cell = CELLS[cell](width, width, batch_first=True, **extra)
        self.dropout = dropout

    def forward(self, hidden: Tensor, state: tuple[Tensor, ...] | Borders | None) -> tuple[Tensor, Any]:
        if isinstance(state, Borders):
            return self.dropout(state.together(self.cell(state.apart(hidden))[0])), None
        before = None if state is None else tuple(part.unsqueeze(0) for part in state)
        hidden, after = self.cell(hidden, before if before is None or isinstance(self.cell, nn.LSTM) else before[0])
        return self.dropout(hidden), tuple(part.squeeze(0) for part in (after if isinstance(after, tuple) else (after,)))


def _linear(before: int, after: int) -> nn.Module:
    return nn.Identity() if before == after else nn.Linear(before, after, bias=False)
