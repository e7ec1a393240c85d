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
from leanlm.planning.predict import Prediction, predict
from leanlm.planning.simulation.step import stages

HOPELESS = 1.3  # budgets of rough bytes from which on a plan is tried last
SECONDS = 10.5  # from the program's begin on, after which no plan is begun, once two (may) fit or it is clear that none does
SHORTEST = 5.0  # seconds of a search that begins late
PATIENCE = 2.0  # seconds more for plans that were begun
LONGEST = 20.0  # seconds more in which other plans are begun, if one fits and no other may, or none does but some come near
ANSWER = 300.0  # as long as none has been simulated at all: on a machine that does much else


@dataclass
class Answer:
    """What a search found."""

    fitting: list[Prediction]  # that fit, fastest first
    others: list[Prediction]  # that do not, fastest first
    least: Prediction  # that exceeds its budget least, or leaves most of it
    candidates: int  # how many plans there were
    simulated: int  # of these, in the order of the rough estimate, before enough were found or time was up


def search(settings: Settings, vocabulary: int, device: Device, devices: int, allow: Iterable[str] = (), wanted: int = 6,
           unfit: int = 4) -> Answer:  # fmt: skip
    """Simulate plans from the fastest on until `wanted` of them fit, and report so many `unfit` ones.

    `settings.plan` gives what is not searched; `allow`: levers labelled `changes` that may be used.

    Raises:
        UserError: no simulation has ended in time.
    """
    until = max(BEGAN + SECONDS, time.monotonic() + SHORTEST)
    team = [_Worker(settings, vocabulary, device) for _ in range(max(1, min(cores(), 8, memory_limit() // WORKER)))]
    try:  # they import while plans are enumerated
        queue, candidates = _in_order(settings, vocabulary, device, devices, allow)
        simulations = _Simulations(queue, team, wanted, until)
        simulations.run()
    finally:
        for worker in team:
            worker.process.kill()  # Lightning puts off SIGTERM until its loop is done
            worker.process.join()
    fitting, others = (sorted(some, key=lambda found: found.seconds) for some in (simulations.fitting, simulations.others))
    if not fitting and not others:
        raise UserError(
            f"none of {candidates} plans could be simulated within {ANSWER:.0f} s: write fewer devices, "
            "a shorter sequence or a smaller model"
        )
    least = min([*fitting, *others], key=lambda found: found.fullest.over)
    return Answer(fitting, others[:unfit], least, candidates, len(fitting) + len(others))


class _Family(NamedTuple):
    """Plans that differ in their micro-batches, from the fastest on that may fit."""

    hopeless: bool  # whether even that is
    seconds: float  # its rough ones
    least: float  # rough bytes of the last
    plans: list[Choice]


def _in_order(
    settings: Settings, vocabulary: int, device: Device, devices: int, allow: Iterable[str]
) -> tuple[list[_Family], int]:
    """Families, the likeliest first, and how many plans there are."""
    whole = stages(settings.config, settings.plan, vocabulary)
    rough = Estimate(settings, vocabulary, device)
    groups = [[(plan, rough(plan)) for plan in plans] for plans in families(settings, devices, whole, device, allow)]
    smallest, least = min((pair for group in groups for pair in group), key=lambda pair: pair[1].bytes)
    queue = []
    for group in groups:
        room = rough.room(group[0][0])
        fit = [i for i, (_, figure) in enumerate(group) if figure.bytes < room]
        # along a pipeline more micro-batches may be faster, elsewhere the fewest are
        first = min(fit, key=lambda i: group[i][1].seconds) if fit else len(group) - 1
        plan, figure = group[first]
        rest = [pair for pair in group[first:] if pair[0] is not smallest]
        if rest:
            seconds = figure.seconds * LATER.get(plan.schedule, 1)
            queue.append(_Family(figure.bytes > HOPELESS * room, seconds, rest[-1][1].bytes, [plan for plan, _ in rest]))
    queue.sort(key=lambda family: family[:2])
    # it tells the least budget, and may take as long to simulate as several others
    queue.insert(2, _Family(False, 0.0, least.bytes, [smallest]))
    return queue, sum(map(len, groups))


class _Simulations:
    """Plans of families, simulated by a team of processes until enough fit or time is up."""

    def __init__(self, queue: list[_Family], team: list["_Worker"], wanted: int, until: float) -> None:
        self.queue, self.waiting, self.wanted, self.until = queue, list(team), wanted, until
        self.running: dict[Any, tuple[_Worker, _Family]] = {}
        self.fitting: list[Prediction] = []
        self.others: list[Prediction] = []

    def run(self) -> None:
        while self.running or (self.queue and self._goes_on()):
            while self.queue and self.waiting and self._goes_on():
                worker, family = self.waiting.pop(), self._next_family()
                with suppress(BrokenPipeError):  # it has been ended; its answer will say so
                    worker.pipe.send(family.plans[0])
                self.running[worker.pipe] = worker, family
            patience = self.until + (self._extra() or PATIENCE) - time.monotonic()
            ready = connection.wait(list(self.running), max(0.0, patience))
            if not ready:
                return
            for pipe in ready:
                self._answered(*self.running.pop(pipe))

    def _extra(self) -> float:
        """Seconds beyond the end in which plans are still begun."""
        if not self.fitting and not self.others:
            return ANSWER
        near = bool(self.fitting) or min(found.fullest.peak / found.fullest.memory for found in self.others) < HOPELESS
        known = len(self.fitting) + (sum(found.tight for found in self.others) if self.fitting else 0)
        return LONGEST if known < 2 and near else 0.0

    def _goes_on(self) -> bool:
        return len(self.fitting) < self.wanted and time.monotonic() < self.until + self._extra()

    def _next_family(self) -> _Family:
        if self.fitting or time.monotonic() < self.until:
            return self.queue.pop(0)
        # before it is said that none fits: the family whose last plan, of the most micro-batches, is the smallest
        family = min(self.queue, key=lambda family: family.least)
        self.queue.remove(family)
        return family._replace(plans=family.plans[-1:])

    def _answered(self, worker: "_Worker", family: _Family) -> None:
        found = worker.answer(last=not self.running and not self.waiting)
        if found is None:  # the system had not enough memory for all
            self.queue.insert(0, family)
            return
        self.waiting.append(worker)
        (self.fitting if found.fits else self.others).append(found)
        rest = family.plans[1:]
        if rest and not found.fits:  # more micro-batches, of fewer rows: so many that what grows with rows may fit
            self.queue.insert(0, family._replace(plans=rest[_next(found, rest) :]))


def _next(found: Prediction, rest: list[Choice]) -> int:
    """The first of plans with more micro-batches, or the last, that frees what one that does not fit has too much."""
    need, micros = found.fullest, found.plan.accumulate_grad_batches
    grows = need.parts["activations"] + need.parts["logits"] + need.parts["temporaries"]
    fit = (i for i, plan in enumerate(rest) if need.over <= grows * (1 - micros / plan.accumulate_grad_batches))
    return next(fit, len(rest) - 1)


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

    def answer(self, last: bool) -> Prediction | None:
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
