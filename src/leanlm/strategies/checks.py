"""What cannot work about a plan, found before any work starts, each with its arithmetic and what to write instead."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from math import prod

import torch

from leanlm.common.precision import STOCHASTIC
from leanlm.launch.ranks import launched, local_world_size
from leanlm.memory import offload, recompute
from leanlm.models import kernels
from leanlm.optimizers.settings import Optim
from leanlm.strategies.plan import AXES, Plan
from leanlm.strategies.schedules import SCHEDULES


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
    if plan.recompute_window < -1:
        problems.append(
            f"strategy.recompute_window={plan.recompute_window}: tokens, 0 for none, or -1 for four times the square root"
        )
    problems += recompute.problems(plan.recompute)
    for key, choices in (("offload", offload.CHOICES), ("rnn_kernel", kernels.CHOICES)):
        if getattr(plan, key) not in choices:
            problems.append(f"strategy.{key}={getattr(plan, key)}: choose one of {', '.join(choices)}")
    if plan.compile not in ("auto", True, False):
        problems.append(f"strategy.compile={plan.compile}: choose one of auto, true, false")
    if plan.compiled and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        problems.append("strategy.compile=true: torch.compile needs a C++ compiler (g++ or clang++), and there is none here")
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
    cut = plan.data_parallel_size * plan.accumulate_grad_batches
    if global_batch % cut:
        near = sorted({max(cut, global_batch // cut * cut), (global_batch // cut + 1) * cut})
        counts = [n for n in range(1, global_batch + 1) if global_batch % (plan.data_parallel_size * n) == 0]
        other = f", or strategy.accumulate_grad_batches={nearest(counts, plan.accumulate_grad_batches)}" if counts else ""
        factors = [(axis, getattr(plan, axis)) for axis in ("replicate", "shard")]
        shown = [f"{axis}={size}" for axis, size in factors if size > 1]
        problems.append(
            f"global_batch={global_batch} does not divide by "
            f"{' x '.join([*shown, f'accumulate_grad_batches={plan.accumulate_grad_batches}'])} = {cut}: "
            f"write global_batch={' or '.join(map(str, near))}{other}"
        )
    return plan, problems


def of_run(plan: Plan, optim: Optim, precision: str, clip: float) -> list[str]:
    """What cannot work about a plan with an optimizer, a precision and clipping.

    Args:
        plan: after `resolve`.
        optim: the optimizer.
        precision: of the run.
        clip: largest global norm of the gradient; 0: no clipping.
    """
    problems = []
    if optim.name not in ("adamw", "muon"):
        asked = {
            f"optim.state={optim.state}": optim.state != "fp32",
            "strategy.zero1=true": plan.zero1,
            "strategy.offload=optimizer": plan.offload == "optimizer",
            f"precision={precision}": precision == STOCHASTIC,
        }
        problems += [
            f"{given} is of AdamW's averages and update, which optim={optim.name} has not" for given in asked if asked[given]
        ]
    if plan.compiled and precision == "fp64" and torch.__version__ < "2.13":
        problems.append(
            f"strategy.compile=true with precision=fp64: torch {torch.__version__} cannot compile attention in float64 "
            "(2.13 can); write precision=fp32, or strategy.compile=false"
        )
    if plan.step_in_backward and clip:
        problems.append(
            f"strategy.step_in_backward=true with clip={clip}: the global norm is known only when all gradients are there; "
            "write clip=0, or leave step_in_backward out"
        )
    if plan.step_in_backward and (plan.accumulate_grad_batches > 1 or plan.pipeline > 1):
        problems.append(
            f"strategy.step_in_backward=true with accumulate_grad_batches={plan.accumulate_grad_batches}: a gradient is whole "
            "only after the last micro-batch; write strategy.accumulate_grad_batches=1 (and no pipeline)"
        )
    if plan.step_in_backward and plan.replicate > 1 and plan.shard == 1:
        problems.append(
            f"strategy.step_in_backward=true with replicate={plan.replicate}: DDP sums gradients in buckets, whole only after "
            f"backward; write strategy.shard={plan.replicate} strategy.replicate=1"
        )
    return problems


def on_gpus(plan: Plan, accelerator: str) -> list[str]:
    """What cannot work about a plan, after `resolve`, on the GPUs of this machine: each process needs one of its own."""
    processes, gpus = local_world_size() if launched() else plan.world, torch.cuda.device_count()
    if accelerator == "cpu" or not torch.cuda.is_available() or processes <= gpus:
        return []
    if launched():
        return [f"{processes} processes were started on this machine, which has {gpus} GPUs: start {gpus}, or write device=cpu"]
    product = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, plan.sizes, strict=True) if size > 1)
    largest, axis = max(zip(plan.sizes, AXES, strict=True))
    room = gpus * largest // processes  # along that axis, if the others stay
    fewer = max((n for n in range(1, room + 1) if largest % n == 0), default=0)
    kept = {**dict(zip(AXES, plan.sizes, strict=True)), axis: fewer} if fewer else dict.fromkeys(AXES, 1)
    micros = plan.accumulate_grad_batches * plan.data_parallel_size // (kept["replicate"] * kept["shard"])
    return [
        f"the plan takes {product} = {processes} GPUs, one for each process, and this machine has {gpus}: write "
        f"{f'strategy.{axis}={fewer}' if fewer else 'strategy=single'} strategy.accumulate_grad_batches={micros}, or device=cpu"
    ]


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
    if kind.splits_backward and plan.compiled:
        problems.append(
            f"strategy.compile=true: {plan.schedule} goes through a block twice in backward, which a compiled one does not "
            "allow; write strategy.schedule=1f1b"
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


def of_model(plan: Plan, blocks: int, units: dict[str, int], splits: bool, recurrent: bool = False,
                  adaptive: bool = False) -> list[str]:  # fmt: skip
    """What cannot work about a plan for one model.

    Args:
        plan: after `resolve`.
        blocks: how many the model has.
        units: what a tensor axis must divide, by name.
        splits: whether the model declares anything that a tensor axis may split.
        recurrent: whether it carries state.
        adaptive: whether its head is an adaptive softmax.
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
    if plan.compiled and recurrent:
        problems.append("strategy.compile=true: torch does not compile recurrent layers; leave it out")
    if plan.compiled and adaptive and not recurrent:
        problems.append(
            "strategy.compile=true: sizes in an adaptive softmax (model.cutoffs) depend on the tokens; leave it out"
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


COMPILING = (10.0, 3.0)  # seconds until a graph is compiled, and for each of its blocks (of GPT-2 small some 45)
SAVED = 0.3  # share of a step on a GPU that compiling saves (GPT-2 small on an H100: nanoGPT's 38.2 ms become 29.4)
RATE, EACH = 2.5e14, 1.5e-3  # operations a second of a GPU in bf16, and seconds of a block whose operations are all small


def earns_compiling(operations: float, micro_batches: int, blocks: int, steps: int) -> bool:
    """Whether a run on a GPU is long enough for compiling to be earned back, roughly.

    Args:
        operations: floating-point operations of a step on each device.
        micro_batches: of a step on each device.
        blocks: on each device.
        steps: of the run.
    """
    step = max(operations / RATE, EACH * blocks * micro_batches)
    return steps * step * SAVED > COMPILING[0] + COMPILING[1] * blocks


def nearest(values: Iterable[int], to: int) -> int:
    return min(values, key=lambda value: abs(value - to))
