"""AdamW whose averages may take fewer bytes, and whose step makes no copy of any tensor."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from leanlm.optimizers import low_bit
from leanlm.optimizers.base import Optimizer, put_away


class AdamW(Optimizer):
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101). `kind`, of `low_bit.BITS`: how the averages are
    kept. `settings`: lr, betas, eps, weight_decay; and those of `Optimizer`."""

    def __init__(self, groups: list[dict[str, Any]], kind: str = "fp32", **settings: Any) -> None:
        defaults = {key: settings.pop(key) for key in ("lr", "betas", "eps", "weight_decay") if key in settings}
        super().__init__(groups, defaults, **settings)
        self.kind = kind
        self.sent: list[Any] = []  # rows on their way to the other copies

    def update(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        for work in self.sent:
            work.wait()
        self.sent.clear()

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, owned = self.state[parameter], self.owned(parameter)
        first, second = (low_bit.average(state, owned, name, self.kind) for name in ("exp_avg", "exp_avg_sq"))
        assert parameter.grad is not None
        weights, gradients = low_bit.flat(owned), low_bit.flat(self.owned(parameter.grad))
        step = state["step"] if "step" in state else torch.zeros((), device=weights.device)
        state["step"] = step = step.to(weights.device)  # not where a checkpoint may have left it: a copy waits for the device
        for piece in low_bit.pieces(owned):
            weight, gradient = weights[piece], gradients[piece]
            wide = weight if weight.dtype != torch.bfloat16 else weight.float()
            mean, square = first.read(piece).to(wide), second.read(piece).to(wide)
            adamw(
                [wide], [gradient.to(wide.dtype)], [mean], [square], [], [step.clone()],
                fused=True, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], eps=group["eps"],
                weight_decay=group["weight_decay"], maximize=False,
            )  # fmt: skip
            first.write(piece, mean)
            second.write(piece, square)
            if wide is not weight:
                weight.copy_(wide if self.rounding is None else self.rounding(wide, parameter, owned, piece))
        step += 1
        if owned is not parameter:
            self._send_rows(parameter)
        if self.scratch is not None:
            put_away(state, self.scratch)

    def _send_rows(self, parameter: Tensor) -> None:
        """Give each device the rows that others have updated; `update` waits for them."""
        assert self.copies is not None
        group, parts = self.copies.get_group(), parameter.detach().chunk(self.copies.size())
        self.sent += [dist.broadcast(rows, group=group, group_src=rank, async_op=True) for rank, rows in enumerate(parts)]
