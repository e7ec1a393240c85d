"""Which tokens are the global batch of step s: pure functions of (seed, s), sliced by rank and micro-batch only."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanlm.data.objectives import Causal, Text
from leanlm.models.head import IGNORE


class Batch(NamedTuple):
    """One micro-batch of one rank."""

    input: Tensor  # tokens read, `[rows, sequence]`
    target: Tensor  # tokens to predict, `[rows, sequence]`, IGNORE where not counted
    rows: Tensor  # their row numbers in the global batch, `[rows]`
    step: int  # of the optimizer, from 0
    micro: int  # number of the micro-batch within the step on this rank
    fresh: bool  # whether carried state starts anew with this batch
    step_tokens: int  # counted targets in the whole global batch
    positions: Tensor | None = None  # of the tokens in their documents, `[rows, sequence]`, if these are not to see each other
    source_tokens: tuple[int, ...] = ()  # counted targets of each source of the text in the whole global batch
    source: int = 0  # of a validation: the one that the rows are of

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with what the model reads moved; row numbers stay on the CPU, where Python reads them."""
        positions = None if self.positions is None else move(self.positions)
        return self._replace(input=move(self.input), target=move(self.target), positions=positions)


@dataclass(frozen=True)
class Order:
    """What the orders of a text have in common: each epoch draws its own random numbers, the first of which shifts it."""

    tokens: int
    sequence: int
    global_batch: int
    seed: int

    def _begin(self, epoch: int, room: int) -> tuple[int, np.random.Generator]:
        """A shift below `sequence`, by `room` at most, and what draws the rest of the epoch."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        return int(random.integers(min(room, self.sequence - 1) + 1)), random


class Windows(Order):
    """Shuffled windows: row r of step s is window s * global_batch + r of an endless series of epochs, each a
    permutation of all windows, shifted by a random offset below `sequence`."""

    def offsets(self, step: int) -> tuple[NDArray[np.int64], bool]:
        """First input token of each row, `[global_batch]`; False, since no state is carried."""
        return self.of(np.arange(step * self.global_batch, (step + 1) * self.global_batch)), False

    def of(self, series: NDArray[np.int64]) -> NDArray[np.int64]:
        """First input token of each of these rows of the series, `[rows]`."""
        starts = np.empty(len(series), np.int64)
        for epoch in np.unique(series // self.per_epoch):
            here = series // self.per_epoch == epoch
            shift, order = self._epoch(int(epoch))
            starts[here] = shift + order[series[here] % self.per_epoch] * self.sequence
        return starts

    @property
    def per_epoch(self) -> int:
        """Windows in an epoch; one is given up for the shift."""
        return max(1, (self.tokens - 1) // self.sequence - 1)

    @cached_property
    def _epoch(self) -> Callable[[int], tuple[int, NDArray[np.int64]]]:
        """Number of an epoch -> its shift, and the order of its windows; the last one is kept."""

        def made(epoch: int) -> tuple[int, NDArray[np.int64]]:
            shift, random = self._begin(epoch, self.tokens - 1 - self.per_epoch * self.sequence)
            return shift, random.permutation(self.per_epoch)

        return lru_cache(1)(made)


class Lanes(Order):
    """Contiguous lanes: the text is cut into `global_batch` equal lanes, and row g of each step continues where row g
    of the step before stopped. An epoch ends when the lanes do; the next starts anew, shifted by a random offset."""

    def offsets(self, step: int) -> tuple[NDArray[np.int64], bool]:
        """First input token of each row, `[global_batch]`, and whether an epoch begins."""
        epoch, position = divmod(step, self.per_epoch)
        shift, _ = self._begin(epoch, self.length - self.per_epoch * self.sequence)
        lanes = np.arange(self.global_batch, dtype=np.int64) * self.length
        return lanes + shift + position * self.sequence, position == 0

    @property
    def length(self) -> int:
        return (self.tokens - 1) // self.global_batch

    @property
    def per_epoch(self) -> int:
        """Steps in an epoch; one is given up for the shift."""
        return max(1, self.length // self.sequence - 1)


@dataclass
class GlobalBatches:
    """This rank's micro-batches of every step from `first_step` on, without end.

    Rank r of `replicas` holds the contiguous rows from r * global_batch / replicas, cut into `accumulate`
    micro-batches. `ignore` lists token numbers that are not counted as targets. `objective` says what is read and predicted.
    """

    tokens: NDArray[np.unsignedinteger]
    order: Any  # Windows, Lanes, or another with `offsets(step)` and `sequence`
    replicas: int = 1
    rank: int = 0
    accumulate: int = 1
    ignore: list[int] = field(default_factory=list)
    first_step: int = 0
    objective: Causal = field(default_factory=Causal)

    def __iter__(self) -> Iterator[Batch]:
        for step in count(self.first_step):
            yield from self.step(step)

    def step(self, step: int) -> Iterator[Batch]:
        """The micro-batches of one step."""
        starts, fresh = self.order.offsets(step)
        size = len(starts) // (self.replicas * self.accumulate)
        counts = self._counts(starts, step, torch.arange(len(starts)))
        for micro in range(self.accumulate):
            first = (self.rank * self.accumulate + micro) * size
            rows = torch.arange(first, first + size)
            text = self._read(starts[first : first + size])
            tokens, target = self.objective.of_rows(text, step, rows)
            yield Batch(tokens, target, rows, step, micro, fresh, sum(counts), text.positions, counts)

    def _counts(self, starts: NDArray[np.int64], step: int, rows: Tensor) -> tuple[int, ...]:
        """Counted targets of the global rows `rows`: the text is looked at where `ignore` or a draw decides."""
        if not self.ignore and not self.objective.chooses:
            return (self._known(starts),)
        return (int((self.objective.of_rows(self._read(starts), step, rows)[1] != IGNORE).sum()),)

    def _known(self, starts: NDArray[np.int64]) -> int:
        """Tokens of rows that the data counts."""
        return len(starts) * self.order.sequence

    def _read(self, starts: NDArray[np.int64]) -> Text:
        length = self.order.sequence
        tokens = _gather(self.tokens, starts + 1, length)
        return Text(_gather(self.tokens, starts, length), tokens, ignored(tokens, self.ignore))


@dataclass
class WholeSplit:
    """Every token of a split as a target exactly once, in lanes of `length` tokens that overlap by `overlap`.

    The first `overlap` targets of each lane but the first only give context. A model that carries state reads a lane in
    pieces of `sequence`; for one that does not, a lane is one window, so `length` equals `sequence`.
    What is counted depends on (length, overlap) alone: not on `rows`, the lanes in a batch, nor on the rank. All ranks
    yield the same number of batches; those too many are IGNORE throughout.
    """

    tokens: NDArray[np.unsignedinteger]
    start: int  # the token that stands before the first one
    sequence: int
    length: int
    overlap: int = 0
    rows: int = 1
    replicas: int = 1
    rank: int = 0
    ignore: list[int] = field(default_factory=list)
    objective: Causal = field(default_factory=Causal)

    @classmethod
    def lane_length(cls, tokens: int, lanes: int, overlap: int) -> int:
        """Length at which `lanes` lanes, overlapping by `overlap`, cover a split; one lane if the split is short."""
        if lanes == 1 or tokens < 2 * lanes * overlap:
            return max(tokens, 1)
        return -(-(tokens + (lanes - 1) * overlap) // lanes)

    def __len__(self) -> int:
        """Batches of each rank."""
        beyond = len(self.tokens) - self.length  # the first lane
        lanes = 1 if beyond <= 0 else 1 + -(-beyond // (self.length - self.overlap))
        groups = -(-lanes // (self.rows * self.replicas))
        return groups * -(-self.length // self.sequence)

    def __iter__(self) -> Iterator[Batch]:
        pieces = -(-self.length // self.sequence)
        for group, piece in (divmod(number, pieces) for number in range(len(self))):
            first = (group * self.replicas + self.rank) * self.rows
            yield self._piece(np.arange(first, first + self.rows), piece)

    def _piece(self, lanes: NDArray[np.int64], piece: int) -> Batch:
        total = len(self.tokens)
        within = piece * self.sequence + np.arange(min(self.sequence, self.length - piece * self.sequence))
        position = lanes[:, None] * (self.length - self.overlap) + within  # of the target, [rows, sequence]
        within_text = torch.from_numpy((position < total).sum(1))[:, None]
        counted = (position < total) & ((within >= self.overlap) | (lanes[:, None] == 0))
        text = torch.from_numpy(self.tokens[np.minimum(position, total - 1)].astype(np.int64))
        before = torch.from_numpy(self.tokens[np.clip(position - 1, 0, total - 1)].astype(np.int64))
        before[torch.from_numpy(position == 0)] = self.start
        target = ignored(text.masked_fill(~torch.from_numpy(counted), IGNORE), self.ignore)
        at = torch.arange(len(within))
        found = Text(before, text, target, torch.where(at < within_text, at, at - within_text))
        tokens, target, positions = self.objective.of_split(found, torch.from_numpy(position))
        counts = int((target != IGNORE).sum())
        return Batch(tokens, target, torch.from_numpy(lanes), piece, 0, piece == 0, counts, positions)


def ignored(target: Tensor, ignore: list[int]) -> Tensor:
    """Targets with the token numbers in `ignore` replaced by IGNORE."""
    return target.masked_fill(torch.isin(target, torch.tensor(ignore)), IGNORE) if ignore else target


def _gather(tokens: NDArray[np.unsignedinteger], starts: NDArray[np.int64], length: int) -> Tensor:
    """`[rows, length]` int64 tokens of the memory-mapped array, a slice per row."""
    return torch.from_numpy(np.asarray(tokens)[starts[:, None] + np.arange(length)].astype(np.int64))
