"""The end of a model: a final norm, perhaps a transform, and what gives each token type its probability."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # a target that is not counted (the value that torch's losses ignore)
ROUND = 64  # tokens of a band: oneDNN makes and keeps a kernel for every size that it meets


class Choice(NamedTuple):
    """A softmax over the outputs of a linear layer, for some of the tokens."""

    hidden: Tensor  # [n, h]
    projection: Any  # nn.Linear
    target: Tensor  # [n], which output; IGNORE: not counted


class Transform(nn.Module):
    """What BERT's head for masked tokens does before its projection: `norm(gelu(dense(hidden)))`."""

    def __init__(self, width: int, norm: nn.Module, bias: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width, bias=bias)
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(hidden)))


class Head(nn.Module):
    """Final norm, transform if there is one, and projection to the vocabulary: `hidden [b, s, h] -> logits [b, s, v]`.

    `choices` says what a token's likelihood is the product of, so that a loss can take the projections in chunks of tokens.
    """

    projection: Any
    transform: nn.Module

    def __init__(self, width: int, vocabulary: int, norm: nn.Module, bias: bool) -> None:
        super().__init__()
        self.norm, self.transform = norm, nn.Identity()
        self.projection = nn.Linear(width, vocabulary, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.projection(self.before(hidden))

    def before(self, hidden: Tensor) -> Tensor:
        """What the projection reads, `[b, s, h]`."""
        return self.transform(self.norm(hidden))

    def choices(self, hidden: Tensor, target: Tensor) -> list[Choice]:
        """Of tokens `target [n]` given what `before` returns for them, `hidden [n, h]`."""
        return [Choice(hidden, self.projection, target)]


class AdaptiveHead(Head):
    """A softmax over the most frequent types and one output for each band of rarer ones, then one within the band (Grave et
    al. 2017, arXiv 1609.04309): a frequent token costs the short softmax alone. torch's module holds the weights.

    Its logits are log-probabilities. Types must be numbered by falling frequency, as `data.tokenizer=word` does.

    Args:
        cutoffs: where the bands begin; band i is read through a linear map to `width / 4**(i + 1)`.
    """

    def __init__(self, width: int, vocabulary: int, norm: nn.Module, bias: bool, cutoffs: Sequence[int]) -> None:
        nn.Module.__init__(self)
        self.norm, self.transform = norm, nn.Identity()
        self.projection = nn.AdaptiveLogSoftmaxWithLoss(width, vocabulary, cutoffs, head_bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.before(hidden)
        return self.projection.log_prob(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])

    def choices(self, hidden: Tensor, target: Tensor) -> list[Choice]:
        bands, ends = self.projection.tail, self.projection.cutoffs
        short, found = target, []
        for i, (down, up) in enumerate(bands):
            inside = (target >= ends[i]) & (target < ends[i + 1])
            short = short.masked_fill(inside, ends[0] + i)
            rows = inside.nonzero()[:, 0]  # their count decides the sizes of what follows: here a GPU is waited for
            # computed where there are none, too: DDP waits for the gradient of every parameter
            more = -len(rows) % ROUND
            wanted = F.pad(target[rows] - ends[i], (0, more), value=IGNORE)
            found.append(Choice(down(hidden.index_select(0, F.pad(rows, (0, more)))), up, wanted))
        return [Choice(hidden, self.projection.head, short), *found]


def make_head(width: int, vocabulary: int, norm: nn.Module, bias: bool, cutoffs: Sequence[int] | None = None) -> Head:
    """A plain head, or an adaptive one if there are cutoffs below the size of the vocabulary."""
    below = [end for end in cutoffs or () if end < vocabulary]
    return AdaptiveHead(width, vocabulary, norm, bias, below) if below else Head(width, vocabulary, norm, bias)


def head_problems(cutoffs: Sequence[Any] | None, tied: bool, width: int) -> list[str]:
    """What cannot work about the arguments of a head, one line each."""
    if cutoffs is None:
        return []
    found = []
    if not all(isinstance(end, int) and end > 0 for end in cutoffs) or sorted(set(cutoffs)) != list(cutoffs) or not cutoffs:
        found.append(f"cutoffs={list(cutoffs)}: whole numbers that grow, such as [2000, 10000]; null for a plain softmax")
    elif width < 4 ** len(cutoffs):
        found.append(
            f"cutoffs={list(cutoffs)}: the last band is read through {width} / 4**{len(cutoffs)} numbers, fewer than 1"
        )
    if tied:
        found.append("tied=true, cutoffs: the bands of an adaptive head are narrower than the embedding; nothing can be shared")
    return found
