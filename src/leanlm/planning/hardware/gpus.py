"""GPUs of this machine: how much of their memory is free, and the data sheets that have their rates."""

import json
import subprocess
import sys
from functools import cache
from typing import Any

from leanlm.common.errors import UserError
from leanlm.config.device_sheets import sheet, size
from leanlm.planning.constants import ASKING, STARTING_ON_GPU

ALIKE = 0.02  # share by which free memory may differ among devices that count as equal
# asked of another process: CUDA, once begun here, would take memory and could not be forked
QUESTION = """
import json, time, torch
gpus = range(torch.cuda.device_count())
free = [(torch.cuda.get_device_name(i), torch.cuda.mem_get_info(i)[0]) for i in gpus]
number, took = torch.zeros(8, device="cuda"), []
for _ in range(1000):
    begin = time.perf_counter()
    number + number
    took.append(time.perf_counter() - begin)
print(json.dumps([free, sorted(took)[500]]))
"""


@cache
def _asked() -> tuple[tuple[tuple[str, int], ...], float]:
    import torch

    if not torch.cuda.is_available():
        return (), 0.0
    done = subprocess.run([sys.executable, "-c", QUESTION], capture_output=True, text=True, check=True)
    found, seconds = json.loads(done.stdout.splitlines()[-1])
    return tuple((name, free) for name, free in found), seconds


def here() -> tuple[tuple[str, int], ...]:
    """Name and free bytes of each GPU that torch can use, as of the first call."""
    return _asked()[0]


def as_node(memory: Any, devices: int | None) -> dict[str, Any] | None:
    """The first so many GPUs here, None: all, as a device of the config group; None if there is none.

    `memory`: that may be used of each; None: what is free.

    Raises:
        UserError: there are fewer, or none of `conf/device` is the data sheet of one.
    """
    gpus = here()[:devices]
    if not gpus:
        return None
    if len(gpus) < (devices or 1):
        raise UserError(
            f"devices={devices}: this machine has {len(gpus)} GPUs; write a data sheet to plan for others, such as device=l4"
        )
    sheets = [sheet(name) for name, _ in gpus]
    free = [found + round(ASKING * size(one["context"])) for (_, found), one in zip(gpus, sheets, strict=True)]
    equal = max(free) - min(free) <= ALIKE * max(free)
    speeds = [each["bandwidth"] / sheets[0]["bandwidth"] for each in sheets]
    return {
        **sheets[0],
        "overhead": STARTING_ON_GPU * _asked()[1],
        "name": f"this machine's {gpus[0][0]}",
        "memory": memory or (min(free) if equal else free),
        "speed": speeds if len({*speeds}) > 1 else None,
    }
