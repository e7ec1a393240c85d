"""Optimizers of whole and of spread parameters. Weight decay acts on matrices only, not on biases and norms."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim._adafactor import adafactor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from leanlm.memory import kernels
from leanlm.memory.offload import Away, host_memory, scratch
from leanlm.memory.state import AdamW, put_away, rounded, rows_of_copies
from leanlm.optim import Optim
from leanlm.spread import is_spread, local, local_part, whole
from leanlm.strategies.plan import Plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

STACK = 1 << 24  # numbers at most in the matrices that Muon updates together on a GPU


def build(
    named: Iterable[tuple[str, nn.Parameter]],
    optim: Optim,
    plan: Plan,
    mesh: "DeviceMesh | None",
    stochastic: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of named parameters, with its state as the plan keeps it; each group has its peak rate as `peak_lr`.

    Fused kernels take tensors of one device mesh at a time, so parameters that are spread otherwise are other groups.
    """
    by_kind: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    hidden: list[nn.Parameter] = []
    for name, parameter in named:
        if optim.name == "muon" and parameter.dim() == 2 and name.startswith("blocks."):
            hidden.append(parameter)
        else:
            own = parameter.device_mesh if is_spread(parameter) else None
            by_kind.setdefault((parameter.dim() >= 2, own), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": optim.weight_decay if matrix else 0.0, "peak_lr": optim.lr}
        for (matrix, _), parameters in by_kind.items()
    ]
    if optim.name == "sgd":
        whole_ones = all(mesh is None for _, mesh in by_kind)  # torch's fused kernel knows no spread tensors
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=whole_ones, foreach=False)
    if optim.name == "adafactor":
        return Adafactor(groups, lr=optim.lr, foreach=False)  # foreach: temporary copies of all parameters at once
    away: Away | None = None
    if plan.offload in ("optimizer", "all"):
        away = host_memory() if kernels.on_gpu((hidden or groups[0]["params"])[0]) else scratch()
    copies = mesh["replicate"] if mesh is not None and plan.zero1 else None

    def adamw(groups: list[dict]) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps}
        if optim.state != "fp32" or stochastic or away or plan.zero1:
            return AdamW(groups, optim.state, stochastic, copies, away, **settings)
        return torch.optim.AdamW(groups, **settings, fused=True)  # fused: no temporary copy of the parameters

    def muons(groups: list[dict]) -> torch.optim.Optimizer:
        return Muon(groups, stochastic, copies, away, lr=optim.muon_lr, momentum=optim.momentum)

    if not hidden:
        return adamw(groups)
    matrices = {"params": hidden, "weight_decay": optim.weight_decay, "peak_lr": optim.muon_lr}
    return Combined([(muons, [matrices])] + ([(adamw, groups)] if groups else []))  # a middle stage may have matrices only


class Muon(torch.optim.Muon):
    """torch's Muon, with the matrices of one shape stacked on a GPU: a product is of all in a stack.

    On a CPU each is a stack of its own: that is about as fast, and some batched products in bf16 round otherwise than torch's
    Muon does. So is one that is spread over devices, in bf16 and rounded by chance, or whose momentum is elsewhere. The update
    of a spread one is made of the whole of it, gathered in bf16 and orthogonalised in the same way on each device; its momentum
    stays spread. `copies`: devices that hold the same matrices and divide the momentum by rows. Gradients are written over.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        stochastic: bool = False,
        copies: "DeviceMesh | None" = None,
        scratch: Away | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(groups, **settings)
        self.stochastic, self.copies, self.scratch = stochastic, copies, scratch

    def owned(self, parameter: Tensor) -> Tensor:
        return rows_of_copies(parameter, self.copies)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for matrices in self._stacks(group["params"]):
                self._update(matrices, group)
        return loss

    def _stacks(self, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
        """Those that have a gradient, as many at a time as are updated together."""
        alike: dict[Any, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                alike.setdefault((parameter.shape, parameter.dtype), []).append(parameter)
        for matrices in alike.values():
            first = matrices[0]
            together = kernels.on_gpu(first) and not (is_spread(self.owned(first)) or self.stochastic or self.scratch)
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
        rounds = self.stochastic and weights[0].dtype == torch.bfloat16
        numbers = [weight.float() for weight in weights] if rounds else weights
        changes = changes.to(numbers[0].dtype, memory_format=torch.contiguous_format)  # foreach wants what lies alike
        parts = [local_part(change, matrix) for change, matrix in zip(changes, matrices, strict=True)]
        torch._foreach_mul_(numbers, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(numbers, parts, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], shape))
        if rounds:
            for weight, wide in zip(weights, numbers, strict=True):
                weight.copy_(rounded(wide))

    def _directions(self, matrices: list[Tensor], momentum: float, nesterov: bool) -> list[Tensor]:
        """Momentum takes the gradients up; what is to be orthogonalised."""
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
        return [whole(gradient.bfloat16()) if is_spread(gradient) else gradient for gradient in gradients]


def orthogonal(stack: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Of each matrix in a stack about the nearest orthogonal one, as torch's Muon takes it: a quintic Newton-Schulz iteration.

    Args:
        stack: [matrices, rows, columns], in bf16. It is divided by the norms of its matrices.
        coefficients: of the polynomial.
        steps: of the iteration.
        eps: the least norm that is divided by.
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


class Adafactor(torch.optim.Adafactor):
    """torch's Adafactor (Shazeer and Stern 2018, arXiv 1804.04235), also for parameters that are spread over devices.

    Of a matrix it keeps the mean squares of rows and columns. They are of the whole matrix and the same on each device; the
    gradient is gathered for them, one matrix at a time.
    """

    whole_state = ("row_var", "col_var", "variance")

    def _init_group(self, group: Any, params_with_grad: Any, grads: Any, *state: Any) -> bool:
        for parameter in group["params"]:
            if parameter.grad is not None and not self.state[parameter]:
                shape = parameter.shape
                sizes = {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])} if len(shape) > 1 else {}
                mine = local(parameter).detach()
                self.state[parameter] = {"step": torch.zeros(())} | {
                    name: mine.new_zeros(size) for name, size in (sizes or {"variance": shape}).items()
                }
        super()._init_group(group, params_with_grad, grads, *state)
        for i in reversed([i for i, one in enumerate(params_with_grad) if is_spread(one)]):
            parameter, grad = params_with_grad.pop(i), grads.pop(i)
            rows, columns, each, steps = ([part.pop(i)] for part in state)
            weight = whole(parameter)
            settings = {key: group[key] for key in ("d", "lr", "beta2_decay", "weight_decay", "maximize")}
            adafactor([weight], [whole(grad)], rows, columns, each, steps,
                      eps1=group["eps"][0], eps2=group["eps"][1], **settings)  # fmt: skip
            local(parameter).copy_(local_part(weight, parameter))
        return False


class Combined(torch.optim.Optimizer):
    """Several optimizers that act as one: the groups and the state are those of all parts together.

    Lightning's automatic optimization, and a checkpoint, then see a single optimizer.
    """

    def __init__(self, parts: list[tuple[Callable[[list[dict]], torch.optim.Optimizer], list[dict]]]) -> None:
        self.parts = [make(groups) for make, groups in parts]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            if isinstance(part, AdamW):
                self.kind = part.kind
            if isinstance(part, AdamW | Muon):
                self.owned, self.scratch = part.owned, part.scratch

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, groups in self._groups_of_parts():
            part.state, part.param_groups = self.state, groups  # ours may have been replaced by loading a checkpoint
            part.step()
        return loss

    def _groups_of_parts(self) -> Iterator[tuple[torch.optim.Optimizer, list[dict]]]:
        first = 0
        for part in self.parts:
            yield part, self.param_groups[first : first + len(part.param_groups)]
            first += len(part.param_groups)
