"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): what backward needs is computed again, not kept.

Whole blocks, some of them, or only what is cheap in them (Korthikanti et al. 2022, arXiv 2205.05198); and for models that
carry state, pieces of the sequence, of which only the states between them are kept.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from leanlm.memory.loss import repeated

CHOICES = "none, blocks, operators, 2 or more (every k-th block), or 0 to 1 (share of the blocks' activations that may stay)"
DEAR = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product")


def levels(recompute: str, blocks: Sequence[nn.Module], compiled: bool = False) -> list[str]:
    """For each of a device's blocks: `keep`, `operators` or `blocks`.

    Of a share, the last blocks stay: their activations are gone by the time that the first blocks are computed again. Of
    recurrent layers nothing is cheap, and torch's change the results of their own matrix products. A compiled block by
    itself keeps matrix products and attention, not what is cheap; it writes over results that `operators` would keep.

    Raises:
        ValueError: `recompute` is none of CHOICES.
    """
    if recompute == "operators":
        recurrent = [any(isinstance(part, nn.RNNBase) for part in block.modules()) for block in blocks]
        return ["keep" if compiled or its else recompute for its in recurrent]
    if recompute.isdecimal() and int(recompute) > 1:
        return ["keep" if i % int(recompute) else "blocks" for i in range(len(blocks))]
    share = float({"none": "1", "blocks": "0"}.get(recompute, recompute))
    if not 0 <= share <= 1:
        raise ValueError(recompute)
    kept = int(share * len(blocks) + 1e-9)
    return ["blocks"] * (len(blocks) - kept) + ["keep"] * kept


def recomputed(function: Callable[..., Any], *inputs: Any, level: str = "blocks") -> Any:
    """`function(*inputs)`, of which backward has the inputs, and with `operators` the results of matrix products and of
    attention; the rest is computed again. Bitwise."""
    if level == "keep" or not torch.is_grad_enabled():
        return function(*inputs)
    if torch.compiler.is_compiling():  # where there are no losses to be made again, nor a choice of operators
        return checkpoint(function, *inputs, use_reentrant=False)
    selective: Any = partial(create_selective_checkpoint_contexts, _policy)
    contexts = selective if level == "operators" else lambda: (repeated(), nullcontext())
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    dear = operator.__name__.startswith(DEAR)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
