"""What is predicted of a GPU: against runs on an H200 (torch 2.11; predicted before they ran, see scripts/plan_gpu.py), and the
paths that a GPU takes, on a CPU that is told to be one."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import composed
from omegaconf import OmegaConf
from torch import nn

from leanlm.common.files import CONF
from leanlm.config.checks import check
from leanlm.config.schema import Settings
from leanlm.memory import chunks, loss
from leanlm.models import kernels
from leanlm.models.attention import attend
from leanlm.planning import inference as reading
from leanlm.planning.candidates import families
from leanlm.planning.choice import Choice
from leanlm.planning.constants import KERNEL, PAGES, REACHED
from leanlm.planning.hardware.devices import Device, of_config
from leanlm.planning.hardware.roofline import seconds
from leanlm.planning.parts import FREED, PARTS, peaks, with_overhead
from leanlm.planning.predict import predict
from leanlm.planning.simulation import gpu
from leanlm.planning.simulation.allocator import reserved
from leanlm.planning.simulation.patches import kernels_of_a_gpu, replaced
from leanlm.planning.simulation.step import simulate, stages
from leanlm.planning.simulation.trace import Work
from leanlm.strategies.plan import Plan
from leanlm.training import build

MIB = 1 << 20
WORDS = 10_573  # types of the text that was used
RUNS = [  # overrides, types, MiB of tensors and MiB that torch's allocator took
    ("model=llama model.width=512 model.depth=4 global_batch=16 sequence=1024 strategy.accumulate_grad_batches=4 optim=adamw "
     "strategy.recompute=operators", 256, 737, 776),
    ("model=lstm model.embedding=128 model.cutoffs=[1000] model.width=1280 model.depth=1 model.locked=false model.dropout=0.2 "
     "strategy.recompute=2 strategy.offload=optimizer global_batch=32 sequence=256 optim=adamw", WORDS, 891, 1130),
    ("model=llama model.width=768 model.depth=8 global_batch=8 sequence=1024 strategy.recompute=operators "
     "precision=bf16 optim=muon", WORDS, 1394, 1452),
]  # fmt: skip


def card(name: str = "h200") -> Device:
    node: Any = OmegaConf.to_container(OmegaConf.load(Path(CONF, "device", f"{name}.yaml")))
    return of_config(node)


@pytest.mark.parametrize(("overrides", "types", "tensors", "taken"), RUNS)
def test_bytes_are_those_that_runs_took(overrides: str, types: int, tensors: int, taken: int, text: Path) -> None:
    settings = check(composed("data=text", f"data.path={text}", "data.tokenizer=byte", "max_steps=6", *overrides.split()))
    parts = predict(settings, types, card()).fullest.parts
    allocated = sum(parts.values()) - parts["allocator"] - parts["context"]
    assert allocated == pytest.approx(tensors * MIB, rel=0.005)
    assert allocated + parts["allocator"] == pytest.approx(taken * MIB, rel=0.025)


GPT2 = ["model=gpt2", "optim=adamw", "sequence=1024", "precision=bf16-mixed", "data.tokenizer=byte"]


def gpt2(text: Path, *overrides: str) -> Settings:
    return check(composed("data=text", f"data.path={text}", *GPT2, "global_batch=12", *overrides))


@pytest.mark.parametrize(("rows", "measured"), [(12, 9299), pytest.param(32, 21793, marks=pytest.mark.slow)])
def test_bytes_of_a_compiled_gpt2(rows: int, measured: int, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all logits at once ours is nanoGPT's, which was measured on an H100 with torch 2.11, and never fitted to."""
    monkeypatch.setattr(chunks, "LEAST", 1 << 40)
    parts = predict(gpt2(text, f"global_batch={rows}", "strategy.compile=true"), 50304, card("h100")).fullest.parts
    allocated = sum(parts.values()) - parts["allocator"] - parts["context"]
    assert allocated == pytest.approx(measured * MIB, rel=0.03)


@pytest.mark.parametrize(("compiled", "most", "memory"), [("false", 900, 0.70), ("true", 500, 0.70)])
def test_launches_and_bytes_of_a_step(compiled: str, most: int, memory: float, text: Path) -> None:
    """Of GPT-2 124M at 12 x 1024, in kernels of an H100; bytes beside those of nanoGPT's compiled step."""
    step = simulate(gpt2(text, f"strategy.compile={compiled}"), 50304, device=card("h100"))
    work = [
        (kind, count)
        for phase, counter in step.trace.work.items()
        if phase.startswith("step 1")
        for kind, count in counter.items()
    ]
    assert 200 < sum(count * kind.launches for kind, count in work if kind.moved or kind.flops) < most
    assert max(sum(parts.values()) for parts in peaks(step.trace).values()) < memory * 9299 * MIB


@pytest.mark.parametrize("plan", ["strategy=ddp", "strategy=pipeline strategy.accumulate_grad_batches=4"])
def test_what_a_compiler_does_not_change(plan: str, text: Path) -> None:
    """Under plans of several devices: bytes of weights, gradients and state; a gradient is no weight that was written over."""
    common = [
        "devices=2",
        "model.width=64",
        "model.depth=4",
        "model.heads=2",
        "model.dropout=0.1",
        "sequence=64",
        "global_batch=8",
    ]
    found = []
    for compiled in ("true", "false"):
        settings = gpt2(text, *plan.split(), *common, f"strategy.compile={compiled}")
        found.append(predict(settings, 1000, card("h100")))
    kinds = ("weights", "gradients", "state")
    assert [[need.parts[kind] for kind in kinds] for need in found[0].needs] == [
        [need.parts[kind] for kind in kinds] for need in found[1].needs
    ]
    if "pipeline" in plan:  # under DDP each part is a graph, which is counted operation by operation
        assert found[0].seconds < found[1].seconds


def test_auto_compiles_what_earns_it_back(text: Path) -> None:
    """GPT-2 small saves some 9 ms a step and compiles for 46 s: 2,000 steps do not earn that, 20,000 do; a CPU's never."""

    def asked(steps: int, device: Device) -> set[Any]:
        settings = gpt2(text, "strategy=auto", f"max_steps={steps}")
        whole = stages(settings.config, settings.plan, 50304)
        return {plan.compile for plans in families(settings, 1, whole, device, ()) for plan in plans}

    assert asked(2000, card("h100")) == {False}
    assert asked(20000, card("h100")) == {False, True}
    cpu = replace(card("h100"), accelerator="cpu")
    assert asked(20000, cpu) == {"auto"}
    assert not Plan().compiled


def test_the_allocator_takes_what_torchs_did() -> None:
    """tests/allocations.txt: those above 1 MiB in an LSTM's run (number:multiples of 512 bytes), for which 1,360 were taken."""
    pairs = (event.split(":") for event in (Path(__file__).parent / "allocations.txt").read_text().split())
    assert reserved((int(number), 512 * int(size)) for number, size in pairs) == 1360 * MIB


def test_holes_are_filled_and_the_end_grows_by_pages() -> None:
    def took(*sizes: int) -> int:
        """Of large blocks: MiB, or minus the number of the one that goes."""
        return reserved((size, 4 * MIB * size) if size > 0 else (-size, size) for size in sizes) // PAGES[1]

    assert took(5) == 1
    assert took(5, 6) == 3  # 44 MiB
    assert took(5, 6, 1, -6, 4) == 3  # 16 of the 24 that are free
    assert took(5, 6, 1, -6, 7) == 4  # 28 do not fit there, nor with the 12 at the end
    assert took(8, 2, 4, -8, 1, 8) == 5  # the 1 goes into the hole of 8, although the end has room for just that
    assert reserved([(1, 100), (2, 600)]) == PAGES[0]


def test_partial_sums_of_a_bias_gradient() -> None:
    """48 and 132 MiB were seen for 768 and 3,072 columns of 8,192 rows."""
    threads = card().threads
    assert gpu._sum_over_rows(torch.empty(8192, 768, device="meta"), [0], threads) == 48 * MIB
    assert gpu._sum_over_rows(torch.empty(8192, 3072, device="meta"), [0], threads) == 132 * MIB
    assert gpu._sum_over_rows(torch.empty(8192, 768, device="meta"), [1], threads) == 0
    assert gpu._sum_over_rows(torch.empty(64, 768, device="meta"), [0], threads) == 0


def test_a_card_computes_while_its_machine_starts_operations() -> None:
    fast = replace(card(), flops={"float32": 1e12}, bandwidth=1e12, overhead=1e-4)
    product = Work(flops=3 * 10**9, dtype="float32")
    work = {"step 1, micro-batch 0, head": Counter({product: 2})}
    assert seconds(work, 1, Plan(), fast) == pytest.approx(2 * 3e-3 / REACHED)
    assert seconds(work, 1, Plan(), replace(fast, overhead=1e-2)) == pytest.approx(2e-2)
    sent = {"step 1, micro-batch 0, head": Counter({Work(collective="host", size=55 * 10**6): 1})}
    assert seconds(sent, 1, Plan(), fast) == pytest.approx(1e-3 + fast.latency)
    layer = {"step 1, micro-batch 0, head": Counter({Work(launches=500): 1})}
    assert seconds(layer, 1, Plan(), fast) == pytest.approx(500 * KERNEL)


def test_nccl_weighs_once_for_each_group_of_ranks() -> None:
    def context(**axes: int) -> int:
        return with_overhead(dict.fromkeys((*PARTS, FREED), 0), 0, Choice(**axes), card(), False)["context"]

    one = card().communicator
    assert context() == card().context
    assert context(replicate=2) == card().context + one
    assert context(replicate=2, shard=2) == card().context + 3 * one  # each axis, and all ranks
    assert context(pipeline=2, shard=2, tensor=2) == card().context + 4 * one


def test_averages_in_host_memory_go_to_the_card_and_back_in_each_step(text: Path) -> None:
    settings = check(composed("data=text", f"data.path={text}", "data.tokenizer=byte", "model=gpt2", "model.width=192",
                              "model.depth=2", "optim=adamw", "strategy.offload=optimizer"))  # fmt: skip
    count = sum(parameter.numel() for parameter in build.model(settings.config, settings.plan, 256).parameters())
    slow, fast = (replace(card(), links={"host": rate}, latency=0.0) for rate in (1e9, 1e12))
    more = predict(settings, 256, slow).seconds - predict(settings, 256, fast).seconds
    assert more == pytest.approx(2 * 8 * count * (1e-9 - 1e-12), rel=0.01)  # but of the smallest tensors


def test_autocast_of_a_gpu_squares_in_float32() -> None:
    half = torch.ones(3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), replaced(kernels_of_a_gpu(card(), lambda size: None)):
        kinds = [(half * half).dtype, torch.square(half).dtype, half.pow(2).dtype, F.softmax(half, 0).dtype, half.sum().dtype]
    assert kinds == [torch.bfloat16, *[torch.float32] * 4]
    with torch.autocast("cpu", torch.bfloat16):  # and no longer
        assert half.pow(2).dtype == torch.bfloat16


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "on_gpu", lambda tensor: True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_the_loss_by_rows(bias: bool, ignored: bool, told: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from leanlm.models.head import IGNORE, Head

    torch.manual_seed(0)
    monkeypatch.setattr(chunks, "logits_memory", lambda device: 0)
    monkeypatch.setattr(chunks, "LEAST", 128 * 1000 * 8)
    head = Head(24, 1000, nn.LayerNorm(24), bias).double()
    hidden, target = torch.randn(5, 60, 24, dtype=torch.float64, requires_grad=True), torch.randint(1000, (5, 60))
    if ignored:
        target[1, 3:40] = IGNORE
    leaves = [hidden, *head.parameters()]
    expected = F.cross_entropy(head(hidden).flatten(0, 1), target.flatten(), reduction="sum", ignore_index=IGNORE)
    got = loss.token_loss(head, hidden, target)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
    for ours, theirs in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_grouped_attention_keeps_no_probabilities(told: None, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(2, 8, 16, 4), torch.randn(2, 2, 16, 4), torch.randn(2, 2, 16, 4)
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    seen: list[tuple[int, bool]] = []
    every = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention",
        lambda q, k, v, *args, **kwargs: seen.append((k.shape[1], kwargs["enable_gqa"])) or every(q, k, v, *args, **kwargs),
    )  # fmt: skip
    torch.testing.assert_close(attend(query, key, value, None), plain)
    assert seen == [(8, False)]


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrences_of_a_gpu_are_in_bf16_under_autocast(layer: Any, told: None) -> None:
    torch.manual_seed(0)
    net, x = layer(32, 32, batch_first=True), torch.randn(4, 9, 32)
    plain, last = net(x)
    wanted = torch.autograd.grad(plain.square().sum(), list(net.parameters()))
    kernels.choose(nn.ModuleList([net]), "onednn")
    with torch.autocast("cpu", torch.bfloat16):
        out, after = net(x)
    got = torch.autograd.grad(out.float().square().sum(), list(net.parameters()))
    assert out.dtype == torch.bfloat16
    assert {part.dtype for part in (after if layer is nn.LSTM else [after])} == {torch.float32}, "as it is carried"
    for ours, theirs in [(out, plain), *zip(got, wanted, strict=True)]:
        assert ours.dtype == theirs.dtype or ours is out
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_evaluation_within_a_card(text: Path) -> None:
    node: Any = OmegaConf.to_container(OmegaConf.load(Path(CONF, "device", "l4.yaml")))
    base = ["data=text", f"data.path={text}", "data.tokenizer=byte", "model=small", "sequence=64"]

    def within(rows: int, memory: int) -> Any:
        settings = check(composed(*base, f"global_batch={rows}"))
        return replace(settings, config=replace(settings.config, device=node | {"memory": memory}))

    some = [within(rows, 1 << 30) for rows in (64, 512)]
    few, many = (reading._total(reading._evaluation(one, 256, card("l4")), Choice.of(one), card("l4")) for one in some)
    assert card("l4").context < few < many < card("l4").context + 2048 * MIB
    assert reading.rows_that_fit(within(512, many), 256).config.global_batch == 512
    assert reading.rows_that_fit(within(512, many - 1), 256).config.global_batch == 256


def test_an_operation_on_a_list_is_a_few_kernels() -> None:
    """So many as torch's MultiTensorApply.cuh launches: 110 tensors of one list to a kernel, 64 of two, 36 of four, or 320
    chunks of 65,536 numbers."""

    def launched(name: str, *args: Any) -> int:
        return gpu.launches(getattr(torch.ops.aten, name).default if "copy" in name or "fused" in name
                            else getattr(torch.ops.aten, name).Scalar, args)  # fmt: skip

    small, large = ([torch.empty(size, device="meta") for _ in range(150)] for size in (8, 1 << 20))
    assert launched("_foreach_mul_", small, 2.0) == 2
    assert launched("_foreach_mul_", large, 2.0) == 8  # 16 chunks each
    assert launched("_foreach_norm", small) == 3
    assert launched("_foreach_lerp_", small, small, 0.5) == 3
    assert launched("_foreach_lerp_", small, [part.half() for part in small], 0.5) == 150
    assert launched("_foreach_copy_", small, [part.half() for part in small]) == 3
    assert launched("_fused_adamw_", small, small, small, small, [], [part[0] for part in small]) == 5
