"""What the kernels of a GPU take that those of a CPU do not: results that fake kernels leave out, memory beside the results,
and launches.

Found allocation by allocation in histories of torch's allocator (torch.cuda.memory._record_memory_history, H200, torch 2.11).
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from leanlm.common.dtensors import here
from leanlm.planning.constants import CHUNK, CHUNKS, CUDNN, KEPT, TENSORS, TOKEN_KERNELS

aten = torch.ops.aten
ATTENTION = (aten._scaled_dot_product_efficient_attention_backward, aten._scaled_dot_product_flash_attention_backward)
RECURRENT = aten._cudnn_rnn, aten._cudnn_rnn_backward


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

    `threads`: that the GPU keeps resident.
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
        beside = _sum_over_rows(here(args[0]), args[1], threads)
        order = (*results, beside, -beside)
    return order


def launches(func: Any, args: Any) -> int:
    """Kernels that run one after the other: a recurrence has some for each token."""
    if func._schema.name.startswith(("aten::_foreach_", "aten::_fused_")):
        return _launches_of_lists(func, args)
    if func._overloadpacket not in RECURRENT:
        return 1
    forward = func._overloadpacket is aten._cudnn_rnn
    return args[0].shape[1 if args[10 if forward else 14] else 0] * TOKEN_KERNELS[not forward]


def _launches_of_lists(func: Any, args: Any) -> int:
    """Of an operation on lists of tensors (torch's MultiTensorApply.cuh): a kernel takes so many tensors of each list, in so
    many chunks in all. Tensors of several types, or that lie otherwise than those of another list, have one each."""
    first = args[0]
    # the sixth are steps
    lists = [part for part in args[:5] if isinstance(part, list) and part and isinstance(part[0], Tensor)]
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
