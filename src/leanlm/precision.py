"""The number types of a run: they change its curve, so they belong to the run and not to a plan."""

import torch

PRECISIONS = {  # name -> (parameters' type, Lightning's precision plugin)
    "fp32": (torch.float32, "32-true"),
    "bf16-mixed": (torch.float32, "bf16-mixed"),  # weights in float32, products in bf16
    "bf16": (torch.bfloat16, "32-true"),  # built in its type; Lightning's plugin then leaves it alone
    "bf16-stochastic": (torch.bfloat16, "32-true"),  # weights are rounded by chance, so that small updates are not lost
    "fp64": (torch.float64, "32-true"),
}
STOCHASTIC = "bf16-stochastic"


def automatic(device: dict) -> str:
    """What `precision=auto` is on a device of the config group: bf16-mixed on a GPU that has bf16, else fp32."""
    if "flops" in device:  # a data sheet
        return "bf16-mixed" if "bfloat16" in device["flops"] else "fp32"
    if device.get("accelerator") == "cpu" or not torch.cuda.is_available():
        return "fp32"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
