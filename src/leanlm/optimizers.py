"""Optimizers of whole and of spread parameters. Weight decay acts on matrices only, not on biases and norms."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim._muon import muon

from leanlm.memory.offload import scratch
from leanlm.memory.state import AdamW
from leanlm.optim import Optim
from leanlm.strategies.cut import local_part
from leanlm.strategies.plan import Plan


def build(
    named: Iterable[tuple[str, nn.Parameter]], optim: Optim, plan: Plan, mesh: DeviceMesh | None
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
            own = parameter.device_mesh if isinstance(parameter, DTensor) else None
            by_kind.setdefault((parameter.dim() >= 2, own), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": optim.weight_decay if matrix else 0.0, "peak_lr": optim.lr}
        for (matrix, _), parameters in by_kind.items()
    ]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=True)

    def adamw(groups: list[dict]) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps}
        stochastic, away = plan.precision == "bf16-stochastic", plan.offload in ("optimizer", "all")
        if plan.optimizer_state != "fp32" or stochastic or away or plan.zero1:
            copies = mesh["replicate"] if mesh is not None and plan.zero1 else None
            return AdamW(groups, plan.optimizer_state, stochastic, copies, scratch() if away else None, **settings)
        return torch.optim.AdamW(groups, **settings, fused=True)  # fused: no temporary copy of the parameters

    def muons(groups: list[dict]) -> torch.optim.Optimizer:
        return Muon(groups, lr=optim.muon_lr, momentum=optim.momentum)

    if not hidden:
        return adamw(groups)
    matrices = {"params": hidden, "weight_decay": optim.weight_decay, "peak_lr": optim.muon_lr}
    return Combined([(muons, [matrices])] + ([(adamw, groups)] if groups else []))  # a middle stage may have matrices only


class Muon(torch.optim.Muon):
    """torch's Muon, also for matrices that are spread over devices.

    The update of such a matrix is made of the whole of it, gathered one at a time and orthogonalised in the same way on
    each device; its momentum stays spread.
    """

    def _init_group(self, group: Any, params_with_grad: Any, grads: Any, muon_momentum_bufs: Any) -> bool:
        super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        spread = [i for i, parameter in enumerate(params_with_grad) if isinstance(parameter, DTensor)]
        for i in reversed(spread):  # torch updates what is left in the lists
            self._update(params_with_grad.pop(i), grads.pop(i), muon_momentum_bufs.pop(i), group)
        return False

    def _update(self, parameter: DTensor, grad: Any, momentum: DTensor, group: dict[str, Any]) -> None:
        momentum.lerp_(grad, 1 - group["momentum"])
        whole = grad.lerp(momentum, group["momentum"]).full_tensor()
        change = torch.zeros_like(whole)
        own = {key: group[key] for key in ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
        muon([change], [whole], [torch.zeros_like(whole)], lr=group["lr"], weight_decay=0, momentum=0, nesterov=False,
             has_complex=False, **own)  # fmt: skip
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.to_local().add_(local_part(change, parameter))


class Combined(torch.optim.Optimizer):
    """Several optimizers that act as one: the groups and the state are those of all parts together.

    Lightning's automatic optimization, and a checkpoint, then see a single optimizer.
    """

    def __init__(self, parts: list[tuple[Callable[[list[dict]], torch.optim.Optimizer], list[dict]]]) -> None:
        self.parts = [make(groups) for make, groups in parts]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        ours = [part for part in self.parts if isinstance(part, AdamW)]
        if ours:
            self.kind, self.owned = ours[0].kind, ours[0].owned

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
