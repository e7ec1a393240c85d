"""What one plan needs: bytes on each rank by part, and seconds of a step."""

from collections import Counter
from dataclasses import dataclass, replace

import torch

from leanlm.common.precision import PRECISIONS
from leanlm.config.schema import Settings
from leanlm.planning.choice import Choice
from leanlm.planning.hardware import roofline
from leanlm.planning.hardware.devices import MARGIN, Device
from leanlm.planning.parts import heap_of, peaks, with_overhead
from leanlm.planning.simulation import allocator
from leanlm.planning.simulation.step import Order, Stages, Step, ends, simulate, stages
from leanlm.planning.simulation.trace import BEFORE, Work
from leanlm.strategies import balance
from leanlm.strategies.plan import Plan
from leanlm.strategies.schedules import SCHEDULES

MICROS = 2  # micro-batches that are simulated; the others are as the last of these (a pipeline's: see _fewer_micro_batches)
BUFFERS_ALONE = ("1f1b", "interleaved")  # schedules under which a micro-batch more takes its buffers; others keep more of each


@dataclass
class Need:
    """What a plan needs on one rank.

    `parts` are bytes at its largest moment: those of PARTS; on a CPU `overhead` (allocator, pages of libraries that a step
    touches) and `process` (Python and what it has imported); on a GPU `workspaces` (cuBLAS), `allocator` (what the caching
    allocator holds beyond tensors) and `context` (driver, kernels, NCCL).
    """

    rank: int
    parts: dict[str, int]
    seconds: float  # of one optimizer step as far as it was simulated, if no rank waits for another
    optimizer: float  # of these, the update of the weights
    memory: int  # bytes that its device has
    droppable: int = 0  # bytes beyond these that a system short of memory can have, by dropping pages of libraries

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.parts.values())

    @property
    def over(self) -> int:
        """Bytes beyond what a plan may take of the device; negative if it fits."""
        return self.peak - round((1 - MARGIN) * self.memory)


@dataclass
class Prediction:
    """What a plan needs."""

    plan: Choice
    needs: list[Need]  # of one rank of each kind; along a pipeline they differ
    seconds: float  # of one optimizer step

    @property
    def fullest(self) -> Need:
        """The rank with the largest peak; of unequal devices, the one that exceeds its own the most."""
        return max(self.needs, key=lambda need: need.over)

    @property
    def fits(self) -> bool:
        """Whether every rank's peak leaves the margin of its device's memory free."""
        return self.fullest.over <= 0

    @property
    def tight(self) -> bool:
        """Whether it may fit though some rank has less than the margin left, or none."""
        return not self.fits and all(need.peak <= need.memory + need.droppable for need in self.needs)

    def of_rank(self, rank: int) -> Need:
        """Of a rank like it, or of one that has more."""
        return next(need for need in reversed(self.needs) if need.rank <= rank)


def predict(settings: Settings, vocabulary: int, device: Device) -> Prediction:
    """Simulate every kind of rank of a plan, with few blocks and micro-batches where more only repeat them."""
    plan = Choice.of(settings)
    settings = plan.settings(settings)
    small, micros = _fewer_micro_batches(settings)
    few = small.plan.accumulate_grad_batches
    whole = stages(settings.config, plan, vocabulary)
    share, in_a_row = device.share(plan.world), plan.world // plan.pipeline  # ranks in a row hold the same blocks
    needs, order = [], Order()
    for rank in kinds_of_ranks(plan, whole, device.alike):
        view, order = _view_of(small, vocabulary, rank, whole, device)
        if micros > few and plan.pipeline > 1 and plan.schedule not in BUFFERS_ALONE:
            more, _ = _view_of(_with(settings, few + plan.pipeline), vocabulary, rank, whole, device)
            view = replace(_between(view, more, (micros - few) / plan.pipeline), work=view.work)
        need = _need(rank, view, micros, plan, share.least(range(rank, rank + in_a_row)), whole.recurrent)
        if plan.schedule in BUFFERS_ALONE:
            need.parts["buffers"] += (micros - few) * received(settings, rank, whole)
        needs.append(need)
    if plan.pipeline == 1:
        return Prediction(plan, needs, needs[0].seconds)
    speeds = [share.least(range(first, first + in_a_row)).bandwidth for first in range(0, plan.world, in_a_row)]
    waits = _waits(plan, whole, order, speeds)
    # The pipeline fills and empties once; every micro-batch more takes as long as the slowest rank.
    flowing = [need.seconds - need.optimizer for need in needs]
    # A rank that waits leaves its core to others, if they share it.
    seconds = sum(flowing) / len(flowing) * max(1.0, 1 / device.crowd(plan.world) / (1 - waits))
    seconds += (micros / few - 1) * max(flowing)
    return Prediction(plan, needs, seconds + max(need.optimizer for need in needs))


def kinds_of_ranks(plan: Plan, whole: Stages, alike: bool = True) -> list[int]:
    """The ranks that can be the fullest, on devices that are all alike or not.

    Along axes that are not a pipeline the first rank holds the most. Of a pipeline, the later a rank in the middle the fewer
    micro-batches it holds, unless the schedule splits backward: only one with more blocks than those before it counts.
    """
    places = list(range(0, plan.world, plan.world // plan.pipeline))
    if plan.pipeline == 1 or SCHEDULES[plan.schedule].splits_backward or not alike:
        return places
    held = {rank: blocks_held(plan, rank, whole) for rank in places[1:-1]}
    fuller = [rank for rank in held if held[rank] > max((held[other] for other in held if other < rank), default=0)]
    return [places[0], *fuller, places[-1]]


def _waits(plan: Plan, whole: Stages, order: Order, speeds: list[float]) -> float:
    """Share of the time that the devices of a pipeline wait, given the speed of each."""
    cost = balance.stage_costs(whole.cost, whole.split)
    for place, speed in enumerate(speeds):
        for stage in plan.stages_on(place):
            cost[stage] /= speed
    return balance.bubble(order, cost)


def _fewer_micro_batches(settings: Settings) -> tuple[Settings, int]:
    """Settings with few micro-batches of the same rows, and how many there are."""
    plan, micros, few = settings.plan, settings.plan.accumulate_grad_batches, MICROS
    if plan.pipeline > 1:
        few = {"1f1b": plan.pipeline + 1, "gpipe": plan.stages, "LoopedBFS": plan.stages}.get(plan.schedule, 2 * plan.stages)
    return (settings if micros <= few else _with(settings, few)), micros


def _with(settings: Settings, micros: int) -> Settings:
    """Settings with another count of micro-batches of the same rows."""
    rows = settings.plan.micro_batch(settings.config.global_batch)
    config = replace(settings.config, global_batch=rows * settings.plan.data_parallel_size * micros)
    return replace(settings, config=config, plan=replace(settings.plan, accumulate_grad_batches=micros))


def received(settings: Settings, rank: int, whole: Stages) -> int:
    """Bytes that a rank of a pipeline holds for each micro-batch of a step: its tokens and targets, and for each stage what it
    receives from the stage before and from the one after (torch has a buffer for every micro-batch of each). Where a device has
    several stages, torch keeps what they send to the same two until the step ends."""
    config, plan = settings.config, settings.plan
    if plan.pipeline == 1:
        return 0
    numbers, last = stages_held(plan, rank), len(whole.split) - 1
    hidden = whole.width * PRECISIONS[config.precision][0].itemsize * sum((n > 0) + (n < last) for n in numbers)
    hidden *= 2 if plan.stages > plan.pipeline else 1
    return plan.micro_batch(config.global_batch) * config.sequence * (2 * torch.long.itemsize + hidden)


def blocks_held(plan: Plan, rank: int, whole: Stages) -> int:
    """How many blocks a rank has."""
    return sum(len(whole.split[number]) for number in stages_held(plan, rank))


def stages_held(plan: Plan, rank: int) -> list[int]:
    """Numbers of the stages on a rank."""
    return plan.stages_on(rank * plan.pipeline // plan.world)


@dataclass
class _View:
    """A simulated rank as numbers that grow evenly with its blocks and micro-batches; `reserved` is a GPU's allocator's."""

    peaks: dict[str, dict[str, int]]
    heap: int
    reserved: int
    work: dict[str, Counter[Work]]


def _view_of(settings: Settings, vocabulary: int, rank: int, whole: Stages, device: Device) -> tuple[_View, Order]:
    """A rank with all its blocks, and the order of a pipeline's work."""
    plan = settings.plan
    even = whole.alike and plan.recompute in ("none", "blocks", "operators")
    few = 2 * ends(plan)  # so many blocks of a stage are simulated, and one more: what the others add is the difference
    # Holes of a GPU's allocator do not grow evenly; of a compiled stage, to trace all blocks takes longest.
    whole_run = device.card is not None and plan.world == 1 and not plan.compiled
    if not even or whole_run or max(map(len, whole.split)) <= few + 1:
        step = simulate(settings, vocabulary, rank, device=device)
        return _view(step), step.order
    less, more = (simulate(settings, vocabulary, rank, blocks, device) for blocks in (few, few + 1))
    if less.blocks == more.blocks:  # this rank's stages are shorter than others'
        return _view(more), more.order
    times = (blocks_held(plan, rank, whole) - less.blocks) / (more.blocks - less.blocks)
    return _between(_view(less), _view(more), times), more.order


def _view(step: Step) -> _View:
    found = peaks(step.trace)
    found.pop(BEFORE, None)
    reserved = allocator.reserved(allocator.of_a_run(step.trace)) if step.trace.card is not None else 0
    return _View(found, heap_of(step.trace), reserved, dict(step.trace.work))


def _between(few: _View, more: _View, times: float) -> _View:
    """The view of a rank with more blocks or micro-batches: `few` and so many times what `more` has beyond it."""

    def line(low: int, high: int) -> int:
        return round(low + times * (high - low))

    found = {
        phase: {part: line(size, more.peaks[phase][part]) for part, size in parts.items()}
        for phase, parts in few.peaks.items()
        if phase in more.peaks
    }
    work: dict[str, Counter[Work]] = {}
    for phase in few.work.keys() | more.work.keys():
        low, high = few.work.get(phase, Counter()), more.work.get(phase, Counter())
        work[phase] = Counter({kind: line(low[kind], high[kind]) for kind in low.keys() | high.keys()})
    sizes = [max(sum(parts.values()) for parts in its.values()) for its in (more.peaks, found)]
    reserved = round(more.reserved * sizes[1] / sizes[0])  # holes do not grow evenly
    return _View(found, line(few.heap, more.heap), reserved, work)


def _need(rank: int, view: _View, micros: int, plan: Choice, device: Device, recurrent: bool) -> Need:
    largest = max(view.peaks.values(), key=lambda its: sum(its.values()))
    parts = with_overhead(largest, view.heap, plan, device, recurrent, view.reserved)
    step = {phase: counter for phase, counter in view.work.items() if phase.startswith("step 1")}
    update = {phase: step.pop(phase) for phase in list(step) if phase.endswith("optimizer")}
    again = max(1, micros - 1) if plan.pipeline == 1 else 1
    optimizer = roofline.seconds(update, 1, plan, device)
    seconds = roofline.seconds(step, again, plan, device) + optimizer
    return Need(rank, parts, seconds, optimizer, device.memory, device.common // plan.world)
