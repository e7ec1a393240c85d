"""Which blocks go to which stage of a pipeline, and how much of the time its devices will wait."""

from collections import deque
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from leanlm.models.contract import Model
from leanlm.strategies.plan import Plan

Work = tuple[str, int, int]  # F, B, I (backward of inputs) or W (of weights); stage; micro-batch


@torch.no_grad()
def costs(net: Model) -> dict[str, float]:
    """Floating-point operations for one row in `embed`, each block and `head`, counted on a model without storage.

    Matrix products, convolutions and attention are counted, as torch's counter does.
    """
    mode = net.training
    known: dict[str, float] = {}  # of blocks that are alike
    net.eval()

    def count(part: torch.nn.Module, *inputs: torch.Tensor | None) -> tuple[float, torch.Tensor]:
        with FlopCounterMode(display=False) as counter:
            out = part(*inputs)
        return float(counter.get_total_flops()), out[0] if isinstance(out, tuple) else out

    embed, hidden = count(net.embed, torch.empty(1, net.sequence, dtype=torch.long, device="meta"))
    found = {"embed": embed}
    for name, block in net.blocks.items():
        settings = {key: value for key, value in vars(block).items() if not key.startswith("_")}
        kind = repr((block, settings, [(part, p.shape) for part, p in block.named_parameters()]))
        if kind not in known:
            known[kind], hidden = count(block, hidden, None)
        found[name] = known[kind]
    found["head"], _ = count(net.head, hidden)
    net.train(mode)
    return found


def split(cost: dict[str, float], plan: Plan) -> list[list[str]]:
    """Blocks of each stage: as `plan.stage_blocks` says, else balanced by cost.

    The embedding counts to the first stage and the head to the last; each stage has a block at least. First the costliest
    stage is made as cheap as can be; then, where devices have several stages, the costliest device.
    """
    if plan.pipeline > 1 and plan.stage_blocks is not None:
        return _cut(cost, [0, *accumulate(plan.stage_blocks)])
    ends = _least_by_stage(cost, [1.0] * plan.stages)
    return _cut(cost, _less_by_device(cost, ends, plan) if plan.stages > plan.pipeline else ends)


def stage_costs(cost: dict[str, float], blocks: list[list[str]]) -> list[float]:
    """Of each stage, with embedding and head."""
    each = [sum(cost[name] for name in names) for names in blocks]
    each[0] += cost["embed"]
    each[-1] += cost["head"]
    return each


def by_weight(cost: dict[str, float], weights: list[float]) -> list[int]:
    """Blocks of each stage so that the largest cost of a stage over its weight, such as its device's speed, is least."""
    return [end - begin for begin, end in pairwise(_least_by_stage(cost, weights))]


def _blocks(cost: dict[str, float]) -> list[str]:
    return [name for name in cost if name not in ("embed", "head")]


def _cut(cost: dict[str, float], ends: list[int]) -> list[list[str]]:
    return [_blocks(cost)[begin:end] for begin, end in pairwise(ends)]


def _least_by_stage(cost: dict[str, float], weights: list[float]) -> list[int]:
    """Where stages begin and end, as counts of blocks, by dynamic programming over prefixes."""
    sums = [0.0, *accumulate(cost[name] for name in _blocks(cost))]
    blocks, stages = len(sums) - 1, len(weights)
    # best[n]: lowest cost of the costliest stage when the stages so far hold n blocks, and where they end
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    for stage, weight in enumerate(weights):
        extra = cost["embed"] * (stage == 0) + cost["head"] * (stage == stages - 1)
        best = {
            end: min(
                (max(most, (sums[end] - sums[begin] + extra) / weight), [*ends, end])
                for begin, (most, ends) in best.items()
                if begin < end
            )
            for end in range(stage + 1, blocks - (stages - stage - 1) + 1)
        }
    return best[blocks][1]


def _less_by_device(cost: dict[str, float], ends: list[int], plan: Plan) -> list[int]:
    """Blocks move over one boundary at a time as long as the costliest device gets cheaper."""

    def worst(ends: list[int]) -> tuple[float, float]:
        each = stage_costs(cost, _cut(cost, ends))
        return max(sum(each[stage] for stage in plan.stages_on(device)) for device in range(plan.pipeline)), max(each)

    while True:
        moves = [
            [*ends[:i], ends[i] + by, *ends[i + 1 :]]
            for i in range(1, plan.stages)
            for by in (-1, 1)
            if ends[i - 1] < ends[i] + by < ends[i + 1]
        ]
        better = min(moves, key=worst, default=ends)
        if worst(better) >= worst(ends):
            return ends
        ends = better


def bubble(order: dict[int, list[Work]], cost: list[float]) -> float:
    """Share of the time that the devices of a pipeline wait, by playing a schedule with the given costs.

    A full backward costs twice a forward, its halves (inputs, weights) as much as a forward each; communication is free.
    `order`: device -> its work in order. `cost`: of each stage's forward pass of a micro-batch, in any unit.

    Raises:
        ValueError: the devices wait for each other.
    """
    queues = {device: deque(work) for device, work in order.items()}
    clock = dict.fromkeys(queues, 0.0)
    done: dict[Work, float] = {}  # when; a full backward counts as that of inputs
    while any(queues.values()):
        ready = [device for device, queue in queues.items() if queue and _needs(queue[0], len(cost) - 1) <= done.keys()]
        if not ready:
            raise ValueError("the schedule waits for itself")
        for device in ready:
            kind, stage, micro = work = queues[device].popleft()
            begin = max([clock[device], *(done[need] for need in _needs(work, len(cost) - 1))])
            clock[device] = begin + cost[stage] * (2 if kind == "B" else 1)
            done["I" if kind == "B" else kind, stage, micro] = clock[device]
    total = sum(3 * cost[stage] for kind, stage, _ in done if kind == "F")
    return 1 - total / (max(clock.values()) * len(queues))


def _needs(work: Work, last: int) -> set[Work]:
    """What must be done before; `last` is the last stage."""
    kind, stage, micro = work
    if kind == "F":
        return {("F", stage - 1, micro)} if stage else set()
    if kind == "W":
        return {("I", stage, micro)}
    return {("I", stage + 1, micro) if stage < last else ("F", stage, micro)}


def order_of(schedule: Any) -> dict[int, list[Work]]:
    """The order of work of one of torch's schedules, for `bubble`."""
    order = {
        device: [
            (each.computation_type.value, each.stage_index, each.microbatch_index)
            for action in filter(None, actions)
            for each in action.sub_actions or [action]
            if each.computation_type.value in ("F", "B", "I", "W")
        ]
        for device, actions in schedule.pipeline_order.items()
    }
    if type(schedule).__name__ == "Schedule1F1B":  # torch 2.11 and 2.13 count the last device's forward passes from 1 on
        last = max(order)
        order[last] = [(kind, stage, micro - (kind == "F")) for kind, stage, micro in order[last]]
    return order
