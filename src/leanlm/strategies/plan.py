"""The plan: how the work of one optimizer step is cut. It changes memory and speed, never the mathematics."""

from dataclasses import asdict, dataclass, replace

import torch

PRECISIONS = {  # name -> (parameters' type, Lightning's precision plugin)
    "fp32": (torch.float32, "32-true"),
    "bf16-mixed": (torch.float32, "bf16-mixed"),
    "bf16": (torch.bfloat16, "bf16-true"),
    "fp64": (torch.float64, "32-true"),  # built in float64; Lightning's plugin then leaves it alone
}


@dataclass(frozen=True)
class Plan:
    """How a global batch is cut.

    Attributes:
        accumulate_grad_batches: micro-batches that one device reads one after the other for a step.
        replicate: copies of the model, each reading its rows (DDP). -1: as many as there are devices.
        precision: fp32, bf16-mixed (weights in fp32, products in bf16), bf16, or fp64 for parity runs.
    """

    accumulate_grad_batches: int = 1
    replicate: int = 1
    precision: str = "fp32"

    @property
    def world(self) -> int:
        """Processes, one per device."""
        return self.replicate

    def micro_batch(self, global_batch: int) -> int:
        """Rows in one forward pass."""
        return global_batch // (self.replicate * self.accumulate_grad_batches)

    @property
    def exactness(self) -> str:
        """`rounding`: the same mathematics as one device in fp32, summed in another order; `changes`: the curve may
        move."""
        if self.precision.startswith("bf16"):
            return "changes"
        return "bitwise" if self.world * self.accumulate_grad_batches == 1 else "rounding"

    def describe(self) -> str:
        parts = [
            f"replicate={self.replicate}",
            f"accumulate_grad_batches={self.accumulate_grad_batches}",
            self.precision,
        ]
        return ", ".join(parts) + f" ({self.exactness})"

    def asdict(self) -> dict:
        return asdict(self)


def resolve(plan: Plan, devices: int | None, global_batch: int) -> tuple[Plan, list[str]]:
    """Fill in what is left open, and list what cannot work.

    Args:
        plan: as written in the configuration.
        devices: how many to use; None: what the plan asks for, and at least 2 where it takes all that there are.
        global_batch: rows per optimizer step.
    """
    problems = []
    if plan.accumulate_grad_batches < 1:
        problems.append(f"strategy.accumulate_grad_batches={plan.accumulate_grad_batches}: it counts micro-batches, at least 1")
    if plan.precision not in PRECISIONS:
        problems.append(f"strategy.precision={plan.precision}: choose one of {', '.join(PRECISIONS)}")
    if plan.replicate == -1:
        plan = replace(plan, replicate=devices or max(2, torch.cuda.device_count()))
    elif plan.replicate < 1:
        problems.append(f"strategy.replicate={plan.replicate}: at least 1, or -1 for all devices")
    if devices is not None and devices != plan.world and not problems:
        instead = "strategy=ddp" if plan.replicate == 1 else f"strategy.replicate={devices}"
        problems.append(
            f"devices={devices}, but the plan uses {plan.world} (replicate={plan.replicate}): "
            f"write {instead}, or devices={plan.world}"
        )
    if problems or global_batch < 1:
        return plan, problems
    cut = plan.replicate * plan.accumulate_grad_batches
    if global_batch % cut:
        near = sorted({max(cut, global_batch // cut * cut), (global_batch // cut + 1) * cut})
        counts = [n for n in range(1, global_batch + 1) if global_batch % (plan.replicate * n) == 0]
        other = f", or strategy.accumulate_grad_batches={_nearest(counts, plan.accumulate_grad_batches)}" if counts else ""
        problems.append(
            f"global_batch={global_batch} does not divide by replicate={plan.replicate} x "
            f"accumulate_grad_batches={plan.accumulate_grad_batches} = {cut}: "
            f"write global_batch={' or '.join(map(str, near))}{other}"
        )
    return plan, problems


def _nearest(values: list[int], to: int) -> int:
    return min(values, key=lambda value: abs(value - to))
