"""The gradient of an embedding that shares its weights with the head, without a table of its own.

Autograd would make one for the embedding, as large as the head's, and the sum of both. Only the rows that were read differ
from zero: here they are added to the gradient of the head, in place, just before it reaches the parameter.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def add_rows(net: nn.Module, head: nn.Module) -> None:
    """Let the embeddings of a model whose weights are those of the head do so: only there another, dense gradient comes."""
    dense = {id(parameter) for parameter in head.parameters()}
    for part in net.modules():
        if isinstance(part, nn.Embedding) and id(part.weight) in dense and part.padding_idx is None and part.max_norm is None:
            part.forward = partial(_look_up, part)  # type: ignore[method-assign]


def _look_up(embedding: nn.Embedding, tokens: Tensor) -> Tensor:
    weight = embedding.weight
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return F.embedding(tokens, weight)
    rows: list[tuple[Tensor, Tensor]] = []

    def add(gradient: Tensor) -> None:
        for found, values in rows:
            gradient.index_add_(0, found, values.to(gradient.dtype))
        rows.clear()
        handle.remove()

    handle = weight.register_hook(add)  # runs when all that read the weights have been gone through in backward
    return _Rows.apply(weight, tokens, rows)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = rows
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (tokens,) = ctx.saved_tensors
        ctx.rows.append((tokens.flatten(), grad.flatten(0, -2)))
        return None, None, None
