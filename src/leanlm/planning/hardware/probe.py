"""Rates of this machine, and what processes weigh on it."""

import json
import math
import mmap
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from leanlm.launch.processes import launch
from leanlm.launch.ranks import process_group, world_size
from leanlm.memory.malloc import ENDS
from leanlm.planning.constants import STARTING

VERSION = 4  # of what is measured
PRODUCTS = ("float32", "bfloat16", "float64")
SMALL = 1 << 20  # bytes of a tensor that gets pages of 4 KiB
LARGE = 8 << 20  # of one that is as large as activations are
HUGE = 16 << 20  # of one whose pages are large
MESSAGE, TIMES = 8 << 20, 9  # bytes that are sent to measure a link, and how often


def measured(rounds: int = 4) -> dict[str, Any]:
    """What `probe` finds, in a process that has imported nothing else, which would weigh in those that it starts."""
    done = subprocess.run([sys.executable, "-m", __name__, str(rounds)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def probe(rounds: int) -> dict[str, Any]:
    """Rates of this machine, and what its processes weigh; measured in about 24 seconds.

    What one process does is measured where it is alone and has all threads, and in two at once that share them: memory and
    new pages are not divided as cores are. A shared processor is slower for a while, then fast again: of several rounds the
    best counts.
    """
    alone, of_one = launch(_process, (rounds,), 1, isolate=True)
    several, of_two = launch(_process, (rounds,), 2, isolate=True)
    return {
        "alone": of_one["rates"],
        "pair": of_two["rates"],
        **of_two["links"],
        "common": of_two["common"],
        "process": [alone, several, _launcher()],
    }


def _rates(rounds: int) -> dict[str, Any]:
    """What this process does a second."""
    n, large, small = 1024, torch.randn(LARGE // 4), torch.zeros(8)
    factors = {kind: torch.randn(2, n, n).to(getattr(torch, kind)) for kind in PRODUCTS}
    pages = partial(mmap.mmap, -1, SMALL, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    kinds: dict[str, Callable[[], Any]] = {
        **{kind: partial(torch.mm, *pair, out=torch.empty_like(pair[0])) for kind, pair in factors.items()},
        # an operation as models have them: it computes a little for each number
        "bandwidth": partial(torch.ops.aten.gelu.out, large, out=torch.empty_like(large)),
        "paging": lambda: torch.ones(HUGE // 4),
        "small_paging": lambda: torch.frombuffer(pages(), dtype=torch.float32).fill_(1),
        "overhead": lambda: small + small,
    }
    best = dict.fromkeys(kinds, math.inf)
    for _ in range(rounds):
        for kind, run in kinds.items():
            best[kind] = min(best[kind], fastest(run))
    small_paging = SMALL / best["small_paging"]
    return {
        "flops": {kind: 2 * n**3 / best[kind] for kind in PRODUCTS},
        "bandwidth": 2 * LARGE / best["bandwidth"],
        "paging": (HUGE - ENDS) / without(ENDS / small_paging, best["paging"]),
        "small_paging": small_paging,
        "overhead": STARTING * best["overhead"],
    }


def without(part: float, whole: float) -> float:
    """Seconds of a whole without a part that was measured by itself, which noise may have made as long as the whole."""
    return max(whole - part, whole / 4)


def seconds(run: Callable[[], Any]) -> float:
    """Of one run."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def fastest(run: Callable[[], Any], during: float = 0.1) -> float:
    """Seconds of one run, the best of several."""
    run()
    best, until = math.inf, time.perf_counter() + during
    while time.perf_counter() < until:
        best = min(best, seconds(run))
    return best


def _process(rounds: int) -> tuple[int, dict[str, Any]]:
    """Bytes of this process, one that will train, before it has built anything; its rates; of several, how fast they send."""
    import leanlm.training.fit  # noqa: F401
    from leanlm.common.machine import memory_now

    with process_group("cpu"):
        size = memory_now()
        common = size - memory_now(shared=False)
        links = _links() if world_size() > 1 else {}  # they begin at once what follows
        return size, {"rates": _rates(rounds), "common": common, "links": links}


def sent(kind: str, ranks: int) -> float:
    """Of the payload of a kind of communication, what each rank sends if they stand in a ring."""
    share = (ranks - 1) / ranks
    return {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": share}.get(kind, 1.0)


def _links() -> dict[str, Any]:
    """Bytes per second that all processes together send in each kind of communication, and seconds of one without payload."""
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
    took = {}
    for kind, run in kinds.items():
        run()
        found = []
        for _ in range(TIMES):
            dist.barrier()
            found.append(seconds(run))
        took[kind] = statistics.median(found)
    latency = took.pop("")
    links = {kind: ranks * MESSAGE * sent(kind, ranks) / without(latency, median) for kind, median in took.items()}
    return {"latency": latency, "links": links}


def _launcher() -> int:
    """Bytes of a process that starts others and waits for them, without the pages of libraries, which are theirs too."""
    code = (
        "import leanlm.train, torch.distributed.launcher.api, torch.distributed.elastic.multiprocessing\n"
        "from leanlm.common.machine import memory_now\nprint(memory_now(shared=False))"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1])


if __name__ == "__main__":
    from leanlm.planning.hardware import probe as importable  # where the processes that it starts find it

    print(json.dumps(importable.probe(int(sys.argv[1]))))
