"""Which blocks go to which stage of a pipeline, and how much of the time its devices will wait."""

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from leanlm.models.contract import Model
from leanlm.strategies.plan import Plan
from leanlm.strategies.schedules import SCHEDULES, stages_of


@torch.no_grad()
def costs(net: Model) -> dict[str, float]:
    """Floating-point operations for one row in `embed`, each block and `head`, counted on a model without storage.

    Matrix products, convolutions and attention are counted, as torch's counter does.
    """
    found, mode = {}, net.training
    known: dict[str, float] = {}  # of blocks that are alike
    net.eval()

    def count(part: torch.nn.Module, *inputs: torch.Tensor | None) -> tuple[float, torch.Tensor]:
        with FlopCounterMode(display=False) as counter:
            out = part(*inputs)
        return float(counter.get_total_flops()), out[0] if isinstance(out, tuple) else out

    found["embed"], hidden = count(net.embed, torch.empty(1, net.sequence, dtype=torch.long, device="meta"))
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
    stage is made as cheap as can be (dynamic programming over prefixes); then, where devices have several stages, blocks move
    over one boundary at a time as long as the costliest device gets cheaper.
    """
    names = [name for name in cost if name not in ("embed", "head")]
    stages = plan.stages if plan.pipeline > 1 else 1
    if plan.stage_blocks is not None and stages > 1:
        ends = [0, *accumulate(plan.stage_blocks)]
    else:
        ends = _costliest_stage_least(cost, names, stages)
    if plan.stage_blocks is None and stages > plan.pipeline:
        v_shape = SCHEDULES[plan.schedule].v_shape
        held = [stages_of(rank, plan.pipeline, stages, v_shape) for rank in range(plan.pipeline)]

        def worst(ends: list[int]) -> tuple[float, float]:
            each = stage_costs(cost, [names[begin:end] for begin, end in pairwise(ends)])
            return max(sum(each[number] for number in numbers) for numbers in held), max(each)

        while True:
            moves = [
                [*ends[:i], ends[i] + by, *ends[i + 1 :]]
                for i in range(1, stages)
                for by in (-1, 1)
                if ends[i - 1] < ends[i] + by < ends[i + 1]
            ]
            better = min(moves, key=worst, default=ends)
            if worst(better) >= worst(ends):
                break
            ends = better
    return [names[begin:end] for begin, end in pairwise(ends)]


def stage_costs(cost: dict[str, float], blocks: list[list[str]]) -> list[float]:
    """Of each stage, with embedding and head."""
    each = [sum(cost[name] for name in names) for names in blocks]
    each[0] += cost["embed"]
    each[-1] += cost["head"]
    return each


def by_weight(cost: dict[str, float], weights: list[float]) -> list[int]:
    """Blocks of each stage so that the largest cost of a stage over its weight, such as its device's speed, is least."""
    names = [name for name in cost if name not in ("embed", "head")]
    return [end - begin for begin, end in pairwise(_costliest_stage_least(cost, names, len(weights), weights))]


def _costliest_stage_least(
    cost: dict[str, float], names: list[str], stages: int, weights: list[float] | None = None
) -> list[int]:
    """Where stages begin and end, as counts of blocks."""
    sums = [0.0, *accumulate(cost[name] for name in names)]
    # best[n]: lowest cost of the costliest stage when the stages so far hold n blocks, and where they end
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    for stage in range(stages):
        extra = cost["embed"] * (stage == 0) + cost["head"] * (stage == stages - 1)
        weight = weights[stage] if weights else 1.0
        best = {
            end: min(
                (max(most, (sums[end] - sums[begin] + extra) / weight), [*ends, end])
                for begin, (most, ends) in best.items()
                if begin < end
            )
            for end in range(stage + 1, len(names) - (stages - stage - 1) + 1)
        }
    return best[len(names)][1]


def bubble(order: dict[int, list[tuple[str, int, int]]], cost: list[float]) -> float:
    """Share of the time that the devices of a pipeline wait, by playing a schedule with the given costs.

    A full backward costs twice a forward, its halves (inputs, weights) as much as a forward each; communication is free.

    Args:
        order: device -> its work in order: (F, B, I for inputs or W for weights; stage; micro-batch).
        cost: of each stage's forward pass of a micro-batch, in any unit.
    """
    queues = {device: list(work) for device, work in order.items()}
    last, clock = len(cost) - 1, dict.fromkeys(queues, 0.0)
    done: dict[tuple[str, int, int], float] = {}
    while any(queues.values()):
        ready = False
        for device, queue in queues.items():
            while queue:
                kind, stage, micro = queue[0]
                needs = {
                    "F": [("F", stage - 1, micro)] if stage else [],
                    "I": [("I", stage + 1, micro) if stage < last else ("F", stage, micro)],
                    "W": [("I", stage, micro)],
                }["I" if kind == "B" else kind]
                if not all(need in done for need in needs):
                    break
                begin = max([clock[device], *(done[need] for need in needs)])
                clock[device] = begin + cost[stage] * (2 if kind == "B" else 1)
                done["I" if kind == "B" else kind, stage, micro] = clock[device]
                queue.pop(0)
                ready = True
        if not ready:
            raise ValueError("the schedule waits for itself")
    work = sum(3 * cost[stage] for kind, stage, _ in done if kind == "F")
    return 1 - work / (max(clock.values()) * len(queues))


def order_of(schedule: Any, micro_batches: int) -> dict[int, list[tuple[str, int, int]]]:
    """The order of work of one of torch's schedules, for `bubble`."""
    if type(schedule).__name__ == "Schedule1F1B":  # torch's own listing numbers the last device's micro-batches wrongly
        devices, micros = schedule._num_stages, range(micro_batches)
        found: dict[int, list[tuple[str, int, int]]] = {}
        for device in range(devices):
            ahead = min(devices - 1 - device, micro_batches)
            backward = [("B", device, micro) for micro in micros]
            forward = [("F", device, micro) for micro in micros]
            steady = [part for pair in zip(forward[ahead:], backward, strict=False) for part in pair]
            found[device] = forward[:ahead] + steady + backward[micro_batches - ahead :]
        return found
    return {
        device: [part for action in actions if action for part in _parts(action)]
        for device, actions in schedule.pipeline_order.items()
    }


def _parts(action: Any) -> list[tuple[str, int, int]]:
    """The computations in one action of a schedule."""
    if action.sub_actions:
        return [part for each in action.sub_actions for part in _parts(each)]
    kind = action.computation_type.value
    return [(kind, action.stage_index, action.microbatch_index)] if kind in ("F", "B", "I", "W") else []
