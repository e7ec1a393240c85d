"""The settings of optimizers and learning-rate schedules."""

import math
from dataclasses import dataclass, field

NAMES = ("adamw", "muon", "adafactor", "sgd")
STATES = ("fp32", "bf16", "int8", "int4")
SCHEDULES = ("constant", "cosine", "linear", "wsd")


@dataclass
class Optim:
    """What `conf/optim` sets.

    Attributes:
        name: adamw (Loshchilov and Hutter 2019), muon (Jordan 2024, on the matrices inside blocks; AdamW on the rest),
            adafactor (Shazeer and Stern 2018), or sgd.
        lr: peak learning rate of adamw or sgd; of adafactor, relative to the root mean square of each weight.
        betas: decay of AdamW's two averages.
        eps: added to AdamW's denominator.
        weight_decay: decoupled, but L2 for sgd.
        momentum: of muon and sgd.
        muon_lr: peak learning rate of the matrices under muon.
        state: how AdamW's averages are kept: fp32 (as the weights are), bf16, int8 or int4.
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
    state: str = "fp32"
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
