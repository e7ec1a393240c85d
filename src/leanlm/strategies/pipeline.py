"""A pipeline over the stages of a model, with torch's own schedules (torch.distributed.pipelining)."""

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from leanlm.data.batches import Batch
from leanlm.strategies.balance import bubble, order_of
from leanlm.strategies.parallel_model import ParallelModel
from leanlm.strategies.patches import without_warm_up
from leanlm.strategies.schedules import SCHEDULES


class Pipeline:
    """Runs whole training steps of this group's `rows`, of `sequence` tokens each, through the stages of all ranks."""

    def __init__(self, parallel: ParallelModel, rows: int, sequence: int) -> None:
        self.parallel, self.scale = parallel, 1.0
        micro_batches = parallel.plan.accumulate_grad_batches
        kind = get_schedule_class(SCHEDULES[parallel.plan.schedule].torch)
        stages = self._stages(rows // micro_batches, sequence)
        self.schedule = kind(
            stages if issubclass(kind, PipelineScheduleMulti) else stages[0],
            micro_batches,
            loss_fn=lambda nats, _: nats * self.scale,
            scale_grads=False,  # the loss is already divided by the tokens of the global batch
        )

    def _stages(self, rows: int, sequence: int) -> list[PipelineStage]:
        """This rank's, with static shapes: torch would else run them once more to find them, and advance carried state."""
        parallel, dtype = self.parallel, self.parallel.dtype
        tokens = torch.empty(rows, sequence, dtype=torch.long, device="meta")
        hidden = torch.empty(rows, sequence, parallel.width, dtype=dtype, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=torch.promote_types(dtype, torch.float32), device="meta", requires_grad=True)
        group, made = parallel.group("pipeline"), []
        for number, stage in parallel.stages.items():
            into, out = hidden if number else tokens, loss if number == parallel.last else hidden
            made.append(PipelineStage(stage, number, parallel.last + 1, parallel.device, into, out, group=group))
        return [without_warm_up(stage) for stage in made]

    def describe(self) -> str:
        """The stages, their share of the work, and the share of the time that devices will wait."""
        cost, total, lines = self.parallel.costs, sum(self.parallel.costs), []
        for number, blocks in enumerate(self.parallel.split):
            parts = [f"blocks {blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"]
            parts = ["embed"] * (number == 0) + parts + ["head"] * (number == self.parallel.last)
            device = self.parallel.owner(number)
            lines.append(f"stage {number} on device {device}: {' + '.join(parts)} ({cost[number] / total:.0%})")
        waits = bubble(order_of(self.schedule), cost)
        return "; ".join(lines) + f". Devices wait {waits:.0%} of the time (bubble and imbalance, communication not counted)"

    def step(self, batch: Batch, scale: float) -> Tensor:
        """Forward and backward of all micro-batches of a step. Returns the summed loss in nats of these rows, times `scale`, on
        the rank of the last stage; 0 on the others."""
        self.scale = scale
        losses: list[Tensor] = []
        last = self.parallel.last in self.parallel.stages
        self.schedule.step(
            *([batch.input] if 0 in self.parallel.stages else []),
            target=batch.rows if last else None,  # the last stage has its targets as an argument, and makes the loss
            losses=losses if last else None,
            return_outputs=False,
            rows=batch.rows,
            targets=batch.target,
            **({} if batch.positions is None else {"positions": batch.positions}),
        )
        return torch.stack(losses).sum().detach() if last else torch.zeros((), device=self.parallel.device)
