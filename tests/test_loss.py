"""The chunked head and loss against logits held whole."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leanlm.data.batches import IGNORE
from leanlm.memory import loss
from leanlm.models.contract import Head


def setup(vocabulary: int, bias: bool, dtype: torch.dtype) -> tuple[Head, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = Head(24, vocabulary, nn.LayerNorm(24), bias).to(dtype)
    hidden = torch.randn(5, 60, 24, dtype=dtype, requires_grad=True)
    target = torch.randint(vocabulary, (5, 60))
    target[1, 3:40] = IGNORE
    target[4] = IGNORE
    return head, hidden, target


def whole(head: Head, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).flatten(0, 1), target.flatten(), reduction="sum", ignore_index=IGNORE)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 128 * 1000, 200 * 1000, 1 << 30])
def test_equals_the_whole_in_float64(bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", chunk)
    head, hidden, target = setup(1000, bias, torch.float64)
    leaves = [hidden, *head.parameters()]
    expected = whole(head, hidden, target)
    got = loss.token_loss(head, hidden, target)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
    for ours, theirs in zip(torch.autograd.grad(0.37 * got, leaves), torch.autograd.grad(0.37 * expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_tied_weights_get_both_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 1)
    head, hidden, target = setup(1000, False, torch.float64)
    embedding = nn.Embedding(1000, 24, dtype=torch.float64)
    head.projection.weight = embedding.weight
    read = target.clamp(min=0)
    (expected,) = torch.autograd.grad(whole(head, hidden + embedding(read), target), [embedding.weight])
    (got,) = torch.autograd.grad(loss.token_loss(head, hidden + embedding(read), target), [embedding.weight])
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)


def test_autocast_stays_near_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, target = setup(1000, True, torch.float32)
    leaves = [hidden, *head.parameters()]
    exact = torch.autograd.grad(whole(head, hidden, target), leaves)
    for chunk in (1, 1 << 30):
        monkeypatch.setattr(loss, "CHUNK", chunk)
        with torch.autocast("cpu", torch.bfloat16):
            got = loss.token_loss(head, hidden, target)
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(whole(head, hidden, target).item(), rel=2e-3)
        for ours, theirs in zip(torch.autograd.grad(got, leaves), exact, strict=True):
            assert ours.dtype == torch.float32
            assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 1)
    head, hidden, target = setup(1000, True, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(loss.token_loss(head, hidden, target), whole(head, hidden, target), atol=1e-9, rtol=0)


def test_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that autograd keeps, nor any made on the way, is as large as the logits of all tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(loss, "CHUNK", 64 * 1000)
    head, hidden, target = setup(1000, True, torch.float32)
    with Watch():
        loss.token_loss(head, hidden, target).backward()
    assert largest <= 160 * 1000 < 300 * 1000
