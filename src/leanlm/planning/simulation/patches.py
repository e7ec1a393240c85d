"""What stands in a simulation in the place of functions of torch, Lightning and leanlm, as torch 2.11 to 2.13 have them.

Each group of patches is a list, so that a test can look whether every name is still there: `mock.patch` raises AttributeError
for one that is not.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.distributed.pipelining import schedules
from torch.fx import traceback
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy

from leanlm.memory import chunks, offload, recompute
from leanlm.models import kernels

aten = torch.ops.aten
Patch = tuple[Any, str, Any]  # where a name stands, the name, what it stands for in a simulation
CELLS = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}  # torch's name -> cuDNN's mode
# What a GPU's autocast computes in float32 and a CPU's does not (aten/src/ATen/autocast_mode.h), of what models may use.
WIDE = {"pow", "square", "__pow__", "exp", "expm1", "log", "log1p", "log2", "rsqrt", "reciprocal", "softplus", "layer_norm",
        "group_norm", "softmax", "log_softmax", "logsumexp", "sum", "prod", "cumsum", "cumprod", "norm"}  # fmt: skip


@contextmanager
def replaced(patches: Iterable[Patch]) -> Iterator[None]:
    """Within it, names stand for what the patches say.

    Raises:
        AttributeError: a name is not there.
    """
    with ExitStack() as stack:
        for place, name, value in patches:
            stack.enter_context(mock.patch.object(place, name, value))
        yield


def meshes_with_numbers() -> list[Patch]:
    """Device meshes are computed with real numbers: they index with them."""
    names = ("__init__", "__getitem__", "_flatten", "get_group", "get_local_rank")
    places = [(device_mesh, "init_device_mesh"), *((device_mesh.DeviceMesh, name) for name in names)]
    return [(place, name, _disable_current_modes()(getattr(place, name))) for place, name in places]


def resizing(resized: Callable[[Tensor], None]) -> list[Patch]:
    """FSDP2 empties the storage of weights that it had gathered, and fills it again, past the dispatcher: `resized` is told."""

    def told(function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def run(tensor: Tensor) -> None:
            function(tensor)
            resized(tensor)

        return run

    places = [(_fsdp_param, "alloc_storage"), (_fsdp_param, "free_storage")]
    if hasattr(_fsdp_param_group, "alloc_storage"):  # which not every release has imported there
        places.append((_fsdp_param_group, "alloc_storage"))
    return [(place, name, told(getattr(place, name))) for place, name in places]


class Sent(NamedTuple):
    """What gloo's handle of something sent does: it holds the tensor for as long as someone holds the handle."""

    wait: Callable[..., Any]
    tensors: list[Tensor]


def sending() -> list[Patch]:
    """Several of torch's schedules keep the handles of all that they send until the step ends."""
    every = schedules._batch_p2p

    def held(ops: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        tensors = [op.tensor for op in ops if op.op is dist.isend]
        return [Sent(work.wait, tensors) for work in every(ops, *args, **kwargs)]

    return [(schedules, "_batch_p2p", held)]


def no_moves(module: Any) -> list[Patch]:
    """Lightning moves a module to its device, where its tensors are already."""
    return [(module, name, lambda *args, **kwargs: module) for name in ("to", "cpu")]


def of_strategy(strategy: Any, wrap: Callable[[nn.Module], nn.Module] | None) -> list[Patch]:
    """Nothing is broadcast by one of Lightning's strategies; a model is wrapped by `wrap`, in the place of DDP's reducer, which
    is C++ and looks into memory. None: it is not DDP's."""
    return [(strategy, "broadcast", lambda obj, src=0: obj), *([(strategy, "_setup_model", wrap)] if wrap else [])]


@contextmanager
def as_a_compiler() -> Iterator[None]:
    """What is traced is told that it is compiled; of what is checkpointed the graph says so, as torch's compiler lets it."""
    numbers = count(1)

    def checkpoint(function: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
        marks = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": next(numbers)}
        with traceback.preserve_node_meta(), mock.patch.dict(traceback.current_meta, marks):
            return function(*inputs)

    with replaced([(torch.compiler, "is_compiling", lambda: True), (recompute, "checkpoint", checkpoint)]):
        yield


def kernels_of_a_gpu(card: Any, to_host: Callable[[int], None]) -> list[Patch]:
    """Fake tensors of a CPU go through the operations that a GPU computes with: autograd knows no device that torch was not
    built for. `to_host` is told of bytes that go to host memory or come back."""
    memory = chunks.share_of(card.total or card.memory)
    return [
        (kernels, "on_gpu", lambda tensor: True),
        (kernels, "add_product_", _add_product_),
        (chunks, "logits_memory", lambda device: memory),
        (offload, "_Kept", partial(_InHostMemory, to_host)),
        (F, "scaled_dot_product_attention", _attention),
        (F, "rms_norm", _rms_norm),
        (nn.RNNBase, "flatten_parameters", lambda self: None),
        *((torch._VF, cell, _recurrence(cell)) for cell in CELLS),
        *((place, name, _wide(getattr(place, name))) for name in WIDE for place in (torch, Tensor, F) if hasattr(place, name)),
    ]


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _wide(function: Callable[..., Any]) -> Callable[..., Any]:
    """In float32 under a CPU's autocast, as under a GPU's."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu") and function.__name__ == "sum":  # reads what there is, adds in float32
            kwargs.setdefault("dtype", torch.float32 if args[0].dtype in (torch.bfloat16, torch.float16) else None)
        elif torch.is_autocast_enabled("cpu"):
            floats = tree_map_only(Tensor, lambda part: part.float() if part.is_floating_point() else part, (args, kwargs))
            args, kwargs = floats
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
    """As one operation, which keeps a number for each token and takes what a layer norm takes. From torch 2.12 on a GPU's
    autocast computes it in float32."""
    if kernels.under_autocast(x) and torch.__version__ >= "2.12":
        x, weight = x.float(), None if weight is None else weight.float()
    return aten.native_layer_norm(x, list(shape), weight, None, eps or 1e-6)[0]


class _InHostMemory:
    """An activation in host memory."""

    def __init__(self, to_host: Callable[[int], None], storage: Any, tensor: Tensor) -> None:
        self.to_host, self.layout, self.dtype = to_host, (tensor.shape, tensor.stride()), tensor.dtype
        to_host(tensor.nbytes)

    def read(self) -> Tensor:
        back = torch.empty_strided(*self.layout, dtype=self.dtype)
        self.to_host(back.nbytes)
        return back


def _recurrence(cell: str) -> Callable[..., Any]:
    """cuDNN's recurrence in the place of a CPU's."""

    def run(x: Tensor, before: Any, weights: list[Tensor], bias: bool, layers: int, dropout: float, train: bool,
            bidirectional: bool, batch_first: bool) -> tuple[Tensor, ...]:  # fmt: skip
        hidden, state = before if cell == "lstm" else (before, None)
        flat = weights[0].new_empty(0)  # of which the weights are views
        out = aten._cudnn_rnn(x, weights, len(weights) // layers, flat, hidden, state, CELLS[cell], hidden.shape[-1], 0, layers,
                              batch_first, dropout, train, bidirectional, [], None)  # fmt: skip
        return out[:3] if cell == "lstm" else out[:2]

    return run
