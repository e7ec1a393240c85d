"""Several sources mixed row by row: the source of each row is a function of its number in the run, and of the weights, alone.

Each source goes through its own rows (windows of a stream, rows of packed documents) in epochs of its own: a small one with a
large weight comes again and again while another is still in its first epoch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanlm.common.errors import UserError, refuse
from leanlm.data.batches import Batch, GlobalBatches
from leanlm.data.corpus import Corpus
from leanlm.data.objectives import Text
from leanlm.data.tokens import Tokens

PERIOD = 10_000  # rows after which the sources follow each other as before, at most: the finest fractions


def mixture(sources: dict[str, Any] | None = None, isolate: bool = False) -> Corpus:
    """Several data sets, each with its share of the rows.

    Args:
        sources: name -> (weight, corpus). Fractions are weights divided by their sum.
        isolate: no token attends to another document of its row; a row of a stream is one document.

    Raises:
        UserError: there are none, or one has too small a share.
    """
    if not sources:
        raise UserError("data=mixture needs data.sources={NAME: {data: text, path: FILE_OR_FOLDER, weight: 1}, ...}")
    shares = shares_of([weight for weight, _ in sources.values()])
    small = [name for name, share in zip(sources, shares, strict=True) if not share]
    refuse(
        f"data.sources.{name}: its weight is less than one row of {PERIOD:,}: give it more, or leave it out" for name in small
    )
    corpora = {
        name: replace(corpus, form=corpus.form and replace(corpus.form, isolate=isolate))
        for name, (_, corpus) in sources.items()
    }
    names = [split for split in ("train", "validation", "test") if any(split in each.splits for each in corpora.values())]
    splits = {split: [piece for each in corpora.values() for piece in each.splits.get(split, [])] for split in names}
    return Corpus(splits, sources=corpora, shares=shares)


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of each source in a period: as the weights say, or if that period were too long, as near as whole rows of PERIOD."""
    exact = [Fraction(str(weight)) for weight in weights]
    parts = [each / sum(exact) for each in exact]
    period = min(PERIOD, lcm(*(part.denominator for part in parts)))
    shares = [int(part * period) for part in parts]
    by_rest = sorted(range(len(parts)), key=lambda i: shares[i] - parts[i] * period)
    for i in by_rest[: period - sum(shares)]:
        shares[i] += 1
    return tuple(shares)


def turns(shares: Sequence[int]) -> NDArray[np.int64]:
    """The source of each row of a period, `[sum(shares)]`.

    A source with the fraction f gets its row j, counted from 0, as one of the rows floor(j / f) to ceil((j + 1) / f) - 1: then
    after any number of rows it is less than one row from its due. Of those whose time has begun, the one comes whose time ends
    first, so that all times are kept (Baruah et al. 1996, "Proportionate progress").
    """
    period, given = sum(shares), [0] * len(shares)
    found = np.empty(period, np.int64)
    for row in range(period):
        begun = (i for i, share in enumerate(shares) if given[i] * period < share * (row + 1))
        found[row] = turn = min(begun, key=lambda i: -(-(given[i] + 1) * period // shares[i]))
        given[turn] += 1
    return found


def rows_of(period: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """How many of the first `count` rows of a run are of each source, `[sources]`. `period`: see `turns`."""
    periods, rest = divmod(count, len(period))
    each = np.bincount(period)
    return periods * each + np.bincount(period[:rest], minlength=len(each))


@dataclass(frozen=True)
class Turns:
    """Row r of step s is row s * global_batch + r of the run. `orders`: of each source's own rows (`Windows` or `Rows`).

    A recurrent model's state starts anew with each row, as with packed documents: a row seldom follows one of its own source.
    """

    period: NDArray[np.int64]  # see `turns`
    orders: list[Any]
    global_batch: int

    def offsets(self, step: int) -> tuple[NDArray[np.int64], bool]:
        """Source of each row and its place there, `[global_batch, 2]`; True, since a state starts anew with each row."""
        first = step * self.global_batch
        sources = self.period[np.arange(first, first + self.global_batch) % len(self.period)]
        found = np.stack((sources, np.empty_like(sources)), axis=1)
        for i, (order, before) in enumerate(zip(self.orders, rows_of(self.period, first), strict=True)):
            here = sources == i
            found[here, 1] = order.of(before + np.arange(here.sum()))
        return found, True


@dataclass(kw_only=True)
class MixedBatches(GlobalBatches):
    """This rank's micro-batches of several sources. `parts`: what reads the rows of each. `order`: `Turns`."""

    parts: list[GlobalBatches]

    def _counts(self, starts: NDArray[np.int64], step: int, rows: Tensor) -> tuple[int, ...]:
        each = [np.flatnonzero(starts[:, 0] == i) for i in range(len(self.parts))]
        return tuple(sum(part._counts(starts[here, 1], step, rows[here])) for part, here in zip(self.parts, each, strict=True))

    def _read(self, starts: NDArray[np.int64]) -> Text:
        length = self.parts[0].order.sequence
        whole = torch.empty(3, len(starts), length, dtype=torch.long)
        positions = torch.arange(length).repeat(len(starts), 1)
        for i, part in enumerate(self.parts):
            here = starts[:, 0] == i
            if here.any():
                *found, within = part._read(starts[here, 1])
                whole[:, torch.from_numpy(here)] = torch.stack(found)
                positions[here] = positions[here] if within is None else within
        before, tokens, counted = whole
        isolate = any(getattr(part, "isolate", False) for part in self.parts)
        return Text(before, tokens, counted, positions if isolate else None)


@dataclass(frozen=True)
class Mixed:
    """A split of several sources, by name: token numbers `[tokens]`, or documents in rows."""

    parts: dict[str, Any]

    def __len__(self) -> int:
        """Tokens, of documents those that count."""
        return sum(map(len, self.parts.values()))

    def describe(self) -> str:
        each = (part.describe() if hasattr(part, "describe") else f"{len(part):,} tokens" for part in self.parts.values())
        return " + ".join(f"{name} {said}" for name, said in zip(self.parts, each, strict=True))


def mixed(corpus: Corpus, name: str, sources: dict[str, Tokens]) -> Tokens:
    """The tokens of a mixture, of those of its sources. `name`: its fingerprint."""
    having = {split: {name: each for name, each in sources.items() if split in each.splits} for split in corpus.splits}
    splits = {split: Mixed({name: each.splits[split] for name, each in found.items()}) for split, found in having.items()}
    sizes = {split: sum(each.bytes[split] for each in found.values()) for split, found in having.items()}
    return Tokens(name, next(iter(sources.values())).tokenizer, splits, sizes)


@dataclass
class SourceBySource:
    """The whole of a split of each source, one source after the other."""

    parts: list[Any]

    def __len__(self) -> int:
        """Batches of each rank."""
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Batch]:
        for i, part in enumerate(self.parts):
            for batch in part:
                yield batch._replace(source=i)
