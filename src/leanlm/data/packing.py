"""Documents packed into rows: which documents share a row, and which rows are the global batch of step s.

A row has `sequence` positions. A document of n tokens takes n - 1 of them: at each a token is read, and the next one is its
target, so that nothing is predicted over a border. A longer document is cut into pieces of a row each and a rest.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from leanlm.common.errors import UserError
from leanlm.common.files import cache_folder
from leanlm.data.batches import Batch, GlobalBatches, ignored
from leanlm.data.documents import Documents
from leanlm.data.objectives import Causal, Text
from leanlm.data.tokens import Progress, whole, written
from leanlm.models.head import IGNORE

FORMAT = 1  # of the folder; part of its name
PARTS = ("pieces", "ends", "counts")  # of it, all int64
TOGETHER = 4096  # documents of which rows are made


@dataclass(frozen=True)
class Packed:
    """Documents in rows.

    Attributes:
        documents: the tokens.
        pieces: their first token and the positions they take, `[pieces, 2]`, row by row; only of those of which a token counts.
        ends: number of the piece after the last one of each row, `[rows]`.
        counts: tokens of each row that count, `[rows]`.
        sequence: positions of a row.
    """

    documents: Documents
    pieces: NDArray[np.int64]
    ends: NDArray[np.int64]
    counts: NDArray[np.int64]
    sequence: int

    def __len__(self) -> int:
        """Tokens that count."""
        return int(self.counts.sum())

    def describe(self) -> str:
        full = self.pieces[:, 1].sum() / (len(self.ends) * self.sequence)
        return f"{self.documents.describe()} of which {len(self):,} count, {len(self.ends):,} rows that are {full:.0%} full"

    def row(self, number: int) -> NDArray[np.int64]:
        """The pieces of a row."""
        return self.pieces[self.ends[number - 1] if number else 0 : self.ends[number]]

    def read(self, rows: Iterable[NDArray[np.int64]], length: int, ignore: list[int]) -> Text:
        """Rows of some pieces each. `ignore`: token numbers that are not counted."""
        found = [self._row(pieces, length) for pieces in rows]
        before, tokens, counted, positions = (torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True))
        return Text(before, tokens, ignored(counted, ignore), positions)

    def _row(self, pieces: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """The parts of a `Text` for a row, `[4, length]`; what remains of it is as a document of which nothing counts."""
        row = np.stack([*np.zeros((2, length), np.int64), np.full(length, IGNORE), np.arange(length)])
        place = 0
        for first, size in pieces.tolist():
            text = self.documents.numbers[first : first + size + 1].astype(np.int64)
            counted = self.documents.counted[first + 1 : first + size + 1]
            row[:, place : place + size] = text[:-1], text[1:], np.where(counted, text[1:], IGNORE), np.arange(size)
            place += size
        row[3, place:] = np.arange(length - place)
        return row


def packed(documents: Documents, name: str, sequence: int, seed: int, report: Progress) -> Packed:
    """Rows of documents, made now unless they are in the cache. `name`: of the documents, their fingerprint and split.

    Raises:
        UserError: no token counts.
    """
    folder = cache_folder() / "rows" / f"{name}-{FORMAT}-{sequence}-{seed}"
    if not folder.is_dir():
        whole(folder, partial(_pack, documents, sequence, seed, partial(report, f"packing {name.rpartition('-')[2]}")))
    pieces, ends, counts = (np.asarray(np.memmap(folder / f"{part}.bin", np.int64, "r")) for part in PARTS)
    return Packed(documents, pieces.reshape(-1, 2), ends, counts, sequence)


def _pack(documents: Documents, sequence: int, seed: int, heard: Callable[[int, int], None], folder: Path) -> None:
    """Write the rows of documents: of some thousand that follow each other at a time, in an order that is drawn for these."""
    done, size = 0, documents.numbers.nbytes
    with ExitStack() as stack:
        files = [stack.enter_context(written(folder / f"{part}.bin")) for part in PARTS]
        heard(0, size)
        for first in range(0, len(documents.ends), TOGETHER):
            pieces, counts = _pieces(documents, first, sequence)
            random = np.random.Generator(np.random.Philox(key=[seed, first])).permutation(len(pieces))
            pieces, counts = pieces[random], counts[random]
            rows = first_fit(pieces[:, 1], sequence)
            order = np.argsort(rows, kind="stable")
            ends = done + np.bincount(rows).cumsum()
            per_row = np.bincount(rows, counts).astype(np.int64)
            for file, part in zip(files, (pieces[order], ends, per_row), strict=True):
                file.write(part.data)
            done += len(pieces)
            heard(int(documents.ends[min(first + TOGETHER, len(documents.ends)) - 1]) * documents.numbers.itemsize, size)
    if not done:
        raise UserError("no token of these documents counts: give them completions, or answers of the assistant")


def _pieces(documents: Documents, first: int, sequence: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of documents from number `first` on, what fits in a row each and has tokens that count: first tokens and positions taken
    `[pieces, 2]`, and tokens that count `[pieces]`."""
    ends = documents.ends[first : first + TOGETHER]
    begin = int(documents.ends[first - 1]) if first else 0
    starts = np.concatenate(([begin], ends[:-1]))
    positions = np.maximum(ends - starts - 1, 0)
    cuts = -(-positions // sequence)
    document = np.repeat(np.arange(len(ends)), cuts)
    before = (np.arange(cuts.sum()) - np.repeat(cuts.cumsum() - cuts, cuts)) * sequence  # positions of the document
    pieces = np.stack((starts[document] + before, np.minimum(positions[document] - before, sequence)), axis=1)
    if not len(pieces):
        return pieces, np.zeros(0, np.int64)
    # up to the first target of the next piece: the first token of a document between them is no target
    counts = np.add.reduceat(documents.counted[begin : ends[-1]], pieces[:, 0] + 1 - begin, dtype=np.int64)
    return pieces[counts > 0], counts[counts > 0]


def first_fit(lengths: NDArray[np.int64], sequence: int) -> NDArray[np.int64]:
    """The row of each piece: the first one that has room for it. Those that fill a row follow after the others."""
    rows, whole_rows = np.empty(len(lengths), np.int64), lengths == sequence
    short = np.flatnonzero(~whole_rows)
    room = np.full(len(short), sequence)
    for i, length in zip(short.tolist(), lengths[short].tolist(), strict=True):
        rows[i] = row = int((room >= length).argmax())
        room[row] -= length
    rows[whole_rows] = int((room < sequence).sum()) + np.arange(whole_rows.sum())
    return rows


@dataclass(frozen=True)
class Rows:
    """Shuffled rows: row r of step s is number s * global_batch + r of a series of epochs, each a permutation of all rows."""

    rows: int
    sequence: int
    global_batch: int
    seed: int

    def offsets(self, step: int) -> tuple[NDArray[np.int64], bool]:
        """Number of each row, `[global_batch]`; True, since a state starts anew with each row."""
        return self.of(np.arange(step * self.global_batch, (step + 1) * self.global_batch)), True

    def of(self, series: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of these rows of the series, `[rows]`."""
        epochs, places = divmod(series, self.rows)
        return np.array([self._epoch(epoch)[place] for epoch, place in zip(epochs, places, strict=True)], np.int64)

    @cached_property
    def _epoch(self) -> Callable[[int], NDArray[np.int64]]:
        """Number of an epoch -> its permutation; the last one is kept."""
        return lru_cache(1)(lambda epoch: np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.rows))


@dataclass(kw_only=True)
class PackedBatches(GlobalBatches):
    """This rank's micro-batches of packed documents. Rows do not depend on each other: a recurrent model's state starts anew
    with each. `isolate`: documents of a row do not either."""

    packed: Packed
    isolate: bool

    def _known(self, starts: NDArray[np.int64]) -> int:
        return int(self.packed.counts[starts].sum())

    def _read(self, starts: NDArray[np.int64]) -> Text:
        text = self.packed.read(map(self.packed.row, starts.tolist()), self.packed.sequence, self.ignore)
        return text if self.isolate else text._replace(positions=None)


@dataclass
class PieceByPiece:
    """Every token of a split that counts, exactly once: each document, or a row's length of it, by itself.

    So its loss depends on no other document, and on no seed. All ranks yield the same number of batches, each as long as the
    longest row of all ranks; rows too many are IGNORE throughout.
    """

    packed: Packed
    rows: int = 1
    replicas: int = 1
    rank: int = 0
    ignore: list[int] = field(default_factory=list)
    objective: Causal = field(default_factory=Causal)

    def __len__(self) -> int:
        """Batches of each rank."""
        return -(-len(self.packed.pieces) // (self.rows * self.replicas))

    def __iter__(self) -> Iterator[Batch]:
        together = self.rows * self.replicas
        for group in range(len(self)):
            pieces = self.packed.pieces[group * together : (group + 1) * together]
            numbers = np.arange(self.rank * self.rows, (self.rank + 1) * self.rows)
            length = int(pieces[:, 1].max())
            text = self.packed.read([pieces[number : number + 1] for number in numbers], length, self.ignore)
            first = np.zeros(self.rows, np.int64)
            mine = pieces[numbers[0] : numbers[-1] + 1]
            first[: len(mine)] = mine[:, 0] + 1
            places = torch.from_numpy(first[:, None] + np.arange(length))
            tokens, target, positions = self.objective.of_split(text, places)
            rows = torch.from_numpy(group * together + numbers)
            yield Batch(tokens, target, rows, 0, 0, True, int((target != IGNORE).sum()), positions)
