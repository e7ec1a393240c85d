"""Text that the model of a run writes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from leanlm.common.errors import refuse
from leanlm.common.precision import automatic
from leanlm.config.arguments import typed
from leanlm.config.checks import without_planner
from leanlm.data.tokenizer import stream
from leanlm.inference.restoring import find, restore, tokenizer_of
from leanlm.models.generation import generate
from leanlm.strategies.plan import Plan


@dataclass
class Generate:
    """What `conf/generate.yaml` sets."""

    run: str = "latest"
    checkpoint: str = "last"
    prompt: str = ""
    tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1
    device: Any = None

    def problems(self) -> list[str]:
        low = [key for key in ("tokens", "temperature", "top_k") if getattr(self, key) < 0]
        found = [f"{key}={getattr(self, key)}: it must not be negative" for key in low]
        return found + ([] if 0 < self.top_p <= 1 else [f"top_p={self.top_p}: a share above 0, at most 1"])


def continuation(asked: Generate, check_memory: Callable[..., None] | None = None) -> Iterator[str]:
    """The text that goes on from `asked.prompt`, piece by piece. `check_memory`: where `device.memory` is set, refuses what
    would take more; see `planning/inference.py`.

    Raises:
        UserError: the run, the prompt or what is asked for cannot be used, or there is not enough memory.
    """
    run, found = find(asked.run)
    problems, config = typed(found)
    refuse([*asked.problems(), *problems])
    config.device, plan, tokenizer = asked.device or config.device, Plan(), tokenizer_of(run)
    refuse(without_planner(config.device))
    if config.precision == "auto":  # of a folder that is no run
        config.precision = automatic(config.device)
    prompt = [tokenizer.start, *map(int, tokenizer.encode(asked.prompt.encode()))]
    if check_memory is not None and config.device.get("memory"):
        check_memory(config, plan, tokenizer.vocabulary, len(prompt), asked.tokens)
    tokenizer, parallel, _ = restore(config, plan, run, asked.checkpoint)
    numbers = generate(parallel.net.eval(), prompt, asked.tokens, asked.temperature, asked.top_k, asked.top_p, asked.seed)
    return stream(tokenizer, numbers)
