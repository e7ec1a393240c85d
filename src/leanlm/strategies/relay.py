"""Forward passes through the stages of all ranks, for validation and for text that a divided model writes."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from leanlm.strategies.parallel_model import ParallelModel


def relay(
    parallel: ParallelModel, tokens: Tensor, rows: Tensor, targets: Tensor | None, positions: Tensor | None = None
) -> Tensor | None:
    """A forward pass in which each rank hands the hidden state on to the next; successive passes overlap.

    `tokens [b, s]` are the same on every rank of a pipeline. Returns what the last stage returns, on the rank that holds it;
    None on the others.
    """
    here, hidden = parallel.coordinate("pipeline"), tokens
    for number, stage in parallel.stages.items():
        if number > 0 and parallel.owner(number - 1) != here:
            hidden = torch.empty(*tokens.shape, parallel.width, dtype=parallel.dtype, device=parallel.device)
            dist.recv(hidden, group=parallel.group("pipeline"), group_src=parallel.owner(number - 1))
        hidden = stage(hidden, rows, targets, positions)
        if number < parallel.last and parallel.owner(number + 1) != here:
            dist.send(hidden, group=parallel.group("pipeline"), group_dst=parallel.owner(number + 1))
    return hidden if parallel.last in parallel.stages else None


def logits_after(parallel: ParallelModel) -> Callable[[list[int]], Tensor]:
    """History of tokens -> logits `[v]` of the next, for `generate`. All ranks must make the same calls.

    A model that carries state goes on from it; others read their last `sequence` tokens anew for each token.
    """
    read = 0
    for stage in parallel.stages.values():
        stage.eval()

    @torch.no_grad()
    def logits(history: list[int]) -> Tensor:
        nonlocal read
        first = read if parallel.net.carries_state else max(0, len(history) - parallel.net.sequence)
        parallel.begin(0, fresh=read == 0)
        read = len(history)
        tokens = torch.tensor([history[first:]], device=parallel.device)
        found = relay(parallel, tokens, torch.zeros(1, dtype=torch.long), None)
        if found is None:
            found = torch.empty(parallel.vocabulary, dtype=parallel.dtype, device=parallel.device)
        if parallel.plan.pipeline > 1:
            dist.broadcast(found, group=parallel.group("pipeline"), group_src=parallel.owner(parallel.last))
        return found

    return logits
