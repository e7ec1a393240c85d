"""A model that leanlm has never seen: gated convolutions (Dauphin et al. 2017), with no attention and no recurrence."""

import torch
from torch import Tensor, nn

from leanlm.models.contract import Model
from leanlm.models.dropout import RowDropout
from leanlm.models.head import Head


class GatedConvolution(Model):
    tensor_split = {
        "embed.tokens": "vocabulary",
        "blocks.*.mix": "input",
        "blocks.*.mix.value": "colwise",
        "blocks.*.mix.gate": "colwise",
        "blocks.*.mix.out": "rowwise",
        "head.projection": "vocabulary",
    }

    def __init__(
        self, vocabulary: int, sequence: int, *, width: int = 16, depth: int = 5, kernel: int = 3, tied: bool = True,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(vocabulary, sequence)
        self.inner = 2 * width
        self.embed = Embedding(vocabulary, width)
        self.blocks = nn.ModuleDict({str(i): Block(width, self.inner, kernel, dropout) for i in range(depth)})
        self.head = Head(width, vocabulary, nn.RMSNorm(width), bias=False)
        if tied:
            self.head.projection.weight = self.embed.tokens.weight
        self.name_sites()

    def tensor_units(self) -> dict[str, int]:
        return {"width": self.inner}

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.normal_(0, 0.1, generator=generator)


class Embedding(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)

    def forward(self, tokens: Tensor, position: int = 0) -> Tensor:
        return self.tokens(tokens)


class Block(nn.Module):
    def __init__(self, width: int, inner: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.past = nn.Conv1d(width, width, kernel, groups=width)
        self.mix = Mix(width, inner)
        self.dropout = RowDropout(dropout)

    def forward(self, hidden: Tensor, state: None = None) -> tuple[Tensor, None]:
        x = self.norm(hidden).transpose(1, 2)
        x = self.past(nn.functional.pad(x, (self.past.kernel_size[0] - 1, 0))).transpose(1, 2)
        return hidden + self.dropout(self.mix(x)), None


class Mix(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.value, self.gate, self.out = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.value(x) * torch.sigmoid(self.gate(x)))
