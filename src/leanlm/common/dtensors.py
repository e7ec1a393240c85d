"""Distributed tensors (DTensor) and plain ones, in the same words.

`torch.distributed.tensor` takes 45 MiB, which a run on one device need not pay.
"""

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Any) -> "TypeGuard[DTensor]":
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """What this device holds of a tensor, sharing its storage. What is still on its way from other devices is waited for."""
    mine = tensor.to_local() if is_dtensor(tensor) else tensor
    return mine.trigger_wait() if hasattr(mine, "trigger_wait") else mine


def here(tensor: Any) -> Tensor:
    """What this device holds of a tensor, without an operation, as `local` takes one for each parameter."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def place(tensor: Any) -> int:
    """Which storage holds what this device has of a tensor: a number that is its own while it lives, in a simulation too."""
    return here(tensor).untyped_storage()._cdata


def whole(tensor: Any) -> Tensor:
    """All of a tensor. All devices that share it must call it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def local_part(tensor: Tensor, like: Any) -> Tensor:
    """The part of a whole tensor that this device holds of the tensor `like`: the innermost axis of the mesh splits first."""
    if not is_dtensor(like):
        return tensor
    for dim in reversed(range(like.device_mesh.ndim)):
        placement = like.placements[dim]
        if not placement.is_replicate():
            chunks = tensor.chunk(like.device_mesh.size(dim), placement.dim)  # type: ignore[attr-defined]
            own = like.device_mesh.get_local_rank(dim)
            tensor = chunks[own] if own < len(chunks) else tensor.narrow(placement.dim, 0, 0)  # type: ignore[attr-defined]
    return tensor


def layout(tensor: Any) -> tuple[Any, ...] | None:
    """How a tensor is distributed, without the tensor; None: it is not."""
    return (tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()) if is_dtensor(tensor) else None


def with_layout(mine: Tensor, layout: tuple[Any, ...] | None) -> Tensor:
    """A tensor distributed so, of which this device holds `mine`."""
    if layout is None:
        return mine
    from torch.distributed.tensor import DTensor

    mesh, placements, shape, stride = layout
    if mine.device.type != mesh.device_type:  # in memory of a GPU's machine, from which `from_local` would fetch it
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        spec = DTensorSpec(mesh, placements, tensor_meta=TensorMeta(torch.Size(shape), stride, mine.dtype))
        return DTensor(mine, spec, requires_grad=False)
    return DTensor.from_local(mine, mesh, placements, run_check=False, shape=shape, stride=stride)


def dtensor_like(mine: Tensor, like: "DTensor", size: torch.Size) -> "DTensor":
    """A tensor of `size` of which this device holds `mine`, distributed as `like` is."""
    stride = torch.empty(size, device="meta").stride()
    return with_layout(mine, (like.device_mesh, like.placements, size, stride))  # type: ignore[return-value]
