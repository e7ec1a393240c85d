"""The plan: how the work of one optimizer step is cut. It changes memory and speed, never the mathematics."""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from leanlm.strategies.schedules import SCHEDULES

AXES = ("pipeline", "replicate", "shard", "tensor")  # of the device mesh; the last varies fastest over the ranks


LEVERS = (
    "recompute", "recompute_window", "zero1", "step_in_backward", "offload", "return_freed_memory",
    "rnn_kernel", "compile",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How a global batch and a model are cut.

    Attributes:
        auto: the rest is for the planner to choose.
        accumulate_grad_batches: micro-batches that one device reads for a step; under a pipeline they flow through it.
        pipeline: devices that hold the blocks one group after the other (pipeline parallel). -1: the devices left.
        replicate: copies of the model, each reading its rows (DDP). -1: the devices left.
        shard: devices that share one copy of parameters, gradients and optimizer state and read rows each (FSDP2); with
            `replicate` above 1, HSDP. -1: the devices left.
        tensor: devices that share each matrix (tensor parallel). -1: the devices left.
        schedule: order of a pipeline's work: gpipe, 1f1b, interleaved, zero-bubble, or torch's name of one.
        stages_per_device: stages on one device of a pipeline; None: 1 for gpipe and 1f1b, else 2.
        stage_blocks: blocks of each stage, the first stage first; None: balanced by cost.
        reshard_after_forward: free a block's parameters between forward and backward (FSDP2): less memory, one more
            all-gather.
        reduce_every_micro_batch: under `shard`, reduce gradients after each micro-batch (they stay sharded: least
            memory) or only after the last (least traffic).
        recompute: what backward computes again instead of keeping it: none, blocks (all), 2 or more (every k-th block),
            operators (what is cheap in each block), or 0 to 1: the share of the blocks' activations that may stay.
        recompute_window: of a model that carries state, tokens of the sequence that are read at a time and read again in
            backward, so that memory grows with its square root. 0: none. -1: four times the square root.
        step_in_backward: update each weight as soon as its gradient is whole, and free the gradient.
        zero1: under `replicate`, divide the averages of AdamW and Muon among the copies of the model (ZeRO-1).
        offload: what a GPU keeps in host memory, a CPU in a file: none, activations, optimizer (the averages of AdamW and
            Muon), or all.
        return_freed_memory: on a CPU, let large tensors leave the process as soon as they are freed.
        rnn_kernel: of recurrent layers on a CPU: onednn, or native, which keeps fewer bytes for backward.
        compile: true, false, or auto: let torch.compile fuse the operations of a stage; auto, until it is settled, does not.
    """

    auto: bool = False
    accumulate_grad_batches: int = 1
    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    schedule: str = "1f1b"
    stages_per_device: int | None = None
    stage_blocks: list[int] | None = None
    reshard_after_forward: bool = True
    reduce_every_micro_batch: bool = True
    recompute: str = "none"
    recompute_window: int = 0
    zero1: bool = False
    step_in_backward: bool = False
    offload: str = "none"
    return_freed_memory: bool = True
    rnn_kernel: str = "onednn"
    compile: Any = "auto"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Devices along each of AXES."""
        return self.pipeline, self.replicate, self.shard, self.tensor

    @property
    def world(self) -> int:
        """Processes, one per device."""
        return prod(self.sizes)

    @property
    def readers(self) -> int:
        """Groups of devices that read different rows."""
        return self.replicate * self.shard

    def reader(self, rank: int) -> int:
        """Which of the `readers` a rank belongs to."""
        return rank // self.tensor % self.readers

    @property
    def cuts_model(self) -> bool:
        """Whether no single device holds the whole model."""
        return self.pipeline * self.shard * self.tensor > 1

    @property
    def adds_to_buckets(self) -> bool:
        """Whether gradients stay in the buckets of DDP from step to step, and micro-batches add to them there."""
        return self.world > 1 and not self.cuts_model and self.accumulate_grad_batches > 1

    @property
    def batches_per_step(self) -> int:
        """Batches that the trainer hands over for a step: a pipeline cuts its micro-batches itself."""
        return 1 if self.pipeline > 1 else self.accumulate_grad_batches

    @property
    def stages(self) -> int:
        """Stages of the pipeline over all its devices."""
        return self.pipeline * (self.stages_per_device or SCHEDULES[self.schedule].stages_per_device)

    def micro_batch(self, global_batch: int) -> int:
        """Rows in one forward pass."""
        return global_batch // (self.readers * self.accumulate_grad_batches)

    @property
    def compiled(self) -> bool:
        """Whether training is compiled."""
        return self.compile is True

    @property
    def order(self) -> str:
        """`bitwise`, or `rounding`: the same mathematics as one device computes, summed in another order."""
        other_order = self.recompute_window or self.rnn_kernel != "onednn" or self.compiled
        return "rounding" if other_order or self.world * self.accumulate_grad_batches > 1 else "bitwise"

    def describe(self) -> str:
        """The axes above 1, the levers, the accumulation."""
        parts = [f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1] or ["one device"]
        if self.pipeline > 1:
            parts.append(f"schedule={self.schedule}")
        parts += [f"{key}={getattr(self, key)}" for key in LEVERS if getattr(self, key) != getattr(Plan, key)]
        return ", ".join([*parts, f"accumulate_grad_batches={self.accumulate_grad_batches}"])

    def asdict(self) -> dict:
        return asdict(self)
