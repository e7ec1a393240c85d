"""It really shards: what each rank holds, against what its axis should give; and no rank ever holds the whole model."""

import json
from pathlib import Path

import pytest
import torch
from conftest import composed
from runner import losses, run_all
from torch.distributed.tensor import DTensor

from leanlm.common.errors import UserError
from leanlm.common.machine import peak_memory
from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.data.batches import Batch
from leanlm.launch.processes import launch
from leanlm.launch.ranks import of_ranks, process_group
from leanlm.strategies.plan import Plan
from leanlm.training import build

VOCABULARY, WIDTH, DEPTH, HEAD = 256, 64, 4, 256 * 64
BLOCK = 12 * WIDTH**2  # no biases, no norm weights


def overrides(text: Path, plan: dict) -> list[str]:
    return [
        "model=transformer", f"model.width={WIDTH}", f"model.depth={DEPTH}", "data=text", f"data.path={text}",
        "data.validation=0.02", "global_batch=8", "sequence=12", "max_steps=2", "device=cpu", "logger=csv", "sample_tokens=1",
        "optim=adamw",
        *(f"strategy.{key}={value}" for key, value in plan.items()),
    ]  # fmt: skip


def test_each_rank_holds_its_share(text: Path, tmp_path: Path) -> None:
    """In numbers of 4 bytes; the untied embedding and head are as large as each other."""
    whole = 2 * HEAD + DEPTH * BLOCK
    expected = {
        "ddp": ({"replicate": 2}, [whole] * 2),
        "shard": ({"shard": 2}, [whole / 2] * 2),
        "tensor": ({"tensor": 2}, [whole / 2] * 2),
        "pipeline": ({"pipeline": 2, "accumulate_grad_batches": 2}, [HEAD + 2 * BLOCK] * 2),
        "pipeline, by hand": (
            {"pipeline": 2, "accumulate_grad_batches": 2, "stage_blocks": "[1,3]"},
            [HEAD + BLOCK, HEAD + 3 * BLOCK],
        ),
        "zero-bubble": (
            {"pipeline": 2, "schedule": "zero-bubble", "accumulate_grad_batches": 2},
            [2 * HEAD + 2 * BLOCK, 2 * BLOCK],
        ),
    }
    zero1 = {tmp_path / "zero1": overrides(text, {"replicate": 2, "zero1": "true"})}
    run_all({tmp_path / name: overrides(text, plan) for name, (plan, _) in expected.items()} | zero1, 2)
    for held in json.loads(Run(tmp_path / "zero1").result.read_text())["held_bytes"]:
        assert held["parameters"] == held["gradients"] == 4 * whole
        assert held["optimizer_state"] == pytest.approx(8 * whole / 2, abs=4 * 64)
    four = {"shard x tensor": ({"shard": 2, "tensor": 2}, [whole / 4] * 4)}
    run_all({tmp_path / name: overrides(text, plan) for name, (plan, _) in four.items()}, 4)
    for name, (_, numbers) in (expected | four).items():
        result = json.loads(Run(tmp_path / name).result.read_text())
        assert result["parameters"] == whole
        for held, number in zip(result["held_bytes"], numbers, strict=True):
            assert held["parameters"] == held["gradients"] == 4 * number, name
            assert held["optimizer_state"] == pytest.approx(8 * number, abs=4 * 64), name  # and a step count for each parameter


def _gradient_storages(overrides: list[str]) -> list[list[int]]:
    """On each rank, bytes of the largest storage that gradients are in, after each micro-batch of two steps; and how many
    gradients were gone when the second step began."""
    import lightning.pytorch as pl

    from leanlm.planning.simulation.step import _batches

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
            self.gone = sum(p.grad is None for p in module.net.parameters()) if index == 2 else self.gone

        def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            storages = {p.grad.untyped_storage()._cdata: p.grad.untyped_storage().nbytes() for p in module.net.parameters()}
            self.found.append(max(storages.values()))

        found: list[int] = []
        gone = -1

    settings, look = check(composed(*overrides)), Look()
    with process_group("cpu"):
        parallel = build.parallel_model(settings.config, settings.plan, VOCABULARY)
        module = build.module(settings, parallel)
        build.trainer(settings, [look], [], 2).fit(module, _batches(settings, 2))
        return of_ranks([*look.found, look.gone])


def test_micro_batches_add_to_the_buckets_of_ddp(text: Path) -> None:
    """All gradients of this model are in one bucket, from the first micro-batch on: none is a tensor of its own beside it,
    nor must it be made anew (and summed once more) in each step."""
    plan = {"replicate": 2, "accumulate_grad_batches": 2}
    whole = 4 * (2 * HEAD + DEPTH * BLOCK)
    assert launch(_gradient_storages, (overrides(text, plan),), 2) == [[whole] * 4 + [0]] * 2


@pytest.mark.skipif(torch.__version__ < "2.13", reason="refused: torch cannot split the backward of recurrent layers")
def test_zero_bubble_of_a_recurrence_a_row_at_a_time(text: Path, tmp_path: Path) -> None:
    """What an LSTM without dropout returns for one row is a view, which torch's schedule cannot detach in place."""
    common = ["model=lstm", "model.width=16", "model.depth=4", "data=text", f"data.path={text}", "global_batch=4",
              "sequence=12", "max_steps=3", "device=cpu", "logger=csv", "sample_tokens=1", "optim=adamw", "log_every=1",
              "precision=fp64"]  # fmt: skip
    run_all({tmp_path / "one": common}, 1)
    plan = ["strategy.pipeline=2", "strategy.schedule=zero-bubble", "strategy.accumulate_grad_batches=4"]
    run_all({tmp_path / "two": [*common, *plan]}, 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-9)


def test_muon_divides_its_momentum(text: Path, tmp_path: Path) -> None:
    """ZeRO-1: the same bits as without, also where a run with it goes on from one without and back."""
    common = [*overrides(text, {"replicate": 2}), "optim=muon", "precision=fp64", "log_every=1", "max_steps=6"]
    common += ["optim.schedule=constant"]  # of how many steps a run has, nothing then depends
    divided = "strategy.zero1=true"
    first = {tmp_path / "plain": common, tmp_path / "divided": [*common, divided]}
    run_all(first | {tmp_path / "two": [*common, "max_steps=2"], tmp_path / "three": [*common, divided, "max_steps=3"]}, 2)
    on = {tmp_path / "on": [divided, "max_steps=6", f"resume={tmp_path / 'two'}"]}
    run_all(on | {tmp_path / "back": ["strategy.zero1=false", "max_steps=6", f"resume={tmp_path / 'three'}"]}, 2)
    curve = losses(tmp_path / "plain")
    for name in ("divided", "on", "back"):
        assert losses(tmp_path / name) == curve, name
    held = {}
    for name in ("plain", "divided"):
        held[name] = json.loads(Run(tmp_path / name).result.read_text())["held_bytes"]
    whole = 8 * (DEPTH * BLOCK + 2 * 2 * HEAD)
    for rank in range(2):
        assert held["plain"][rank]["optimizer_state"] == pytest.approx(whole, abs=8 * 64)
        assert held["divided"][rank]["optimizer_state"] == pytest.approx(whole / 2, abs=8 * 64)


def grow(text: Path) -> list[int]:
    """Bytes by which building a model of 8 blocks of 48 MiB adds to the peak of each process."""
    with process_group("cpu"):
        settings = check(composed(*overrides(text, {"shard": 2}), "model.width=1024", "model.depth=8", "model.heads=8"))
        before = peak_memory()
        parallel = build.parallel_model(settings.config, settings.plan, VOCABULARY)
        grown = of_ranks(peak_memory() - before)
        assert parallel.parameters == 8 * 12 * 1024**2 + 2 * VOCABULARY * 1024
        return grown


def test_no_rank_ever_holds_the_whole_model(text: Path) -> None:
    whole = 8 * 12 * 1024**2 * 4
    for grown in launch(grow, (text,), 2):
        assert grown < 0.5 * whole + 1.5 * whole / 8  # its half, and one block on the way


def weights(text: Path) -> dict[str, torch.Tensor]:
    """Initial weights under every plan of two devices, gathered."""
    found = {}
    plans = {
        "shard": Plan(shard=2),
        "tensor": Plan(tensor=2),
        "1f1b": Plan(pipeline=2),
        "v": Plan(pipeline=2, schedule="zero-bubble"),
    }
    with process_group("cpu"):
        settings = check(composed(*overrides(text, {"shard": 2}), "model.tied=true", "model.zero_init=false"))
        for name, plan in plans.items():
            named = build.parallel_model(settings.config, plan, VOCABULARY).named_parameters()
            mine = {key: p.full_tensor() if isinstance(p, DTensor) else p.detach() for key, p in named}
            for part in of_ranks(mine):
                found |= {f"{name} {key}": value for key, value in part.items()}
    return found


def test_initial_weights_are_the_same_bits_under_every_plan(text: Path) -> None:
    settings = check(composed(*overrides(text, {}), "model.tied=true", "model.zero_init=false"))
    whole = dict(build.parallel_model(settings.config, settings.plan, VOCABULARY).named_parameters())
    found = launch(weights, (text,), 2)
    assert len(found) == 4 * len(whole)
    for name, value in found.items():
        assert torch.equal(value, whole[name.partition(" ")[2]]), name


REFUSED = [
    ({"pipeline": 5, "accumulate_grad_batches": 8}, "= 5 stages, but the model has 4 blocks: write strategy.pipeline=4"),
    ({"pipeline": 4, "accumulate_grad_batches": 2}, "fewer micro-batches than the 4 stages that they must fill; write at"),
    ({"tensor": 3}, "model.heads=4 does not divide by tensor=3: write strategy.tensor=2, or model.heads=6"),
    ({"pipeline": 2, "accumulate_grad_batches": 2, "stage_blocks": "[4]"}, "2 numbers, each at least 1, with the sum 4"),
    ({"pipeline": 2, "accumulate_grad_batches": 5, "schedule": "interleaved"}, "2 equal rounds over pipeline=2; write 4"),
    ({"pipeline": 2, "accumulate_grad_batches": 2, "schedule": "1f2b"}, "choose one of gpipe, 1f1b, interleaved"),
    ({"pipeline": -1, "shard": -1}, "only one of strategy.pipeline, strategy.shard can be -1"),
    (
        {"pipeline": 2, "accumulate_grad_batches": 2, "schedule": "zero-bubble", "recompute": "operators"},
        "serves for one backward pass, and zero-bubble makes two: write strategy.schedule=1f1b",
    ),
    ({"recompute_window": 64}, "cannot read part of a row without the tokens before it"),
    ({"recompute": "1.5"}, "strategy.recompute=1.5: choose none, blocks, operators, 2 or more"),
    ({"zero1": "true"}, "but replicate=1, shard=1, tensor=1: it needs replicate above 1"),
    ({"step_in_backward": "true"}, "clip=1.0: the global norm is known only when all gradients are there; write clip=0"),
    ({"step_in_backward": "true", "accumulate_grad_batches": 2}, "is whole only after 2 micro-batches"),
    ({"step_in_backward": "true", "replicate": 2}, "write strategy.shard=2 strategy.replicate=1"),
    (
        {"pipeline": 2, "accumulate_grad_batches": 2, "schedule": "zero-bubble", "compile": "true"},
        "compile=true serves for one backward pass",
    ),
    ({"shard": 3}, "does not divide by shard=3 x accumulate_grad_batches=1 = 3: write global_batch=6 or 9"),
]


@pytest.mark.parametrize(("plan", "message"), REFUSED)
def test_a_plan_that_cannot_work_is_refused_with_what_would(plan: dict, message: str, text: Path) -> None:
    with pytest.raises(UserError) as error:
        check(composed(*overrides(text, plan)))
    assert message in str(error.value)


def _offloaded(size: int) -> bool:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    from leanlm.common.dtensors import local, with_layout

    with process_group("cpu"):
        mesh = init_device_mesh("cpu", (2,))
        mesh._device_type = "cuda"  # fetching it there would raise
        spread = with_layout(torch.empty(size), (mesh, [Shard(0)], torch.Size([2 * size]), (1,)))
        return local(spread).device.type == "cpu" and spread.shape == (2 * size,)


def test_what_another_device_holds_stays_there() -> None:
    assert launch(_offloaded, (4,), 2)
