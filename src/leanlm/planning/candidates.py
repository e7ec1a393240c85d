"""Every plan that could be taken, and the rough figures by which they are ordered before any is simulated."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any, NamedTuple

from leanlm.config.of_model import SAVED, can_compile, model_problems, worth_compiling
from leanlm.config.schema import Settings
from leanlm.memory import offload
from leanlm.planning import constants
from leanlm.planning.choice import Choice
from leanlm.planning.hardware.devices import MARGIN, Device
from leanlm.planning.parts import groups
from leanlm.planning.simulation.step import Stages, stages
from leanlm.strategies import balance
from leanlm.strategies.checks import of_run, resolve
from leanlm.strategies.plan import AXES, Plan


class Rough(NamedTuple):
    """What orders candidates before anything is simulated."""

    seconds: float  # of a step
    bytes: float  # on the fullest rank


def meshes(devices: int) -> Iterator[tuple[int, ...]]:
    """Every (pipeline, replicate, shard, tensor) whose product is the number of devices."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    return (mesh for mesh in product(sizes, repeat=4) if prod(mesh) == devices)


def families(settings: Settings, devices: int, whole: Stages, device: Device, allow: Iterable[str]) -> list[list[Choice]]:
    """Plans that can work and keep the curve, grouped by all but their micro-batches, of which the fewest come first.

    All `devices` are used. `settings.plan` gives what is not searched; `whole` is the model as one stage; `allow` says what may
    change the curve and may be chosen too: precision, optim.state.
    """
    base = replace(Choice.of(settings), auto=False)
    found = []
    for mesh in meshes(devices):
        axes: dict[str, Any] = dict(zip(AXES, mesh, strict=True))
        mine = replace(base, **axes)
        choices = product(
            _recomputations(whole, device),
            _changes(allow),
            _schedules(whole, device, mine),
            (False, True) if mine.replicate > 1 and mine.shard == mine.tensor == 1 else (False,),
            offload.CHOICES if devices == 1 else ("none", "all"),
            _compilations(settings, device, mine),
        )
        for lever, change, (schedule, blocks), zero1, away, compiled in choices:
            if compiled is True and lever.get("recompute") == "operators":  # a compiler chooses these itself
                continue
            plan = replace(mine, **lever, **change, schedule=schedule, zero1=zero1, offload=away, compile=compiled,
                           stages_per_device=None, stage_blocks=blocks)  # fmt: skip
            plans = list(_with_micro_batches(settings, plan))
            if plans and not model_problems(settings.config, plans[0]):
                found.append(plans)
    return found


def _recomputations(whole: Stages, device: Device) -> list[dict[str, Any]]:
    levers: list[dict[str, Any]] = [{}, {"recompute": "blocks"}]
    levers.append({"recompute_window": -1} if whole.recurrent else {"recompute": "operators"})
    return levers + [{"rnn_kernel": "native"}] * (whole.recurrent and device.card is None)


def _changes(allow: Iterable[str]) -> list[dict[str, Any]]:
    changes: list[dict[str, Any]] = [{}]
    if "precision" in allow:
        changes.append({"precision": "bf16-mixed", "changed": ("precision=bf16-mixed",)})
    if "optim.state" in allow:
        changes += [{**its, "state": "int8", "changed": (*its.get("changed", ()), "optim.state=int8")} for its in changes]
    return changes


def _schedules(whole: Stages, device: Device, plan: Plan) -> list[tuple[str, list[int] | None]]:
    """Schedules of a pipeline, with the blocks of each stage; None: even ones."""
    names = ("1f1b", "interleaved", "zero-bubble") if plan.pipeline > 1 else ("1f1b",)
    return [*((name, None) for name in names), *(("1f1b", blocks) for blocks in _uneven(whole, device, plan))]


def _uneven(whole: Stages, device: Device, plan: Plan) -> list[list[int]]:
    """Blocks of each stage that suit the speeds of unequal devices, and their memories."""
    if plan.pipeline == 1 or device.alike or len(whole.split[0]) < plan.pipeline:
        return []
    each = plan.world // plan.pipeline
    places = [device.least(range(first, first + each)) for first in range(0, plan.world, each)]
    parts = {name: float(count) for name, count in whole.elements.items()}
    by_speed = balance.by_weight(whole.cost, [place.bandwidth for place in places])
    by_memory = balance.by_weight(parts, [float(place.memory) for place in places])
    return [by_speed] if by_speed == by_memory else [by_speed, by_memory]


def _compilations(settings: Settings, device: Device, plan: Choice) -> tuple[Any, ...]:
    if device.card is None or plan.compile != "auto":
        return (plan.compile,)  # on a CPU auto never compiles
    asks = can_compile(settings.config, plan) and worth_compiling(settings.config, plan)
    return (False, True) if asks else (False,)


def _with_micro_batches(settings: Settings, plan: Choice) -> Iterator[Choice]:
    """A plan with every number of micro-batches under which it can work."""
    config = settings.config
    rows = config.global_batch // plan.data_parallel_size
    if plan.schedule == "zero-bubble" and (plan.recompute, plan.offload) != ("none", "none"):  # slower, frees little
        return
    for micros in range(1, rows + 1):
        if config.global_batch % (plan.data_parallel_size * micros) or (plan.step_in_backward and micros > 1):
            continue
        cut = replace(plan, accumulate_grad_batches=micros)
        problems = resolve(cut, plan.world, config.global_batch)[1]  # nothing is open that it would fill in
        if not problems and not of_run(cut, replace(config.optim, state=plan.state), plan.precision, config.clip):
            yield cut


class Estimate:
    """Rough figures of plans of one model."""

    def __init__(self, settings: Settings, vocabulary: int, device: Device) -> None:
        self.config, self.device = settings.config, device
        one = stages(settings.config, Plan(), vocabulary)
        self.flops, self.parameters, self.blocks = sum(one.cost.values()), one.parameters, len(one.split[0])
        self.trained = one.trained / one.parameters
        self.ends = max(one.elements["embed"], one.elements["head"])  # parameters that one stage has beside its blocks
        block, sequence = one.elements[one.split[0][0]], settings.config.sequence
        width = max(1.0, (block / 12) ** 0.5)
        self.kept = constants.KEPT_WIDTHS * width * sequence * 4  # bytes of a block and row
        self.hidden = width * sequence * 4
        # Muon's 5 iterations of Newton and Schulz, of which each multiplies three times; divided only along a pipeline
        self.muon = settings.config.optim.name == "muon"
        self.update = 30 * width * self.blocks * block * self.trained if self.muon else 0.0
        # bytes of weights that a recurrence reads again for each token, twice in backward
        self.again = 3 * 4 * block / 2 * sequence if one.recurrent else 0.0
        self.averages = {"adamw": 2, "muon": 1, "sgd": 1, "adafactor": 0}[settings.config.optim.name]

    def room(self, plan: Choice) -> float:
        """Bytes that the fullest rank may take beside its process and driver; along a pipeline, the mean of unequal ones."""
        device = self.device.share(plan.world)
        memories = device.memories if plan.pipeline > 1 else ()
        memory = sum(memories) / len(memories) if memories else device.memory
        card = device.context + 2 * device.workspace + groups(plan) * device.communicator
        return memory * (1 - MARGIN) - card - device.process[int(plan.world > 1)]

    def __call__(self, plan: Choice) -> Rough:
        weights = (1 + self.trained) * self._held(plan)  # and their gradients
        return Rough(self._seconds(plan), weights + self._state(plan) + self._activations(plan))

    def _held(self, plan: Choice) -> float:
        """Bytes of weights on the fullest rank."""
        parameters = self.parameters + self.ends * (plan.pipeline - 1)
        return parameters * 4 / (plan.pipeline * plan.shard * plan.tensor)

    def _state(self, plan: Choice) -> float:
        """Bytes of the optimizer's state."""
        if plan.offloads("optimizer"):
            return 0
        size = self._held(plan) * self.trained * self.averages * (0.25 if plan.state == "int8" else 1)
        return size / (plan.replicate if plan.zero1 else 1)

    def _activations(self, plan: Choice) -> float:
        """Bytes that are kept for backward, and a pipeline's buffers."""
        rows, divided = plan.micro_batch(self.config.global_batch), plan.tensor**constants.TENSOR_DIVIDES
        block = self.kept * rows / divided  # of one block and micro-batch
        if plan.offloads("activations"):
            kept = block
        else:
            ahead = constants.IN_FLIGHT.get(plan.schedule, constants.IN_FLIGHT["others"]) * plan.pipeline
            flying = min(plan.accumulate_grad_batches, ahead) if plan.pipeline > 1 else 1
            each = {"operators": constants.OPERATORS_KEEP * self.kept, "blocks": self.hidden}.get(plan.recompute, self.kept)
            kept = each * rows * flying * self.blocks / plan.pipeline / divided
            if plan.recompute != "none":
                kept += block  # that is run again
            if plan.recompute_window:
                kept *= constants.WINDOWS_KEEP
        if plan.pipeline > 1:  # torch's buffers for what every micro-batch receives
            kept += self.hidden * self.config.global_batch / plan.data_parallel_size * plan.stages / plan.pipeline
        return kept

    def _seconds(self, plan: Choice) -> float:
        device, micros = self.device.share(plan.world), plan.accumulate_grad_batches
        speeds = device.speeds or (1.0,)
        speed = sum(speeds) / len(speeds) if plan.pipeline > 1 else min(speeds)
        rate = device.flops["bfloat16" if plan.precision.startswith("bf16") else "float32"] * speed
        again = constants.RECOMPUTING.get("blocks" if plan.recompute_window else plan.recompute, 1.0)
        seconds = (2 + self.trained) * again * self.flops * self.config.global_batch / plan.world / rate
        if plan.pipeline > 1:
            seconds *= 1 + constants.IDLE.get(plan.schedule, 1.0) * (plan.pipeline - 1) / micros
        seconds += self._sending(plan, device)
        operations = constants.OPERATIONS.get(plan.recompute, constants.OPERATIONS["others"])  # and what tracks them
        starting = micros * self.blocks * operations * device.overhead
        seconds = max(seconds, starting) if device.card else seconds + starting
        seconds += micros * self.blocks * self.again / (plan.pipeline * plan.tensor * device.bandwidth * speed)
        if plan.offload != "none":
            seconds *= constants.OFFLOADING
        if plan.compiled:
            seconds *= 1 - SAVED
        half = device.flops.get("bfloat16", device.flops["float32"])
        updating = constants.UPDATE * self.trained * self._held(plan) / (device.bandwidth * speed)
        return seconds + self.update / plan.pipeline / (half * speed) + updating

    def _sending(self, plan: Choice, device: Device) -> float:
        """Seconds of communication."""
        micros, mine = plan.accumulate_grad_batches, self.parameters * 4 / (plan.pipeline * plan.tensor)
        seconds = 0.0
        if plan.shard > 1:  # gathered forward and backward; and by Muon, as whole matrices
            seconds += device.sending("all-gather", (2 * micros + self.muon) * mine, plan.shard)
            seconds += device.sending("reduce-scatter", micros * self.trained * mine, plan.shard)
        if plan.replicate > 1:
            times = constants.ZERO1_SENDS if plan.zero1 else 1
            seconds += device.sending("all-reduce", self.trained * mine / plan.shard, plan.replicate) * times
        if plan.tensor > 1:  # hidden states twice forward and twice backward
            hidden = 4 * self.hidden * plan.micro_batch(self.config.global_batch) * micros * self.blocks / plan.pipeline
            seconds += device.sending("all-reduce", hidden, plan.tensor)
        return seconds
