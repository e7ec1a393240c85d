"""Write text with a trained model: `python -m leanlm.generate run=runs/X prompt="def " tokens=200`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from leanlm.models.contract import Model

if TYPE_CHECKING:
    from leanlm.strategies.cut import Cut


@dataclass
class Generate:
    """What `conf/generate.yaml` sets."""

    run: str = "latest"
    prompt: str = ""
    tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1
    device: Any = None


@torch.no_grad()
def generate(
    net: Model,
    prompt: list[int],
    tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1,
    cached: bool = True,
) -> Iterator[int]:
    """Yield `tokens` token numbers that continue `prompt`.

    Work grows linearly with the length: a model that carries state goes on from it; others keep their keys and values,
    and when the context is full read its newer half again.

    Args:
        net: in eval mode.
        prompt: at least one token.
        tokens: how many to yield.
        temperature: 0 takes the likeliest token each time.
        top_k: draw from the k likeliest; 0: from all.
        top_p: draw from the fewest tokens that have this probability together (Holtzman et al. 2020).
        seed: of the drawing.
        cached: False reads the whole context anew for every token, which must give the same.
    """
    device = next(net.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    history = list(prompt)
    states, read, position = net.start(1), 0, 0
    for _ in range(tokens):
        if not net.carries_state and position + len(history) - read > net.sequence:
            states, read, position = net.start(1), len(history) - max(1, net.sequence // 2), 0
        if not cached:
            states, read, position = net.start(1), read - position, 0
        fresh = torch.tensor([history[read:]], device=device)
        hidden, states = net.hidden(fresh, states, position)
        position, read = position + len(history) - read, len(history)
        history.append(_pick(net.head(hidden[:, -1:])[0, 0].float(), temperature, top_k, top_p, generator))
        yield history[-1]


def generate_cut(cut: "Cut", prompt: list[int], tokens: int, temperature: float = 1.0, seed: int = 1) -> Iterator[int]:
    """As `generate`, with a model that is spread over several ranks; all of them must call it.

    A model that carries state goes on from it; others read their last `sequence` tokens anew for each token.
    """
    generator = torch.Generator(cut.device).manual_seed(seed)
    history, read = list(prompt), 0
    for _ in range(tokens):
        first = read if cut.net.carries_state else max(0, len(history) - cut.net.sequence)
        logits = cut.next_logits(torch.tensor([history[first:]], device=cut.device), fresh=read == 0)
        read = len(history)
        history.append(_pick(logits.float(), temperature, 0, 1.0, generator))
        yield history[-1]


def _pick(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
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


def main() -> None:
    from leanlm import cli

    cli.run("generate", Generate, _main)


def _main(asked: Generate) -> None:
    from leanlm.config import typed
    from leanlm.data.tokenizer import stream
    from leanlm.errors import UserError
    from leanlm.evaluate import restore, tokenizer_of
    from leanlm.runs import Run
    from leanlm.strategies.plan import Plan

    problems = [
        f"{key}={getattr(asked, key)}: it must not be negative"
        for key in ("tokens", "temperature", "top_k")
        if getattr(asked, key) < 0
    ]
    if not 0 < asked.top_p <= 1:
        problems.append(f"top_p={asked.top_p}: a share above 0, at most 1")
    if problems:
        raise UserError(*problems)
    run = Run.find(asked.run)
    problems, config = typed(run.config())
    if problems:
        raise UserError(*problems)
    config.device, plan, tokenizer = asked.device or config.device, Plan(), tokenizer_of(run)
    prompt = [tokenizer.start, *map(int, tokenizer.encode(asked.prompt.encode()))]
    if config.device.get("memory"):
        from leanlm.planning.reading import check_generation

        check_generation(config, plan, tokenizer.vocabulary, len(prompt), asked.tokens)
    tokenizer, cut = restore(config, plan, run)
    numbers = generate(cut.net.eval(), prompt, asked.tokens, asked.temperature, asked.top_k, asked.top_p, asked.seed)
    sys.stdout.write(asked.prompt)
    for text in stream(tokenizer, numbers):
        sys.stdout.write(text)
        sys.stdout.flush()
    print()


if __name__ == "__main__":
    main()
