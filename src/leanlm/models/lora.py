"""LoRA (Hu et al. 2021, arXiv 2106.09685): a model's weights stay as they are, and chosen linear layers learn a correction of
low rank beside theirs.

    y = W x + scale B A x,   A [rank, inputs], B [outputs, rank]

A is drawn as torch draws a linear layer's weights, B begins at zero: training begins with the model as it was.
"""

from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlm.models import kernels
from leanlm.models.contract import Model
from leanlm.models.dropout import RowDropout


@dataclass(frozen=True)
class Lora:
    """What is trained beside a model.

    Attributes:
        rank: of each correction.
        alpha: scale of the corrections times `rank`; times its square root if `rank_stabilized` (rsLoRA, Kalajdzievski 2023,
            arXiv 2312.03732).
        dropout: rate on what the corrections read.
        targets: patterns for the names of linear layers, as in any block (attention.query) or in one (blocks.7.*); `*` is
            anything.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["*"])
    rank_stabilized: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def problems(self, net: Model) -> list[str]:
        """Why it cannot be put into a model, one line each."""
        found = [] if self.rank >= 1 else [f"adapter.rank={self.rank}: it must be at least 1"]
        found += [] if self.alpha > 0 else [f"adapter.alpha={self.alpha:g}: it must be above 0"]
        found += [] if 0 <= self.dropout < 1 else [f"adapter.dropout={self.dropout:g}: a share of at least 0 and below 1"]
        names = [name for name, _ in layers(net)]
        within = ", ".join(dict.fromkeys(map(within_block, names)))
        known = f"there are {within}" if within else "its blocks have none"
        return found + [
            f"adapter.targets: no linear layer of this {type(net).__name__} is called {pattern}; {known}"
            for pattern in self.targets or ["[]"]
            if not any(_is_called(name, pattern) for name in names)
        ]

    def chosen(self, net: Model) -> list[tuple[str, nn.Linear]]:
        return [(name, each) for name, each in layers(net) if any(_is_called(name, pattern) for pattern in self.targets)]

    def apply(self, net: Model) -> None:
        """Put corrections into a model, whose own parameters are not trained any more."""
        net.requires_grad_(False)
        for name, layer in self.chosen(net):
            _put(net, name, Adapted(layer, Correction(layer, self.rank, self.scale, self.dropout)))
        net.name_sites()


class Correction(nn.Module):
    """Adds `scale B A dropout(x) [..., outputs]` of `x [..., inputs]` to what a layer makes of `x`."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.a = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.b = nn.Parameter(layer.weight.new_empty(layer.out_features, rank))
        self.scale, self.dropout = scale, RowDropout(dropout)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        low = self.low(x, self.a)
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self.b.t()).view(out.shape)  # without a tensor more

    def low(self, x: Tensor, a: Tensor) -> Tensor:
        """`scale A dropout(x) [..., rank]`, by an A that need not be its own."""
        return F.linear(self.dropout(x), a) * self.scale

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        bound = parameter.shape[1] ** -0.5 if name == "a" else 0.0
        parameter.uniform_(-bound, bound, generator=generator)


class Adapted(nn.Linear):
    """A linear layer with a correction, whose own weights are those of `layer`."""

    def __init__(self, layer: nn.Linear, adapter: Correction) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias, self.adapter = layer.weight, layer.bias, adapter

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(kernels.low_precision(x))  # once for both
        return self.adapter(x, super().forward(x))


def layers(net: Model) -> list[tuple[str, nn.Linear]]:
    """Linear layers in the blocks of a model, by their global names."""
    return [(f"blocks.{name}", each) for name, each in net.blocks.named_modules() if isinstance(each, nn.Linear)]


def within_block(name: str) -> str:
    """`blocks.7.attention.query` -> `attention.query`."""
    return name.split(".", 2)[2]


def _is_called(name: str, pattern: str) -> bool:
    return fnmatch(within_block(name), pattern) or fnmatch(name, pattern)


@torch.no_grad()
def merge(net: Model) -> None:
    """Add the corrections to the weights of a whole model, which has plain linear layers then."""
    for name, layer in layers(net):
        if isinstance(layer, Adapted):
            adapter = layer.adapter
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight, plain.bias = layer.weight, layer.bias
            plain.weight += adapter.scale * (adapter.b.double() @ adapter.a.double()).to(plain.weight.dtype)
            _put(net, name, plain)


def _put(net: Model, name: str, layer: nn.Linear) -> None:
    parent, _, key = name.rpartition(".")
    setattr(net.get_submodule(parent), key, layer)
