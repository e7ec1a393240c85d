"""Rows of an embedding that are added to the gradient of the head it shares its weights with."""

import torch
from torch import nn

from leanlm.memory.tied import add_rows


def test_the_gradient_of_shared_weights_is_that_of_autograd() -> None:
    """Of two backward passes whose gradients add up, and with tokens that are read several times."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)).double()
    net[1].weight = net[0].weight
    tokens = torch.tensor([[1, 3, 3], [6, 1, 3]])

    def gradient() -> torch.Tensor:
        net.zero_grad()
        for part in (tokens, tokens.flip(1)[:, :2]):
            net(part).square().sum().backward()
        return net[1].weight.grad.clone()

    wanted = gradient()
    add_rows(net, net[1])
    torch.testing.assert_close(gradient(), wanted, rtol=0, atol=1e-12)
