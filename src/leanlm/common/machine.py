"""The machine as this process may use it: its cores and its memory."""

import os
import re
from pathlib import Path

import torch


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit() -> int:
    """Bytes that processes may still take here: what the machine has free, or what the control group allows if that is less."""
    free = _of_proc("meminfo", "MemAvailable") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in _cgroups():
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            try:
                free = min(free, int((folder / limit).read_text()) - int((folder / used).read_text()))
            except (OSError, ValueError):  # no such file, or `max`
                continue
    return free


def _of_proc(file: str, key: str) -> int:
    """The bytes that a file of Linux gives for a key; 0: there is none."""
    path = Path("/proc", file)
    found = re.search(rf"{key}:\s+(\d+) kB", path.read_text()) if path.is_file() else None
    return int(found[1]) * 1024 if found else 0


def _cgroups() -> list[Path]:
    """The folders of the control groups that this process is in, the innermost first (version 2, then version 1)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for _, kinds, path in (line.split(":", 2) for line in lines):
        if not kinds or "memory" in kinds.split(","):
            root = Path("/sys/fs/cgroup", "memory" if kinds else "")
            inner = root / path.lstrip("/")
            found += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
    return found


def peak_memory() -> int:
    """Largest memory of this process so far in bytes: what torch has taken of its GPU, or what is resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    if peak := _of_proc("self/status", "VmHWM"):
        return peak
    import resource  # on Linux its figure is not below that of the process that started this one
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_now(shared: bool = True) -> int:
    """Memory of this process in bytes: taken of its GPU, or resident (on Linux; elsewhere the largest so far). `shared`: with
    the pages of files, such as libraries, which other processes may have too."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_reserved()
    pages = Path("/proc/self/statm")
    if not pages.is_file():
        return peak_memory()
    resident, files = map(int, pages.read_text().split()[1:3])
    return (resident if shared else resident - files) * os.sysconf("SC_PAGE_SIZE")
