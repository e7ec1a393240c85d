"""What is kept for backward, counted: recomputation, windows of time, offload, kernels of recurrent layers."""

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from leanlm.config.checks import check
from leanlm.memory import chunks, loss, offload
from leanlm.memory.recompute import levels
from leanlm.models import kernels
from leanlm.models.contract import initialize
from leanlm.strategies.stage import Stage
from leanlm.training import build

GPT2 = ["model=gpt2", "model.heads=4"]


class Live(TorchDispatchMode):
    """Storages that were made within it and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.data_ptr(), storage.nbytes()
        return out

    def bytes(self, net: nn.Module) -> int:
        """Without the parameters, of which views were made, and what is in the file."""
        gc.collect()
        elsewhere = {part.untyped_storage().data_ptr() for part in net.parameters()} | set(offload.scratch().mapped)
        return sum(size for ref, place, size in self.made.values() if not ref.expired() and place not in elsewhere)


def step(text: Path, *more: str) -> tuple[int, float, list[torch.Tensor]]:
    """Bytes that live after the forward pass of one step, its loss, and the gradients."""
    settings = check(
        composed(
            "data=text", f"data.path={text}", "data.tokenizer=char", "device=cpu", "logger=csv", "precision=fp64",
            "global_batch=4", "sequence=128", "model.width=32", "model.depth=6", "model.dropout=0.1", *more,
        )
    )  # fmt: skip
    parallel = build.parallel_model(settings.config, settings.plan, 20)
    (stage,) = parallel.stages.values()
    size = settings.config.sequence
    tokens = torch.arange(4 * size).view(4, size) % 19
    stage.begin(3, True)
    with Live() as live:
        nats = stage(tokens, torch.arange(4), tokens + 1)
        held = live.bytes(parallel.net)
    nats.backward()
    return held, nats.item(), [p.grad for p in parallel.net.parameters() if p.grad is not None]


def same(ours: tuple, theirs: tuple, tolerance: float = 0) -> None:
    assert abs(ours[1] - theirs[1]) <= tolerance * abs(theirs[1])
    for a, b in zip(ours[2], theirs[2], strict=True):
        assert (a - b).abs().max() <= tolerance


def test_blocks_keep_their_inputs_only(text: Path) -> None:
    plain, all_of_them = step(text, *GPT2), step(text, *GPT2, "strategy.recompute=blocks")
    same(all_of_them, plain)
    inputs = 6 * 4 * 128 * 32 * 8
    ends = step(text, *GPT2, "model.depth=1", "strategy.recompute=blocks")[0]
    assert inputs < all_of_them[0] < ends + inputs
    assert all_of_them[0] < 0.15 * plain[0]
    half = step(text, *GPT2, "strategy.recompute=0.5")
    operators = step(text, *GPT2, "strategy.recompute=operators")
    for some in (half, operators):
        same(some, plain)
        assert 1.5 * all_of_them[0] < some[0] < 0.75 * plain[0]


def test_windows_of_time_grow_with_the_square_root(text: Path) -> None:
    lstm = ["model=lstm", "model.depth=1", "model.width=128", "model.locked=false"]  # masks that differ by position
    for more in ([], ["strategy.recompute_window=-1"]):
        short, long = (step(text, *lstm, f"sequence={size}", *more) for size in (64, 1024))
        if not more:
            plain = long
            assert long[0] > 14 * short[0]
    assert long[0] < 7 * short[0]  # tokens and targets, 16 bytes each, grow with the sequence
    assert long[0] < 0.2 * plain[0]
    same(long, plain, 1e-9)


def test_the_first_pass_over_a_window_makes_no_gradients_of_the_head(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 1)
    plain = step(text, "model=lstm", "model.depth=1")
    wanted: list[bool] = []
    chunked = loss._ChunkedLoss.apply
    monkeypatch.setattr(loss._ChunkedLoss, "apply", lambda *inputs: wanted.append(inputs[-1]) or chunked(*inputs))
    windows = step(text, "model=lstm", "model.depth=1", "strategy.recompute_window=64")
    same(windows, plain, 1e-9)
    assert wanted == [False, False, True, True], "two windows, each read twice"


class Tables(TorchDispatchMode):
    """The most tensors as large as a parameter, beside itself, that are alive at a time."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table, self.most = table, 0
        self.made: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage()
                if storage.nbytes() == self.table.nbytes and storage.data_ptr() != self.table.data_ptr():
                    self.made[storage._cdata] = StorageWeakRef(storage)
        self.most = max(self.most, sum(not ref.expired() for ref in self.made.values()))
        return out


def test_a_tied_embedding_has_one_gradient(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 1)
    settings = check(composed("data=text", f"data.path={text}", *GPT2, "model.width=32", "model.depth=1", "sequence=12"))
    found = {}
    for rows_only in (True, False):
        parallel = build.parallel_model(settings.config, settings.plan, 4001)
        table: torch.Tensor = parallel.net.embed.tokens.weight
        if not rows_only:
            parallel.net.embed.tokens.forward = partial(nn.Embedding.forward, parallel.net.embed.tokens)

        tokens = torch.arange(48).view(4, 12) * 83
        (stage,) = parallel.stages.values()
        with Tables(table) as tables:
            stage(tokens, torch.arange(4), tokens + 1).backward()
        found[rows_only] = tables.most, table.grad
    assert found[True][0] == 1
    assert found[False][0] > 1
    torch.testing.assert_close(found[True][1], found[False][1])


def test_training_is_compiled_and_evaluation_is_not(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def compiled(function: Any, **settings: Any) -> Any:
        return lambda *inputs: calls.append(getattr(function, "__name__", "loss")) or function(*inputs)

    monkeypatch.setattr(torch, "compile", compiled)
    settings = check(
        composed("data=text", f"data.path={text}", *GPT2, "model.width=32", "sequence=12", "strategy.compile=true")
    )
    net = build.model(settings.config, settings.plan, 20)
    initialize(net, 1)
    tokens = torch.arange(48).view(4, 12) % 20
    for replicate, wanted in ((1, ["read"]), (2, ["forward"] * (1 + len(net.blocks)) + ["loss"])):
        stage = Stage(net, list(net.blocks), True, True, 1, replace(settings.plan, replicate=replicate))
        stage(tokens, torch.arange(4), tokens)
        assert calls == wanted
        stage.eval()
        stage(tokens, torch.arange(4), tokens)
        assert calls == wanted
        stage.train()
        calls.clear()


def test_offloaded_activations_are_not_in_memory(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1 << 10)
    others = len(offload.scratch().mapped)
    for model in (GPT2, ["model=lstm", "model.depth=1", "precision=fp32"]):
        plain, away = step(text, *model), step(text, *model, "strategy.offload=activations")
        same(away, plain)
        assert away[0] < 0.1 * plain[0]
    file = offload.scratch()
    assert len(file.mapped) == others, "what was read is forgotten"
    before = file.size
    step(text, *GPT2, "strategy.offload=activations")
    assert file.size == before, "its place is used again"


def test_levels() -> None:
    blocks = [nn.Linear(1, 1)] * 5
    assert levels("2", blocks) == ["blocks", "keep", "blocks", "keep", "blocks"]
    assert levels("0.4", blocks) == ["blocks"] * 3 + ["keep"] * 2
    assert levels("0", blocks) == ["blocks"] * 5
    assert levels("1", blocks) == levels("none", blocks) == ["keep"] * 5
    assert levels("operators", [*blocks, nn.LSTM(1, 1)]) == ["operators"] * 5 + ["keep"]
    assert levels("operators", blocks, compiled=True) == ["keep"] * 5


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_the_native_kernel_keeps_less(text: Path) -> None:
    kept = {}
    for kernel in ("onednn", "native"):
        torch.manual_seed(0)
        layer = nn.LSTM(64, 64, batch_first=True)
        kernels.choose(layer, kernel)
        held: dict[int, int] = {}
        weights = {part.untyped_storage().data_ptr() for part in layer.parameters()}

        def keep(tensor: torch.Tensor, held: dict = held, weights: set = weights) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(8, 100, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = layer(x)[0]
        out.square().sum().backward()
        kept[kernel] = sum(held.values()), out.detach(), x.grad
    assert kept["native"][0] < 0.75 * kept["onednn"][0]
    for ours, theirs in zip(kept["native"][1:], kept["onednn"][1:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_mixed_precision_keeps_no_weights_of_a_recurrence_for_each_token() -> None:
    """torch's own kernels of GRUs and Elman networks read the weights at every token, autocast would copy them there."""
    found = []
    for mixed in (False, True):
        torch.manual_seed(0)
        layer = nn.GRU(64, 64, batch_first=True)
        kernels.choose(layer, "onednn")
        held: dict[int, int] = {}

        def keep(tensor: torch.Tensor, held: dict = held) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(2, 50, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=mixed):
            out = layer(x)[0]
        out.float().square().sum().backward()
        found.append((sum(held.values()), out.detach(), layer.weight_hh_l0.grad))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])


def test_only_what_has_pages_of_its_own_is_offloaded() -> None:
    """A small tensor shares pages of the heap with others: they would stay."""
    layer, others = nn.Linear(256, 256), len(offload.scratch().mapped)
    for rows, moved in ((1024, 0), (4096, 1)):  # 1 and 4 MiB
        with offload.activations(layer):
            out = layer(torch.randn(rows, 256))
        assert len(offload.scratch().mapped) - others == moved
        del out


@pytest.mark.parametrize("moved", [True, False])
def test_a_graph_that_is_given_up_is_freed_though_what_it_kept_was_offloaded(
    moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook that keeps an operation's own result would hold the graph by itself. Schedules that split backward keep graphs
    beyond it: 1,084 MiB of a rank instead of 657."""
    monkeypatch.setattr(offload, "SMALLEST", 0 if moved else offload.SMALLEST)
    layer = nn.Linear(64, 64)
    with offload.activations(layer):
        result = layer(torch.ones(8, 64)).exp()  # which keeps its result
    storage = StorageWeakRef(result.untyped_storage())
    del result
    assert storage.expired()


def test_weights_that_backward_reads_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 0)
    moved, empty = list[torch.Size](), offload.Scratch.empty
    monkeypatch.setattr(offload.Scratch, "empty", lambda self, size, dtype: moved.append(size) or empty(self, size, dtype))
    layer, x = torch.nn.Linear(6, 5), torch.ones(2, 3, requires_grad=True)
    with offload.activations(layer):
        layer(x.repeat(1, 2))
    assert moved == [(2, 6)], "the input alone"
