"""What the kernels of a GPU take that those of a CPU do not.

Simulations run on fake tensors of a CPU: autograd knows no device that torch was not built for. Here the operations are
replaced that a GPU has others for, and what these take beside their results is counted; found allocation by allocation in
histories of torch's allocator on an H200 (torch.cuda.memory._record_memory_history, torch 2.11).
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from leanlm.memory import chunks, offload
from leanlm.models import kernels

aten = torch.ops.aten
CELLS = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}  # name -> cuDNN's mode
ATTENTION = (aten._scaled_dot_product_efficient_attention_backward, aten._scaled_dot_product_flash_attention_backward)
KEPT = {0: 1, 1: 1, 2: 5, 3: 6}  # mode -> numbers that cuDNN keeps for each token and unit
KERNEL = 4e-6  # seconds of the shortest one
REACHED = 0.75  # of a data sheet's rates (H200: 0.75 by products in float32, 0.79 in bf16, 0.87 by copies)
CUDNN = 8 << 20  # bytes of its workspace beside numbers and weights
# what a GPU's autocast computes in float32 and a CPU's does not (aten/src/ATen/autocast_mode.h), of what models may use
WIDE = {"pow", "square", "__pow__", "exp", "expm1", "log", "log1p", "log2", "rsqrt", "reciprocal", "softplus", "layer_norm",
        "group_norm", "softmax", "log_softmax", "logsumexp", "sum", "prod", "cumsum", "cumprod", "norm"}  # fmt: skip
CHUNK, CHUNKS = 1 << 16, 320  # numbers that one block of threads goes through, and blocks of one kernel
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # of each list, by the number of lists, that one kernel takes
RECURRENT = aten._cudnn_rnn, aten._cudnn_rnn_backward


@contextlib.contextmanager
def kernels_of_a_gpu(card: Any, to_host: Callable[[int], None]) -> Iterator[None]:
    """Within it, fake tensors of a CPU go through the operations that a GPU would compute with.

    Args:
        card: its `Device`.
        to_host: is told of bytes that go to host memory or come back.
    """
    with contextlib.ExitStack() as patches:
        replaced: list[tuple[Any, str, Callable[..., Any]]] = [
            (kernels, "on_gpu", lambda tensor: True),
            (kernels, "add_product_", _add_product_),
            (chunks, "logits_memory", lambda device: chunks.share_of(card.total or card.memory)),
            (F, "scaled_dot_product_attention", _attention),
            (F, "rms_norm", _rms_norm),
            (offload, "_Pinned", partial(_Away, to_host)),
            *((torch._VF, cell, _recurrence(cell)) for cell in CELLS),
            (nn.RNNBase, "flatten_parameters", lambda self: None),
            *(
                (place, name, _wide(getattr(place, name)))
                for name in WIDE
                for place in (torch, Tensor, F)
                if hasattr(place, name)
            ),
        ]
        for place, name, function in replaced:
            patches.enter_context(mock.patch.object(place, name, function))
        yield


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _wide(function: Callable[..., Any]) -> Callable[..., Any]:
    """In float32 under a CPU's autocast, as under a GPU's."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu") and function.__name__ == "sum":  # reads what there is, adds in float32
            kwargs.setdefault("dtype", torch.float32 if args[0].dtype in (torch.bfloat16, torch.float16) else None)
        elif torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(
                Tensor, lambda part: part.float() if part.is_floating_point() else part, (args, kwargs)
            )
        return function(*args, **kwargs)

    return run


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
    """As one operation, which keeps a number for each token; what it takes is what a layer norm takes. From torch 2.12 on a
    GPU's autocast computes it in float32."""
    if kernels.under_autocast(x) and torch.__version__ >= "2.12":
        x, weight = x.float(), None if weight is None else weight.float()
    return aten.native_layer_norm(x, list(shape), weight, None, eps or 1e-6)[0]


class _Away:
    """An activation in host memory."""

    def __init__(self, to_host: Callable[[int], None], tensor: Tensor) -> None:
        self.to_host, self.layout = to_host, (tensor.shape, tensor.stride(), tensor.dtype)
        to_host(_bytes(tensor))

    def read(self) -> Tensor:
        size, stride, dtype = self.layout
        back = torch.empty_strided(size, stride, dtype=dtype)
        self.to_host(_bytes(back))
        return back


def _recurrence(cell: str) -> Callable[..., Any]:
    mode = CELLS[cell]

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
    packet = func._overloadpacket
    if packet not in RECURRENT:
        return func(*args, **kwargs)
    x, weights, hidden, state = args[0], args[1], args[4], args[5]
    if packet is aten._cudnn_rnn:
        mode, width, batch_first, training = args[6], args[7], args[10], args[12]
        out = x.new_empty(*(x.transpose(0, 1) if batch_first else x).shape[:2], width)
        kept = KEPT[mode] * _bytes(out) + (_bytes(*weights) if x.dtype == torch.bfloat16 else 0)  # in bf16, the weights in one
        reserve = x.new_empty(kept if training else 0, dtype=torch.uint8)
        after = torch.empty_like(hidden), x.new_empty(0) if state is None else torch.empty_like(state)
        return out.transpose(0, 1) if batch_first else out, *after, reserve, x.new_empty(0)
    flat = weights[0].new_empty(sum(weight.numel() for weight in weights))
    parts = flat.split([weight.numel() for weight in weights])
    gradients = [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]
    return torch.empty_like(x), torch.empty_like(hidden), state if state is None else torch.empty_like(state), gradients


def allocations(func: Any, args: Any, results: list[Tensor], threads: int) -> tuple[Tensor | int, ...]:
    """What an operation allocates, in order: its results, and bytes beside them, negative where it gives them back.

    Args:
        threads: that the GPU keeps resident.
    """
    packet = func._overloadpacket
    order: tuple[Tensor | int, ...] = (*results,)
    if packet in RECURRENT:
        x, weights, batch_first = args[0], args[1], args[10] if packet is aten._cudnn_rnn else args[14]
        moved = _bytes(x) if batch_first and not x.transpose(0, 1).is_contiguous() else 0  # tokens must come first
        if packet is aten._cudnn_rnn:
            space = 6 * _bytes(results[0]) + _bytes(*weights) + CUDNN
            order = (moved, results[0], space, *results[1:], -space, -moved)
        else:
            out, grad = args[6], args[7]
            space = 6 * _bytes(out) + _bytes(*weights) + CUDNN
            turned = _bytes(grad) if batch_first and not grad.transpose(0, 1).is_contiguous() else 0
            order = (moved, turned, results[0], space, -space, -turned, -moved)
            order += (moved, *results[1:], space, -space, -moved)
    elif packet in ATTENTION:  # the query's gradient in float32, and a sum for each query
        query = args[1]
        beside = (query.numel() + query.numel() // query.shape[-1]) * 4
        order = (*results, beside, -beside)
    elif packet is aten.sum and len(args) > 1 and args[1]:
        beside = _sum_over_rows(getattr(args[0], "_local_tensor", args[0]), args[1], threads)
        order = (*results, beside, -beside)
    return order


def launches(func: Any, args: Any) -> int:
    """Kernels that run one after the other: a recurrence has some for each token (H200: 20 us forward, 32 backward)."""
    if func._schema.name.startswith(("aten::_foreach_", "aten::_fused_")):
        return _launches_of_lists(func, args)
    if func._overloadpacket not in RECURRENT:
        return 1
    forward = func._overloadpacket is aten._cudnn_rnn
    return args[0].shape[1 if args[10 if forward else 14] else 0] * (5 if forward else 8)


def _launches_of_lists(func: Any, args: Any) -> int:
    """Of an operation on lists of tensors (torch's MultiTensorApply.cuh): a kernel takes so many tensors of each list, in so
    many chunks in all. Tensors of several types, or that lie otherwise than those of another list, have one each."""
    first = args[0]
    lists = [
        part for part in args[:5] if isinstance(part, list) and part and isinstance(part[0], Tensor)
    ]  # the sixth are steps
    mixed = len({part.dtype for each in lists for part in each}) > 1 and func._overloadpacket is not aten._foreach_copy_
    if mixed or any(part.stride() != own.stride() for each in lists for part, own in zip(each, first, strict=True)):
        return len(first)
    norms = func._overloadpacket is aten._foreach_norm
    made = bool(func._schema.returns) and not norms
    chunks = sum(-(-part.numel() // CHUNK) for part in first)
    return max(-(-len(first) // TENSORS[len(lists) + made]), -(-chunks // CHUNKS)) + norms  # these are summed by another


def recurrent_flops(args: Any) -> int:
    """Floating-point operations of a recurrence forward."""
    return 2 * args[0].shape[0] * args[0].shape[1] * sum(weight.numel() for weight in args[1])


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _sum_over_rows(x: Tensor, dims: list[int], threads: int) -> int:
    """Partial sums of `x` over its first dimensions, as the gradient of a bias takes them (torch's Reduce.cuh): blocks of 128
    threads, each with 4 columns in every thread, as many along the rows as fill the GPU."""
    dims = sorted(dim % x.dim() for dim in dims) if x.dim() else []
    if not dims or dims != list(range(len(dims))) or len(dims) == x.dim() or not threads or not x.is_contiguous():
        return 0
    rows, columns = prod(x.shape[: len(dims)]), prod(x.shape[len(dims) :])
    each = rows // 4  # rows to a thread
    if each < 256 or columns < 128:
        return 0
    across = -(-columns // 128)
    down = max(min(-(-threads // 128 // across), -(-each // 16)), -(-each // 256))
    return 4 * columns * down * 128
