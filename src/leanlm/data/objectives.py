"""What a model learns of a text: rows of tokens become an input and, for each of its positions, a target or IGNORE.

Which tokens are masked is a function of (seed, step, global row, position), drawn by the hash that draws dropout: the same
under every plan, after every resume, on every device.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from leanlm.common.errors import UserError
from leanlm.data.tokenizer import Tokenizer
from leanlm.models.contract import stable_hash
from leanlm.models.dropout import random_words
from leanlm.models.head import IGNORE

FIXED: dict[str, Any] = {"rate": 0.15, "random": 0.1, "kept": 0.1, "whole_words": False}  # in evaluation


class Text(NamedTuple):
    """Rows of a text, `[rows, length]` each."""

    before: Tensor  # the token before each of `tokens`
    tokens: Tensor
    counted: Tensor  # `tokens`, IGNORE where they are not to be predicted
    positions: Tensor | None = None  # of `tokens` in their documents, or before what fills a row up; None: all are one text


class Causal:
    """Each token is predicted from those before it."""

    causal: ClassVar[bool] = True  # what `Model.causal` has to be
    chooses: ClassVar[bool] = False  # whether a draw decides what counts, and evaluation tells how many were predicted right

    def problems(self) -> list[str]:
        """What cannot work about the arguments, one line each."""
        return []

    def vocabulary(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer, with what the objective needs beside."""
        return tokenizer

    def ready(self, tokenizer: Tokenizer, seed: int) -> "Causal":
        """The same for the token numbers of a tokenizer."""
        return self

    def frame(self, tokenizer: Tokenizer, numbers: NDArray[np.integer]) -> NDArray[np.integer]:
        """The tokens of a single text, as the model is to read them."""
        return numbers

    def one_by_one(self) -> "Causal":
        """The objective that gives every token of a text a probability, in one pass if it can. It is not `ready`."""
        return self

    def of_rows(self, text: Text, step: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Input and targets of the global rows `rows [rows]` in a step of training."""
        return text.before, text.counted

    def of_split(self, text: Text, places: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, targets and positions in evaluation. `places [rows, length]`: of the tokens in the split."""
        return text.before, text.counted, None

    def whole(self, batches: Any, rows: int) -> Any:
        """The batches of a split, of `rows` rows at most, as they are to be scored."""
        return batches


@dataclass
class Masked(Causal):
    """Some tokens are hidden, and predicted from all others of their row (BERT, Devlin et al. 2018).

    Args:
        rate: share of the tokens that are predicted.
        random: of these, the share in whose place a random token stands; the others show the mask token.
        kept: the share in whose place they stand themselves.
        whole_words: hide all tokens of a word, or none.
    """

    rate: float = 0.3
    random: float = 0.1
    kept: float = 0.1
    whole_words: bool = False

    causal: ClassVar[bool] = False
    chooses: ClassVar[bool] = True

    def problems(self) -> list[str]:
        found = [] if 0 < self.rate < 1 else [f"rate={self.rate}: a share above 0 and below 1"]
        if min(self.random, self.kept) < 0 or self.random + self.kept > 1:
            found.append(f"random={self.random}, kept={self.kept}: shares of at least 0 that are at most 1 together")
        return found

    def vocabulary(self, tokenizer: Tokenizer) -> Tokenizer:
        return tokenizer if tokenizer.mask is not None else tokenizer.with_mask()

    def ready(self, tokenizer: Tokenizer, seed: int) -> "Masked":
        if tokenizer.mask is None:
            raise UserError("objective=masked: the tokenizer has no mask token ([MASK] or <mask>)")
        pieces = tokenizer.pieces()
        self.seed, self.mask = stable_hash("masks", seed), tokenizer.mask
        self.special = torch.tensor([not piece for piece in pieces])
        self.ordinary = (~self.special).nonzero()[:, 0]
        self.opens = torch.tensor([not piece or piece[0].isspace() for piece in pieces])  # a word begins with it
        self.closes = torch.tensor([not piece or piece[-1].isspace() for piece in pieces])  # or after it
        return self

    def frame(self, tokenizer: Tokenizer, numbers: NDArray[np.integer]) -> NDArray[np.integer]:
        names = getattr(tokenizer, "beside", {}).get("marks", ())  # what begins a text and what ends it
        marks = [number for name in names for number in tokenizer.numbers(name)]
        return np.array([marks[0], *numbers, marks[1]]) if len(marks) == 2 else numbers

    def one_by_one(self) -> "Masked":
        return OneByOne()

    def of_rows(self, text: Text, step: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        of_step = int(random_words(self.seed, torch.tensor([step])))
        keys = random_words(of_step, rows.long())[:, None]
        bits = random_words(0, keys ^ torch.arange(text.tokens.shape[1]))
        return self._hidden(text, bits, self.rate, self.random, self.kept, self.whole_words)

    def of_split(self, text: Text, places: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        bits = random_words(stable_hash("fixed masks"), places)
        return *self._hidden(text, bits, **FIXED), apart(text.positions)

    def _hidden(
        self, text: Text, bits: Tensor, rate: float, random: float, kept: float, whole_words: bool
    ) -> tuple[Tensor, Tensor]:
        """Input and targets. `bits [rows, length]`: 64 random ones for each token."""
        tokens, deciding = text.tokens, bits.gather(1, self._first_of_word(text)) if whole_words else bits
        chosen = ((deciding & 0xFFFFFF) < rate * 2**24) & self._countable(text)
        share = (bits >> 24 & 0xFFFF) / 2**16
        drawn = self.ordinary[(bits >> 40 & 0x7FFFFF) % len(self.ordinary)]
        shown = torch.where(share < random, drawn, torch.where(share < random + kept, tokens, self.mask))
        return torch.where(chosen, shown, tokens), torch.where(chosen, tokens, IGNORE)

    def _countable(self, text: Text) -> Tensor:
        return (text.counted != IGNORE) & ~self.special[text.tokens]

    def _first_of_word(self, text: Text) -> Tensor:
        """Position in its row of the first token of each token's word, `[rows, length]`."""
        begins = self.opens[text.tokens] | F.pad(self.closes[text.tokens][:, :-1], (1, 0), value=True)
        if text.positions is not None:
            begins = begins | (text.positions == 0)
        return torch.where(begins, torch.arange(text.tokens.shape[1]), 0).cummax(1).values


class OneByOne(Masked):
    """Pseudo-log-likelihood: each token is predicted while it alone is hidden (Salazar et al. 2020, arXiv 1910.14659)."""

    def of_split(self, text: Text, places: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return text.tokens, torch.where(self._countable(text), text.tokens, IGNORE), apart(text.positions)

    def whole(self, batches: Any, rows: int) -> Any:
        return EachToken(batches, self.mask, rows)


@dataclass
class EachToken:
    """The rows of some batches, once for each of their positions, which is hidden then; `rows` of these at a time.

    All ranks yield the same number of batches, since theirs have the same shapes.
    """

    batches: Iterable[Any]
    mask: int
    rows: int

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            for each in torch.arange(batch.input.numel()).split(self.rows):
                row, place = each // batch.input.shape[1], each % batch.input.shape[1]
                here = torch.arange(batch.input.shape[1]) == place[:, None]
                tokens = batch.input[row].masked_fill(here, self.mask)
                target = batch.target[row].masked_fill(~here, IGNORE)
                positions = None if batch.positions is None else batch.positions[row]
                yield batch._replace(input=tokens, target=target, rows=batch.rows[row], positions=positions)


def apart(positions: Tensor | None) -> Tensor | None:
    """Positions, if there is more than one text in a row: then these are not to see each other."""
    return positions if positions is not None and bool((positions[:, 1:] == 0).any()) else None
