"""What cannot work about a plan, found before any work starts, each with its arithmetic and what to write instead."""

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

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

    `devices`: how many to use; None: what the plan asks for, and at least 2 where it takes all that there are. `global_batch`:
    rows per optimizer step.
    """
    problems = [*_levers(plan)]
    plan, found = _on_devices(plan, devices)
    problems += [*found, *_schedule(plan)]
    if not problems and global_batch >= 1:
        problems += _rows(plan, global_batch)
    return plan, problems


def of_run(plan: Plan, optim: Optim, precision: str, clip: float) -> list[str]:
    """What cannot work about a plan, after `resolve`, with an optimizer, a precision and clipping (0: none)."""
    problems = [*_optimizer_state(plan, optim, precision), *_step_in_backward(plan, clip)]
    if plan.compiled and precision == "fp64" and torch.__version__ < "2.13":
        problems.append(f"strategy.compile=true: torch {torch.__version__} cannot compile attention in float64; leave it out")
    return problems


def of_model(plan: Plan, blocks: int, units: dict[str, int], splits: bool, recurrent: bool = False,
             adaptive: bool = False) -> list[str]:  # fmt: skip
    """What cannot work about a plan, after `resolve`, for a model of so many blocks.

    `units`: what a tensor axis must divide, by name. `splits`: whether the model declares anything that the axis may split.
    `recurrent`: whether it carries state. `adaptive`: whether its head is an adaptive softmax.
    """
    problems = [*_stages(plan, blocks, recurrent), *_tensor(plan, units, splits)]
    if plan.recompute_window and not recurrent:
        problems.append(
            f"strategy.recompute_window={plan.recompute_window}: the model carries no state, and cannot read part of a row "
            "without the tokens before it; write strategy.recompute=blocks"
        )
    if plan.compiled and (recurrent or adaptive):
        sizes = "sizes in an adaptive softmax (model.cutoffs) depend on the tokens"
        why = "torch does not compile recurrent layers" if recurrent else sizes
        problems.append(f"strategy.compile=true: {why}; leave it out")
    return problems


def on_gpus(plan: Plan, accelerator: str) -> list[str]:
    """What cannot work about a plan, after `resolve`, on the GPUs of this machine: each process needs one of its own."""
    processes, gpus = local_world_size() if launched() else plan.world, torch.cuda.device_count()
    if accelerator == "cpu" or not torch.cuda.is_available() or processes <= gpus:
        return []
    if launched():
        return [f"{processes} processes were started on this machine, which has {gpus} GPUs: start {gpus}, or write device=cpu"]
    sizes = plan.sizes
    axis = max(AXES, key=lambda axis: (sizes[axis], axis))
    room = gpus * sizes[axis] // processes  # along the longest axis, if the others stay
    fewer = max((n for n in range(1, room + 1) if sizes[axis] % n == 0), default=0)
    kept = sizes | {axis: fewer} if fewer else dict.fromkeys(AXES, 1)
    micros = plan.accumulate_grad_batches * plan.data_parallel_size // (kept["replicate"] * kept["shard"])
    product, instead = " x ".join(plan.long_axes), f"strategy.{axis}={fewer}" if fewer else "strategy=single"
    return [
        f"the plan takes {product} = {processes} GPUs, one for each process, and this machine has {gpus}: write {instead} "
        f"strategy.accumulate_grad_batches={micros}, or device=cpu"
    ]


def _levers(plan: Plan) -> Iterator[str]:
    if plan.accumulate_grad_batches < 1:
        yield f"strategy.accumulate_grad_batches={plan.accumulate_grad_batches}: it counts micro-batches, at least 1"
    if plan.recompute_window < -1:
        yield f"strategy.recompute_window={plan.recompute_window}: tokens, 0 for none, or -1 for four times the square root"
    try:
        recompute.levels(plan.recompute, [])
    except ValueError:
        yield f"strategy.recompute={plan.recompute}: choose {recompute.CHOICES}"
    for key, choices in (("offload", offload.CHOICES), ("rnn_kernel", kernels.CHOICES)):
        if getattr(plan, key) not in choices:
            yield f"strategy.{key}={getattr(plan, key)}: choose one of {', '.join(choices)}"
    if plan.compile not in ("auto", True, False):
        yield f"strategy.compile={plan.compile}: choose one of auto, true, false"
    if plan.compiled and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        yield "strategy.compile=true: torch.compile needs a C++ compiler (g++ or clang++), and there is none here"


def _on_devices(plan: Plan, devices: int | None) -> tuple[Plan, list[str]]:
    """The plan with a number for the axis that takes the devices that are left."""
    sizes = plan.sizes
    problems = [f"strategy.{axis}={size}: at least 1, or -1 for the devices that are left"
                for axis, size in sizes.items() if size < 1 and size != -1]  # fmt: skip
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        problems.append(f"only one of strategy.{', strategy.'.join(free)} can be -1, which means the devices that are left")
    if problems:
        return plan, problems
    taken, product = prod(size for size in sizes.values() if size != -1), " x ".join(plan.long_axes) or "one device"
    if free:
        devices = devices or max(2 * taken, torch.cuda.device_count() // taken * taken)
        if devices % taken:
            return plan, [f"devices={devices} does not divide by {product}: write devices={_multiples(devices, taken)}"]
        left: dict[str, Any] = {free[0]: devices // taken}
        return replace(plan, **left), []
    if devices in (None, taken):
        return plan, []
    longer = [axis for axis, size in sizes.items() if size > 1]
    instead = f"strategy.{longer[-1]}=-1" if longer else "strategy=ddp"
    return plan, [f"devices={devices}, but the plan uses {taken} ({product}): write {instead}, or devices={taken}"]


def _rows(plan: Plan, global_batch: int) -> Iterator[str]:
    """Micro-batches are equal."""
    micros, size = plan.accumulate_grad_batches, plan.data_parallel_size
    parts = size * micros
    if global_batch % parts:
        axes = [each for each in plan.long_axes if each.startswith(("replicate", "shard"))]
        product, near = " x ".join([*axes, f"accumulate_grad_batches={micros}"]), _multiples(global_batch, parts)
        counts = [n for n in range(1, global_batch + 1) if global_batch % (size * n) == 0]
        other = f", or strategy.accumulate_grad_batches={_nearest(counts, micros)}" if counts else ""
        yield f"global_batch={global_batch} does not divide by {product} = {parts}: write global_batch={near}{other}"


def _schedule(plan: Plan) -> Iterator[str]:
    if plan.pipeline <= 1:
        return
    if plan.schedule not in SCHEDULES:
        yield f"strategy.schedule={plan.schedule}: choose one of {', '.join(SCHEDULES)}"
        return
    kind, micros = SCHEDULES[plan.schedule], plan.accumulate_grad_batches
    per = plan.stages_per_device or kind.stages_per_device
    if per < 1 or (kind.fixed and per != kind.stages_per_device):
        yield f"strategy.stages_per_device={per}: {plan.schedule} needs {kind.stages_per_device}"
    once = {"recompute=operators": plan.recompute == "operators", "compile=true": plan.compiled}
    for lever in filter(once.get, once) if kind.splits_backward else ():
        yield f"strategy.{lever} serves for one backward pass, and {plan.schedule} makes two: write strategy.schedule=1f1b"
    each = per if kind.fill_stages else 1
    least = plan.pipeline * each
    if micros < least:
        yield (
            f"strategy.accumulate_grad_batches={micros}: fewer micro-batches than the {least} stages that they must fill; "
            f"write at least {least}, or strategy.pipeline={max(1, micros // each)}"
        )
    elif kind.rounds and micros % (micros // plan.pipeline):
        good = [n for n in range(plan.pipeline, 2 * micros + 1) if n % (n // plan.pipeline) == 0]
        yield (
            f"strategy.accumulate_grad_batches={micros}: {plan.schedule} takes them in {micros // plan.pipeline} equal rounds "
            f"over pipeline={plan.pipeline}; write {_nearest(good, micros)}"
        )


def _optimizer_state(plan: Plan, optim: Optim, precision: str) -> Iterator[str]:
    if plan.zero1 and (plan.replicate == 1 or plan.shard > 1 or plan.tensor > 1):
        yield (
            f"strategy.zero1=true divides optimizer state among whole copies of the model, but replicate={plan.replicate}, "
            f"shard={plan.shard}, tensor={plan.tensor}: it needs replicate above 1 and the others 1, as strategy=ddp has them"
        )
    asked = {
        f"optim.state={optim.state}": optim.state != "fp32",
        "strategy.zero1=true": plan.zero1,
        "strategy.offload=optimizer": plan.offload == "optimizer",
        f"precision={precision}": precision == STOCHASTIC,
    }
    if optim.name not in ("adamw", "muon"):  # muon updates some of the weights as AdamW does
        for given in filter(asked.get, asked):
            yield f"{given} is of AdamW's averages and update, which optim={optim.name} has not"


def _step_in_backward(plan: Plan, clip: float) -> Iterator[str]:
    micros, copies, lever = plan.accumulate_grad_batches, plan.replicate, "strategy.step_in_backward=true"
    if plan.step_in_backward and clip:
        yield f"{lever} with clip={clip}: the global norm is known only when all gradients are there; write clip=0"
    if plan.step_in_backward and micros > 1:
        yield f"{lever}: a gradient is whole only after {micros} micro-batches; write strategy.accumulate_grad_batches=1"
    if plan.step_in_backward and copies > 1 and plan.shard == 1:
        yield f"{lever}: DDP sums gradients in buckets after backward; write strategy.shard={copies} strategy.replicate=1"


def _stages(plan: Plan, blocks: int, recurrent: bool) -> Iterator[str]:
    if plan.pipeline == 1:
        return
    if SCHEDULES[plan.schedule].splits_backward and torch.__version__ < "2.13" and (recurrent or plan.tensor > 1):
        what = "loses gradients of recurrent layers" if recurrent else "cannot divide the backward pass of split matrices"
        yield f"strategy.schedule={plan.schedule}: torch {torch.__version__} {what} under it; write strategy.schedule=1f1b"
    per, sizes = plan.stages // plan.pipeline, plan.stage_blocks
    if plan.stages > blocks:
        yield (
            f"strategy.pipeline={plan.pipeline} x {per} stages per device = {plan.stages} stages, but the model has {blocks} "
            f"blocks: write strategy.pipeline={max(1, blocks // per)} or less, or model.depth={plan.stages}"
        )
    elif sizes is not None and (len(sizes) != plan.stages or sum(sizes) != blocks or min(sizes) < 1):
        yield f"strategy.stage_blocks={list(sizes)}: it takes {plan.stages} numbers, each at least 1, with the sum {blocks}"


def _tensor(plan: Plan, units: dict[str, int], splits: bool) -> Iterator[str]:
    size = plan.tensor
    if size > 1 and not splits:
        yield f"strategy.tensor={size}: the model declares nothing that may be split (Model.tensor_split)"
    for name, count in units.items():
        if count % size:
            good, more = _nearest([n for n in range(1, count + 1) if count % n == 0], size), -(-count // size) * size
            yield f"model.{name}={count} does not divide by tensor={size}: write strategy.tensor={good}, or model.{name}={more}"


def _nearest(values: Iterable[int], to: int) -> int:
    return min(values, key=lambda value: abs(value - to))


def _multiples(number: int, of: int) -> str:
    """Those on both sides of a number that is none, as `8 or 12`."""
    below = number // of * of
    return " or ".join(str(each) for each in (below, below + of) if each)
