"""Optimizers of whole and of spread parameters. Weight decay acts on matrices only, not on biases and norms."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim._adafactor import adafactor
from torch.optim._muon import muon

from leanlm.memory import kernels
from leanlm.memory.offload import Away, host_memory, scratch
from leanlm.memory.state import AdamW, put_away, rounded, rows_of_copies
from leanlm.optim import Optim
from leanlm.spread import is_spread, local, local_part, whole
from leanlm.strategies.plan import Plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
    """torch's Muon, also for matrices that are spread over devices, or in bf16 and rounded by chance.

    The update of a spread matrix is made of the whole of it, gathered one at a time and orthogonalised in the same way on
    each device; its momentum stays spread. `copies`: devices that hold the same matrices and divide the momentum by rows.
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

    def step(self, closure: Callable[[], float] | None = None):
        loss = super().step(closure)
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if self.scratch is not None and parameter in self.state:
                put_away(self.state[parameter], self.scratch)
        return loss

    def _init_group(self, group: Any, params_with_grad: Any, grads: Any, muon_momentum_bufs: Any) -> bool:
        for parameter in group["params"] if self.copies is not None else ():
            if parameter.grad is not None and not self.state[parameter]:
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(self.owned(parameter.grad))}
        super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        ours = [
            i
            for i, (momentum, grad) in enumerate(zip(muon_momentum_bufs, grads, strict=True))
            if self.stochastic or is_spread(momentum) or (self.scratch is not None and kernels.on_gpu(grad))
        ]
        for i in reversed(ours):  # torch updates what is left in the lists
            self._update(params_with_grad.pop(i), grads.pop(i), muon_momentum_bufs.pop(i), group)
        return False

    def _update(self, parameter: Tensor, grad: Any, momentum: Tensor, group: dict[str, Any]) -> None:
        grad = self.owned(grad)
        here = momentum.to(grad.device)
        here.lerp_(grad, 1 - group["momentum"])
        gradient = whole(grad.lerp(here, group["momentum"]))
        if here is not momentum:
            momentum.copy_(here)
        del here
        change = torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        own = {key: group[key] for key in ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
        muon([change], [gradient], [torch.zeros_like(gradient)], lr=group["lr"], weight_decay=0, momentum=0, nesterov=False,
             has_complex=False, **own)  # fmt: skip
        weight, change = local(parameter), local_part(change, parameter)
        if weight.dtype == change.dtype:
            weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(change)
        else:
            wide = weight.float().mul_(1 - group["lr"] * group["weight_decay"]).add_(change)
            weight.copy_(rounded(wide) if self.stochastic else wide)
        if self.scratch is not None:  # before the next one comes
            put_away(self.state[parameter], self.scratch)


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
