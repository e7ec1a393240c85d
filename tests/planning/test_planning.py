"""The planner's memory against real tensors, its shortcuts against the full simulation, its search."""

import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import composed

from leanlm.common.errors import UserError
from leanlm.config.checks import check
from leanlm.config.schema import Settings
from leanlm.launch.processes import launch
from leanlm.launch.ranks import process_group
from leanlm.memory import chunks, malloc, offload
from leanlm.optimizers import base, low_bit
from leanlm.planning import inference as reading
from leanlm.planning.choice import Choice
from leanlm.planning.constants import ONE_PROCESS
from leanlm.planning.hardware.devices import Device, of_config
from leanlm.planning.parts import peaks
from leanlm.planning.predict import _between, _fewer_micro_batches, _view, _with, kinds_of_ranks, predict, received
from leanlm.planning.simulation import patches, repetitions
from leanlm.planning.simulation.step import ends, simulate, stages
from leanlm.planning.simulation.trace import Work
from leanlm.strategies.plan import Plan
from leanlm.training import build

MODEL = [
    "model=gpt2",
    "model.width=32",
    "model.heads=2",
    "model.depth=7",
    "global_batch=8",
    "sequence=16",
    "data.tokenizer=byte",
]
HERE = Device("a test", "cpu", 1 << 30, {"float32": 1e11}, 1e10, 1e9, 1e-4, 1e-6)


def settings(text: Path, *overrides: str) -> Settings:
    optim = [] if any(override.startswith("optim=") for override in overrides) else ["optim=adamw"]
    return check(composed("data=text", f"data.path={text}", *MODEL, *optim, *overrides))


def _measured(settings: Settings) -> list[list[int]]:
    """Bytes of parameters and of optimizer state on each rank of a real run."""
    import lightning.pytorch as pl

    from leanlm.launch.ranks import of_ranks
    from leanlm.planning.simulation.step import _batches
    from leanlm.training import build

    with process_group("cpu"):
        parallel = build.parallel_model(settings.config, settings.plan, 256)
        module = build.module(settings, parallel)
        trainer = build.trainer(settings, [pl.Callback()], [], 2)
        trainer.fit(module, _batches(settings, 2))
        held = module.held_bytes(trainer.optimizers[0])
        return of_ranks([held["parameters"], held["optimizer_state"]])


def test_the_mask_of_isolated_documents_counts(text: Path) -> None:
    bytes_of = []
    for isolate in (False, True):
        asked = settings(text, "sequence=256")
        asked = replace(asked, config=replace(asked.config, data=asked.config.data | {"isolate": isolate}))
        bytes_of.append(max(sum(parts.values()) for parts in peaks(simulate(asked, 256).trace).values()))
    assert bytes_of[1] - bytes_of[0] >= 8 * 256**2 * 4  # of 8 rows; torch makes numbers of the bits


def slow(plan: str) -> Any:
    return pytest.param(plan, marks=pytest.mark.slow)


REST = ("strategy=ddp", "strategy=pipeline", "strategy=accumulate", "strategy=tensor", "strategy=zero_bubble")
PLANS = ["strategy=single", "strategy=fsdp", *map(slow, REST)]


@pytest.mark.parametrize("plan", PLANS)
def test_weights_and_state_are_those_of_a_real_run(plan: str, text: Path) -> None:
    asked = settings(text, plan, "optim=adamw")
    asked = replace(asked, config=replace(asked.config, device={"accelerator": "cpu"}))
    real = launch(_measured, (asked,), asked.plan.world)
    for rank in (0, asked.plan.world - 1):
        step = simulate(asked, 256, rank)
        parts = peaks(step.trace)["step 1, optimizer"]
        assert [parts["weights"], parts["state"]] == real[rank]


@pytest.mark.parametrize(
    "plan",
    ["strategy=single strategy.recompute=blocks optim.state=int8 model.depth=4", "strategy=fsdp model.depth=6",
     *map(slow, (
        "strategy=single", "strategy=ddp", "strategy=tensor", "strategy=fsdp strategy.recompute=operators optim=muon",
        "strategy=pipeline model.depth=14", "strategy=interleaved model.depth=28", "strategy=zero_bubble model.depth=28",
        "strategy=gpipe model.depth=14", "strategy=accumulate strategy.recompute=operators", "strategy=ddp strategy.zero1=true",
        "strategy=tensor strategy.recompute=blocks"))],
)  # fmt: skip
def test_few_blocks_say_what_all_blocks_need(plan: str, text: Path) -> None:
    asked = settings(text, *plan.split())
    blocks = asked.config.model["depth"] // asked.plan.stages
    for rank in (0, asked.plan.world - 1):
        ended = 2 * ends(asked.plan)
        steps = [simulate(asked, 256, rank, count) for count in (ended, ended + 1, None)]
        few, more, all_ = map(_view, steps)
        held = [step.blocks for step in steps]
        found = _between(few, more, (held[2] - held[0]) / (held[1] - held[0]))
        assert held[2] == blocks * asked.plan.stages // asked.plan.pipeline
        largest = [max(sum(parts.values()) for parts in view.peaks.values()) for view in (found, all_)]
        assert largest[0] == largest[1]
        named = {phase for phase in all_.peaks if "middle" not in phase}  # where the peak lies may change with the depth
        assert {f"step 1, micro-batch 0, backward {place}" for place in ((0, 1, -1, -2) if ended == 4 else (0, -1))} <= named
        assert {phase: sum(found.peaks[phase].values()) for phase in named} == {
            phase: sum(all_.peaks[phase].values()) for phase in named
        }
        total = [sum(kind.flops * n for counts in view.work.values() for kind, n in counts.items()) for view in (found, all_)]
        assert total[0] == total[1]


@pytest.mark.parametrize("plan", ["strategy=pipeline model.depth=4", *map(slow, (
    "strategy=interleaved", "strategy=pipeline devices=4", "strategy=interleaved devices=4 model.depth=8"))])  # fmt: skip
def test_a_pipeline_holds_only_its_buffers_more_however_many_micro_batches_flow_through_it(plan: str, text: Path) -> None:
    asked = settings(text, *plan.split(), "global_batch=24", "strategy.accumulate_grad_batches=24")
    fewer, micros = _fewer_micro_batches(asked)
    assert fewer.plan.accumulate_grad_batches < micros == 24
    before, counted = 0, kinds_of_ranks(asked.plan, stages(asked.config, asked.plan, 256))
    for rank in range(asked.plan.pipeline):
        few, all_ = (peaks(simulate(one, 256, rank).trace) for one in (fewer, asked))
        largest = [max(sum(parts.values()) for parts in found.values()) for found in (few, all_)]
        more = micros - fewer.plan.accumulate_grad_batches
        expected = more * received(asked, rank, stages(asked.config, asked.plan, 256))
        hidden = 16 * 32 * 4  # bytes of a micro-batch's, of which a pipeline of more than two fills with one more
        # the last stage also keeps each one's loss, 4 bytes
        assert 0 <= largest[1] - largest[0] - expected <= 4 * more + hidden * (asked.plan.pipeline > 2)
        assert rank in counted or largest[1] <= before
        before = largest[1]


@pytest.mark.parametrize("schedule", ["gpipe", *map(slow, ("LoopedBFS", "zero-bubble", "DualPipeV", "InterleavedZeroBubble"))])
def test_each_micro_batch_of_other_schedules_adds_as_much(schedule: str, text: Path) -> None:
    asked = settings(text, "strategy=pipeline", f"strategy.schedule={schedule}", "global_batch=12",
                     "strategy.accumulate_grad_batches=12", "model.depth=4")  # fmt: skip
    fewer, _ = _fewer_micro_batches(asked)
    few = fewer.plan.accumulate_grad_batches
    for rank in (0, 1):
        one, two, all_ = (_view(simulate(each, 256, rank)) for each in (fewer, _with(asked, few + 2), asked))
        found = _between(one, two, (12 - few) / 2)
        largest = [max(sum(parts.values()) for parts in view.peaks.values()) for view in (found, all_)]
        assert largest[0] == largest[1]
        assert found.heap == all_.heap


def test_fsdp_holds_shards_alone_between_steps_and_while_it_is_built(text: Path) -> None:
    """FSDP2 empties storages past the dispatcher, and the model is first made without storage: neither may be missed."""
    asked = settings(text, "strategy=fsdp", "optim=adamw")
    found = peaks(simulate(asked, 256).trace)
    weights = found["step 1, optimizer"]["weights"]
    assert found["step 1, optimizer"]["activations"] == 0
    assert sum(found["build"].values()) < 1.5 * weights  # the shards, and one block on its way
    gathered = peaks(simulate(asked, 256, device=HERE).trace)
    assert max(parts["buffers"] for parts in gathered.values()) > max(parts["buffers"] for parts in found.values())


def test_gradients_that_are_gone_once_they_are_there(text: Path) -> None:
    """A plan that takes its steps within the backward pass could not be planned for: its gradients were looked for later."""
    asked = settings(text, "optim=adamw", "clip=0", "strategy.step_in_backward=true")
    found = peaks(simulate(asked, 256).trace)
    assert max(parts["gradients"] for parts in found.values()) < 2 * stages(asked.config, Plan(), 256).parameters


@pytest.mark.parametrize(("micros", "copies"), [(1, 0), (2, 2)])
def test_ddp_makes_its_buckets_anew_beside_gradients_that_stay(text: Path, micros: int, copies: int) -> None:
    """torch orders its buckets as gradients came, after the first backward that sums them (Reducer::rebuild_buckets). Gradients
    that are gone by then leave no old ones (measured: 884 and 1,028 MiB predicted, 883 and 1,026 used)."""
    asked = settings(text, "strategy=ddp", "optim=adafactor", f"strategy.accumulate_grad_batches={micros}")
    found = peaks(simulate(asked, 256).trace)
    gradients = 4 * stages(asked.config, Plan(), 256).parameters
    assert found.get("buckets", {}).get("gradients", 0) == copies * gradients
    assert found["step 1, optimizer"]["gradients"] == gradients


def test_two_micro_batches_say_what_eight_need(text: Path) -> None:
    asked = settings(text, "strategy.accumulate_grad_batches=8", "model.depth=2")
    fewer, micros = _fewer_micro_batches(asked)
    assert micros == 8
    few, all_ = (peaks(simulate(one, 256).trace) for one in (fewer, asked))
    largest = [max(sum(parts.values()) for parts in found.values()) for found in (few, all_)]
    assert largest[0] == pytest.approx(largest[1], rel=1e-3)  # each micro-batch has a loss of a few bytes


@pytest.mark.parametrize(
    "plan",
    [
        "optim=adamw",
        "optim.state=int8 optim=adamw strategy.offload=optimizer",
        slow("precision=bf16-mixed"),
        slow("strategy=tensor model.tied=false"),
    ],
)
def test_three_pieces_of_head_and_state_say_what_all_need(plan: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 1 << 14)
    monkeypatch.setattr(low_bit, "PIECE", 1 << 12)
    asked = settings(text, *plan.split(), "sequence=160")
    few = simulate(asked, 256)
    monkeypatch.setattr(repetitions, "few_pieces", lambda trace: [])
    every = simulate(asked, 256)
    assert len(few.trace.events) < len(every.trace.events)
    assert in_step(peaks(few.trace)) == in_step(peaks(every.trace))
    for phase in in_step(every.trace.work):
        (flops, moved), (few_flops, few_moved) = (
            [sum(getattr(kind, what) * n for kind, n in one.trace.work[phase].items()) for what in ("flops", "moved")]
            for one in (every, few)
        )
        assert few_flops == flops
        assert few_moved == pytest.approx(moved, rel=1e-3)  # a last piece may be shorter


@pytest.mark.parametrize(
    "plan",
    [
        "optim=muon",
        "strategy=ddp devices=2 strategy.zero1=true optim=muon",
        "strategy=fsdp devices=2 strategy.offload=optimizer optim.state=bf16 optim=adamw",
    ],
)
def test_one_tensor_of_a_shape_says_what_an_optimizer_does_to_each(
    plan: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "SMALLEST", 64)
    asked = settings(text, *plan.split(), "model.width=64", "model.depth=2")
    once = simulate(asked, 64).trace  # as many token types as rows of a matrix, which is then of the logits
    monkeypatch.setattr(repetitions, "alike_tensors", lambda trace: [])
    each = simulate(asked, 64).trace
    events = [
        [(trace.parts.get(number), size) for number, size in trace.events[start:]]
        for trace in (once, each)
        for start in [next(first for first, name in trace.phases if name.startswith("step"))]
    ]
    assert events[0] == events[1]
    assert in_step(peaks(once)) == in_step(peaks(each))
    works, views = [in_step(trace.work) for trace in (once, each)], Work()
    counts = [sum(work.pop(views, 0) for work in its.values()) for its in works]
    assert counts[0] == pytest.approx(counts[1], rel=0.1)  # of the first spread tensor of a shape torch looks at more
    assert works[0] == works[1]


def in_step(phases: dict[str, Any]) -> dict[str, Any]:
    """Without what comes before a step, of which no more is simulated than it takes to have an optimizer's state."""
    return {name: found for name, found in phases.items() if name.startswith("step")}


def test_what_is_offloaded_takes_memory_while_it_is_used(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are real pages in a run; a simulation has neither."""
    monkeypatch.setattr(offload, "SMALLEST", 1 << 16)
    traces = [simulate(settings(text, *rest), 256).trace for rest in (
        ["model.width=128", "sequence=64", "optim=adamw", f"strategy.offload={kind}"] for kind in ("none", "all"))]  # fmt: skip
    here, away = map(peaks, traces)
    weights = here["step 1, optimizer"]["weights"]
    small = 16 * 2 * 2 * 1024 * 7  # bytes of biases and gains, which stay
    assert here["step 1, micro-batch 0, forward head"]["state"] == pytest.approx(2 * weights, rel=1e-3)
    assert away["step 1, micro-batch 0, forward head"]["state"] < small
    kept = here["step 1, micro-batch 0, backward -1"]["activations"]
    assert away["step 1, micro-batch 0, backward -1"]["activations"] < 0.05 * kept
    paged, before = (
        sum((kind.fresh + kind.small) * n for counts in one.work.values() for kind, n in counts.items()) for one in traces[::-1]
    )
    assert paged - before > kept  # each activation comes and goes, which takes time
    largest = 2 * 4 * 128 * 4 * 128  # bytes of both averages of an MLP's matrix
    assert away["step 1, optimizer"]["state"] <= small + 3 * largest


@pytest.mark.parametrize("model", ["small", slow("lstm")])
def test_evaluation_takes_as_many_rows_as_its_budget_has_room_for(model: str, text: Path) -> None:
    def within(rows: int, memory: int) -> Settings:
        base = ["data=text", f"data.path={text}", "data.tokenizer=byte", f"model={model}", "sequence=64"]
        return check(composed(*base, f"global_batch={rows}", f"device.memory={memory}"))

    plan, here = within(8, 1 << 30).plan, of_config({"accelerator": "cpu"})
    needs = {
        rows: reading._total(reading._evaluation(within(rows, 1 << 30), 256, here), Choice(**plan.asdict()), here)
        for rows in (1, 4, 8, 16)
    }
    logits = 64 * 256 * 4  # bytes of a row's
    assert all(needs[more] - needs[less] > (more - less) * logits for less, more in ((1, 4), (4, 8), (8, 16)))
    assert reading.rows_that_fit(within(8, needs[8]), 256).config.global_batch == 8
    assert reading.rows_that_fit(within(8, needs[8] - 1), 256).config.global_batch == 4
    with pytest.raises(UserError, match="with one row needs"):
        reading.rows_that_fit(within(8, needs[1] - 1), 256)


@pytest.mark.parametrize("size", [["model.width=512", "model.depth=5"], ["model.width=512", "model.depth=2"]])
def test_small_tensors_share_the_heap_in_the_simulation_as_in_training(text: Path, size: list[str]) -> None:
    """Of 5 blocks of 3 million weights and of 2, of which a simulation builds fewer."""
    wanted = settings(text, *size)
    with mock.patch.object(malloc, "return_freed_memory") as asked:
        build.parallel_model(wanted.config, wanted.plan, 256)
    assert (
        simulate(wanted, 256, blocks=1).trace.own == asked.call_args.args[0] == (512 if "model.depth=5" in size else 2048) << 10
    )


def test_generation_that_does_not_fit_is_refused(text: Path) -> None:
    config = settings(text, "model.width=64", "sequence=512").config
    weights = 4 * stages(config, Plan(), 256).parameters
    cache = 7 * 2 * 512 * 64 * 4  # keys and values of 512 tokens in 7 blocks
    base = of_config({"accelerator": "cpu"}).process[0]
    for memory, fits in ((base + ONE_PROCESS + 2 * (weights + 2 * cache), True), (base + ONE_PROCESS + weights, False)):
        config.device = {"accelerator": "cpu", "memory": memory}
        with nullcontext() if fits else pytest.raises(UserError, match="generate needs"):
            reading.check_generation(config, Plan(), 256, 400, 200)


def test_a_model_the_planner_has_not_seen(text: Path) -> None:
    """Data-dependent shapes, recurrence, offload, bands of rare types: nothing here has a formula of its own."""
    for overrides in (
        ["model=lstm", "model.width=64", "model.cutoffs=[100]", "strategy.offload=all"],
        ["model=gru", "model.width=64", "strategy.recompute_window=4", "optim.state=int8"],
        ["model=llama", "model.width=64", "model.depth=2", "model.mlp_width=128", "precision=bf16-mixed"],
        ["model=llama", "model.width=64", "model.depth=2", "model.mlp_width=128", "strategy=tensor", "optim=sgd"],
    ):
        base = ["data=text", f"data.path={text}", "global_batch=8", "sequence=16", "data.tokenizer=byte"]
        found = predict(check(composed(*base, *overrides)), 256, HERE)
        assert found.fullest.parts["weights"] > 0
        assert found.seconds > 0


def _holds_what_it_sent() -> bool:
    """Whether gloo's handle of a send keeps the tensor, after it has arrived."""
    with process_group("cpu"):
        tensor = torch.ones(4)
        if dist.get_rank():
            dist.recv(tensor, 0)
            return False
        work = dist.isend(tensor, 1)
        seen = weakref.ref(tensor)
        del tensor
        work.wait()
        held = seen() is not None
        del work
        return held and seen() is None


def test_what_a_pipeline_has_sent_stays_as_with_gloo(text: Path) -> None:
    """Of several stages a device, torch keeps all handles until the step ends."""
    assert launch(_holds_what_it_sent, (), 2, isolate=True)
    asked = settings(text, "strategy=interleaved", "devices=2", "strategy.accumulate_grad_batches=4", "model.depth=4",
                     "optim=adamw")  # fmt: skip
    rows, hidden = 2, 16 * 32 * 4
    most = max(sum(parts.values()) for parts in peaks(simulate(asked, 256, 1).trace).values())
    with mock.patch.object(patches, "Sent", lambda wait, tensors: SimpleNamespace(wait=wait)):
        less = max(sum(parts.values()) for parts in peaks(simulate(asked, 256, 1).trace).values())
    assert most - less >= 2 * rows * hidden


@pytest.mark.parametrize("plan", ["strategy=single", *map(slow, ("strategy=fsdp devices=2", "strategy=zero_bubble devices=2"))])
def test_an_average_of_the_weights_counts_as_state(plan: str, text: Path) -> None:
    """As many bytes as the weights that the rank holds, from the begin of training on."""
    without, with_average = (
        peaks(simulate(settings(text, "model.depth=4", *plan.split(), *more), 256, device=HERE).trace)["step 1, optimizer"]
        for more in ([], ["callbacks=ema"])
    )
    assert with_average["state"] - without["state"] == without["weights"]
