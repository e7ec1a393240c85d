"""The settings of optimizers and learning-rate schedules."""

import math
from dataclasses import dataclass, field

from leanlm.common.files import defaults

CHOICES = {
    "name": ("adamw", "muon", "adafactor", "sgd"),
    "schedule": ("constant", "cosine", "linear", "wsd"),
    "state": ("fp32", "bf16", "int8", "int4"),
}
SHIPPED = defaults("optim/adamw.yaml")


@dataclass
class Optim:
    """What `conf/optim` sets; what each key means, and its default, stand in `conf/optim/adamw.yaml`."""

    name: str = SHIPPED["name"]
    lr: float = SHIPPED["lr"]
    betas: list[float] = field(default_factory=SHIPPED["betas"].copy)
    eps: float = SHIPPED["eps"]
    weight_decay: float = SHIPPED["weight_decay"]
    momentum: float = SHIPPED["momentum"]
    muon_lr: float = SHIPPED["muon_lr"]
    state: str = SHIPPED["state"]
    schedule: str = SHIPPED["schedule"]
    warmup: int = SHIPPED["warmup"]
    decay: float = SHIPPED["decay"]
    final: float = SHIPPED["final"]

    def problems(self) -> list[str]:
        given = vars(self)
        of = {key: names for key, names in CHOICES.items() if given[key] not in names}
        found = [f"optim.{key}={given[key]}: choose one of {', '.join(names)}" for key, names in of.items()]
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"optim.betas={list(self.betas)}: two numbers from 0 to below 1")
        found += [f"optim.{key}={given[key]}: it must be above 0" for key in ("lr", "muon_lr") if given[key] <= 0]
        low = ("eps", "weight_decay", "momentum", "warmup", "decay", "final")
        return found + [f"optim.{key}={given[key]}: it must not be negative" for key in low if given[key] < 0]


def factor(optim: Optim, step: int, max_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) as a share of the peak."""
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return 1.0
    falls = round(optim.decay * max_steps) if optim.schedule == "wsd" else max_steps - optim.warmup  # steps in which it does
    left = min(1.0, max(0.0, (max_steps - step) / max(1, falls)))  # 1 before it falls, 0 at the end
    if optim.schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return optim.final + (1 - optim.final) * left
