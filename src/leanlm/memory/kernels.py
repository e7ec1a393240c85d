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
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def low_precision(tensor: Tensor) -> torch.dtype:
    """The type in which products with a tensor are computed."""
    return torch.get_autocast_dtype(tensor.device.type) if under_autocast(tensor) else tensor.dtype


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
