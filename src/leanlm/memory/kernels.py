"""Which kernel computes recurrent layers on a CPU.

oneDNN's keeps a workspace of about 70 bytes for each token and unit of a float32 LSTM, torch's own 32.
"""

import warnings
from functools import partial
from typing import Any

import torch
from torch import nn

CHOICES = ("onednn", "native")


def without_onednn(net: nn.Module) -> None:
    """Let the recurrent layers of a model use torch's own kernels."""
    warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # torch's own switch touches that too
    for part in net.modules():
        if isinstance(part, nn.RNNBase):
            part.forward = partial(_native, part.forward)


def _native(forward: Any, *inputs: Any) -> Any:
    with torch.backends.mkldnn.flags(enabled=False):
        return forward(*inputs)
