"""Schedules against their closed forms; which parameters decay; optimizers that act as one."""

import math

import pytest
import torch
from torch import nn

from leanlm.models import kernels
from leanlm.models.contract import initialize
from leanlm.models.transformer import Transformer
from leanlm.optimizers.build import build
from leanlm.optimizers.muon import Muon
from leanlm.optimizers.settings import Optim, factor


def test_warm_up_then_each_shape() -> None:
    for schedule in ("constant", "cosine", "linear", "wsd"):
        optim = Optim(schedule=schedule, warmup=10, decay=0.2, final=0.1)
        curve = [factor(optim, step, 110) for step in range(110)]
        assert curve[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        if schedule == "constant":
            assert set(curve[10:]) == {1.0}
        if schedule == "linear":
            assert curve[10:] == pytest.approx([1 - 0.9 * i / 100 for i in range(100)])
        if schedule == "cosine":
            assert curve[10:] == pytest.approx([0.55 + 0.45 * math.cos(math.pi * i / 100) for i in range(100)])
        if schedule == "wsd":
            assert curve[10:88] == [1.0] * 78
            assert curve[88:] == pytest.approx([1 - 0.9 * i / 22 for i in range(22)])
        assert max(curve) <= 1 + 1e-12


def model() -> nn.Module:
    net = Transformer(11, 8, width=8, depth=2, heads=2, bias=True)
    initialize(net, 1)
    return net


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "sgd"])
def test_only_matrices_decay(name: str) -> None:
    """With no gradient, decoupled decay is all that a step does."""
    net = model()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = build(net.named_parameters(), Optim(name=name, weight_decay=0.5, lr=0.1, muon_lr=0.1))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for n, parameter in net.named_parameters():
        shrunk = before[n] * (1 - 0.1 * 0.5) if parameter.dim() == 2 else before[n]
        torch.testing.assert_close(parameter.detach(), shrunk)


def test_muon_takes_the_matrices_of_blocks_only() -> None:
    net = model()
    optimizer = build(net.named_parameters(), Optim(name="muon", lr=1e-3, muon_lr=0.3))
    names = {parameter: n for n, parameter in net.named_parameters()}
    peaks = {names[p]: group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert peaks.keys() == dict(net.named_parameters()).keys()
    for n, peak in peaks.items():
        matrix = n.startswith("blocks.") and n.endswith("weight") and "norm" not in n
        assert peak == (0.3 if matrix else 1e-3), n


def test_combined_equals_its_parts_after_loading_state() -> None:
    """Two steps, with the state moved to a new optimizer between them, equal two steps of separate optimizers."""

    def gradients(net: nn.Module, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)

    one, two = model(), model()
    optim = Optim(name="muon", lr=1e-2, muon_lr=0.05, betas=[0.8, 0.9], weight_decay=0.1)
    combined = build(one.named_parameters(), optim)
    matrices = [p for n, p in two.named_parameters() if n.startswith("blocks.") and p.dim() == 2]
    rest = [p for p in two.parameters() if not any(p is m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.05, weight_decay=0.1, momentum=0.95)
    adamw = torch.optim.AdamW(
        [{"params": [p for p in rest if p.dim() == 2], "weight_decay": 0.1}, {"params": [p for p in rest if p.dim() == 1]}],
        lr=1e-2, betas=(0.8, 0.9), weight_decay=0.0,
    )  # fmt: skip
    for seed in range(3):
        gradients(one, seed)
        gradients(two, seed)
        combined.step()
        muon.step()
        adamw.step()
        state = combined.state_dict()
        combined = build(one.named_parameters(), optim)
        combined.load_state_dict(state)
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_muon_in_stacks_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tall, wide and square matrices, at most three in a stack, against torch's Muon, which takes them one by one."""
    monkeypatch.setattr(kernels, "on_gpu", lambda tensor: True)
    monkeypatch.setattr("leanlm.optimizers.muon.STACK", 3 * 16 * 16)
    torch.manual_seed(0)
    shapes = [(16, 16), (24, 16), (16, 16), (16, 48), (16, 16), (24, 16), (16, 16)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    stacked, plain = Muon([{"params": ours}], **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        assert [len(matrices) for matrices in stacked._stacks(ours)] == [3, 1, 2, 1]
        stacked.step()
        plain.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)  # a tenth of a step: products in bf16 round otherwise
        torch.testing.assert_close(stacked.state[one]["momentum_buffer"], plain.state[other]["momentum_buffer"])


def test_sgd_in_bf16() -> None:
    """Against momentum written out in float32: torch's fused kernel would leave bf16's full of garbage on a CPU."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    optimizer = build([("weight", parameter)], Optim(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.0))
    weight, momentum = torch.zeros(64, 64), torch.zeros(64, 64)
    for _ in range(4):
        parameter.grad = torch.randn_like(parameter)
        momentum = 0.5 * momentum + parameter.grad.float()
        weight -= 0.1 * momentum
        optimizer.step()
    torch.testing.assert_close(parameter.detach().float(), weight, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "wrong", [{"name": "adam"}, {"schedule": "step"}, {"lr": 0.0}, {"betas": [0.9]}, {"warmup": -1}, {"eps": -1.0}]
)
def test_problems_name_the_key(wrong: dict) -> None:
    (problem,) = Optim(**wrong).problems()
    assert problem.startswith(f"optim.{next(iter(wrong))}=")
