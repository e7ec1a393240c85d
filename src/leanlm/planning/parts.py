"""Bytes of a traced step by part, and with what the process, its libraries and the allocator hold beside its tensors."""

from leanlm.planning import constants
from leanlm.planning.choice import Choice
from leanlm.planning.hardware.devices import Device
from leanlm.planning.simulation.trace import WORKSPACES, Trace
from leanlm.strategies.plan import AXES, Plan

PARTS = ("weights", "gradients", "state", "activations", "logits", "buffers", "temporaries")
FREED = "freed"


def peaks(trace: Trace) -> dict[str, dict[str, int]]:
    """Phase -> bytes of each part at the moment in it when most lived, and beside them `freed`: what the heap keeps of small
    tensors that are gone, where it never shrinks. Of a name that comes again, its largest moment."""
    live: dict[str, int] = dict.fromkeys((*PARTS, WORKSPACES, FREED), 0)
    now, heap, most, found = 0, 0, 0, dict[str, tuple[int, dict[str, int]]]()
    always = {number for number, part in trace.parts.items() if part == WORKSPACES}  # of every step but the first
    live[WORKSPACES] = now = sum(size for number, size in trace.events if number in always)
    for name, first, end in trace.pieces():
        best = now + live[FREED], dict(live)
        for number, size in trace.events[first:end]:
            if number in always:
                continue
            live[trace.parts.get(number, "temporaries")] += size
            now += size
            if trace.pinned and abs(size) < trace.own:
                heap += size
                most = max(most, heap)
                live[FREED] = most - heap
            if now + live[FREED] > best[0]:
                best = now + live[FREED], dict(live)
        if best[0] > found.get(name, (-1, {}))[0]:
            found[name] = best
    return {name: parts for name, (_, parts) in found.items()}


def heap_of(trace: Trace) -> int:
    """Most bytes at a time of tensors that live in the C library's heap."""
    now = most = 0
    for _, size in trace.events:
        if abs(size) < trace.own:
            now += size
            most = max(most, now)
    return most


def with_overhead(
    parts: dict[str, int], heap: int, plan: Choice, device: Device, recurrent: bool, reserved: int = 0
) -> dict[str, int]:
    """Bytes of tensors by part, and with them what the process, the libraries and the allocator hold."""
    parts = dict(parts)
    freed = parts.pop(FREED)
    if device.card:
        return parts | {
            "allocator": max(0, reserved - sum(parts.values())),
            "context": device.context + groups(plan) * device.communicator,
        }
    parts.pop(WORKSPACES, None)
    holes = round((constants.HEAP_RECURRENT if recurrent else constants.HEAP) * heap)
    return parts | {"overhead": _libraries(plan) + holes + freed, "process": device.process[int(plan.world > 1)]}


def groups(plan: Plan) -> int:
    """Groups of ranks that one belongs to: of all, and of each axis if there are several."""
    axes = sum(getattr(plan, axis) > 1 for axis in AXES)
    return axes + (axes > 1)


def _libraries(plan: Choice) -> int:
    """Bytes of what a process that trains touches of its libraries, and makes of them."""
    wanted = (
        (plan.world == 1, constants.ONE_PROCESS),
        (plan.world > 1, constants.SEVERAL),
        (plan.shard * plan.tensor > 1, constants.DTENSOR),
        (plan.shard > 1, constants.FSDP),
        (plan.pipeline > 1, constants.PIPELINE),
        (plan.pipeline > 1 and plan.stages > plan.pipeline, constants.STAGES),  # large tensors that take holes of the heap
        (plan.precision.startswith("bf16"), constants.BF16),
    )
    return sum(size for applies, size in wanted if applies)
