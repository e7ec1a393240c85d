"""A pipeline over the stages of a model, with torch's own schedules (torch.distributed.pipelining)."""

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from leanlm.data.batches import Batch
from leanlm.strategies.balance import bubble, order_of
from leanlm.strategies.parallel_model import ParallelModel
from leanlm.strategies.schedules import SCHEDULES


class _Part(PipelineStage):
    def _get_init_p2p_neighbors_ops(self) -> list:
        """None: only a warm-up of connections, in which torch 2.11 sends to itself where a V turns, and gloo fails."""
        return []


class Pipeline:
    """Runs whole training steps through the stages of all ranks.

    Args:
        parallel: with at least two stages.
        rows: of this group of ranks in a step.
        sequence: tokens per row.
    """

    def __init__(self, parallel: ParallelModel, rows: int, sequence: int) -> None:
        self.parallel, self.scale, plan = parallel, 1.0, parallel.plan
        micro = rows // plan.accumulate_grad_batches
        dtype = parallel.dtype
        # static shapes: torch would else run the stages once more to find them, and advance carried state
        tokens = torch.empty(micro, sequence, dtype=torch.long, device="meta")
        hidden = torch.empty(micro, sequence, parallel.width, dtype=dtype, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=torch.promote_types(dtype, torch.float32), device="meta", requires_grad=True)
        last = len(parallel.split) - 1
        parts = [
            _Part(
                stage,
                number,
                len(parallel.split),
                parallel.device,
                input_args=tokens if number == 0 else hidden,
                output_args=loss if number == last else hidden,
                group=parallel.group("pipeline"),
            )
            for number, stage in parallel.stages.items()
        ]
        kind = get_schedule_class(SCHEDULES[plan.schedule].torch)
        several = issubclass(kind, PipelineScheduleMulti)
        self.schedule = kind(
            parts if several else parts[0],
            plan.accumulate_grad_batches,
            loss_fn=lambda nats, _: nats * self.scale,
            scale_grads=False,  # the loss is already divided by the tokens of the global batch
        )

    def describe(self) -> str:
        """The stages, their share of the work, and the share of the time that devices will wait."""
        cost, total, lines = self.parallel.costs, sum(self.parallel.costs), []
        for number, blocks in enumerate(self.parallel.split):
            parts = [f"blocks {blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"]
            parts = ["embed"] * (number == 0) + parts + ["head"] * (number == len(cost) - 1)
            lines.append(
                f"stage {number} on device {self.parallel.owner(number)}: {' + '.join(parts)} ({cost[number] / total:.0%})"
            )
        waits = bubble(order_of(self.schedule, self.parallel.plan.accumulate_grad_batches), cost)
        return "; ".join(lines) + f". Devices wait {waits:.0%} of the time (bubble and imbalance, communication not counted)"

    def step(self, batch: Batch, scale: float) -> Tensor:
        """Forward and backward of all micro-batches of a step.

        Args:
            batch: the rows of this group of ranks in the step.
            scale: of the summed loss in nats.

        Returns:
            the scaled loss of these rows on the rank of the last stage; 0 on the others.
        """
        self.scale = scale
        losses: list[Tensor] = []
        tokens = (batch.input,) if 0 in self.parallel.stages else ()
        last = len(self.parallel.split) - 1 in self.parallel.stages
        self.schedule.step(
            *tokens,
            target=batch.rows if last else None,  # the last stage has its targets as an argument, and makes the loss
            losses=losses if last else None,
            return_outputs=False,
            rows=batch.rows,
            targets=batch.target,
        )
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.parallel.device)
