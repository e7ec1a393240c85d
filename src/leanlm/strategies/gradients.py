"""What happens to gradients between backward and the optimizer when a model is cut: summed where a weight has copies, and
clipped by the norm of all of them."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from leanlm.strategies.cut import Cut


def complete(cut: Cut) -> None:
    """Sum what neither autograd, DDP nor FSDP2 has summed. All ranks must call it once a step, after the last backward."""
    _add_tied(cut)
    plan = cut.plan
    if plan.replicate > 1 and plan.shard == 1 and plan.pipeline * plan.tensor > 1:
        group = cut.group("replicate")
        gradients = [local(p.grad) for _, p in cut.named_parameters() if p.grad is not None]
        for work in [dist.all_reduce(gradient, group=group, async_op=True) for gradient in gradients]:
            work.wait()
        torch._foreach_div_(gradients, plan.replicate)  # a mean, as DDP and FSDP2 take it


def clip(cut: Cut, largest: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `largest` (0: leave them) and return the norm before.

    Each rank adds the squares of what it holds, divided by the ranks that hold the same; one all-reduce makes the norm.
    """
    copies = {id(parameter) for _, parameter in cut.copies()}
    parameters = [parameter for parameter in cut.net.parameters() if parameter.grad is not None]
    if cut.mesh is None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    else:
        holders = cut.plan.world // cut.plan.pipeline
        squares = torch.zeros((), dtype=torch.float64, device=cut.device)
        by_pieces: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            if id(parameter) not in copies:
                by_pieces.setdefault(_pieces(parameter), []).append(local(parameter.grad))
        for pieces, gradients in by_pieces.items():
            squares += torch.nn.utils.get_total_norm(gradients).double() ** 2 * pieces / holders
        dist.all_reduce(squares)
        norm = squares.sqrt()
    if largest:
        scale = (largest / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grads_with_norm_
        torch._foreach_mul_([local(p.grad) for p in parameters], scale.to(parameters[0].dtype))
    return norm


def local(tensor: Tensor | None) -> Tensor:
    """What this rank holds of a tensor, sharing its storage."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _pieces(parameter: Tensor) -> int:
    """Into how many different pieces a parameter is cut over the ranks of its stage."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh, pieces = parameter.device_mesh, 1
    for dim, placement in enumerate(parameter.placements):
        pieces *= 1 if placement.is_replicate() else mesh.size(dim)
    return pieces


def _add_tied(cut: Cut) -> None:
    """Weights shared by the first and the last stage of a pipeline have a copy in each: both get the sum of the gradients."""
    copies = cut.copies()
    owners = dict(reversed(cut.named_parameters()))  # of a name that is there twice, the first
    if cut.plan.pipeline == 1 or not cut.ties:
        return
    here = [name for name, _ in copies if owners[name] is not dict(copies)[name]]
    for name, copy in copies:
        if name in here:
            total = local(owners[name].grad).add_(local(copy.grad))
            local(copy.grad).copy_(total)
    first, last = 0, len(cut.split) - 1
    if (first in cut.stages) == (last in cut.stages):
        return
    peer = dist.get_global_rank(cut.group("pipeline"), cut.owner(last if first in cut.stages else first))
    for name in sorted(set(cut.ties.values())):
        mine = local(owners[name].grad)
        theirs = torch.empty_like(mine)
        swap = [dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)]
        for work in dist.batch_isend_irecv(swap):
            work.wait()
        mine.add_(theirs)
