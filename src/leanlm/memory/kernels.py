"""Which kernels compute what: those of a GPU or of a CPU, and on a CPU, whose of recurrent layers.

oneDNN's LSTM keeps a workspace of about 70 bytes for each token and unit in float32, torch's own 32.
"""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

CHOICES = ("onednn", "native")


def on_gpu(tensor: Tensor) -> bool:
    """Whether a GPU's kernels compute with a tensor. A simulation answers for the device that it plans for."""
    return tensor.device.type not in ("cpu", "meta")


def under_autocast(tensor: Tensor) -> bool:
    """Whether autocast chooses the types of products with a tensor."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def low_precision(tensor: Tensor) -> torch.dtype:
    """The type in which products with a tensor are computed."""
    return torch.get_autocast_dtype(tensor.device.type) if under_autocast(tensor) else tensor.dtype


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU's tensor on a device; a GPU's queue is not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, where the total may be in float32 and the factors in bf16: a GPU adds in float32 then."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left.to(total.dtype) @ right.to(total.dtype))


def choose(net: nn.Module, kernel: str) -> None:
    """Let the recurrent layers of a model use oneDNN's kernel on a CPU, which is for LSTMs alone, or torch's own."""
    if kernel == "native":
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # torch's own switch touches that too
    for part in net.modules():
        if isinstance(part, nn.RNNBase):
            part.forward = partial(_recurrence, part.forward, kernel == "native", isinstance(part, nn.LSTM))


def _recurrence(forward: Any, native: bool, lstm: bool, hidden: Tensor, before: Any = None) -> Any:
    """In float32 where autocast's kernels would not do: token by token a CPU's would keep a bf16 copy of the weights for each
    token, and cuDNN's take fp16 (torch's autocast gives them no other), in which small gradients are lost."""
    gpu = on_gpu(hidden)
    if under_autocast(hidden) and (gpu or native or not lstm):
        with torch.autocast(hidden.device.type, enabled=False):
            return _recurrence(forward, native, lstm, *tree_map_only(Tensor, Tensor.float, (hidden, before)))
    if gpu or not native:
        return forward(hidden, before)
    with torch.backends.mkldnn.flags(enabled=False):
        return forward(hidden, before)
