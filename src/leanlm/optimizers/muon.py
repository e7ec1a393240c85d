"""Muon (Jordan 2024) for plain and for distributed matrices."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz  # private; the same in torch 2.11 and 2.13

from leanlm.common.dtensors import is_dtensor, local, local_part, whole
from leanlm.models import kernels
from leanlm.optimizers.base import Optimizer, put_away

STACK = 1 << 24  # numbers at most in the matrices that Muon updates together on a GPU


class Muon(Optimizer, torch.optim.Muon):
    """torch's Muon, which on a GPU takes matrices of one shape together, as a stack. Gradients are written over.

    A matrix is alone on a CPU, where a stack is no faster and some batched products in bf16 round otherwise than torch's Muon
    does; and if it is distributed, rounded by chance, or has its momentum elsewhere. A distributed one keeps its
    momentum so; its update is made of the whole of it, gathered in bf16 and orthogonalised in the same way on each device.
    """

    def update(self) -> None:
        for group in self.param_groups:
            for matrices in self._stacks(group["params"]):
                self._update(matrices, group)

    def _stacks(self, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
        """Those that have a gradient, as many at a time as are updated together."""
        alike: dict[Any, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                alike.setdefault((parameter.shape, parameter.dtype), []).append(parameter)
        for matrices in alike.values():
            first = matrices[0]
            together = kernels.on_gpu(first) and not (is_dtensor(self.owned(first)) or self.rounding or self.scratch)
            most = max(1, STACK // first.numel()) if together else 1
            yield from (matrices[i : i + most] for i in range(0, len(matrices), most))

    def _update(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        directions = self._directions(matrices, group["momentum"], group["nesterov"])
        shape = directions[0].shape
        stack = directions[0].new_empty((len(matrices), *shape), dtype=torch.bfloat16)
        torch._foreach_copy_(list(stack), directions)
        del directions
        changes = orthogonal(stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
        del stack
        weights = [local(matrix) for matrix in matrices]
        rounds = self.rounding is not None and weights[0].dtype == torch.bfloat16
        numbers = [weight.float() for weight in weights] if rounds else weights
        changes = changes.to(numbers[0].dtype, memory_format=torch.contiguous_format)  # foreach wants what lies alike
        parts = [local_part(change, matrix) for change, matrix in zip(changes, matrices, strict=True)]
        torch._foreach_mul_(numbers, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(numbers, parts, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], shape))
        if rounds and self.rounding is not None:
            for matrix, weight, wide in zip(matrices, weights, numbers, strict=True):
                weight.copy_(self.rounding(wide.flatten(), matrix, matrix, slice(0, wide.numel())).view_as(wide))

    def _directions(self, matrices: list[Tensor], momentum: float, nesterov: bool) -> list[Tensor]:
        """Add the gradients to the momentum, and return what is to be orthogonalised."""
        gradients = [self.owned(cast(Tensor, matrix.grad)) for matrix in matrices]
        for matrix, gradient in zip(matrices, gradients, strict=True):
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(gradient)
        kept = [local(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
        mine = [local(gradient) for gradient in gradients]
        here = [part.to(own.device) for part, own in zip(kept, mine, strict=True)]
        torch._foreach_lerp_(here, mine, 1 - momentum)
        torch._foreach_lerp_(mine, here, momentum if nesterov else 1.0)
        for matrix, part, own in zip(matrices, kept, here, strict=True):
            if own is not part:
                part.copy_(own)
            if self.scratch is not None:
                put_away(self.state[matrix], self.scratch)
        return [whole(gradient.bfloat16()) if is_dtensor(gradient) else gradient for gradient in gradients]


def orthogonal(stack: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Of each matrix in a stack about the nearest orthogonal one, as torch's Muon takes it: a quintic Newton-Schulz iteration.

    `stack`: [matrices, rows, columns], in bf16. It is divided by the norms of its matrices, which count as `eps` at least.
    """
    if len(stack) == 1:
        return _zeropower_via_newtonschulz(stack[0], coefficients, steps, eps)[None]
    a, b, c = coefficients
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack
    x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=eps))
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
