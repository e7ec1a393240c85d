"""What the kernels of a GPU take that those of a CPU do not.

Simulations run on fake tensors of a CPU: autograd knows no device that torch was not built for. Here the operations are replaced
that a GPU has others for, and what these take beside their results is counted; found allocation by allocation in histories of
torch's allocator on an H200 (torch.cuda.memory._record_memory_history, torch 2.11).
"""

import contextlib
from collections.abc import Callable, Iterator
from math import prod
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlm.memory import kernels, offload

aten = torch.ops.aten
ROUNDING = 512  # bytes; the caching allocator gives whole multiples
HOLES = 0.03  # of what is allocated: what the allocator holds beyond it
HANDLES = 2  # of cuBLAS, each with a workspace: one of the thread that trains, one of autograd's
CELLS = {"rnn_relu": (0, 1), "rnn_tanh": (1, 1), "lstm": (2, 4), "gru": (3, 3)}  # name -> cuDNN's mode, gates
ATTENTION = (aten._scaled_dot_product_efficient_attention_backward, aten._scaled_dot_product_flash_attention_backward)
RECURRENT = aten._cudnn_rnn, aten._cudnn_rnn_backward


@contextlib.contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Within it, fake tensors of a CPU go through the operations that a GPU would compute with."""
    with contextlib.ExitStack() as patches:
        replaced: list[tuple[Any, str, Callable[..., Any]]] = [
            (kernels, "on_gpu", lambda tensor: True),
            (F, "scaled_dot_product_attention", _attention),
            (F, "rms_norm", _rms_norm),
            (offload, "_Pinned", _Away),
            *((torch._VF, cell, _recurrence(cell)) for cell in CELLS),
            (nn.RNNBase, "flatten_parameters", lambda self: None),
        ]
        for place, name, function in replaced:
            patches.enter_context(mock.patch.object(place, name, function))
        yield


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """Flash attention (cuDNN's keeps the same) in half precision, the memory-efficient kernel in float32 or with a mask."""
    low = kernels.low_precision(query)
    query, key, value = (part.to(low) for part in (query, key, value))
    half = low in (torch.bfloat16, torch.float16)
    if low == torch.float64 or (enable_gqa and not half):
        return aten._scaled_dot_product_attention_math(query, key, value, mask, dropout, is_causal, enable_gqa=enable_gqa)[0]
    if half and mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout, is_causal, False, scale=scale)[0]
    return aten._scaled_dot_product_efficient_attention(query, key, value, mask, True, dropout, is_causal, scale=scale)[0]


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """As one operation, which keeps a number for each token; what it takes is what a layer norm takes."""
    return aten.native_layer_norm(x, list(shape), weight, None, eps or 1e-6)[0]


class _Away:
    """An activation in host memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.layout = tensor.shape, tensor.stride(), tensor.dtype

    def read(self) -> Tensor:
        size, stride, dtype = self.layout
        return torch.empty_strided(size, stride, dtype=dtype)


def _recurrence(cell: str) -> Callable[..., Any]:
    mode, _ = CELLS[cell]

    def run(x: Tensor, before: Any, weights: list[Tensor], bias: bool, layers: int, dropout: float, train: bool,
            bidirectional: bool, batch_first: bool) -> tuple[Tensor, ...]:  # fmt: skip
        hidden, state = before if cell == "lstm" else (before, None)
        flat = weights[0].new_empty(0)  # of which the weights are views
        out = aten._cudnn_rnn(x, weights, len(weights) // layers, flat, hidden, state, mode, hidden.shape[-1], 0, layers,
                              batch_first, dropout, train, bidirectional, [], None)  # fmt: skip
        return out[:3] if cell == "lstm" else out[:2]

    return run


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation whose fake kernel is missing, or leaves out what it keeps."""
    if func._overloadpacket is aten._cudnn_rnn:
        out, keeps = func(*args, **kwargs), args[12]
        return (*out[:3], args[0].new_empty(reserve(args) if keeps else 0, dtype=torch.uint8), out[4])
    if func._overloadpacket is aten._cudnn_rnn_backward:
        x, weights, hidden, state = args[0], args[1], args[4], args[5]
        flat = weights[0].new_empty(sum(weight.numel() for weight in weights))
        parts = flat.split([weight.numel() for weight in weights])
        gradients = [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]
        return torch.empty_like(x), torch.empty_like(hidden), state if state is None else torch.empty_like(state), gradients
    return func(*args, **kwargs)


def tokens_and_gates(args: Any) -> tuple[int, int, int]:
    """Of a recurrence: tokens, rows, gates."""
    x, mode, width, batch_first = args[0], args[6], args[7], args[10]
    rows, tokens = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    return tokens, rows, width * next(gates for its, gates in CELLS.values() if its == mode)


def reserve(args: Any) -> int:
    """Bytes that cuDNN keeps of a recurrence for backward."""
    tokens, rows, gates = tokens_and_gates(args)
    return tokens * rows * gates * 2 * args[0].element_size()


def beside(func: Any, args: Any, threads: int) -> int:
    """Bytes that an operation takes beside its results, and gives back.

    Args:
        threads: that the GPU keeps resident.
    """
    packet = func._overloadpacket
    if packet in ATTENTION:  # the query's gradient in float32, and a sum for each query
        query = args[1]
        return (query.numel() + query.numel() // query.shape[-1]) * 4
    if packet is aten.sum and len(args) > 1 and args[1]:
        return _sum_over_rows(args[0], args[1], threads)
    return 0


def _sum_over_rows(x: Tensor, dims: list[int], threads: int) -> int:
    """Partial sums of `x` over its first dimensions, as the gradient of a bias takes them (torch's Reduce.cuh): blocks of 128
    threads, each with 4 columns in every thread, as many along the rows as fill the GPU."""
    dims = sorted(dim % x.dim() for dim in dims)
    if dims != list(range(len(dims))) or len(dims) == x.dim() or not threads or not x.is_contiguous():
        return 0
    rows, columns = prod(x.shape[: len(dims)]), prod(x.shape[len(dims) :])
    each = rows // 4  # rows to a thread
    if each < 256 or columns < 128:
        return 0
    across = -(-columns // 128)
    down = max(min(-(-threads // 128 // across), -(-each // 16)), -(-each // 256))
    return 4 * columns * down * 128
