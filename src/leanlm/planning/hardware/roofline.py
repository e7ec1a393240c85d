"""Seconds that counted operations take (the roofline of Williams et al. 2009), calibrated by a probe or by data sheets."""

from collections import Counter

from leanlm.planning.constants import KERNEL, LAYOUT, OVERLAP, REACHED
from leanlm.planning.hardware.devices import Device
from leanlm.planning.simulation.trace import Work
from leanlm.strategies.plan import Plan


def seconds(work: dict[str, Counter[Work]], micros: int, plan: Plan, device: Device) -> float:
    """Of these phases, those of the second micro-batch so many times.

    A processor takes for each operation what starting it takes, its arithmetic and its memory. A GPU computes while its
    machine starts the next operations: whichever takes longer counts. DDP and FSDP2 send while a device of its own computes;
    processes that share cores do one or the other.
    """
    computing = starting = blocking = beside = 0.0
    for phase, counter in work.items():
        again = micros if "micro-batch 1" in phase else 1
        for kind, count in counter.items():
            times = again * count
            if not kind.collective:
                computing += times * _computing(kind, device)
                starting += times * kind.dispatches * device.overhead
            elif plan.data_parallel_size > 1 and kind.ranks > 1 and plan.tensor == 1 and not device.shared:
                beside += times * _sending(kind, device)
            else:
                blocking += times * _sending(kind, device)
    computing = computing + starting if device.card is None else max(computing, starting)
    return computing + blocking + max(0.0, beside - OVERLAP * computing)


def _sending(kind: Work, device: Device) -> float:
    return device.latency + device.sending(kind.collective, kind.size, kind.ranks)


def _computing(kind: Work, device: Device) -> float:
    arithmetic = kind.flops / device.flops.get(kind.dtype, device.flops["float32"])
    moving = kind.moved / device.bandwidth
    if device.card:
        return max(kind.launches * KERNEL, arithmetic / REACHED, moving / REACHED)
    if kind.flops:
        moving *= LAYOUT
    return arithmetic + moving + kind.fresh / device.paging + kind.small / device.small_paging
