"""Adafactor for plain and for distributed parameters."""

from typing import Any

import torch
from torch.optim._adafactor import adafactor  # private, as `_init_group` is; the same in torch 2.11 and 2.13

from leanlm.common.dtensors import is_dtensor, local, local_part, whole


class Adafactor(torch.optim.Adafactor):
    """torch's Adafactor (Shazeer and Stern 2018, arXiv 1804.04235), also for distributed parameters.

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
        # distributed ones are updated here and taken from the lists of which torch updates the rest
        for i in reversed([i for i, one in enumerate(params_with_grad) if is_dtensor(one)]):
            parameter, grad = params_with_grad.pop(i), grads.pop(i)
            rows, columns, each, steps = ([part.pop(i)] for part in state)
            weight = whole(parameter)
            settings = {key: group[key] for key in ("d", "lr", "beta2_decay", "weight_decay", "maximize")}
            adafactor([weight], [whole(grad)], rows, columns, each, steps,
                      eps1=group["eps"][0], eps2=group["eps"][1], **settings)  # fmt: skip
            local(parameter).copy_(local_part(weight, parameter))
        return False
