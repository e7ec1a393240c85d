"""How the parameters of a model without storage get their initial values and are sharded, one part after the other.

Each part is filled, one parameter at a time, just before it is sharded, so that no rank ever holds more than its share and
one part.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leanlm.common.dtensors import dtensor_like, is_dtensor, local_part
from leanlm.strategies.plan import Plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


Values = Callable[[str, Tensor], Tensor]  # name of a parameter, one of its shape and type -> its initial value on the CPU


@torch.no_grad()
def fill(part: nn.Module, net: nn.Module, global_names: dict[str, str], value_of: Values, device: torch.device) -> None:
    """Give storage on a device and initial values to the parameters of a part of `net` that have none.

    `global_names`: of tied parameters that have another name; tied ones of a part become one.
    """
    inside = set(part.modules())
    filled: dict[str, nn.Parameter] = {}
    for prefix, module in net.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)) if module in inside else ():
            name = global_names.get(f"{prefix}.{key}", f"{prefix}.{key}")
            if name not in filled and not parameter.is_meta:
                continue
            if name not in filled:
                whole = value_of(name, parameter)
                value = local_part(whole, parameter).to(device, copy=True)
                value = dtensor_like(value, parameter, whole.shape) if is_dtensor(parameter) else value
                filled[name] = nn.Parameter(value, parameter.requires_grad)
            setattr(module, key, filled[name])


def shard(part: nn.Module, mesh: "DeviceMesh", plan: Plan) -> None:
    """Divide the parameters of a part over the plan's `shard` axis with FSDP2, and copy them along `replicate`."""
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # the view it returns is a state, never written to
    # torch's schedules keep the parameters of a stage whole during a step; one that was resharded loses its gradients
    reshard = plan.reshard_after_forward and plan.pipeline == 1
    fully_shard(part, mesh=mesh["replicate", "shard"] if plan.replicate > 1 else mesh["shard"], reshard_after_forward=reshard)
