"""Optimizers of whole and of spread parameters. Weight decay acts on matrices only, not on biases and norms."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from leanlm.common.dtensors import is_dtensor
from leanlm.memory.offload import StateStorage, host_memory, scratch
from leanlm.models import kernels
from leanlm.optimizers.adafactor import Adafactor
from leanlm.optimizers.adamw import AdamW
from leanlm.optimizers.muon import Muon
from leanlm.optimizers.settings import Optim

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def build(
    named: Iterable[tuple[str, nn.Parameter]],
    optim: Optim,
    copies: "DeviceMesh | None" = None,
    offload: bool = False,
    stochastic: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of named parameters; each of its groups has its peak rate as `peak_lr`.

    Fused kernels take tensors of one device mesh at a time, so parameters that are spread otherwise are other groups.

    Args:
        named: global name and parameter, or the part of it that this device has.
        optim: what is asked for.
        copies: devices that hold the same parameters and divide the averages among them (ZeRO-1); None: they are not divided.
        offload: keep the averages in the memory of a GPU's machine, or in a file.
        stochastic: round bf16 weights up or down by chance.
    """
    by_kind: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    hidden: list[nn.Parameter] = []
    for name, parameter in named:
        if optim.name == "muon" and parameter.dim() == 2 and name.startswith("blocks."):
            hidden.append(parameter)
        else:
            own = parameter.device_mesh if is_dtensor(parameter) else None
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
    away: StateStorage | None = None
    if offload:
        away = host_memory() if kernels.on_gpu((hidden or groups[0]["params"])[0]) else scratch()

    def adamw(groups: list[dict]) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps}
        if optim.state != "fp32" or stochastic or away or copies is not None:
            return AdamW(groups, optim.state, stochastic, copies, away, **settings)
        return torch.optim.AdamW(groups, **settings, fused=True)  # fused: no temporary copy of the parameters

    def muons(groups: list[dict]) -> torch.optim.Optimizer:
        return Muon(groups, stochastic, copies, away, lr=optim.muon_lr, momentum=optim.momentum)

    if not hidden:
        return adamw(groups)
    matrices = {"params": hidden, "weight_decay": optim.weight_decay, "peak_lr": optim.muon_lr}
    return Combined([(muons, [matrices])] + ([(adamw, groups)] if groups else []))  # a middle stage may have matrices only


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
