"""How many targets are the likeliest tokens, beside their loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlm.models.head import IGNORE, Head

TOGETHER = 1024  # tokens whose logits are held at a time


def loss_and_hits(head: Head, hidden: Tensor, target: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats of `target [b, s]` given `hidden [b, s, h]`, and how many of them are the
    likeliest tokens, `[2]`; IGNORE is not counted."""
    found = torch.zeros(2, dtype=torch.float64, device=hidden.device)
    for some, wanted in zip(hidden.flatten(0, 1).split(TOGETHER), target.flatten().split(TOGETHER), strict=True):
        logits = head(some[None])[0]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = F.cross_entropy(wide, wanted, reduction="sum", ignore_index=IGNORE)
        found += torch.stack((nats.double(), (wide.argmax(1) == wanted).sum().double()))
    return found
