"""Which kernel computes recurrent layers on a CPU.

oneDNN's keeps a workspace of about 70 bytes for each token and unit of a float32 LSTM, torch's own 32.
"""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

CHOICES = ("onednn", "native")


def choose(net: nn.Module, kernel: str) -> None:
    """Let the recurrent layers of a model use oneDNN's kernel, which is for LSTMs alone, or torch's own."""
    if kernel == "native":
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # torch's own switch touches that too
    for part in net.modules():
        if isinstance(part, nn.RNNBase) and (kernel == "native" or not isinstance(part, nn.LSTM)):
            part.forward = partial(_native, part.forward, kernel == "native")


def _native(forward: Any, off: bool, hidden: Tensor, before: Any = None) -> Any:
    """Without autocast on a CPU: token by token it would keep a bf16 copy of the weights for each token."""
    if torch.is_autocast_enabled("cpu") and hidden.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return _native(forward, off, *tree_map_only(Tensor, Tensor.float, (hidden, before)))
    if not off:
        return forward(hidden, before)
    with torch.backends.mkldnn.flags(enabled=False):
        return forward(hidden, before)
