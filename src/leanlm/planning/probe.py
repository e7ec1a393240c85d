"""Rates of this machine, and what processes weigh on it."""

import mmap
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from leanlm.launch import launch, process_group, world_size

SMALL = 1 << 20  # bytes of a tensor that gets pages of 4 KiB
MESSAGE, TIMES = 8 << 20, 9  # bytes that are sent to measure a link, and how often


def probe() -> dict[str, Any]:
    """Rates of this machine, and what its processes weigh; measured in about fifteen seconds."""
    alone, _ = launch(_process, (), 1, isolate=True)
    several, rates = launch(_process, (), 2, isolate=True)
    n = 1024
    flops = {}
    for kind in ("float32", "bfloat16", "float64"):
        a, b = (torch.randn(n, n).to(getattr(torch, kind)) for _ in range(2))
        out = torch.empty_like(a)
        flops[kind] = 2 * n**3 * rate(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
    large = torch.randn(1 << 25)
    other = torch.empty_like(large)
    small = torch.zeros(8)
    return {
        **rates,
        "flops": flops,
        # of an operation as models have them: it computes a little for each number
        "bandwidth": 2 * large.nbytes * rate(lambda: torch.ops.aten.gelu.out(large, out=other)),
        "paging": large.nbytes * rate(lambda: torch.ones(large.numel())),
        "small_paging": SMALL * rate(lambda: torch.frombuffer(mmap.mmap(-1, SMALL), dtype=torch.float32).fill_(1)),
        "overhead": 1 / rate(lambda: small + small) * 4,  # with Python, autograd and modules around it
        "process": [alone, several, _launcher()],
    }


def rate(run: Callable[[], Any], seconds: float = 0.3) -> float:
    """Times per second, the best of several."""
    run()
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        begin = time.perf_counter()
        run()
        best = max(best, 1 / (time.perf_counter() - begin))
    return best


def _process() -> tuple[int, dict[str, Any]]:
    """Bytes of this process, one that will train, before it has built anything; of several, how fast they send."""
    import leanlm.fit  # noqa: F401
    from leanlm.callbacks.record import memory_now

    with process_group("cpu"):
        size = memory_now()
        common = size - memory_now(shared=False)
        return size, _links() | {"common": common} if world_size() > 1 else {}


def sent(kind: str, ranks: int) -> float:
    """Of the payload of a kind of communication, what each rank sends if they stand in a ring."""
    share = (ranks - 1) / ranks
    return {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": share}.get(kind, 1.0)


def _links() -> dict[str, Any]:
    """Bytes per second that all processes together send in each kind of communication, and seconds of one without payload."""
    import torch.distributed as dist

    warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has new names for two of these
    ranks = dist.get_world_size()
    whole, part, small = torch.ones(MESSAGE // 4), torch.ones(MESSAGE // 4 // ranks), torch.ones(1)

    def pass_on() -> None:
        if dist.get_rank() % 2:
            dist.recv(whole, dist.get_rank() - 1)
        else:
            dist.send(whole, dist.get_rank() + 1)

    kinds = {
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "send": pass_on,
        "": lambda: dist.all_reduce(small),
    }
    seconds = {}
    for kind, run in kinds.items():
        run()
        found = []
        for _ in range(TIMES):
            dist.barrier()
            begin = time.perf_counter()
            run()
            found.append(time.perf_counter() - begin)
        seconds[kind] = statistics.median(found)
    latency = seconds.pop("")
    links = {kind: ranks * MESSAGE * sent(kind, ranks) / (taken - latency) for kind, taken in seconds.items()}
    return {"latency": latency, "links": links}


def _launcher() -> int:
    """Bytes of a process that starts others and waits for them, without the pages of libraries, which are theirs too."""
    code = (
        "import leanlm.train, torch.distributed.launcher.api, torch.distributed.elastic.multiprocessing\n"
        "from leanlm.callbacks.record import memory_now\nprint(memory_now(shared=False))"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1])
