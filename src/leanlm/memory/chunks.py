"""How many tokens' logits the chunked loss holds at a time."""

from collections.abc import Iterable

import torch
from torch import Tensor

from leanlm.models import kernels

CHUNK = 1 << 22  # logits that a CPU holds at a time: 16 MiB in float32
SHARE = 128  # a GPU's logits take at most one part in so many of its memory
LEAST = 32 << 20  # bytes of a GPU's logits: its kernels are slow with fewer, and so many in float32 need no chunks
SUM = 8  # bytes moved to add to one number of a weight's gradient: a chunk has as many of logits, or adding would cost more
SHORTEST = 128  # tokens in a chunk: matrix products are slow with fewer
EVEN = 32  # a CPU takes two to four times as long for the softmax of a number of tokens that this does not divide


def unneeded(hidden: Tensor, classes: int) -> bool:
    """Whether all logits of `hidden [n, h]` may be held at once."""
    return len(hidden) * classes <= (LEAST // 4 if kernels.on_gpu(hidden) else CHUNK)


def chunk_size(hidden: Tensor, classes: int, padding: int = 0) -> int:
    """Tokens in a chunk of `hidden [n, h]`, which has the type of the logits, such that the last one is not short.

    `classes`: logits of a token. `padding`: unused numbers that lie beside them in memory.
    """
    most = CHUNK
    if kernels.on_gpu(hidden):
        pays = SUM * hidden.shape[1] * classes
        most = max(LEAST, min(pays, logits_memory(hidden.device))) // hidden.dtype.itemsize
    size, tokens = max(SHORTEST, most // (classes + padding)), len(hidden)
    return max(EVEN, round(tokens / max(1, round(tokens / size)) / EVEN) * EVEN)


def chunks(tokens: int, size: int) -> Iterable[slice]:
    """Where each chunk lies."""
    return (slice(first, first + size) for first in range(0, tokens, size))


def logits_memory(device: torch.device) -> int:
    """Bytes that a GPU has for logits: a share of its memory, whatever else is in it at the moment."""
    return share_of(torch.cuda.get_device_properties(device).total_memory)


def share_of(memory: int) -> int:
    """The same for every card that is sold with so much: of a power of two, since each keeps some of it to itself."""
    return (1 << (memory * 9 // 8).bit_length() - 1) // SHARE
