"""Every plan that could be taken, and the rough figures by which they are ordered before any is simulated."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from leanlm.config.of_model import can_compile, model_problems, worth_compiling
from leanlm.config.schema import Settings
from leanlm.memory import offload
from leanlm.planning.choice import Choice
from leanlm.planning.hardware.devices import MARGIN, Device
from leanlm.planning.hardware.probe import sent
from leanlm.planning.parts import groups
from leanlm.planning.simulation.step import Stages, stages
from leanlm.strategies import balance
from leanlm.strategies.checks import SAVED, of_run, resolve
from leanlm.strategies.plan import Plan


@dataclass(frozen=True)
class Rough:
    """What orders candidates before anything is simulated: seconds of a step and bytes on the fullest rank."""

    seconds: float
    bytes: float


def meshes(devices: int) -> Iterator[tuple[int, int, int, int]]:
    """Every (pipeline, replicate, shard, tensor) whose product is the number of devices."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    return (sizes for sizes in product(sizes, repeat=4) if sizes[0] * sizes[1] * sizes[2] * sizes[3] == devices)  # type: ignore[misc]


def families(settings: Settings, devices: int, whole: Stages, device: Device, allow: Iterable[str]) -> list[list[Choice]]:
    """Plans that can work and keep the curve, grouped by all but their micro-batches, of which the fewest come first.

    Args:
        settings: `plan` gives what is not searched: number types, state of the optimizer.
        devices: all of them are used.
        whole: the model as one stage.
        device: of which unequal ones get unequal stages of a pipeline under 1F1B.
        allow: what may change the curve and may be chosen too: precision, optim.state.
    """
    config, base = settings.config, replace(Choice.of(settings), auto=False)
    levers: list[dict[str, Any]] = [{}, {"recompute": "blocks"}]
    levers += [{"recompute_window": -1}] if whole.recurrent else [{"recompute": "operators"}]
    levers += [{"rnn_kernel": "native"}] if whole.recurrent and device.card is None else []
    changes: list[dict[str, Any]] = [{}]
    if "precision" in allow:
        changes += [{"precision": "bf16-mixed", "changed": ("precision=bf16-mixed",)}]
    if "optim.state" in allow:
        changes += [
            {**change, "state": "int8", "changed": (*change.get("changed", ()), "optim.state=int8")} for change in changes
        ]
    found = []
    settled = base.compile if device.card is None or base.compile != "auto" else False  # on a CPU auto never compiles
    for pipeline, replicate, shard, tensor in meshes(devices):
        axes: dict[str, Any] = {"pipeline": pipeline, "replicate": replicate, "shard": shard, "tensor": tensor}
        schedules = ("1f1b", "interleaved", "zero-bubble") if pipeline > 1 else ("1f1b",)
        zero1 = (False, True) if replicate > 1 and shard == tensor == 1 else (False,)
        offloads = offload.CHOICES if devices == 1 else ("none", "all")
        uneven = [("1f1b", blocks) for blocks in _uneven(whole, device, pipeline, devices)]
        orders = [*((schedule, None) for schedule in schedules), *uneven]
        mine = replace(base, **axes)
        asks = settled is False and base.compile == "auto" and can_compile(config, mine) and worth_compiling(config, mine)
        choices = product(levers, changes, orders, zero1, offloads, (settled, True) if asks else (settled,))
        for lever, change, (schedule, blocks), divided, away, compiled in choices:
            if compiled is True and lever.get("recompute") == "operators":  # a compiler chooses these itself
                continue
            plans = []
            for micros in range(1, config.global_batch // (replicate * shard) + 1):
                if config.global_batch % (replicate * shard * micros):
                    continue
                plan = replace(mine, **lever, **change, schedule=schedule, zero1=divided, offload=away, compile=compiled,
                               accumulate_grad_batches=micros, stages_per_device=None, stage_blocks=blocks)  # fmt: skip
                if plan.step_in_backward and micros > 1:
                    continue
                if schedule == "zero-bubble" and (plan.recompute, away) != ("none", "none"):  # slower, frees little
                    continue
                problems = resolve(plan, devices, config.global_batch)[1]  # nothing is open that it would fill in
                if not problems and not of_run(plan, replace(config.optim, state=plan.state), plan.precision, config.clip):
                    plans.append(plan)
            if plans and not model_problems(config, plans[0]):
                found.append(plans)
    return found


def _uneven(whole: Stages, device: Device, pipeline: int, devices: int) -> list[list[int]]:
    """Blocks of each stage that suit the speeds of unequal devices, and their memories."""
    if pipeline == 1 or device.alike or len(whole.split[0]) < pipeline:
        return []
    each = devices // pipeline
    places = [device.least(range(first, first + each)) for first in range(0, devices, each)]
    parts = {name: float(count) for name, count in whole.elements.items()}
    weights = (whole.cost, [place.bandwidth for place in places]), (parts, [float(place.memory) for place in places])
    found = [balance.by_weight(cost, shares) for cost, shares in weights]
    return [found[0]] + found[1:] * (found[1] != found[0])


class Estimate:
    """Rough figures of plans of one model."""

    def __init__(self, settings: Settings, vocabulary: int, device: Device) -> None:
        self.config, self.device = settings.config, device
        one = stages(settings.config, Plan(), vocabulary)
        self.flops, self.parameters, self.blocks = sum(one.cost.values()), one.parameters, len(one.split[0])
        self.ends = max(one.elements["embed"], one.elements["head"])  # parameters that one stage has beside its blocks
        width = max(1.0, (one.elements[one.split[0][0]] / 12) ** 0.5)
        self.kept = 16 * width * settings.config.sequence * 4  # bytes of a block and row, as of GPT-2's
        self.hidden = width * settings.config.sequence * 4
        # 5 iterations of Newton and Schulz, of which each multiplies three times; not divided but along a pipeline
        matrices = self.blocks * one.elements[one.split[0][0]]
        self.update = 30 * width * matrices if settings.config.optim.name == "muon" else 0.0
        # bytes of weights that a recurrence reads again for each token, twice in backward
        self.again = 3 * 4 * one.elements[one.split[0][0]] / 2 * settings.config.sequence if one.recurrent else 0.0
        self.averages = {"adamw": 2, "muon": 1, "sgd": 1, "adafactor": 0}[settings.config.optim.name]

    def room(self, plan: Choice) -> float:
        """Bytes that the fullest rank may take beside its process and driver; along a pipeline, the mean of unequal ones."""
        device = self.device.share(plan.world)
        memories = device.memories if plan.pipeline > 1 else ()
        memory = sum(memories) / len(memories) if memories else device.memory
        card = device.context + 2 * device.workspace + groups(plan) * device.communicator
        return memory * (1 - MARGIN) - card - device.process[int(plan.world > 1)]

    def __call__(self, plan: Choice) -> Rough:
        config, device = self.config, self.device.share(plan.world)
        speeds = device.speeds or (1.0,)
        speed = sum(speeds) / len(speeds) if plan.pipeline > 1 else min(speeds)
        held = (self.parameters + self.ends * (plan.pipeline - 1)) * 4 / (plan.pipeline * plan.shard * plan.tensor)
        state = held * self.averages * (0.25 if plan.state == "int8" else 1) / (plan.replicate if plan.zero1 else 1)
        rows = plan.micro_batch(config.global_batch)
        ahead = {"1f1b": plan.pipeline, "interleaved": 1.3 * plan.pipeline}.get(plan.schedule, 1.5 * plan.pipeline)
        flying = min(plan.accumulate_grad_batches, ahead) if plan.pipeline > 1 else 1
        each = {"none": self.kept, "operators": 0.7 * self.kept, "blocks": self.hidden}.get(plan.recompute, self.kept)
        kept = each * rows * flying * self.blocks / plan.pipeline / plan.tensor**0.8
        if plan.recompute != "none":
            kept += self.kept * rows / plan.tensor**0.8  # of the block that is run again
        if plan.recompute_window:
            kept /= 8
        if plan.offload in ("activations", "all"):
            kept = self.kept * rows / plan.tensor**0.8
        if plan.offload in ("optimizer", "all"):
            state = 0
        if plan.pipeline > 1:  # torch's buffers for what every micro-batch receives
            kept += self.hidden * config.global_batch / plan.data_parallel_size * plan.stages / plan.pipeline
        extra = 4 / 3 if plan.recompute == "blocks" or plan.recompute_window else 1.08 if plan.recompute == "operators" else 1
        rate = device.flops["bfloat16" if plan.precision.startswith("bf16") else "float32"]
        seconds = 3 * extra * self.flops * config.global_batch / plan.world / (rate * speed)
        if plan.pipeline > 1:
            part = {"interleaved": 0.5, "zero-bubble": 0.3}.get(plan.schedule, 1.0)
            seconds *= 1 + part * (plan.pipeline - 1) / plan.accumulate_grad_batches
        micros, mine = plan.accumulate_grad_batches, self.parameters * 4 / (plan.pipeline * plan.tensor)

        def sending(kind: str, payload: float, ranks: int) -> float:
            return payload * sent(kind, ranks) / device.links.get(kind, device.link)

        if plan.shard > 1:  # gathered forward and backward; and by Muon, as whole matrices
            gathered = 2 * micros + (config.optim.name == "muon")
            seconds += sending("all-gather", gathered * mine, plan.shard) + sending("reduce-scatter", micros * mine, plan.shard)
        if plan.replicate > 1:
            seconds += sending("all-reduce", mine / plan.shard, plan.replicate) * (1.5 if plan.zero1 else 1)
        if plan.tensor > 1:  # hidden states twice forward and twice backward
            seconds += sending("all-reduce", 4 * self.hidden * rows * micros * self.blocks / plan.pipeline, plan.tensor)
        operations = {"none": 200, "operators": 1100, "blocks": 500}.get(plan.recompute, 350)  # and what tracks them
        starting = micros * self.blocks * operations * device.overhead
        seconds = max(seconds, starting) if device.card else seconds + starting
        seconds += micros * self.blocks * self.again / (plan.pipeline * plan.tensor * device.bandwidth * speed)
        if plan.offload != "none":
            seconds *= 1.5
        if plan.compiled:
            seconds *= 1 - SAVED
        half = device.flops.get("bfloat16", device.flops["float32"])
        seconds += self.update / plan.pipeline / (half * speed) + 40 * held / (device.bandwidth * speed)
        return Rough(seconds, 2 * held + state + kept)
