"""The fastest of the plans that fit.

Every way to cut the work over the devices is ordered by a rough estimate (closed forms over counted operations, parameters and
what one block keeps); from the fastest on, plans are simulated until enough of them fit. Only these are ever shown or taken.
"""

import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from typing import Any, NamedTuple

import torch

from leanlm import BEGAN
from leanlm.common.errors import UserError
from leanlm.common.machine import cores, memory_limit
from leanlm.config.schema import Settings
from leanlm.planning.candidates import Estimate, families
from leanlm.planning.choice import Choice
from leanlm.planning.constants import LATER, WORKER
from leanlm.planning.hardware.devices import Device
from leanlm.planning.simulation.step import stages

HOPELESS = 1.3  # budgets of rough bytes from which on a plan is tried last
SECONDS = 10.5  # from the program's begin on, after which no plan is begun, once two (may) fit or it is clear that none does
SHORTEST = 5.0  # seconds of a search that begins late
PATIENCE = 2.0  # seconds more for plans that were begun
LONGEST = 20.0  # seconds more in which other plans are begun, if one fits and no other may, or none does but some come near
ANSWER = 300.0  # as long as none has been simulated at all: on a machine that does much else


@dataclass
class Answer:
    """What a search found.

    Attributes:
        fitting: predictions that fit, fastest first.
        others: of plans that do not, the fastest first.
        least: the prediction that exceeds its budget least, or leaves most of it.
        candidates: how many plans there were.
        simulated: how many of them were looked at, in the order of the rough estimate, before enough were found or time was up.
    """

    fitting: list[Any]
    others: list[Any]
    least: Any
    candidates: int
    simulated: int


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
    until = max(BEGAN + SECONDS, time.monotonic() + SHORTEST)
    team = [_Worker(settings, vocabulary, device) for _ in range(max(1, min(cores(), 8, memory_limit() // WORKER)))]
    try:  # they import while plans are enumerated
        queue, candidates = _in_order(settings, vocabulary, device, devices, allow)
        fitting, others = _simulated(queue, team, wanted, until)
    finally:
        for worker in team:
            worker.process.kill()  # Lightning puts off SIGTERM until its loop is done
            worker.process.join()
    if not fitting and not others:
        raise UserError(
            f"none of {candidates} plans could be simulated within {ANSWER:.0f} s: write fewer devices, "
            "a shorter sequence or a smaller model"
        )
    fitting.sort(key=lambda found: found.seconds)
    others.sort(key=lambda found: found.seconds)
    least = min([*fitting, *others], key=lambda found: found.fullest.over)
    return Answer(fitting, others[:unfit], least, candidates, len(fitting) + len(others))


class _Family(NamedTuple):
    """Plans that differ in their micro-batches, from the fastest on that may fit: whether even that is hopeless, its rough
    seconds, and the rough bytes of the last."""

    hopeless: bool
    seconds: float
    least: float
    plans: list[Choice]


def _in_order(
    settings: Settings, vocabulary: int, device: Device, devices: int, allow: Iterable[str]
) -> tuple[list[_Family], int]:
    """Families, the likeliest first, and how many plans there are."""
    whole = stages(settings.config, settings.plan, vocabulary)
    rough = Estimate(settings, vocabulary, device)
    groups = families(settings, devices, whole, device, allow)
    figures = [[rough(plan) for plan in plans] for plans in groups]
    smallest = min(
        ((figure.bytes, plan) for plans, guess in zip(groups, figures, strict=True)
         for plan, figure in zip(plans, guess, strict=True)), key=lambda pair: pair[0])[1]  # fmt: skip
    queue = []
    for plans, guess in zip(groups, figures, strict=True):
        room = rough.room(plans[0])
        fit = [i for i, figure in enumerate(guess) if figure.bytes < room]
        # along a pipeline more micro-batches may be faster, elsewhere the fewest are
        first = min(fit, key=lambda i: guess[i].seconds) if fit else len(plans) - 1
        rest = [plan for plan in plans[first:] if plan is not smallest]
        seconds = guess[first].seconds * LATER.get(plans[0].schedule, 1)
        if rest:
            queue.append(_Family(guess[first].bytes > HOPELESS * room, seconds, rough(rest[-1]).bytes, rest))
    queue.sort(key=lambda family: family[:2])
    # it tells the least budget, and may take as long to simulate as several others
    queue.insert(2, _Family(False, 0.0, rough(smallest).bytes, [smallest]))
    return queue, sum(map(len, groups))


def _simulated(queue: list[_Family], team: list["_Worker"], wanted: int, until: float) -> tuple[list[Any], list[Any]]:
    """Predictions that fit, and those that do not."""
    fitting: list[Any] = []
    others: list[Any] = []
    waiting, running = list(team), dict[Any, tuple[_Worker, _Family]]()

    def extra() -> float:
        if not fitting and not others:
            return ANSWER
        near = bool(fitting) or min(found.fullest.peak / found.fullest.memory for found in others) < HOPELESS
        known = len(fitting) + (sum(found.tight for found in others) if fitting else 0)
        return LONGEST if known < 2 and near else 0.0

    def more() -> bool:
        return len(fitting) < wanted and time.monotonic() < until + extra()

    def take() -> _Family:
        if fitting or time.monotonic() < until:
            return queue.pop(0)
        # before it is said that none fits: the family whose last plan, of the most micro-batches, is the smallest
        family = queue.pop(min(range(len(queue)), key=lambda i: queue[i].least))
        return family._replace(plans=family.plans[-1:])

    while running or (queue and more()):
        while queue and waiting and more():
            worker, family = waiting.pop(), take()
            with suppress(BrokenPipeError):  # it has been ended; its answer will say so
                worker.pipe.send(family.plans[0])
            running[worker.pipe] = worker, family
        ready = connection.wait(list(running), max(0.0, until + (extra() or PATIENCE) - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            worker, family = running.pop(pipe)
            found = worker.answer(last=not running and not waiting)
            if found is None:  # the system had not enough memory for all
                queue.insert(0, family)
                continue
            waiting.append(worker)
            (fitting if found.fits else others).append(found)
            rest = family.plans[1:]
            if rest and not found.fits:  # more micro-batches, of fewer rows: so many that what grows with rows may fit
                queue.insert(0, family._replace(plans=rest[_next(found, rest) :]))
    return fitting, others


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

    def answer(self, last: bool) -> Any:
        """The prediction that has come; None: the process is gone.

        Raises:
            RuntimeError: the simulation failed; with its traceback.
            UserError: the process is gone, and was the last.
        """
        try:
            good, found = self.pipe.recv()
        except EOFError:
            self.process.join(1)
            if not last:
                return None
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


def _next(found: Any, rest: list[Choice]) -> int:
    need = found.fullest
    grows = need.parts["activations"] + need.parts["logits"] + need.parts["temporaries"]
    micros = found.plan.accumulate_grad_batches
    for i, plan in enumerate(rest):
        if need.over <= grows * (1 - micros / plan.accumulate_grad_batches):
            return i
    return len(rest) - 1
