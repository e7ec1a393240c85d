"""The plan: how the work of one optimizer step is cut. It changes memory and speed, never the mathematics."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import prod

import torch

from leanlm.memory import kernels, offload, recompute, state
from leanlm.strategies.schedules import SCHEDULES

PRECISIONS = {  # name -> (parameters' type, Lightning's precision plugin)
    "fp32": (torch.float32, "32-true"),
    "bf16-mixed": (torch.float32, "bf16-mixed"),
    "bf16": (torch.bfloat16, "32-true"),  # built in its type; Lightning's plugin then leaves it alone
    "bf16-stochastic": (torch.bfloat16, "32-true"),
    "fp64": (torch.float64, "32-true"),
}
AXES = ("pipeline", "replicate", "shard", "tensor")  # of the device mesh; the last varies fastest over the ranks


@dataclass(frozen=True)
class Plan:
    """How a global batch and a model are cut.

    Attributes:
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
            backward, so that memory grows with its square root. 0: none. -1: twice the square root.
        optimizer_state: how AdamW's averages are kept: fp32 (as the weights are), bf16, int8 or int4.
        zero1: under `replicate`, divide AdamW's averages among the copies of the model (ZeRO-1).
        offload: what a GPU keeps in host memory, a CPU in a file: none, activations, optimizer (AdamW's averages), or all.
        rnn_kernel: of recurrent layers on a CPU: onednn, or native, which keeps fewer bytes for backward.
        precision: fp32, bf16-mixed (weights in fp32, products in bf16), bf16, bf16-stochastic (AdamW rounds the weights up or
            down by chance, so that small updates are not lost), or fp64 for parity runs.
    """

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
    optimizer_state: str = "fp32"
    zero1: bool = False
    offload: str = "none"
    rnn_kernel: str = "onednn"
    precision: str = "fp32"

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
    def exactness(self) -> str:
        """`rounding`: the same mathematics as one device in fp32, summed in another order; `changes`: the curve may
        move."""
        if self.precision.startswith("bf16") or self.optimizer_state != "fp32":
            return "changes"
        other_order = self.world * self.accumulate_grad_batches > 1 or self.recompute_window or self.rnn_kernel != "onednn"
        return "rounding" if other_order else "bitwise"

    def describe(self) -> str:
        """One line: the axes above 1, the accumulation, the precision, the exactness."""
        parts = [f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1] or ["one device"]
        if self.pipeline > 1:
            parts.append(f"schedule={self.schedule}")
        levers = ("recompute", "recompute_window", "optimizer_state", "zero1", "offload", "rnn_kernel")
        parts += [f"{key}={getattr(self, key)}" for key in levers if getattr(self, key) != getattr(Plan, key)]
        parts += [f"accumulate_grad_batches={self.accumulate_grad_batches}", self.precision]
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
    if plan.recompute_window < -1:
        problems.append(
            f"strategy.recompute_window={plan.recompute_window}: tokens, 0 for none, or -1 for twice the square root"
        )
    problems += recompute.problems(plan.recompute)
    for key, choices in (("offload", offload.CHOICES), ("optimizer_state", state.KINDS), ("rnn_kernel", kernels.CHOICES)):
        if getattr(plan, key) not in choices:
            problems.append(f"strategy.{key}={getattr(plan, key)}: choose one of {', '.join(choices)}")
    plan, found = _devices(plan, devices)
    if plan.zero1 and (plan.replicate == 1 or plan.shard > 1 or plan.tensor > 1):
        problems.append(
            f"strategy.zero1=true divides optimizer state among whole copies of the model, but replicate={plan.replicate}, "
            f"shard={plan.shard}, tensor={plan.tensor}: it needs replicate above 1 and the others 1, as strategy=ddp has them"
        )
    problems += found
    if plan.pipeline > 1:
        problems += _schedule(plan)
    if problems or global_batch < 1:
        return plan, problems
    cut = plan.readers * plan.accumulate_grad_batches
    if global_batch % cut:
        near = sorted({max(cut, global_batch // cut * cut), (global_batch // cut + 1) * cut})
        counts = [n for n in range(1, global_batch + 1) if global_batch % (plan.readers * n) == 0]
        other = f", or strategy.accumulate_grad_batches={nearest(counts, plan.accumulate_grad_batches)}" if counts else ""
        factors = [(axis, getattr(plan, axis)) for axis in ("replicate", "shard")]
        shown = [f"{axis}={size}" for axis, size in factors if size > 1]
        problems.append(
            f"global_batch={global_batch} does not divide by "
            f"{' x '.join([*shown, f'accumulate_grad_batches={plan.accumulate_grad_batches}'])} = {cut}: "
            f"write global_batch={' or '.join(map(str, near))}{other}"
        )
    return plan, problems


def _devices(plan: Plan, devices: int | None) -> tuple[Plan, list[str]]:
    sizes = {axis: getattr(plan, axis) for axis in AXES}
    problems = [
        f"strategy.{axis}={size}: at least 1, or -1 for the devices that are left"
        for axis, size in sizes.items()
        if size < 1 and size != -1
    ]
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        problems.append(f"only one of strategy.{', strategy.'.join(free)} can be -1, which means the devices that are left")
    if problems:
        return plan, problems
    taken = prod(size for size in sizes.values() if size != -1)
    product = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
    if free:
        devices = devices or max(2 * taken, torch.cuda.device_count() // taken * taken)
        if devices % taken:
            near = sorted({max(taken, devices // taken * taken), (devices // taken + 1) * taken})
            return plan, [f"devices={devices} does not divide by {product}: write devices={' or '.join(map(str, near))}"]
        plan = replace(plan, **{free[0]: devices // taken})
    elif devices is not None and devices != taken:
        one = [axis for axis, size in sizes.items() if size > 1]
        instead = "strategy=ddp" if not one else f"strategy.{one[-1]}=-1"
        problems.append(
            f"devices={devices}, but the plan uses {taken} ({product or 'one device'}): write {instead}, or devices={taken}"
        )
    return plan, problems


def _schedule(plan: Plan) -> list[str]:
    """What cannot work about a pipeline's schedule."""
    kind = SCHEDULES.get(plan.schedule)
    if kind is None:
        return [f"strategy.schedule={plan.schedule}: choose one of {', '.join(SCHEDULES)}"]
    problems, per = [], plan.stages_per_device or kind.stages_per_device
    if per < 1 or (kind.fixed and per != kind.stages_per_device):
        problems.append(f"strategy.stages_per_device={per}: {plan.schedule} needs {kind.stages_per_device}")
    if kind.splits_backward and plan.recompute == "operators":
        problems.append(
            f"strategy.recompute=operators: {plan.schedule} goes through a block twice in backward, and torch's selective "
            "recomputation serves once; write strategy.recompute=blocks, or strategy.schedule=1f1b"
        )
    micros = plan.accumulate_grad_batches
    least = plan.pipeline * (per if kind.fill_stages else 1)
    if micros < least:
        problems.append(
            f"strategy.accumulate_grad_batches={micros}: fewer micro-batches than the {least} stages that they must fill; "
            f"write at least {least}, or strategy.pipeline={max(1, micros // (least // plan.pipeline))}"
        )
    elif kind.rounds and micros % (micros // plan.pipeline):
        good = [n for n in range(plan.pipeline, 2 * micros + 1) if n % (n // plan.pipeline) == 0]
        problems.append(
            f"strategy.accumulate_grad_batches={micros}: {plan.schedule} takes them in {micros // plan.pipeline} equal rounds "
            f"over pipeline={plan.pipeline}; write {nearest(good, micros)}"
        )
    return problems


def cuts_of_model(plan: Plan, blocks: int, units: dict[str, int], splits: bool, recurrent: bool = False) -> list[str]:
    """What cannot work about a plan for one model.

    Args:
        plan: after `resolve`.
        blocks: how many the model has.
        units: what a tensor axis must divide, by name.
        splits: whether the model declares anything that a tensor axis may split.
        recurrent: whether it carries state.
    """
    problems = []
    if plan.pipeline > 1:
        if SCHEDULES[plan.schedule].splits_backward and torch.__version__ < "2.13" and (recurrent or plan.tensor > 1):
            what = "loses gradients of recurrent layers" if recurrent else "cannot divide the backward pass of split matrices"
            problems.append(
                f"strategy.schedule={plan.schedule}: torch {torch.__version__} {what} under it (2.13 does not); "
                "write strategy.schedule=1f1b or interleaved"
            )
        if plan.stages > blocks:
            per = plan.stages // plan.pipeline
            problems.append(
                f"strategy.pipeline={plan.pipeline} x {per} stages per device = {plan.stages} stages, but the model has "
                f"{blocks} blocks: write strategy.pipeline={max(1, blocks // per)} or less, or model.depth={plan.stages}"
            )
        elif plan.stage_blocks is not None and (
            len(plan.stage_blocks) != plan.stages or sum(plan.stage_blocks) != blocks or min(plan.stage_blocks) < 1
        ):
            problems.append(
                f"strategy.stage_blocks={list(plan.stage_blocks)}: {plan.stages} numbers, each at least 1, with the sum "
                f"{blocks} (here {len(plan.stage_blocks)} numbers, sum {sum(plan.stage_blocks)})"
            )
    if plan.recompute_window and not recurrent:
        problems.append(
            f"strategy.recompute_window={plan.recompute_window}: the model carries no state, and cannot read part of a row "
            "without the tokens before it; write strategy.recompute=blocks"
        )
    if plan.tensor > 1 and not splits:
        problems.append(f"strategy.tensor={plan.tensor}: the model declares nothing that may be split (Model.tensor_split)")
    for name, count in units.items() if plan.tensor > 1 else ():
        if count % plan.tensor:
            good = [n for n in range(1, count + 1) if count % n == 0]
            problems.append(
                f"model.{name}={count} does not divide by tensor={plan.tensor}: write strategy.tensor="
                f"{nearest(good, plan.tensor)}, or model.{name}={-(-count // plan.tensor) * plan.tensor}"
            )
    return problems


def nearest(values: Iterable[int], to: int) -> int:
    return min(values, key=lambda value: abs(value - to))
