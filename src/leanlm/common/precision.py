"""The number types of a run: they change its curve, so they belong to the run and not to a plan."""

import ctypes
from functools import cache
from typing import Any

import torch

PRECISIONS = {  # name -> (type of the weights, type in which autocast computes products)
    "fp32": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, None),
    "bf16-stochastic": (torch.bfloat16, None),  # weights are rounded by chance, so that small updates are not lost
    "fp64": (torch.float64, None),
}
STOCHASTIC = "bf16-stochastic"
CAPABILITY = 75  # the CUDA driver's number of the attribute: the first number of a GPU's compute capability


def automatic(device: dict[str, Any]) -> str:
    """What `precision=auto` is on a device of the config group: bf16-mixed on a GPU that has bf16, here or of a data sheet,
    else fp32."""
    if "flops" in device:  # where bfloat16 is not faster, it is emulated
        has_bf16 = device["flops"].get("bfloat16", 0) > device["flops"]["float32"]
    else:
        has_bf16 = device.get("accelerator") != "cpu" and gpu_has_bf16()
    return "bf16-mixed" if has_bf16 else "fp32"


@cache
def gpu_has_bf16() -> bool:
    """Whether the first GPU that torch can use has bf16 of itself (compute capability 8 and more).

    The driver is asked: torch.cuda.is_bf16_supported would begin CUDA in this process, which then forks no more.
    """
    if not torch.cuda.is_available():
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # another system's driver
        return torch.cuda.is_bf16_supported(including_emulation=False)
    device, found = ctypes.c_int(), ctypes.c_int()
    failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(found), CAPABILITY, device)
    return not failed and found.value >= 8
