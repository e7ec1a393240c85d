"""The tensor axis: matrices divided over devices as the model's `tensor_split` declares, with torch's tensor parallel."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from leanlm.models.contract import Model


def split_matrices(net: Model, mesh: DeviceMesh) -> None:
    """Divide the parameters that this rank has of a model without storage; patterns of `tensor_split` name its modules."""
    modules = dict(net.named_modules())
    for pattern, kind in net.tensor_split.items():
        for name in [pattern.replace("*", block) for block in net.blocks] if "*" in pattern else [pattern]:
            if name in modules:  # else another rank holds it, or this configuration does not have the part
                _split(modules[name], kind, mesh)


def _split(module: Any, kind: str, mesh: DeviceMesh) -> None:
    if kind == "input":
        module.register_forward_pre_hook(partial(_sum_gradient_once, mesh))
    elif kind == "partial":
        if getattr(module, "weight", None) is not None:
            module.forward = partial(_scaled_in_parts, module, mesh)
    elif isinstance(module, nn.Embedding):
        _split_rows(module, mesh)
    elif isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
        for part in (module.head, *(band[1] for band in module.tail)):  # type: ignore[index]
            _split(part, kind, mesh)
    elif kind == "vocabulary":  # in training, memory/loss.py reads the weights and gathers no logits
        parallelize_module(module, mesh, ColwiseParallel(output_layouts=Replicate()))
    else:
        parallelize_module(module, mesh, RowwiseParallel() if kind == "rowwise" else ColwiseParallel())


def _split_rows(embedding: nn.Embedding, mesh: DeviceMesh) -> None:
    """Each device looks up the token types it holds, and the results are summed.

    torch's RowwiseParallel (2.11, 2.13) does the same forward, but leaves each device with the gradient of the whole table.
    """
    weight = distribute_tensor(embedding.weight, mesh, [Shard(0)], src_data_rank=None)
    embedding.register_parameter("weight", nn.Parameter(weight))
    embedding.forward = partial(_look_up, embedding, mesh)  # type: ignore[method-assign]


def _look_up(embedding: Any, mesh: DeviceMesh, tokens: Tensor) -> Tensor:
    weight = embedding.weight.to_local()
    position = tokens - mesh.get_local_rank() * -(-embedding.num_embeddings // mesh.size())
    here = (position >= 0) & (position < len(weight))
    found = nn.functional.embedding(position.where(here, 0), weight).masked_fill(~here[..., None], 0)
    return DTensor.from_local(found, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()]).to_local()


def _scaled_in_parts(norm: Any, mesh: DeviceMesh, x: Tensor) -> Tensor:
    """RMSNorm of this device's heads, whose whole scale each device holds: its gradient is summed over the devices."""
    weight = DTensor.from_local(norm.weight, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
    return nn.functional.rms_norm(x, norm.normalized_shape, weight, norm.eps)


def _sum_gradient_once(mesh: DeviceMesh, module: nn.Module, inputs: tuple) -> tuple:
    """A forward pre-hook after which the gradients that several column-wise layers give their common input are added
    before they are summed over the tensor axis, not after."""
    return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False), *inputs[1:]
