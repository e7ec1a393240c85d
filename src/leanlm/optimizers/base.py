"""What our optimizers have in common: which part of the state a device keeps, and where it lies between two steps."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leanlm.common.dtensors import dtensor_like, is_dtensor, local, with_layout
from leanlm.memory.offload import Storage
from leanlm.optimizers.rounding import Rounding

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SMALLEST = 4096  # numbers in a tensor, or bytes of its state, below which neither is divided, coded or moved


class Optimizer(torch.optim.Optimizer):
    """What AdamW, Muon and both together have in common.

    Args:
        asked: what the optimizer of torch's that it is made of takes, as `settings` are.
        rounding: of bf16 parameters by chance; None: to the nearest.
        copies: devices that hold the same parameters, among which state and work are divided by rows (ZeRO-1, Rajbhandari et
            al. 2020, arXiv 1910.02054); None: each does all of it.
        scratch: where the state is between two steps; None: in the device's memory.
    """

    def __init__(
        self,
        *asked: Any,
        rounding: Rounding | None = None,
        copies: "DeviceMesh | None" = None,
        scratch: Storage | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*asked, **settings)
        self.rounding, self.copies, self.scratch = rounding, copies, scratch

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.update()
        return loss

    def update(self) -> None:
        """Update all parameters that have a gradient."""
        raise NotImplementedError

    def owned(self, tensor: Tensor) -> Tensor:
        """Of a parameter, or a tensor like it, the rows whose state this device keeps, sharing their storage."""
        if self.copies is None or is_dtensor(tensor) or tensor.numel() < SMALLEST:
            return tensor
        parts = tensor.detach().chunk(self.copies.size())
        if len(parts) < self.copies.size():
            return tensor
        from torch.distributed.tensor import Shard

        mine = parts[self.copies.get_local_rank()]
        return with_layout(mine, (self.copies, [Shard(0)], tensor.shape, tensor.stride()))


def owned(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """As `Optimizer.owned`, of torch's optimizers too, which keep all of it."""
    return optimizer.owned(parameter) if isinstance(optimizer, Optimizer) else parameter


def put_away(state: dict[str, Tensor], scratch: Storage) -> None:
    """Move the tensors of a parameter's state away, and let what they took leave memory."""
    for key, value in state.items():
        mine = local(value)
        if mine.nbytes < SMALLEST:
            continue
        if not scratch.holds(mine):
            moved = scratch.empty(mine.shape, mine.dtype).copy_(mine)
            state[key] = dtensor_like(moved, value, value.shape) if is_dtensor(value) else moved
            mine = moved
        scratch.release(mine)
