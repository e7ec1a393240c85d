"""The tensor axis: matrices spread over devices as the model's `tensor_split` declares, with torch's tensor parallel."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from leanlm.models.contract import Model


def split_matrices(net: Model, mesh: DeviceMesh) -> None:
    """Spread the parameters that this rank has of a model without storage; patterns of `tensor_split` name its modules."""
    for pattern, kind in net.tensor_split.items():
        for name in [pattern.replace("*", block) for block in net.blocks] if "*" in pattern else [pattern]:
            module = _find(net, name)
            if module is None:  # held by another rank, or a part that this configuration does not have
                continue
            if kind == "input":
                module.register_forward_pre_hook(_sum_gradient_once(mesh))
                continue
            for part in _softmaxes(module) if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss) else [module]:
                parallelize_module(part, mesh, _style(kind, part))


def _find(net: nn.Module, path: str) -> nn.Module | None:
    module: Any = net
    for name in path.split("."):
        children = module._modules
        module = children.get(name)
        if module is None:
            return None
    return module


def _softmaxes(adaptive: nn.AdaptiveLogSoftmaxWithLoss) -> list[nn.Module]:
    return [adaptive.head, *(band[1] for band in adaptive.tail)]  # type: ignore[index]


def _style(kind: str, module: nn.Module) -> ParallelStyle:
    if kind == "vocabulary" and isinstance(module, nn.Embedding):
        return _VocabularyParallel()
    if kind == "vocabulary":  # in training, memory/loss.py reads the weights and gathers no logits
        return ColwiseParallel(output_layouts=Replicate())
    return RowwiseParallel() if kind == "rowwise" else ColwiseParallel()


class _VocabularyParallel(ParallelStyle):
    """An embedding whose rows are spread: each device looks up the token types it holds, and the results are summed.

    torch's RowwiseParallel does the same forward, but leaves each device with the gradient of the whole table.
    """

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        weight = distribute_tensor(module.weight, device_mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter("weight", nn.Parameter(weight))
        module.forward = partial(_look_up, module, device_mesh)
        return module


def _look_up(module: Any, mesh: DeviceMesh, tokens: Tensor) -> Tensor:
    weight = module.weight.to_local()
    position = tokens - mesh.get_local_rank() * -(-module.num_embeddings // mesh.size())
    here = (position >= 0) & (position < len(weight))
    found = nn.functional.embedding(position.where(here, 0), weight).masked_fill(~here[..., None], 0)
    return DTensor.from_local(found, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()]).to_local()


def _sum_gradient_once(mesh: DeviceMesh) -> Any:
    """A forward pre-hook after which the gradients that several column-wise layers give their common input are added
    before they are summed over the tensor axis, not after."""

    def hook(module: nn.Module, inputs: tuple) -> tuple:
        return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False), *inputs[1:]

    return hook
