"""Text that a model writes, token by token, one or several at once."""

from collections.abc import Callable, Container, Iterator
from functools import partial

import torch
from torch import Tensor

from leanlm.common.errors import UserError
from leanlm.models.contract import Model


class LogitsAfter:
    """Logits `[v]` of the token after a history, of a model that keeps what it has read.

    Work grows linearly with the length: a model that carries state goes on from it; others keep their keys and values, and
    when the context is full they read its newer half again. A history that does not go on from the last one is read anew.
    `net` is in eval mode, and causal. `cached=False` reads the whole context anew for every token, which must give the same.
    """

    def __init__(self, net: Model, cached: bool = True) -> None:
        needs_causal(net)
        self.net, self.cached = net, cached
        self.seen: list[list[int]] = []  # the histories of which a part is in the states
        self.position = 0  # of the next token in the context

    def __call__(self, history: list[int]) -> Tensor:
        return self.of_rows([history])[0]

    @torch.no_grad()
    def of_rows(self, histories: list[list[int]]) -> Tensor:
        """Logits `[b, v]` after b histories of the same length."""
        net, rows, length = self.net, len(histories), len(histories[0])
        read = len(self.seen[0]) if self.seen else 0
        if not 0 < read < length or [history[:read] for history in histories] != self.seen:
            self.states, self.position, read = net.start(rows), 0, 0
        if not net.carries_state and self.position + length - read > net.sequence:
            self.states, self.position, read = net.start(rows), 0, length - newer_half(net)
        if not self.cached:
            self.states, self.position, read = net.start(rows), 0, read - self.position
        fresh = torch.tensor([history[read:] for history in histories], device=next(net.parameters()).device)
        hidden, self.states = net.hidden(fresh, self.states, self.position)
        self.position += length - read
        self.seen = [list(history) for history in histories]
        return net.head(hidden[:, -1:])[:, 0]


def needs_causal(net: Model) -> None:
    """Raise UserError if a model cannot go on from a text, nor say how likely its next token is."""
    if not net.causal:
        raise UserError("causal=false: this model reads a text in both directions, and cannot go on from one")


def newer_half(net: Model) -> int:
    """Tokens that stay of a context that is full."""
    return max(1, net.sequence // 2)


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
    after = LogitsAfter(logits_after) if isinstance(logits_after, Model) else logits_after
    draw = partial(pick, temperature=temperature, top_k=top_k, top_p=top_p)
    for _, token in _rows(lambda histories: after(histories[0])[None], [prompt], tokens, draw, [seed], ()):
        yield token


def generate_rows(
    net: Model,
    prompts: list[list[int]],
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seeds: list[int],
    ended: Container[int],
) -> Iterator[tuple[int, int]]:
    """Yield pairs of a row and its next token, for several prompts at once, of each what `generate` yields for it alone.

    `seeds`: of each row's drawing. `ended`: rows that need no more tokens; it may grow meanwhile.
    """
    fits = [p if net.carries_state or len(p) <= net.sequence else p[-newer_half(net) :] for p in prompts]
    draw = partial(pick, temperature=temperature, top_k=top_k, top_p=top_p)
    return _rows(LogitsAfter(net).of_rows, fits, tokens, draw, seeds, ended)


def _rows(
    logits_after: Callable[[list[list[int]]], Tensor],
    prompts: list[list[int]],
    tokens: int,
    draw: Callable[..., int],
    seeds: list[int],
    ended: Container[int],
) -> Iterator[tuple[int, int]]:
    """All rows go forward together, so that a token has the position that it has alone: where the shortest prompt ends, the
    others go on with their own tokens."""
    histories, whole = [list(prompt) for prompt in prompts], [len(prompt) + tokens for prompt in prompts]
    generators: list[torch.Generator] = []

    def needs(row: int) -> bool:
        return row not in ended and len(histories[row]) < whole[row]

    length = min(map(len, histories))
    while any(map(needs, range(len(histories)))):
        logits = logits_after([history[:length] for history in histories]).float()
        generators = generators or [torch.Generator(logits.device).manual_seed(seed) for seed in seeds]
        for row, history in enumerate(histories):
            if len(history) > length:
                continue
            if needs(row):
                history.append(draw(logits[row], generator=generators[row]))
                yield row, history[-1]
            else:
                history.append(history[-1])  # it is as long as the others, and nobody looks at it
        length += 1


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
