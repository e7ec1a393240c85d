"""Linear layers that read the same input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlm.models import kernels


def together(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Each layer's outputs of `x [..., h]`; as one product where the weights are copied anyway, by autocast or in a compiler's
    graph. A GPU takes less time for one large product than for several small ones; the layers keep their own weights and
    names. A layer that something else watches or has replaced is called by itself.
    """
    copied = torch.compiler.is_compiling() or kernels.low_precision(x) != layers[0].weight.dtype
    if not copied or not all(map(_plain, layers)):
        x = x.to(kernels.low_precision(x))  # once for all of them
        return tuple(layer(x) for layer in layers)
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    weights: list[Tensor] = [layer.weight for layer in layers]
    out = F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
    return out.split([layer.out_features for layer in layers], -1)


def _plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks
