"""Optimizers of plain and of distributed parameters. Weight decay acts on matrices only, not on biases and norms."""

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from leanlm.common.dtensors import is_dtensor
from leanlm.memory import offload
from leanlm.models import kernels
from leanlm.optimizers.adafactor import Adafactor
from leanlm.optimizers.adamw import AdamW
from leanlm.optimizers.base import Optimizer
from leanlm.optimizers.muon import Muon
from leanlm.optimizers.rounding import Rounding
from leanlm.optimizers.settings import Optim

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def build(
    named: Iterable[tuple[str, nn.Parameter]],
    optim: Optim,
    copies: "DeviceMesh | None" = None,
    offloads: bool = False,
    rounding: Rounding | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of named parameters; each of its groups has its peak rate as `peak_lr`.

    Fused kernels take tensors of one device mesh at a time, so parameters that are distributed otherwise are other groups.
    `named`: global name and parameter, or the part of it that this device has. `offloads`: keep the averages in the memory of a
    GPU's machine, or in a file. For `copies` and `rounding` see `Optimizer`.
    """
    hidden, groups = _groups(named, optim)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=_fuses_sgd(groups), foreach=False)
    if optim.name == "adafactor":
        return Adafactor(groups, lr=optim.lr, foreach=False)  # foreach: temporary copies of all parameters at once
    scratch = offload.storage((hidden or groups)[0]["params"][0]) if offloads else None
    ours: dict[str, Any] = {"rounding": rounding, "copies": copies, "scratch": scratch}
    parts: list[torch.optim.Optimizer] = []  # a middle stage may have matrices only
    if hidden:
        parts.append(Muon(hidden, lr=optim.muon_lr, momentum=optim.momentum, **ours))
    settings: dict[str, Any] = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps}
    if groups and (optim.state != "fp32" or any(each is not None for each in ours.values())):
        parts.append(AdamW(groups, optim.state, **settings, **ours))
    elif groups:
        parts.append(torch.optim.AdamW(groups, **settings, fused=True))  # fused: no temporary copy of the parameters
    return Combined(parts) if hidden else parts[0]


def _groups(named: Iterable[tuple[str, nn.Parameter]], optim: Optim) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups of Muon, and those of all other parameters."""
    found: dict[tuple[bool, bool, Any], list[nn.Parameter]] = {}
    for name, parameter in named:
        hidden = optim.name == "muon" and parameter.dim() == 2 and name.startswith("blocks.")
        mesh = parameter.device_mesh if is_dtensor(parameter) and not hidden else None
        found.setdefault((hidden, parameter.dim() >= 2, mesh), []).append(parameter)
    groups: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for (hidden, matrix, _), parameters in found.items():
        peak, decay = optim.muon_lr if hidden else optim.lr, optim.weight_decay if matrix else 0.0
        groups[hidden].append({"params": parameters, "weight_decay": decay, "peak_lr": peak})
    return groups[True], groups[False]


def _fuses_sgd(groups: list[dict[str, Any]]) -> bool:
    """torch's fused SGD knows no distributed tensors, and garbles momentum in bf16 on a CPU (torch 2.13)."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return not any(is_dtensor(p) or (p.dtype == torch.bfloat16 and not kernels.on_gpu(p)) for p in parameters)


class Combined(Optimizer):
    """Several optimizers that act as one: the groups and the state are those of all parts together.

    Lightning's automatic optimization, and a checkpoint, then see a single optimizer.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            if isinstance(part, AdamW):
                self.kind = part.kind
            if isinstance(part, Optimizer):
                self.copies, self.scratch = part.copies, part.scratch

    def update(self) -> None:
        groups = iter(self.param_groups)  # which may have been replaced by loading a checkpoint, as the state may
        for part in self.parts:
            part.state, part.param_groups = self.state, list(islice(groups, len(part.param_groups)))
            part.step()
