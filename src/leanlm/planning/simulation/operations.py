"""What torch's counters and fake kernels do not know: the arithmetic of some kernels, what oneDNN's LSTM takes, and how long
checkpointing's Python takes."""

import sys
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry

from leanlm.memory.malloc import LARGE
from leanlm.planning.constants import CHECKPOINTED, LAYOUT, SELECTIVE, TOUCHED
from leanlm.planning.simulation import gpu

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward
RECURRENT = aten.mkldnn_rnn_layer, aten.mkldnn_rnn_layer_backward
CHECKPOINT = "torch.utils.checkpoint"
WRAPPERS = ("torch._dynamo", "torch._compile", "torch._ops")  # stand between a mode and its caller


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of a call in matrix products, attention and recurrences."""
    packet, backward = func._overloadpacket, _is_backward(func)
    if packet in flop_registry:
        factors = [part for part in args if not isinstance(part, torch.dtype)]  # of the result: torch's formulas do not take it
        return int(flop_registry[packet](*factors, **kwargs, out_val=out))
    if packet in ATTENTION:  # as if no position were masked: what a causal mask saves, small products cost (measured)
        query, key = args[1:3] if backward else args[:2]
        return (10 if backward else 4) * query.numel() * key.shape[-2]
    # Each number of a weight is used once for each token, twice in backward; token by token that takes as long as a product
    # of half as much more (measured: 0.4 to 1.05 of its rate).
    if packet in RECURRENT:
        weights = sum(part.numel() for part in args[1:3])
        return (6 if backward else 3) * args[0].shape[0] * args[0].shape[1] * weights
    if packet in gpu.RECURRENT:
        return gpu.recurrent_flops(args) * (2 if backward else 1)
    return 0


def read_again(func: Any, args: Any) -> int:
    """Bytes that a kernel moves more often than once: a recurrence its weights for each token, twice in backward. With few rows
    that takes most of the time (measured, width 512: a fifth as long with 1 row as with 32): all of these count, not LAYOUT.
    Logits are written over with their gradient."""
    if str(func._schema.name) == "leanlm::cross_entropy_":
        return args[0].nbytes
    if func._overloadpacket not in RECURRENT:
        return 0
    times = (args[0].shape[0] - 1) * (2 if _is_backward(func) else 1)
    return round(times * args[2].nbytes / LAYOUT)


def _is_backward(func: Any) -> bool:
    return str(func._schema.name).endswith("backward")


@cache
def lstm_workspace(tokens: int, rows: int, size: int, width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that oneDNN's LSTM asks for to keep until backward, measured at one and at two tokens; and that forward writes. It
    never writes the rest, whose pages are not there."""

    def measured(tokens: int) -> int:
        with _disable_current_modes():
            shapes = (tokens, rows, size), (4 * width, size), (4 * width, width), (4 * width,), (4 * width,)
            parts = (torch.zeros(shape, dtype=dtype) for shape in (*shapes, (rows, width), (rows, width)))
            return aten.mkldnn_rnn_layer(*parts, False, [], 2, width, 1, True, False, False, True)[3].nbytes

    first, second = measured(1), measured(2)
    asked = first + (tokens - 1) * (second - first)
    return asked, asked if asked < 2 * LARGE else round(TOUCHED.get(dtype, (1.0, 1.0))[0] * asked) + LARGE


def lstm_scratch(backward: bool, args: Any, touched: int) -> int:
    """Bytes that oneDNN's LSTM takes beside its results, and gives back: its weights laid out anew, backward their gradients
    too, the gates of all tokens, and what backward writes of the workspace beyond what is touched (fitted to the peaks of
    processes)."""
    source, weights = args[0], sum(part.nbytes for part in args[1:3])
    gates = source.shape[0] * source.shape[1] * len(args[2]) * source.element_size()
    if not backward:
        return weights + (gates if source.dtype == torch.float32 else 0)
    later = TOUCHED.get(source.dtype, (1.0, 1.0))[1]
    return 2 * weights + gates + max(0, round(later * args[-1].nbytes) - touched)


def dispatches() -> int:
    """How often as long as by itself the operation at hand takes to start where checkpointing keeps track of it. What it does
    in backward counts here, but not the operation itself when it is run again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or hooks[0].__module__ != CHECKPOINT or torch._C._current_graph_task_id() != -1:
        return 1
    return SELECTIVE if caller(3).f_globals["__name__"] == CHECKPOINT else CHECKPOINTED


def caller(depth: int) -> FrameType:
    """The frame that called the operation at hand, so many frames up or beyond wrappers."""
    frame = sys._getframe(depth + 1)
    while frame.f_back and frame.f_globals["__name__"].startswith(WRAPPERS):
        frame = frame.f_back
    return frame
