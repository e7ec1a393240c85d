"""The plan: how the work of one optimizer step is cut. It changes memory and speed, never the mathematics."""

from dataclasses import dataclass, fields
from math import prod
from typing import Any

from leanlm.common.files import defaults
from leanlm.strategies.schedules import SCHEDULES

AXES = ("pipeline", "replicate", "shard", "tensor")  # of the device mesh; the last varies fastest over the ranks
LEVERS = ("recompute", "recompute_window", "zero1", "step_in_backward", "offload", "return_freed_memory", "rnn_kernel",
          "compile")  # fmt: skip
SHIPPED = defaults("strategy/single.yaml")


@dataclass(frozen=True)
class Plan:
    """How a global batch and a model are cut. What each field means, and its default, stand in `conf/strategy/single.yaml`."""

    auto: bool = SHIPPED["auto"]
    accumulate_grad_batches: int = SHIPPED["accumulate_grad_batches"]
    pipeline: int = SHIPPED["pipeline"]
    replicate: int = SHIPPED["replicate"]
    shard: int = SHIPPED["shard"]
    tensor: int = SHIPPED["tensor"]
    schedule: str = SHIPPED["schedule"]
    stages_per_device: int | None = SHIPPED["stages_per_device"]
    stage_blocks: list[int] | None = SHIPPED["stage_blocks"]
    reshard_after_forward: bool = SHIPPED["reshard_after_forward"]
    reduce_every_micro_batch: bool = SHIPPED["reduce_every_micro_batch"]
    recompute: str = SHIPPED["recompute"]
    recompute_window: int = SHIPPED["recompute_window"]
    zero1: bool = SHIPPED["zero1"]
    step_in_backward: bool = SHIPPED["step_in_backward"]
    offload: str = SHIPPED["offload"]
    return_freed_memory: bool = SHIPPED["return_freed_memory"]
    rnn_kernel: str = SHIPPED["rnn_kernel"]
    compile: Any = SHIPPED["compile"]

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each of AXES."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def long_axes(self) -> list[str]:
        """Those with several devices, as `shard=2`."""
        return [f"{axis}={size}" for axis, size in self.sizes.items() if size > 1]

    @property
    def world(self) -> int:
        """Processes, one per device."""
        return prod(self.sizes.values())

    @property
    def data_parallel_size(self) -> int:
        """Groups of devices that read different rows."""
        return self.replicate * self.shard

    def data_parallel_rank(self, rank: int) -> int:
        """Which of the groups that read different rows a rank belongs to."""
        return rank // self.tensor % self.data_parallel_size

    @property
    def splits_model(self) -> bool:
        """Whether no single device holds the whole model."""
        return self.pipeline * self.shard * self.tensor > 1

    @property
    def adds_to_buckets(self) -> bool:
        """Whether gradients stay in the buckets of DDP from step to step, and micro-batches add to them there."""
        return self.world > 1 and not self.splits_model and self.accumulate_grad_batches > 1

    @property
    def batches_per_step(self) -> int:
        """Batches that the trainer hands over for a step: a pipeline cuts its micro-batches itself."""
        return 1 if self.pipeline > 1 else self.accumulate_grad_batches

    @property
    def stages(self) -> int:
        """Stages of the pipeline over all its devices; without a pipeline the whole model is one."""
        each = self.stages_per_device or SCHEDULES[self.schedule].stages_per_device
        return self.pipeline * each if self.pipeline > 1 else 1

    def stages_on(self, device: int) -> list[int]:
        """Numbers of the stages on a device of the pipeline, in rising order."""
        turns = SCHEDULES[self.schedule].v_shape
        firsts = enumerate(range(0, self.stages, self.pipeline))
        return [first + (self.pipeline - 1 - device if turns and i % 2 else device) for i, first in firsts]

    def micro_batch(self, global_batch: int) -> int:
        """Rows in one forward pass."""
        return global_batch // (self.data_parallel_size * self.accumulate_grad_batches)

    @property
    def compiled(self) -> bool:
        """Whether training is compiled."""
        return self.compile is True

    def offloads(self, what: str) -> bool:
        """Whether the `optimizer`'s averages, or the `activations` that backward needs, lie elsewhere until they are used."""
        return self.offload in (what, "all")

    @property
    def order(self) -> str:
        """`bitwise`, or `rounding`: the same mathematics as one device computes, summed in another order."""
        other_order = self.recompute_window or self.rnn_kernel != "onednn" or self.compiled
        return "rounding" if other_order or self.world * self.accumulate_grad_batches > 1 else "bitwise"

    def describe(self) -> str:
        """The axes above 1, the levers, the accumulation."""
        parts = self.long_axes or ["one device"]
        if self.pipeline > 1:
            parts.append(f"schedule={self.schedule}")
        parts += [f"{key}={getattr(self, key)}" for key in LEVERS if getattr(self, key) != getattr(Plan, key)]
        return ", ".join([*parts, f"accumulate_grad_batches={self.accumulate_grad_batches}"])

    def asdict(self) -> dict[str, Any]:
        """As a configuration's group has it."""
        return {each.name: getattr(self, each.name) for each in fields(Plan)}
