"""The tensor axis: matrices divided over devices as the model's `tensor_split` declares, with torch's tensor parallel."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from leanlm.models.contract import Model
from leanlm.models.lora import Adapted


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
        adapter = module._modules.pop("adapter") if isinstance(module, Adapted) else None  # torch would split it as the layer
        parallelize_module(module, mesh, RowwiseParallel() if kind == "rowwise" else ColwiseParallel())
        if adapter is not None:
            module.adapter = adapter
            _split_correction(adapter, kind, mesh)


def _split_rows(embedding: nn.Embedding, mesh: DeviceMesh) -> None:
    """Each device looks up the token types it holds, and the results are summed.

    torch's RowwiseParallel (2.11, 2.13) does the same forward, but leaves each device with the gradient of the whole table.
    """
    weight = distribute_tensor(embedding.weight, mesh, [Shard(0)], src_data_rank=None)
    embedding.register_parameter("weight", nn.Parameter(weight, embedding.weight.requires_grad))
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


def _split_correction(adapter: Any, kind: str, mesh: DeviceMesh) -> None:
    """Of its two matrices each device has a part of the one that its layer splits, and the whole of the other."""
    key, axis = ("b", 0) if kind == "colwise" else ("a", 1)
    part = distribute_tensor(getattr(adapter, key), mesh, [Shard(axis)], src_data_rank=None)
    adapter.register_parameter(key, nn.Parameter(part))
    if key == "a":
        inputs = part.shape[1]
        adapter.dropout.columns = mesh.get_local_rank() * -(-inputs // mesh.size()), inputs
    adapter.forward = partial(_correct_in_parts, adapter, key, mesh)


def _correct_in_parts(adapter: Any, key: str, mesh: DeviceMesh, x: Any, out: Any) -> Any:
    """`out` with a correction of an output that is split, or of this device's summand of it. Gradients of the matrix that all
    devices hold, and of an input that all of them read, are summed over them."""
    matrices = {"a": adapter.a, "b": adapter.b}
    matrices[key] = matrices[key].to_local()
    (other,) = matrices.keys() - {key}
    whole = DTensor.from_local(matrices[other], mesh, [Replicate()], run_check=False)
    matrices[other] = whole.to_local(grad_placements=[Partial()])
    last = Shard(x.dim() - 1)
    low = adapter.low(x.to_local(grad_placements=[Partial() if key == "b" else last]), matrices["a"])
    found = nn.functional.linear(low, matrices["b"])
    return out + DTensor.from_local(found, mesh, [last if key == "b" else Partial()], run_check=False)


def _sum_gradient_once(mesh: DeviceMesh, module: nn.Module, inputs: tuple) -> tuple:
    """A forward pre-hook after which the gradients that several column-wise layers give their common input are added
    before they are summed over the tensor axis, not after."""
    return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False), *inputs[1:]
