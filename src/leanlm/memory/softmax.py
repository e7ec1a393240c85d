"""Cross-entropy over logits that become their own gradient: read twice, written once, with nothing beside them.

On a GPU a kernel of Triton does it, a row to a program, with the running maximum and sum of Milakov and Gimelshein (2018,
arXiv 1805.02867); what it reads again of a row comes from the cache. torch's own operations, which do it elsewhere, pass over a
float32 copy of the logits some eight times.
"""

from importlib.util import find_spec

import torch
from torch import Tensor


def _by_torch(logits: Tensor, target: Tensor, classes: int, gradient: bool) -> Tensor:
    wide = logits[:, :classes].to(torch.promote_types(logits.dtype, torch.float32))
    counted, wanted = target >= 0, target.clamp(min=0)[:, None]
    total = wide.logsumexp(1, keepdim=True)
    nats = (total - wide.gather(1, wanted))[:, 0].where(counted, 0)
    if gradient:
        probability = wide.sub_(total).exp_()
        probability.scatter_add_(1, wanted, -torch.ones_like(total)).mul_(counted[:, None])
        logits[:, :classes] = probability
        logits[:, classes:] = 0
    return nats


@torch.library.custom_op("leanlm::cross_entropy_", mutates_args=("logits",))
def cross_entropy_(logits: Tensor, target: Tensor, classes: int, gradient: bool) -> Tensor:
    """Negative log-likelihood of each row in nats, `[n]`, float32 or wider; 0 where a target `[n]` is negative.

    Of `logits [n, columns]` the first `classes` count. With `gradient` they become the gradient of the sum over rows, which is
    0 in the other columns; else they are left in whatever state.
    """
    return _by_torch(logits, target, classes, gradient)


@cross_entropy_.register_fake
def _(logits: Tensor, target: Tensor, classes: int, gradient: bool) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))


@cross_entropy_.register_kernel("cuda")
def _(logits: Tensor, target: Tensor, classes: int, gradient: bool) -> Tensor:
    if logits.dtype == torch.float64 or find_spec("triton") is None:
        return _by_torch(logits, target, classes, gradient)
    from leanlm.memory import softmax_kernel

    return softmax_kernel.cross_entropy_(logits, target, classes, gradient)
