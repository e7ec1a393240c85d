"""The settings of optimizers and learning-rate schedules."""

import math
from dataclasses import dataclass, field

from leanlm.common.files import defaults

NAMES = ("adamw", "muon", "adafactor", "sgd")
STATES = ("fp32", "bf16", "int8", "int4")
SCHEDULES = ("constant", "cosine", "linear", "wsd")


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
        found = []
        if self.name not in NAMES:
            found.append(f"optim.name={self.name}: choose one of {', '.join(NAMES)}")
        if self.schedule not in SCHEDULES:
            found.append(f"optim.schedule={self.schedule}: choose one of {', '.join(SCHEDULES)}")
        if self.state not in STATES:
            found.append(f"optim.state={self.state}: choose one of {', '.join(STATES)}")
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
