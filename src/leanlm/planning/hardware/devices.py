"""Devices: how much memory one has and how fast it is, measured here or from a data sheet (`conf/device`)."""

import json
import math
import platform
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from leanlm.common.errors import UserError
from leanlm.common.files import cache_folder, writable, write
from leanlm.common.machine import cores, memory_limit
from leanlm.config.device_sheets import size
from leanlm.planning.constants import SLICE
from leanlm.planning.hardware import gpus
from leanlm.planning.hardware.probe import VERSION, measured, sent

LISTS = ("memory", "speed")  # of a config, what may be given for each device
SIZES = ("total", "context", "workspace", "communicator")
MARGIN = 0.05  # of a budget that is left free: predictions have errors


@dataclass(frozen=True)
class Device:
    """One device, or a machine whose processes share memory and cores."""

    name: str
    accelerator: str  # auto, cpu or cuda
    memory: int  # bytes that a process may use on it; of a machine that is shared, all its processes
    flops: dict[str, float] = field(hash=False)  # number type -> floating-point operations per second in matrix products
    bandwidth: float  # bytes per second to and from its memory
    link: float  # bytes per second from one device to another, in one direction
    latency: float  # seconds of a collective operation without payload
    overhead: float  # seconds of an operation without work
    total: int = 0  # bytes of a GPU, whatever may be used of it
    context: int = 0  # bytes that a GPU's driver and the kernels take
    workspace: int = 0  # bytes that cuBLAS takes for each thread that multiplies
    communicator: int = 0  # bytes that NCCL takes for each group of ranks
    threads: int = 0  # that a GPU keeps resident
    # bytes of a process that trains alone before it has built anything, of one of several, and of what starts these, without
    # the pages of libraries that several processes share
    process: tuple[int, int, int] = (0, 0, 0)
    common: int = 0  # bytes of these pages
    links: dict[str, float] = field(default_factory=dict, hash=False)  # by kind of communication, where they differ (gloo's do)
    paging: float = math.inf  # bytes per second of new pages of 2 MiB; a GPU's allocator keeps what was freed
    small_paging: float = math.inf  # the same of 4 KiB
    shared: bool = False  # whether `memory` and the rates are of a machine and divided among its processes
    # flops, bandwidth, both pagings and overhead of each of two processes that share a machine, measured at once
    pair: dict[str, Any] = field(default_factory=dict, hash=False)
    memories: tuple[int, ...] = ()  # bytes of each device in the order of ranks, where they differ; `memory` is the least
    speeds: tuple[float, ...] = ()  # of each device, as multiples of `flops`, `bandwidth` and both pagings; none: all alike

    @property
    def card(self) -> "Device | None":
        """Itself, if it is a GPU."""
        return None if self.accelerator == "cpu" else self

    @property
    def alike(self) -> bool:
        """Whether it does not matter which of several devices is meant."""
        return len({*self.memories}) < 2 and len({*self.speeds}) < 2

    def least(self, ranks: range) -> "Device":
        """What each of these has at least: work that is cut evenly waits for the slowest."""
        memory = min(self.memories[ranks.start : ranks.stop], default=self.memory)
        rates = self._rates(min(self.speeds[ranks.start : ranks.stop], default=1.0))
        return replace(self, **rates, memory=memory, memories=(), speeds=())

    def _rates(self, by: float) -> dict[str, Any]:
        """Those of which several processes each have a part, so many times."""
        flops = {kind: rate * by for kind, rate in self.flops.items()}
        return {"flops": flops} | {name: getattr(self, name) * by for name in ("bandwidth", "paging", "small_paging")}

    def scaled(self, by: float) -> "Device":
        """With another amount of memory."""
        memories = tuple(round(memory * by) for memory in self.memories)
        return replace(self, memory=round(self.memory * by), memories=memories)

    def share(self, processes: int) -> "Device":
        """What each of several processes gets of a machine; pages that they share count in each, and once for the machine."""
        if not self.shared or processes == 1:
            return self
        crowd, two = self.crowd(processes), replace(self, **(self.pair or self._rates(1 / 2)))  # what each of two has
        return replace(
            two,
            **two._rates(2 / processes),
            memory=(self.memory - self.process[2] + (processes - 1) * self.common) // processes,
            link=self.link / processes,
            links={kind: rate / processes for kind, rate in self.links.items()},
            overhead=two.overhead * crowd,
            latency=self.latency * crowd + SLICE * (crowd - 1),
        )

    def sending(self, kind: str, payload: float, ranks: int) -> float:
        """Seconds in which each of several ranks sends its part of a payload."""
        return payload * sent(kind, ranks) / self.links.get(kind, self.link)

    def crowd(self, processes: int) -> float:
        """How many of so many processes share a core; 1 if each has one of its own."""
        return max(1.0, processes / cores()) if self.shared else 1.0


def count(node: dict[str, Any], devices: int | None) -> int:
    """How many devices: as asked for, or as many as a list of memories or speeds has, or the GPUs here, or one."""
    listed = max((len(node[key]) for key in LISTS if isinstance(node.get(key), list)), default=0)
    return devices or listed or (len(gpus.here()) if _of_this_machine(node) else 0) or 1


def _of_this_machine(node: dict[str, Any]) -> bool:
    """Whether it asks for GPUs without a data sheet."""
    return "flops" not in node and node["accelerator"] != "cpu"


def of_config(node: dict[str, Any], devices: int | None = None) -> Device:
    """The device of a config group; what it leaves open is measured on this machine.

    Args:
        node: of `conf/device`; `memory` and `speed` may be lists, of one value for each device.
        devices: how many there are; None: as many as the lists have, or GPUs are here.

    Raises:
        UserError: `memory` or `speed` cannot be read or does not fit the number of devices, or a GPU here has no data sheet.
    """
    if _of_this_machine(node):
        node = gpus.as_node(node.get("memory"), devices) or node
    lists = {key: tuple(node[key]) if isinstance(node.get(key), list) else () for key in LISTS}
    if problems := _problems(node, lists, count(node, devices)):
        raise UserError(*problems)
    if "flops" in node:
        memories = tuple(map(size, lists["memory"]))
        known: dict[str, Any] = {key: size(value) if key in SIZES else value for key, value in node.items() if key not in LISTS}
        return Device(**known, memory=min(memories or (size(node["memory"]),)), memories=memories, speeds=lists["speed"])
    here = this_machine()
    return replace(here, memory=size(node["memory"])) if node.get("memory") else here


def _problems(node: dict[str, Any], lists: dict[str, tuple], devices: int) -> list[str]:
    """What is wrong with lists of one value for each device."""
    found = [
        f"device.{key} has {len(values)} values for {devices} devices: write one for each, in the order of ranks"
        for key, values in lists.items()
        if values and len(values) != devices
    ]
    if any(lists.values()) and "flops" not in node:
        found.append("device: processes of one machine share it; write one value, or take a data sheet, such as device=l4")
    single = node.get("speed") is not None and not lists["speed"]
    if single or not all(isinstance(speed, int | float) and speed > 0 for speed in lists["speed"]):
        found.append(f"device.speed={node['speed']}: write a list of positive numbers, 1 for a device as its data sheet says")
    return found


def this_machine() -> Device:
    """This machine's processor and the memory that a process here may use. Rates are measured once and stored."""
    file = cache_folder() / "device.json"
    key = f"{platform.node()} {platform.machine()} {cores()} cores, torch {torch.__version__}, probe {VERSION}"
    stored = json.loads(file.read_text()) if file.is_file() else {}
    if key not in stored:
        stored[key] = measured()
        with suppress(OSError, UserError):  # where nothing can be written, each process measures
            write(writable(file.parent) / file.name, json.dumps(stored, indent=1))
    rates = stored[key] | {"process": tuple(stored[key]["process"]), "link": stored[key]["links"]["send"], "shared": True}
    return Device(f"this machine ({cores()} cores)", "cpu", memory_limit(), **rates.pop("alone"), **rates)
