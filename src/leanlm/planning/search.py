"""Which plans there are, and the fastest of those that fit.

Every way to cut the work over the devices is ordered by a rough estimate (closed forms over counted operations, parameters and
what one block keeps); from the fastest on, plans are simulated until enough of them fit. Only these are ever shown or taken.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import connection
from typing import Any

import torch

from leanlm.config import Settings, cuts
from leanlm.errors import UserError
from leanlm.memory import offload
from leanlm.planning.device import Device
from leanlm.strategies.plan import Plan
from leanlm.strategies.resolve import of_optimizer, resolve

MARGIN = 0.05  # of a budget that is left free: predictions have errors
HOPELESS = 1.3  # budgets of rough bytes from which on a plan is tried last
LATER = {"interleaved": 1.03, "zero-bubble": 1.1}  # simulating these takes as long as several others: they wait for their turn
SECONDS = 8.0  # after which no plan is begun
PATIENCE, LONGEST = 2.5, 20.0  # seconds more for those that were; as long as there is no answer at all


@dataclass(frozen=True)
class Rough:
    """What orders candidates before anything is simulated: seconds of a step and bytes on the fullest rank."""

    seconds: float
    bytes: float


@dataclass
class Answer:
    """What a search found.

    Attributes:
        fitting: predictions that fit, fastest first.
        others: of plans that do not, the fastest first.
        least: the prediction with the smallest peak.
        candidates: how many plans there were.
        simulated: how many of them were looked at, in the order of the rough estimate, before enough were found or time was up.
    """

    fitting: list[Any]
    others: list[Any]
    least: Any
    candidates: int
    simulated: int


def meshes(devices: int) -> Iterator[tuple[int, int, int, int]]:
    """Every (pipeline, replicate, shard, tensor) whose product is the number of devices."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    return (sizes for sizes in product(sizes, repeat=4) if sizes[0] * sizes[1] * sizes[2] * sizes[3] == devices)  # type: ignore[misc]


def families(settings: Settings, devices: int, recurrent: bool, allow: Iterable[str]) -> list[list[Plan]]:
    """Plans that can work and keep the curve, grouped by all but their micro-batches, of which the fewest come first.

    Args:
        settings: `plan` gives what is not searched: number types, state of the optimizer.
        devices: all of them are used.
        recurrent: whether the model carries state.
        allow: levers labelled `changes` that may be used: optimizer_state, precision.
    """
    config, base = settings.config, replace(settings.plan, auto=False)
    levers: list[dict[str, Any]] = [{}, {"recompute": "blocks"}]
    levers += [{"recompute_window": -1}, {"rnn_kernel": "native"}] if recurrent else [{"recompute": "operators"}]
    changes: list[dict[str, Any]] = [{}]
    if "precision" in allow:
        changes += [{"precision": "bf16-mixed"}]
    if "optimizer_state" in allow:
        changes += [{**change, "optimizer_state": kind} for change in changes for kind in ("int8",)]
    found = []
    for pipeline, replicate, shard, tensor in meshes(devices):
        axes: dict[str, Any] = {"pipeline": pipeline, "replicate": replicate, "shard": shard, "tensor": tensor}
        schedules = ("1f1b", "interleaved", "zero-bubble") if pipeline > 1 else ("1f1b",)
        zero1 = (False, True) if replicate > 1 and shard == tensor == 1 else (False,)
        offloads = offload.CHOICES if devices == 1 else ("none", "all")
        for lever, change, schedule, divided, away in product(levers, changes, schedules, zero1, offloads):
            plans = []
            for micros in range(1, config.global_batch // (replicate * shard) + 1):
                if config.global_batch % (replicate * shard * micros):
                    continue
                plan = replace(base, **axes, **lever, **change, schedule=schedule, zero1=divided, offload=away,
                               accumulate_grad_batches=micros, stages_per_device=None, stage_blocks=None)  # fmt: skip
                if plan.step_in_backward and micros > 1:
                    continue
                if schedule == "zero-bubble" and (plan.recompute, away) != ("none", "none"):  # slower, frees little
                    continue
                plan, problems = resolve(plan, devices, config.global_batch)
                if not problems and not of_optimizer(plan, config.optim.name, config.clip):
                    plans.append(plan)
            if plans and not cuts(config, plans[0]):
                found.append(plans)
    return found


class _Estimate:
    """Rough figures of plans of one model."""

    def __init__(self, settings: Settings, vocabulary: int, device: Device) -> None:
        from leanlm.planning.simulate import stages

        self.config, self.device = settings.config, device
        one = stages(settings.config, Plan(), vocabulary)
        self.flops, self.parameters, self.blocks = sum(one.cost.values()), one.parameters, len(one.split[0])
        width = max(1.0, (one.elements[one.split[0][0]] / 12) ** 0.5)
        self.kept = 16 * width * settings.config.sequence * 4  # bytes of a block and row, as of GPT-2's
        self.hidden = width * settings.config.sequence * 4
        self.averages = {"adamw": 2, "muon": 1, "sgd": 1, "adafactor": 0}[settings.config.optim.name]

    def __call__(self, plan: Plan) -> Rough:
        config, device = self.config, self.device.share(plan.world)
        held = self.parameters * 4 / (plan.pipeline * plan.shard * plan.tensor)
        state = held * self.averages * (0.25 if plan.optimizer_state == "int8" else 1) / (plan.replicate if plan.zero1 else 1)
        rows = plan.micro_batch(config.global_batch)
        ahead = {"1f1b": plan.pipeline, "interleaved": 1.3 * plan.pipeline}.get(plan.schedule, 1.5 * plan.pipeline)
        flying = min(plan.accumulate_grad_batches, ahead) if plan.pipeline > 1 else 1
        each = {"none": self.kept, "operators": 0.6 * self.kept, "blocks": self.hidden}.get(plan.recompute, self.kept)
        kept = each * rows * flying * self.blocks / plan.pipeline / plan.tensor**0.8
        if plan.recompute != "none":
            kept += self.kept * rows / plan.tensor**0.8  # of the block that is run again
        if plan.recompute_window:
            kept /= 8
        if plan.offload in ("activations", "all"):
            kept = self.kept * rows / plan.tensor**0.8
        if plan.offload in ("optimizer", "all"):
            state = 0
        extra = 4 / 3 if plan.recompute == "blocks" or plan.recompute_window else 1.08 if plan.recompute == "operators" else 1
        rate = device.flops["bfloat16" if plan.precision.startswith("bf16") else "float32"]
        seconds = 3 * extra * self.flops * config.global_batch / plan.world / rate
        if plan.pipeline > 1:
            part = {"1f1b": 1.0, "interleaved": 0.5, "zero-bubble": 0.3}[plan.schedule]
            seconds *= 1 + part * (plan.pipeline - 1) / plan.accumulate_grad_batches
        micros, bytes_ = plan.accumulate_grad_batches, self.parameters * 4
        sent = 2.0 * bytes_ / (plan.pipeline * plan.tensor) * (plan.readers > 1)
        if plan.shard > 1:
            sent = bytes_ * 3 * micros / (plan.pipeline * plan.tensor)
        if plan.tensor > 1:
            sent += 8 * self.hidden * rows * micros * self.blocks / plan.pipeline
        seconds += sent / device.link + micros * self.blocks * 120 * device.overhead
        if plan.offload != "none":
            seconds *= 1.5
        return Rough(seconds, 2 * held + state + kept)


def search(
    settings: Settings,
    vocabulary: int,
    device: Device,
    devices: int,
    allow: Iterable[str] = (),
    wanted: int = 6,
    unfit: int = 4,
) -> Answer:
    """Simulate plans from the fastest on until enough fit.

    Args:
        settings: of a training run; `plan` gives what is not searched.
        vocabulary: token types.
        device: of which each rank has one, or all share one machine.
        devices: how many.
        allow: levers labelled `changes` that may be used.
        wanted: fitting plans after which the search ends.
        unfit: plans that do not fit to report.

    Raises:
        UserError: no simulation has ended in time.
    """
    from leanlm.planning.simulate import stages

    recurrent = stages(settings.config, Plan(), vocabulary).recurrent
    rough = _Estimate(settings, vocabulary, device)
    mine = device.share(devices)
    budget = mine.memory * (1 - MARGIN)
    room = budget - mine.context - mine.process[int(devices > 1)]
    groups = families(settings, devices, recurrent, allow)
    figures = {id(plans): [rough(plan) for plan in plans] for plans in groups}
    queue: list[tuple[bool, float, list[Plan]]] = []  # whether it is hopeless, rough seconds, a family from there on
    smallest = min(
        ((figure.bytes, plan) for plans in groups for plan, figure in zip(plans, figures[id(plans)], strict=True)),
        key=lambda pair: pair[0],
    )[1]
    for plans in groups:
        guess = figures[id(plans)]
        first = next((i for i, figure in enumerate(guess) if figure.bytes < room), len(plans) - 1)
        hopeless = guess[first].bytes > HOPELESS * room
        queue.append((hopeless, guess[first].seconds * LATER.get(plans[first].schedule, 1), plans[first:]))
    queue.sort(key=lambda entry: entry[:2])
    fitting: list[Any] = []
    others: list[Any] = []
    until = time.monotonic() + SECONDS
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
    waiting = [_Worker(settings, vocabulary, device) for _ in range(workers)]
    running: dict[Any, tuple[_Worker, list[Plan]]] = {}

    def start(plan: Plan, rest: list[Plan]) -> None:
        worker = waiting.pop()
        worker.pipe.send(plan)
        running[worker.pipe] = worker, rest

    try:
        start(smallest, [])
        while running or (queue and len(fitting) < wanted and time.monotonic() < until):
            while queue and waiting and len(fitting) < wanted and time.monotonic() < until:
                *_, plans = queue.pop(0)
                start(plans[0], plans[1:])
            patience = PATIENCE if fitting or others else LONGEST
            ready = connection.wait(list(running), max(0.0, until + patience - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                worker, rest = running.pop(pipe)
                waiting.append(worker)
                found = worker.answer()
                if found.fullest.peak <= budget:
                    fitting.append(found)
                    continue
                others.append(found)
                if rest:  # more micro-batches, of fewer rows: so many that what grows with rows may fit
                    queue.insert(0, (False, 0.0, rest[_next(found, rest, budget) :]))
    finally:
        for worker in (*waiting, *(worker for worker, _ in running.values())):
            worker.process.kill()  # Lightning puts off SIGTERM until its loop is done
    if not fitting and not others:
        raise UserError(
            f"none of {sum(map(len, groups))} plans could be simulated within {SECONDS + LONGEST:.0f} s: write fewer devices, "
            "a shorter sequence or a smaller model"
        )
    fitting.sort(key=lambda found: found.seconds)
    others.sort(key=lambda found: found.seconds)
    least = min([*fitting, *others], key=lambda found: found.fullest.peak)
    return Answer(fitting, others[:unfit], least, sum(map(len, groups)), len(fitting) + len(others))


class _Worker:
    """A process that simulates one plan after the other. It may be killed at any time, which a pool's may not."""

    def __init__(self, *fixed: Any) -> None:
        # what this process has imported need not be imported again; a driver or threads elsewhere do not live through a fork
        forks = sys.platform == "linux" and not torch.cuda.is_initialized()
        context: Any = multiprocessing.get_context("fork" if forks else "spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_simulate_all, args=(theirs, *fixed), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        """The prediction that has come.

        Raises:
            RuntimeError: the simulation failed; with its traceback.
            UserError: the process is gone.
        """
        try:
            good, found = self.pipe.recv()
        except EOFError:
            self.process.join(1)
            raise UserError(
                f"the planner's own process was ended (exit status {self.process.exitcode}), as systems do without memory "
                "to give: name the plan instead of strategy=auto, or give the machine more memory"
            ) from None
        if not good:
            raise RuntimeError(found)
        return found


def _simulate_all(pipe: Any, settings: Settings, vocabulary: int, device: Device) -> None:
    from leanlm.planning.predict import predict

    torch.set_num_threads(1)
    while True:
        try:
            plan = pipe.recv()
        except EOFError:  # whoever asked is gone
            return
        try:
            pipe.send((True, predict(replace(settings, plan=plan), vocabulary, device)))
        except Exception:
            pipe.send((False, f"{plan.describe()}\n{traceback.format_exc()}"))


def _next(found: Any, rest: list[Plan], budget: float) -> int:
    parts = found.fullest.parts
    grows = parts["activations"] + parts["logits"] + parts["temporaries"]
    fixed = found.fullest.peak - grows
    micros = found.plan.accumulate_grad_batches
    for i, plan in enumerate(rest):
        if fixed + grows * micros / plan.accumulate_grad_batches <= budget:
            return i
    return len(rest) - 1
