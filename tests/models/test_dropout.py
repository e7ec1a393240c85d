"""Masks are pure functions of their key, and look random."""

import pytest
import torch

from leanlm.models.dropout import RowDropout, draw, keep_mask, row_keys


def keys(site: int, rows: torch.Tensor) -> torch.Tensor:
    """Of one site in a step, `[b]`."""
    dropout = RowDropout(0.5)
    dropout.site = site
    return row_keys(1, 2, rows, [dropout])[:, 0]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_rate(rate: float) -> None:
    mask = keep_mask(keys(5, torch.arange(64)), 4096, rate).double()
    bound = 5 * (rate * (1 - rate) / mask.numel()) ** 0.5  # five standard deviations
    assert abs(mask.mean().item() - (1 - rate)) < bound
    assert mask.mean(1).std().item() == pytest.approx((rate * (1 - rate) / 4096) ** 0.5, rel=0.35)  # rows spread as coins do


def test_rows_sites_steps_and_neighbours_are_uncorrelated() -> None:
    def centred(site: int) -> torch.Tensor:
        return keep_mask(keys(site, torch.arange(32)), 8192, 0.5).double() - 0.5

    a, b = centred(1), centred(2)
    n = a.numel()
    bound = 5 * 0.25 / n**0.5
    assert abs((a * b).mean().item()) < bound, "sites"
    assert abs((a[:-1] * a[1:]).mean().item()) < 1.1 * bound, "rows"
    for lag in (1, 2, 3, 4, 8, 16, 64, 128, 256, 1024):
        assert abs((a[:, :-lag] * a[:, lag:]).mean().item()) < 1.2 * bound, lag


def test_a_mask_follows_its_row_however_the_batch_is_cut() -> None:
    rows = torch.tensor([5, 2, 9, 0])
    whole = keep_mask(keys(3, rows), 100, 0.3)
    for i, row in enumerate(rows):
        assert torch.equal(keep_mask(keys(3, row[None]), 100, 0.3)[0], whole[i])


def test_known_values_do_not_change() -> None:
    """A run that is resumed with a newer leanlm must draw the same masks."""
    mask = keep_mask(keys(123456789, torch.tensor([0, 1, 1000])), 16, 0.5)
    assert ["".join("01"[int(bit)] for bit in row) for row in mask] == KNOWN


KNOWN = ["0110001101101101", "1010101110101000", "0001101011101011"]


def test_locked_dropout_repeats_over_positions_and_keeps_the_mean() -> None:
    dropout = RowDropout(0.25, locked=True).train()
    draw([dropout], row_keys(1, 2, torch.arange(400), [dropout]))
    out = dropout(torch.ones(400, 6, 50))
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1, abs=0.02)


def test_needs_to_know_its_rows() -> None:
    with pytest.raises(RuntimeError, match="draw"):
        RowDropout(0.1).train()(torch.ones(1, 1, 1))
    assert torch.equal(RowDropout(0.1).eval()(torch.ones(1, 1, 1)), torch.ones(1, 1, 1))
