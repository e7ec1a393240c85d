"""The chunked loss on a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlm.memory import chunks
from leanlm.memory.softmax import cross_entropy_
from leanlm.models import kernels

ALIGNED = 64  # a GPU multiplies at half the speed where this does not divide the vocabulary


def by_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As `loss.loss_and_gradients`, with logits `[tokens of a chunk, vocabulary]`.

    Those of a token are neighbours in memory, as a GPU's softmax wants them.
    """
    need_hidden, need_weight, need_bias = needs
    wide = torch.promote_types(hidden.dtype, torch.float32)
    classes, padding = len(weight), -len(weight) % ALIGNED
    matrix = weight.to(hidden.dtype)
    if padding and hidden.dtype.itemsize == 2:
        matrix = F.pad(matrix, (0, 0, 0, padding))
    columns = len(matrix)
    offset = None if bias is None else F.pad(bias.to(hidden.dtype), (0, columns - classes))
    size = chunks.chunk_size(hidden, classes, padding)
    buffer = hidden.new_empty(min(size, len(hidden)), classes + padding)[:, :columns]
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_weight = torch.zeros_like(matrix, dtype=wide) if need_weight else None
    d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and need_bias else None
    nats = [hidden.new_zeros(0, dtype=wide)]
    for chunk in chunks.chunks(len(hidden), size):
        x = hidden[chunk]
        logits = buffer[: len(x)]
        if offset is None:
            torch.mm(x, matrix.t(), out=logits)
        else:
            torch.addmm(offset, x, matrix.t(), out=logits)
        nats.append(cross_entropy_(logits, target[chunk], classes, any(needs)))
        d_logits = logits  # cross_entropy_ has written the gradient over them
        if d_hidden is not None:
            torch.mm(d_logits, matrix, out=d_hidden[chunk])
        if d_weight is not None:
            kernels.add_product_(d_weight, d_logits.t(), x)
        if d_bias is not None:
            d_bias += d_logits[:, :classes].sum(0, dtype=wide)
    return (
        torch.cat(nats).sum(),
        d_hidden,
        None if d_weight is None else d_weight[:classes].to(weight.dtype),
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )
