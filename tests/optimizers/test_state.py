"""AdamW whose averages take fewer bytes: against torch's, and against its definition written out."""

import itertools
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import composed
from runner import losses, run_all
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode

from leanlm.common.dtensors import local_part
from leanlm.common.errors import UserError
from leanlm.common.machine import memory_now
from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.memory import malloc, offload
from leanlm.memory.offload import Scratch
from leanlm.optimizers import base, low_bit
from leanlm.optimizers.adafactor import Adafactor
from leanlm.optimizers.adamw import AdamW
from leanlm.optimizers.low_bit import code_values
from leanlm.optimizers.muon import Muon
from leanlm.optimizers.rounding import Rounding, random_bits
from leanlm.training import build, checkpoint
from leanlm.training.checkpoint import checkpoints

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def gradients(steps: int, *shape: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape) * torch.rand(shape[0], 1) for _ in range(steps)]


def trained(optimizer: type, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **more) -> tuple[torch.Tensor, dict]:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape).to(dtype))
    if more.pop("chance", False):
        more["rounding"] = Rounding(1, [("weight", parameter)])
    made = optimizer([{"params": [parameter], "weight_decay": 0.1}], **SETTINGS, **more)
    for gradient in gradients(5, *shape):
        parameter.grad = gradient.to(dtype)
        made.step()
    return parameter.detach(), made.state[parameter]


def test_full_averages_have_the_bits_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit, "PIECE", 1 << 14)
    ours, theirs = trained(AdamW, (100, 640), kind="fp32"), trained(torch.optim.AdamW, (100, 640), fused=True)
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(ours[1][key], theirs[1][key]) for key in ("exp_avg", "exp_avg_sq"))


def nearest(numbers: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return values[(numbers[..., None] - values).abs().argmin(-1)]


def kept(average: torch.Tensor, kind: str, signed: bool) -> torch.Tensor:
    """What is left of an average when it is stored."""
    if kind == "bf16":
        return average.bfloat16().float()
    blocks = average.view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    return (nearest((blocks / scales).bfloat16().float(), code_values(int(kind[3:]), signed)) * scales).view_as(average)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_is_adamw_with_averages_that_are_stored_so(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit, "PIECE", 1 << 10)
    torch.manual_seed(0)
    weight = torch.randn(40, 128)
    first, second = torch.zeros(40, 128), torch.zeros(40, 128)
    for t, gradient in enumerate(gradients(5, 40, 128), 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        change = first / (1 - 0.9**t) / ((second / (1 - 0.95**t)).sqrt() + 1e-8)
        weight = weight * (1 - 1e-2 * 0.1) - 1e-2 * change
        first, second = kept(first, kind, True), kept(second, kind, False)
    got, _ = trained(AdamW, (40, 128), kind=kind)
    different = (got - weight).abs() > 1e-5
    assert different.float().mean() < 0.005, "a number between two codes may go either way"


def test_codes() -> None:
    for bits, signed in ((8, True), (8, False), (4, True), (4, False)):
        values = code_values(bits, signed)
        assert len(values.unique()) == 2**bits
        assert values[-1] == 1
        numbers = torch.linspace(-1 if signed else 0, 1, 4001).bfloat16().float()
        half = numbers.bfloat16().view(torch.int16).int() + (1 << 15)
        codes = low_bit.nearest(bits, signed)[half]
        assert ((values[codes.int()] - numbers).abs() - (nearest(numbers, values) - numbers).abs()).abs().max() < 1e-6
    assert (code_values(8, True).abs() < 1e-4).sum() > 5, "small numbers have codes of their own"


@pytest.mark.parametrize(("kind", "share"), [("bf16", 1 / 2), ("int8", 1 / 4 + 1 / 64), ("int4", 1 / 8 + 1 / 64)])
def test_bytes(kind: str, share: float) -> None:
    parameter, kept = trained(AdamW, (512, 512), kind=kind)
    held = sum(part.numel() * part.element_size() for part in kept.values())
    assert held == 2 * 4 * parameter.numel() * share + 4


def test_a_step_copies_no_tensor() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for part in out if isinstance(out, tuple | list) else (out,):
                if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() not in held:
                    largest = max(largest, part.untyped_storage().nbytes())
            return out

    parameter = torch.nn.Parameter(torch.randn(4096, 1024))
    parameter.grad = torch.randn_like(parameter)
    optimizer = AdamW([{"params": [parameter], "weight_decay": 0.1}], "int8", **SETTINGS)
    optimizer.step()
    tensors = (parameter, parameter.grad, *optimizer.state[parameter].values())
    held = {part.untyped_storage().data_ptr() for part in tensors}
    with Watch():
        optimizer.step()
    assert 0 < largest <= 4 * low_bit.PIECE


def test_averages_in_a_file_have_the_same_bits(tmp_path: Path) -> None:
    file = Scratch(tmp_path)
    for kind in ("fp32", "int8"):
        ours, away = trained(AdamW, (128, 256), kind=kind, scratch=file)
        theirs, here = trained(AdamW, (128, 256), kind=kind)
        assert torch.equal(ours, theirs)
        for key, value in here.items():
            assert torch.equal(away[key], value)
            assert file.holds(away[key]) == (value.dim() > 0 and value.nbytes >= base.SMALLEST)


def test_offload_claims_its_room_first(tmp_path: Path) -> None:
    """A file with holes would end the process with a Bus error when it came to write where the disk is full."""
    file = Scratch(tmp_path)
    here = file.empty((1 << 18,), torch.float32)
    assert os.fstat(file.file.fileno()).st_blocks * 512 >= 1 << 20
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 19, before[1]))
    try:
        with pytest.raises(UserError, match=f"1,048,576 bytes in {tmp_path}, and there is no room for 1,048,576 more"):
            file.empty((1 << 18,), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    here.fill_(1)
    assert file.empty((1 << 10,), torch.float32).fill_(1).sum() == 1 << 10


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no count of resident pages")
def test_a_checkpoint_leaves_no_pages_of_the_file_in_memory(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(2048, 2048))
    optimizer = AdamW([{"params": [parameter], "weight_decay": 0.1}], scratch=offload.scratch(), **SETTINGS)
    parameter.grad = torch.randn_like(parameter)
    for step in (1, 2):  # the first imports what it needs
        optimizer.step()
        before = memory_now()
        checkpoint.save(tmp_path, [("weight", parameter)], optimizer, {}, {"step": step}, keep=1)
    assert memory_now() - before < 0.25 * 2 * parameter.nbytes


def test_stochastic_rounding_keeps_small_updates() -> None:
    numbers = torch.full((200_000,), 1 + 1 / 512)  # a quarter of the way to the next bf16 number, 1 + 1/128
    found = by_chance(numbers)
    assert set(found.unique().tolist()) == {1.0, 1 + 1 / 128}
    assert abs(found.mean() - numbers[0]) < 1e-4
    assert torch.equal(by_chance(torch.tensor([-2.0, 0.0, 0.5])), torch.tensor([-2.0, 0.0, 0.5]))
    exact, _ = trained(torch.optim.AdamW, (64, 64))
    rounded, _ = trained(AdamW, (64, 64), torch.bfloat16, kind="fp32", chance=True)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.1


def by_chance(numbers: torch.Tensor) -> torch.Tensor:
    return Rounding(1, [("weight", numbers)])(numbers, numbers, numbers, slice(0, len(numbers))).float()


def test_what_rounding_draws_is_even_and_another_each_step() -> None:
    like = torch.empty(64, 1000)
    draws = [random_bits(key, like, slice(0, 64_000), low_bit.CPU).double() for key in (1, 2, 3)]
    for bits in draws:
        assert abs(bits.mean()) < 4 * 2**16 / 12**0.5 / 64_000**0.5
        assert torch.histc(bits, 16, -(2**15), 2**15).std() < 2 * 4000**0.5
    pairs = [(draws[0], draws[1]), (draws[1], draws[2]), (draws[0][1:], draws[0][:-1]), (draws[0][4:], draws[0][:-4])]
    for a, b in pairs:
        assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 4 / 64_000**0.5


@pytest.mark.parametrize(
    ("shape", "axes"), [((37, 13), (0,)), ((37, 13), (1,)), ((6, 50), (0, 1)), ((20, 8), (0, 0)), ((29,), (0,))]
)
def test_parts_of_a_parameter_are_rounded_as_the_whole(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    """Of every device of a mesh of 3 x 2, piece by piece."""
    whole = random_bits(7, torch.empty(shape), slice(0, math.prod(shape)), low_bit.CPU).view(shape)
    sizes = (3, 2)[: len(axes)]
    for place in itertools.product(*map(range, sizes)):
        mesh = SimpleNamespace(ndim=len(axes), size=sizes.__getitem__, get_local_rank=place.__getitem__)
        part = SimpleNamespace(shape=torch.Size(shape), device_mesh=mesh, placements=[Shard(axis) for axis in axes])
        mine = local_part(whole, part).flatten()
        for start in range(0, len(mine), 11):
            piece = slice(start, min(start + 11, len(mine)))
            assert torch.equal(random_bits(7, part, piece, low_bit.CPU), mine[piece])


def test_muon_keeps_small_updates_by_chance() -> None:
    """Steps of a hundredth of the distance between two bf16 numbers: rounded to the nearest, they would all be lost."""
    settings = {"lr": 3e-4, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    start, gradient = torch.full((64, 64), 1.0), gradients(1, 64, 64)[0]
    moved = {}
    for name, made in (("exact", torch.optim.Muon), ("by chance", Muon), ("lost", Muon)):
        parameter = torch.nn.Parameter(start.to(torch.float32 if name == "exact" else torch.bfloat16, copy=True))
        more = {"rounding": Rounding(1, [("weight", parameter)])} if name == "by chance" else {}
        optimizer = made([{"params": [parameter]}], **more, **settings)
        for step in range(60):
            if more:
                more["rounding"].step = step
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
        moved[name] = parameter.detach().float() - start
    assert moved["lost"].abs().max() == 0
    slope = (moved["by chance"] * moved["exact"]).sum() / (moved["exact"] ** 2).sum()
    assert slope == pytest.approx(1, abs=0.1)


def test_momentum_of_muon_in_a_file_has_the_same_bits(tmp_path: Path) -> None:
    file = Scratch(tmp_path)
    found = []
    for scratch in (None, file):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(64, 96))
        optimizer = Muon([{"params": [parameter]}], scratch=scratch, lr=0.02, weight_decay=0.1)
        for gradient in gradients(4, 64, 96):
            parameter.grad = gradient
            optimizer.step()
        found.append((parameter.detach(), optimizer.state[parameter]["momentum_buffer"]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert file.holds(found[1][1])


def test_adafactor_keeps_a_row_and_a_column() -> None:
    parameter = torch.nn.Parameter(torch.randn(300, 200))
    optimizer = Adafactor([{"params": [parameter], "weight_decay": 0.0}], lr=1e-2)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert sum(part.numel() for part in optimizer.state[parameter].values()) == 300 + 200 + 1


def test_a_step_in_backward_has_one_gradient_at_a_time(text: Path) -> None:
    settings = check(composed(*overrides(text, "fp32", ["strategy.step_in_backward=true", "clip=0"], 2)))
    parallel = build.parallel_model(settings.config, settings.plan, 60)
    module = build.module(settings, parallel)
    optimizer = module.configure_optimizers()
    counts, step = [], optimizer.step
    optimizer.step = lambda: (counts.append(sum(p.grad is not None for p in parallel.net.parameters())), step())
    before = [parameter.detach().clone() for parameter in parallel.net.parameters()]
    tokens = torch.randint(60, (8, 12))
    (stage,) = parallel.stages.values()
    (stage(tokens, torch.arange(8), tokens) / tokens.numel()).backward()
    assert counts == [1] * len(before)
    assert not any(torch.equal(now, then) for now, then in zip(parallel.net.parameters(), before, strict=True))
    norm, largest = module.in_backward.done()
    assert largest == max(parameter.nbytes for parameter in parallel.net.parameters())
    assert norm > 0


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
@pytest.mark.parametrize(
    ("parameters", "size", "between", "count", "least", "most"),
    [
        (0, 8 << 20, 1 << 20, 30, 200, 300),
        (None, 8 << 20, 1 << 20, 30, -1, 100),
        (malloc.MODEL, 1 << 20, 1 << 16, 200, 180, 300),
        (malloc.MODEL - 1, 1 << 20, 1 << 16, 200, -1, 50),
    ],
)
def test_freed_memory_leaves_the_process(
    parameters: int | None, size: int, between: int, count: int, least: int, most: int
) -> None:
    """Tensors of `size` bytes with others `between` them that stay; None: glibc does as it likes."""
    code = f"""
import torch
from leanlm.memory.malloc import own_pages, return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

if {parameters} is not None:
    return_freed_memory(own_pages({parameters}))
torch.ones(24 << 20, dtype=torch.uint8)  # once freed, glibc keeps all that is smaller
kept = [(torch.ones({size}, dtype=torch.uint8), torch.ones({between}, dtype=torch.uint8)) for _ in range({count})]
full = resident()
kept = [small for _, small in kept]
print(full - resident())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert least < int(done.stdout) < most  # MiB


CHECKPOINT = """
import sys, torch, leanlm
from pathlib import Path
from leanlm.memory import malloc
from leanlm.memory.offload import release_all, scratch
from leanlm.optimizers.adamw import AdamW
from leanlm.training import checkpoint

def status(key):
    return int([line for line in open("/proc/self/status") if line.startswith(key)][0].split()[1]) >> 10

def peak(run):
    malloc.trim()
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    run()
    return status("VmHWM") - before

malloc.return_freed_memory(malloc.SMALL)
torch.manual_seed(0)
folder, offloaded = Path(sys.argv[1]), sys.argv[2] == "True"
named = [(str(i), torch.nn.Parameter(torch.randn(1024, 1024))) for i in range(17)]

def made():
    return AdamW([{"params": [p for _, p in named]}], "fp32", scratch=scratch() if offloaded else None, lr=1e-3,
                 betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

optimizer = made()
for _, parameter in named:
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    parameter.grad = None
first = [optimizer.state[p]["exp_avg_sq"].sum().item() for _, p in named]
release_all()
checkpoint.save(folder, named[:1], optimizer, {}, {"step": 1}, 2)  # imports
saving = peak(lambda: checkpoint.save(folder, named, optimizer, {}, {"step": 2}, 2))
del optimizer
optimizer = made()
loading = peak(lambda: checkpoint.load(folder / "step-00000002", named, optimizer))
assert first == [optimizer.state[p]["exp_avg_sq"].sum().item() for _, p in named]
print(saving, loading)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory as Linux counts it")
@pytest.mark.parametrize("offloaded", [True, False])
def test_a_checkpoint_does_not_bring_back_all_that_is_offloaded(tmp_path: Path, offloaded: bool) -> None:
    """Of 136 MiB of averages, a few of 4 MiB at a time."""
    command = [sys.executable, "-c", CHECKPOINT, str(tmp_path), str(offloaded)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, "LEANLM_DATA": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    saving, loading = map(int, done.stdout.split())
    assert saving < 40
    assert loading < 40 if offloaded else loading > 120


def overrides(text: Path, kind: str, plan: list[str], steps: int) -> list[str]:
    return [
        "model=transformer", "model.width=128", "model.depth=2", "data=text", f"data.path={text}", "global_batch=8",
        "sequence=12", f"max_steps={steps}", "device=cpu", "logger=csv", "sample_tokens=1", "optim=adamw", "log_every=1",
        "optim.schedule=constant", "optim.warmup=1", f"optim.state={kind}", *plan,
    ]  # fmt: skip


@pytest.mark.timeout(200)
def test_a_checkpoint_in_codes_goes_on_under_other_plans(text: Path, tmp_path: Path) -> None:
    """Stored in codes by two devices that share each matrix's rows, taken up by one, and by two that share its columns."""
    shard, tensor = ["strategy=fsdp"], ["strategy=tensor"]
    run_all({tmp_path / "begun": overrides(text, "int8", shard, 4)}, 2)
    goes_on = [f"resume={tmp_path / 'begun'}", "max_steps=8", "strategy.shard=1", "strategy.tensor=1"]
    one = {kind: overrides(text, kind, [], 8) for kind in ("bf16", "fp32")}
    one["int8"] = [*goes_on, f"run_dir={tmp_path / 'int8'}"]
    run_all({tmp_path / kind: arguments for kind, arguments in one.items()})
    again = [*goes_on[:2], "strategy.shard=1", "strategy.tensor=2", f"run_dir={tmp_path / 'tensor'}"]
    run_all({tmp_path / "tensor": again, tmp_path / "whole": overrides(text, "int8", tensor, 8)}, 2)
    curves = {name: losses(tmp_path / name) for name in ("int8", "bf16", "fp32", "tensor", "whole")}
    assert len(curves["whole"]) == 8
    for name, curve in curves.items():
        assert max(abs(a - b) for a, b in zip(curve, curves["whole"], strict=True)) < 2e-3, name
    assert curves["int8"] == pytest.approx(curves["tensor"], abs=1e-5)
    held = {name: json.loads(Run(tmp_path / name).result.read_text())["held_bytes"][0] for name in ("int8", "bf16", "fp32")}
    assert held["int8"]["optimizer_state"] < 0.55 * held["bf16"]["optimizer_state"] < 0.3 * held["fp32"]["optimizer_state"]
    assert all(len(checkpoints(Run(tmp_path / name).checkpoints)) for name in one)


@pytest.mark.parametrize("key", ["optim.state=int8", "strategy.offload=optimizer", "precision=bf16-stochastic"])
@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_only_for_adamw_and_muon(key: str, optim: str, text: Path) -> None:
    with pytest.raises(UserError) as error:
        check(composed(*overrides(text, "fp32", [f"optim={optim}", key], 2)))
    assert f"{key} is of AdamW's averages and update, which optim={optim} has not" in str(error.value)
