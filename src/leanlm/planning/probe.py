"""Rates of this machine, and what processes weigh on it."""

import mmap
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from leanlm.launch import launch, process_group

SMALL = 1 << 20  # bytes of a tensor that gets pages of 4 KiB


def probe() -> dict[str, Any]:
    """Rates of this machine, and what its processes weigh; measured in about fifteen seconds."""

    def rate(run: Callable[[], Any], seconds: float = 0.3) -> float:
        """Times per second, the best of several."""
        run()
        best, until = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < until:
            begin = time.perf_counter()
            run()
            best = max(best, 1 / (time.perf_counter() - begin))
        return best

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
        "flops": flops,
        # of an operation as models have them: it computes a little for each number
        "bandwidth": 2 * large.nbytes * rate(lambda: torch.ops.aten.gelu.out(large, out=other)),
        "paging": large.nbytes * rate(lambda: torch.ones(large.numel())),
        "small_paging": SMALL * rate(lambda: torch.frombuffer(mmap.mmap(-1, SMALL), dtype=torch.float32).fill_(1)),
        "overhead": 1 / rate(lambda: small + small) * 4,  # with Python, autograd and modules around it
        "process": [launch(_resident, (), processes, isolate=True) for processes in (1, 2)] + [_launcher()],
    }


def _resident() -> int:
    """Bytes of this process, one that will train, before it has built anything."""
    import leanlm.fit  # noqa: F401
    from leanlm.callbacks.record import memory_now

    with process_group("cpu"):
        return memory_now()


def _launcher() -> int:
    """Bytes of a process that starts others and waits for them, without the pages of libraries, which are theirs too."""
    code = (
        "import leanlm.train, torch.distributed.launcher.api, torch.distributed.elastic.multiprocessing\n"
        "from leanlm.callbacks.record import memory_now\nprint(memory_now(shared=False))"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1])
