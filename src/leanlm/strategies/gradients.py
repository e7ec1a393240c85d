"""What happens to gradients between backward and the optimizer when a model is divided: summed where a weight has copies, and
clipped by the norm of all of them."""

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from leanlm.common.dtensors import is_dtensor, local
from leanlm.strategies.parallel_model import ParallelModel


def complete(parallel: ParallelModel) -> None:
    """Sum what neither autograd, DDP nor FSDP2 has summed. All ranks must call it once a step, after the last backward."""
    _add_tied(parallel)
    plan = parallel.plan
    if plan.replicate > 1 and plan.shard == 1 and plan.pipeline * plan.tensor > 1:
        group = parallel.group("replicate")
        gradients = [local(p.grad) for _, p in parallel.named_parameters() if p.grad is not None]
        for work in [dist.all_reduce(gradient, group=group, async_op=True) for gradient in gradients]:
            work.wait()
        torch._foreach_div_(gradients, plan.replicate)  # a mean, as DDP and FSDP2 take it


def clip(parallel: ParallelModel, largest: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `largest` (0: leave them) and return the norm before.

    Each rank adds the squares of what it holds, divided by the ranks that hold the same; one all-reduce makes the norm.
    """
    parameters = [parameter for parameter in parallel.net.parameters() if parameter.grad is not None]
    if not parallel.plan.splits_model:
        norm = _norm([p.grad for p in parameters if p.grad is not None])
    else:
        squares = _squares(parallel, parameters)
        dist.all_reduce(squares)
        norm = squares.sqrt()
    if largest:
        scale = (largest / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grads_with_norm_
        # torch's fused AdamW could scale them as it reads them (`grad_scale`), but takes the factor in float32 only: in float64
        # the gradients would be off by 3e-8 of theirs
        torch._foreach_mul_([local(p.grad) for p in parameters], scale.to(parameters[0].dtype))
    return norm


class StepInBackward:
    """Updates each parameter as soon as its gradient is whole, and frees the gradient.

    Of all parameters only the one at hand then has a gradient, and an optimizer leaves the others alone.
    """

    updates = True  # False: gradients are only freed

    def __init__(self, parallel: ParallelModel, optimizer: torch.optim.Optimizer) -> None:
        self.parallel, self.optimizer = parallel, optimizer
        self.squares, self.largest = torch.zeros((), dtype=torch.float64, device=parallel.device), 0
        for _, parameter in parallel.named_parameters():
            parameter.register_post_accumulate_grad_hook(self._update)

    def _update(self, parameter: Tensor) -> None:
        self.squares += _squares(self.parallel, [parameter])
        self.largest = max(self.largest, local(parameter.grad).nbytes)
        if self.updates:
            self.optimizer.step()
        parameter.grad = None

    def done(self) -> tuple[Tensor, int]:
        """The step is over: the global norm of its gradient, and the bytes of the largest part of it on this rank."""
        squares, largest = self.squares.clone(), self.largest
        if self.parallel.plan.splits_model:
            dist.all_reduce(squares)
        self.squares.zero_()
        self.largest = 0
        return squares.sqrt(), largest


def _norm(tensors: list[Tensor]) -> Tensor:
    """Global norm of tensors of one type. As torch's `get_total_norm` takes it, which for a simulation's tensors goes through
    them one by one."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def _squares(parallel: ParallelModel, parameters: Sequence[Tensor]) -> Tensor:
    """This rank's share of the squared norm of gradients: their sum over all ranks is the whole."""
    copies = {id(parameter) for _, parameter in parallel.copies()}
    squares = torch.zeros((), dtype=torch.float64, device=parallel.device)
    by_pieces: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        if id(parameter) not in copies:
            by_pieces.setdefault(_pieces(parameter), []).append(local(parameter.grad))
    for pieces, gradients in by_pieces.items():
        squares += _norm(gradients).double() ** 2 * pieces / (parallel.plan.world // parallel.plan.pipeline)
    return squares


def _pieces(parameter: Tensor) -> int:
    """Into how many different pieces a parameter is divided over the ranks of its stage."""
    if not is_dtensor(parameter):
        return 1
    mesh = parameter.device_mesh
    return prod(mesh.size(axis) for axis, place in enumerate(parameter.placements) if not place.is_replicate())


def _add_tied(parallel: ParallelModel) -> None:
    """Weights shared by the first and the last stage of a pipeline have a copy in each: both get the sum of the gradients."""
    copies, owners = dict(parallel.copies()), dict(parallel.owned_parameters())
    for name in parallel.shared:
        if name in copies and name in owners:
            total = local(owners[name].grad).add_(local(copies[name].grad))
            local(copies[name].grad).copy_(total)
        elif name in copies or name in owners:
            mine = local((copies | owners)[name].grad)
            other_end = parallel.last if name in owners else 0
            peer = dist.get_global_rank(parallel.group("pipeline"), parallel.owner(other_end))
            theirs = torch.empty_like(mine)
            swap = [dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)]
            for work in dist.batch_isend_irecv(swap):
                work.wait()
            mine.add_(theirs)
