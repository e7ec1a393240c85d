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
            part.forward = partial(_recurrence, part, part.forward, kernel == "native")


def _recurrence(part: nn.RNNBase, forward: Any, native: bool, hidden: Tensor, before: Any = None) -> Any:
    """A recurrent layer `forward`, where autocast's own choice of types would not do: token by token a CPU's kernels would keep
    a bf16 copy of the weights for each token, and cuDNN's take fp16, in which small gradients are lost."""
    gpu = on_gpu(hidden)
    if under_autocast(hidden) and (gpu or native or not isinstance(part, nn.LSTM)):
        with torch.autocast(hidden.device.type, enabled=False):
            if gpu:
                return _in_low_precision(part, torch.get_autocast_dtype(hidden.device.type), hidden, before)
            return _recurrence(part, forward, native, *tree_map_only(Tensor, Tensor.float, (hidden, before)))
    if gpu or not native:
        return forward(hidden, before)
    with torch.backends.mkldnn.flags(enabled=False):
        return forward(hidden, before)


def _in_low_precision(part: nn.RNNBase, low: torch.dtype, hidden: Tensor, before: Any) -> Any:
    """A recurrent layer with weights, inputs and state in `low`; the state after it is in float32, as it is carried."""
    warnings.filterwarnings("ignore", message="RNN module weights are not part of single")  # cuDNN puts them together anyway
    cell: Any = getattr(torch._VF, part.mode.lower())  # lstm, gru, rnn_tanh or rnn_relu
    x, weights = hidden.to(low), [weight.to(low) for weight in part._flat_weights if weight is not None]
    if before is None:
        zeros = x.new_zeros(part.num_layers, len(x), part.hidden_size)
        before = (zeros, zeros) if isinstance(part, nn.LSTM) else zeros
    before = tree_map_only(Tensor, lambda state: state.to(low), before)
    out, *after = cell(x, before, weights, part.bias, part.num_layers, 0.0, part.training, False, part.batch_first)
    after = [state.float() for state in after]
    return out, tuple(after) if isinstance(part, nn.LSTM) else after[0]
