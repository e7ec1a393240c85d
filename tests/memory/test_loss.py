"""The chunked head and loss against logits held whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from leanlm.launch.processes import launch
from leanlm.launch.ranks import process_group
from leanlm.memory import chunks, loss
from leanlm.models.head import IGNORE, AdaptiveHead, Head


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
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    head, hidden, target = setup(1000, bias, torch.float64)
    leaves = [hidden, *head.parameters()]
    expected = whole(head, hidden, target)
    got = loss.token_loss(head, hidden, target)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
    for ours, theirs in zip(torch.autograd.grad(0.37 * got, leaves), torch.autograd.grad(0.37 * expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("chunk", [-1, 1 << 30])  # -1: even no tokens at all go through the chunks
@pytest.mark.parametrize("missing", [False, True])
def test_an_adaptive_softmax_equals_torchs(chunk: int, missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    _, hidden, target = setup(1000, True, torch.float64)
    if missing:
        target[target >= 400] = 7  # no token of the last band
    head = AdaptiveHead(24, 1000, nn.LayerNorm(24), True, [100, 400]).double()
    leaves, counted = [hidden, *head.parameters()], target != IGNORE
    expected = -head.projection(head.norm(hidden)[counted], target[counted]).output.sum()
    got = loss.token_loss(head, hidden, target)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
    bands = head.choices(hidden.flatten(0, 1), target.flatten())[1:]
    assert [len(band.target) % 64 for band in bands] == [0, 0], "or oneDNN keeps a kernel for every count of tokens"
    torch.testing.assert_close(whole(head, hidden, target), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(head(hidden).exp().sum(-1), torch.ones(5, 60).double(), atol=1e-9, rtol=0)
    gradients = torch.autograd.grad(expected, leaves, allow_unused=True)
    for ours, theirs in zip(torch.autograd.grad(got, leaves), gradients, strict=True):  # ours: zeros, never None
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, atol=1e-9, rtol=0)


def rows_by_kernel() -> None:
    """In a process of its own, where Triton interprets: the kernel of a GPU against torch's cross-entropy and its gradient."""
    from leanlm.memory import softmax_kernel

    torch.manual_seed(0)
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        logits, target = (4 * torch.randn(6, 20032)).to(dtype), torch.randint(20000, (6,))
        target[2] = IGNORE
        exact = logits[:, :20000].double().requires_grad_()
        wanted = F.cross_entropy(exact, target, reduction="none", ignore_index=IGNORE)
        (gradient,) = torch.autograd.grad(wanted.sum(), exact)
        before = logits.clone()
        nats = softmax_kernel.cross_entropy_(logits, target, 20000, gradient=False)
        assert torch.equal(logits, before)
        torch.testing.assert_close(nats.double(), wanted.detach(), rtol=0, atol=1e-5)
        softmax_kernel.cross_entropy_(logits, target, 20000, gradient=True)
        torch.testing.assert_close(logits[:, :20000].double(), gradient, rtol=0, atol=most)
        assert logits[:, 20000:].count_nonzero() == logits[2].count_nonzero() == 0


def test_the_kernel_of_a_gpu() -> None:
    """3 blocks of columns, the last of them short; 32 columns that only align the rows."""
    pytest.importorskip("triton", reason="Triton has no build for this system")
    folders = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(folders)}
    code = "import test_loss; test_loss.rows_by_kernel()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_tied_weights_get_both_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 1)
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
        monkeypatch.setattr(chunks, "CHUNK", chunk)
        with torch.autocast("cpu", torch.bfloat16):
            got = loss.token_loss(head, hidden, target)
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(whole(head, hidden, target).item(), rel=2e-3)
        for ours, theirs in zip(torch.autograd.grad(got, leaves), exact, strict=True):
            assert ours.dtype == torch.float32
            assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_tokens_whose_probability_no_number_can_hold(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 1)
    head, hidden, target = setup(1000, True, torch.float32)
    with torch.no_grad():
        head.projection.weight.mul_(2000)
    leaves = [hidden, *head.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = head(hidden).float().flatten(0, 1)
        got = loss.token_loss(head, hidden, target)
    each = F.cross_entropy(logits, target.flatten(), reduction="none", ignore_index=IGNORE)
    assert (each > 110).sum() > 50, "or exp would not have come to zero"
    assert got.item() == pytest.approx(each.sum().item(), rel=1e-3 if autocast else 1e-6)
    assert all(torch.isfinite(part).all() for part in torch.autograd.grad(got, leaves))


def test_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation takes one matrix product a chunk; training takes three."""
    products = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal products
            products += "mm" in function.__name__
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(chunks, "CHUNK", 1)
    head, hidden, target = setup(1000, True, torch.float64)
    with torch.no_grad(), Count():
        found = loss.token_loss(head, hidden, target)
    torch.testing.assert_close(found, whole(head, hidden, target), atol=1e-9, rtol=0)
    evaluating, products = products, 0
    with Count():
        loss.token_loss(head, hidden, target)
    assert products == 3 * evaluating > 3


def test_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that autograd keeps, nor any made on the way, is as large as the logits of all tokens."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(chunks, "CHUNK", 64 * 1000)
    head, hidden, target = setup(1000, True, torch.float32)
    with Watch():
        loss.token_loss(head, hidden, target).backward()
    assert largest <= 160 * 1000 < 300 * 1000


def spread(tokens: int, vocabulary: int, bias: bool) -> list[float]:
    """On two devices that share the vocabulary, in several chunks: largest differences of loss and gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    chunks.CHUNK = 1 << 11
    with process_group("cpu"):
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(3)
        head = Head(8, vocabulary, nn.LayerNorm(8), bias).double()
        hidden = torch.randn(3, tokens // 3, 8, dtype=torch.float64, requires_grad=True)
        target = torch.randint(vocabulary, (3, tokens // 3))
        target[0, :5] = IGNORE
        plain = F.cross_entropy(head(hidden).flatten(0, 1), target.flatten(), reduction="sum")
        wanted = torch.autograd.grad(plain * 0.3, [hidden, *head.parameters()])
        for name, parameter in list(head.projection.named_parameters()):
            setattr(head.projection, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        found = loss.token_loss(head, hidden, target)
        got = torch.autograd.grad(found * 0.3, [hidden, *head.parameters()])
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in got]
        return [abs(found - plain).item(), *(float((a - b).abs().max()) for a, b in zip(whole, wanted, strict=True))]


@pytest.mark.parametrize(("vocabulary", "bias"), [(64, False), (37, True)])
def test_a_vocabulary_that_is_spread_over_devices(vocabulary: int, bias: bool) -> None:
    """37 types on two devices are 19 and 18; 600 tokens are several chunks."""
    assert max(launch(spread, (600, vocabulary, bias), 2)) < 1e-10
