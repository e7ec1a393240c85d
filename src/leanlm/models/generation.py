"""Text that a model writes, token by token."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from leanlm.models.contract import Model


class LogitsAfter:
    """Logits `[v]` of the token after a history, of a model that keeps what it has read.

    Work grows linearly with the length: a model that carries state goes on from it; others keep their keys and values, and
    when the context is full they read its newer half again. `net` is in eval mode. `cached=False` reads the whole context anew
    for every token, which must give the same.
    """

    def __init__(self, net: Model, cached: bool = True) -> None:
        self.net, self.cached = net, cached
        self.states = net.start(1)
        self.read = 0  # tokens of the history that are in the states
        self.position = 0  # of the next token in the context

    @torch.no_grad()
    def __call__(self, history: list[int]) -> Tensor:
        net = self.net
        if not net.carries_state and self.position + len(history) - self.read > net.sequence:
            self.states, self.read, self.position = net.start(1), len(history) - max(1, net.sequence // 2), 0
        if not self.cached:
            self.states, self.read, self.position = net.start(1), self.read - self.position, 0
        fresh = torch.tensor([history[self.read :]], device=next(net.parameters()).device)
        hidden, self.states = net.hidden(fresh, self.states, self.position)
        self.position, self.read = self.position + len(history) - self.read, len(history)
        return net.head(hidden[:, -1:])[0, 0]


def generate(
    logits_after: Model | Callable[[list[int]], Tensor],
    prompt: list[int],
    tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1,
) -> Iterator[int]:
    """Yield `tokens` token numbers that continue `prompt`.

    Args:
        logits_after: history of tokens -> logits `[v]` of the next; or a model in eval mode.
        prompt: at least one token.
        tokens: how many to yield.
        temperature: 0 takes the likeliest token each time.
        top_k: draw from the k likeliest; 0: from all.
        top_p: draw from the fewest tokens that have this probability together (Holtzman et al. 2020, arXiv 1904.09751).
        seed: of the drawing.
    """
    if isinstance(logits_after, Model):
        logits_after = LogitsAfter(logits_after)
    history, generator = list(prompt), None
    for _ in range(tokens):
        logits = logits_after(history).float()
        generator = generator or torch.Generator(logits.device).manual_seed(seed)
        history.append(pick(logits, temperature, top_k, top_p, generator))
        yield history[-1]


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """A token drawn by its logits `[v]`, see `generate`."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    probability = logits.softmax(0)
    if top_p < 1:
        ordered, order = probability.sort(descending=True)
        enough = ordered.cumsum(0) - ordered >= top_p  # what comes after the share is reached
        probability[order[enough]] = 0
    return int(torch.multinomial(probability, 1, generator=generator))
