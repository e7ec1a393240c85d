"""The rows of step s, as pure functions, against slow but obvious versions."""

import numpy as np
import pytest
import torch

from leanlm.data.batches import GlobalBatches, Lanes, WholeSplit, Windows
from leanlm.models.head import IGNORE


def test_windows_read_every_window_once_in_an_epoch() -> None:
    order = Windows(tokens=1000, sequence=10, global_batch=7, seed=3)
    series = np.concatenate([order.offsets(step)[0] for step in range(60)])
    for epoch in range(3):
        starts = np.sort(series[epoch * order.per_epoch : (epoch + 1) * order.per_epoch])
        assert (np.diff(starts) == 10).all()
        assert starts[0] < 10
        assert starts[-1] + 10 < 1000, "the last target is in the text"


def test_windows_are_shuffled_differently_in_each_epoch_and_for_each_seed() -> None:
    order = Windows(1000, 10, 98, 3)
    assert order.per_epoch == 98
    first, second = order.offsets(0)[0], order.offsets(1)[0]
    assert not np.array_equal(first, np.sort(first))
    assert not np.array_equal(first - first.min(), second - second.min())
    assert not np.array_equal(first, Windows(1000, 10, 98, 4).offsets(0)[0])


@pytest.mark.parametrize("kind", [Windows, Lanes])
def test_rows_are_a_function_of_seed_and_step(kind: type) -> None:
    order = kind(977, 8, 6, 5)
    forwards = [order.offsets(step) for step in range(90)]
    fresh = kind(977, 8, 6, 5)
    for step in (89, 3, 41, 40, 0):
        rows, begins = fresh.offsets(step)
        assert np.array_equal(rows, forwards[step][0])
        assert begins == forwards[step][1]


def test_lanes_continue_where_they_stopped_until_the_epoch_ends() -> None:
    order = Lanes(tokens=1001, sequence=9, global_batch=5, seed=1)
    epochs, before = 0, None
    for step in range(3 * order.per_epoch):
        rows, begins = order.offsets(step)
        assert rows.max() + 9 <= 1000
        if begins:
            epochs += 1
            assert (np.diff(rows) == 200).all()
            assert rows[0] < 9
        else:
            assert np.array_equal(rows, before + 9)
        before = rows
    assert epochs == 3


@pytest.mark.parametrize("kind", [Windows, Lanes])
def test_rank_and_micro_batch_only_slice(kind: type) -> None:
    text = np.random.default_rng(0).integers(0, 50, 999).astype(np.uint8)
    order = kind(999, 6, 12, 2)
    for step in (0, 5, 17):
        whole = next(GlobalBatches(text, order, ignore=[3, 7]).step(step))
        parallel = [b for rank in (0, 1, 2) for b in GlobalBatches(text, order, 3, rank, 2, [3, 7]).step(step)]
        for field in ("input", "target", "rows"):
            assert torch.equal(torch.cat([getattr(b, field) for b in parallel]), getattr(whole, field))
        assert {b.step_tokens for b in parallel} == {int((whole.target != IGNORE).sum())}
        assert torch.equal(
            whole.input[:, 1:][whole.target[:, :-1] != IGNORE], whole.target[:, :-1][whole.target[:, :-1] != IGNORE]
        )
        assert not torch.isin(whole.target, torch.tensor([3, 7])).any()


def test_batches_go_on_from_any_step() -> None:
    text = np.arange(500, dtype=np.uint16)
    order = Windows(500, 6, 4, 2)
    late = next(iter(GlobalBatches(text, order, first_step=9)))
    assert late.step == 9
    assert torch.equal(late.input, next(GlobalBatches(text, order).step(9)).input)


@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 640, 1000])
@pytest.mark.parametrize(
    ("length", "overlap", "sequence"), [(16, 0, 16), (16, 5, 16), (100, 20, 16), (1000, 0, 16), (64, 16, 16)]
)
@pytest.mark.parametrize(("rows", "replicas"), [(1, 1), (3, 1), (2, 3)])
def test_every_token_is_counted_once_with_its_own_context(
    tokens: int, length: int, overlap: int, sequence: int, rows: int, replicas: int
) -> None:
    text = np.arange(1, tokens + 1, dtype=np.uint16)  # token i + 1 at position i
    seen, lengths = [], set()
    for rank in range(replicas):
        split = WholeSplit(text, 0, sequence, length, overlap, rows, replicas, rank)
        batches = list(split)
        assert len(batches) == len(split)
        lengths.add(len(batches))
        for batch in batches:
            counted = batch.target != IGNORE
            seen += batch.target[counted].tolist()
            assert torch.equal(batch.input[counted], batch.target[counted] - 1), "the token before, 0 before the first"
    assert sorted(seen) == list(range(1, tokens + 1))
    assert len(lengths) == 1, "every rank has as many batches"


@pytest.mark.parametrize("tokens", [10, 1000, 1003])
@pytest.mark.parametrize("lanes", [1, 4, 7])
def test_lane_length_makes_as_many_lanes_as_asked(tokens: int, lanes: int) -> None:
    length = WholeSplit.lane_length(tokens, lanes, 10)
    stride = length - 10
    made = 1 if tokens <= length else 1 + -(-(tokens - length) // stride)
    assert made == (lanes if tokens >= 1000 else 1)
