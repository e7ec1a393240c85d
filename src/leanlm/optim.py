"""Optimizers and learning-rate schedules. Weight decay acts on matrices only, not on biases and norms."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

NAMES = ("adamw", "muon", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "wsd")


@dataclass
class Optim:
    """What `conf/optim` sets.

    Attributes:
        name: adamw (Loshchilov and Hutter 2019), muon (Jordan 2024, on the matrices inside blocks; AdamW on the rest),
            or sgd.
        lr: peak learning rate of adamw or sgd.
        betas: decay of AdamW's two averages.
        eps: added to AdamW's denominator.
        weight_decay: decoupled for adamw and muon, L2 for sgd.
        momentum: of muon and sgd.
        muon_lr: peak learning rate of the matrices under muon.
        schedule: after the warm-up: constant; cosine or linear down to `final`; wsd: constant, then linear.
        warmup: steps in which the rate rises linearly from 0.
        decay: share of all steps in which wsd decays.
        final: rate at the end, as a share of the peak.
    """

    name: str = "adamw"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95
    muon_lr: float = 0.02
    schedule: str = "cosine"
    warmup: int = 100
    decay: float = 0.4
    final: float = 0.1

    def problems(self) -> list[str]:
        found = []
        if self.name not in NAMES:
            found.append(f"optim.name={self.name}: choose one of {', '.join(NAMES)}")
        if self.schedule not in SCHEDULES:
            found.append(f"optim.schedule={self.schedule}: choose one of {', '.join(SCHEDULES)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"optim.betas={list(self.betas)}: two numbers from 0 to below 1")
        found += [
            f"optim.{key}={getattr(self, key)}: it must be above 0" for key in ("lr", "muon_lr") if getattr(self, key) <= 0
        ]
        low = ("eps", "weight_decay", "momentum", "warmup", "decay", "final")
        return found + [f"optim.{key}={getattr(self, key)}: it must not be negative" for key in low if getattr(self, key) < 0]


def factor(optim: Optim, step: int, max_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) as a share of the peak."""
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    left = max(0.0, (max_steps - step) / max(1, max_steps - optim.warmup))  # 1 after the warm-up, 0 at the end
    if optim.schedule == "cosine":
        return optim.final + (1 - optim.final) * 0.5 * (1 - math.cos(math.pi * left))
    if optim.schedule == "linear":
        return optim.final + (1 - optim.final) * left
    if optim.schedule == "wsd":
        share = min(1.0, (max_steps - step) / max(1, round(optim.decay * max_steps)))
        return optim.final + (1 - optim.final) * max(0.0, share)
    return 1.0


def build(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer of a model's parameters; each group keeps its peak rate as `peak_lr`."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    hidden: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if optim.name == "muon" and parameter.dim() == 2 and name.startswith("blocks."):
            hidden.append(parameter)
        else:
            (matrices if parameter.dim() >= 2 else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": optim.weight_decay, "peak_lr": optim.lr},
        {"params": others, "weight_decay": 0.0, "peak_lr": optim.lr},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=True)

    def adamw(groups: list[dict]) -> torch.optim.Optimizer:
        # fused: no temporary copy of the parameters during the step
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True)

    def muon(groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.Muon(groups, lr=optim.muon_lr, momentum=optim.momentum)

    if not hidden:
        return adamw(groups)
    group = {"params": hidden, "weight_decay": optim.weight_decay, "peak_lr": optim.muon_lr}
    return Combined([(muon, [group]), (adamw, groups)])


class Combined(torch.optim.Optimizer):
    """Several optimizers that act as one: the groups and the state are those of all parts together.

    Lightning's automatic optimization, and a checkpoint, then see a single optimizer.
    """

    def __init__(self, parts: list[tuple[Callable[[list[dict]], torch.optim.Optimizer], list[dict]]]) -> None:
        self.parts = [make(groups) for make, groups in parts]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

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
