"""Text that the model of a run writes."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanlm.common.errors import UserError, refuse
from leanlm.common.precision import automatic
from leanlm.config.arguments import typed
from leanlm.config.checks import without_planner
from leanlm.config.schema import Config
from leanlm.data.decoding import stream
from leanlm.data.documents import stops
from leanlm.data.tokenizer import Tokenizer
from leanlm.inference.restoring import find, restore, tokenizer_of
from leanlm.models.contract import Model
from leanlm.models.generation import generate
from leanlm.strategies.plan import Plan

Check = Callable[..., None]  # refuses what takes more memory than `device.memory`, see `planning/inference.py`


@dataclass
class Generate:
    """What `conf/generate.yaml` sets."""

    run: str = "latest"
    checkpoint: str = "last"
    prompt: str = ""
    prompts: str | None = None
    rows: int = 16
    to: str | None = None
    chat: bool = False
    system: str | None = None
    tokens: int = 200
    stop: list[str] = field(default_factory=list)
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1
    device: Any = None

    def problems(self) -> list[str]:
        low = [key for key in ("tokens", "temperature", "top_k") if getattr(self, key) < 0]
        found = [f"{key}={getattr(self, key)}: it must not be negative" for key in low]
        found += [] if 0 < self.top_p <= 1 else [f"top_p={self.top_p}: a share above 0, at most 1"]
        found += [] if self.rows > 0 else [f"rows={self.rows}: at least 1 prompt is read at a time"]
        found += ["stop: an empty text stands everywhere; leave it out"] if "" in self.stop else []
        if self.prompts is not None:
            both = {"chat=true": self.chat, "prompt=": self.prompt}
            found += [f"{key} with prompts={self.prompts}: leave out one of them" for key, given in both.items() if given]
        elif self.to is not None:
            found.append(f"to={self.to} is for what prompts=FILE gives: add that, or leave it out")
        if self.system is not None and not self.chat:
            found.append("system=...: it begins a conversation: add chat=true")
        if self.to is not None and (file := Path(os.path.expanduser(self.to))).exists():
            found.append(f"to={self.to} is there already: name another file")
        elif self.to is not None and not file.parent.is_dir():
            found.append(f"to={self.to}: there is no folder {file.parent}")
        return found

    @property
    def drawing(self) -> tuple[int, float, int, float]:
        """Arguments of `generate` before its seed."""
        return self.tokens, self.temperature, self.top_k, self.top_p


class Source:
    """What text is asked of.

    Attributes:
        tokenizer: of the run, or of the folder in Hugging Face's layout.
    """

    def __init__(self, asked: Generate, problems: list[str]) -> None:
        """Raises UserError: with these and all other problems."""
        self.asked, problems = asked, [*asked.problems(), *problems]
        try:
            self.run, found = find(asked.run)
            more, config = typed(found)
            problems += more
            self.tokenizer: Tokenizer = tokenizer_of(self.run)
        except UserError as error:
            problems += error.problems
        refuse(problems)
        self.config: Config = config
        config.device = asked.device or config.device
        refuse(without_planner(config.device))
        if config.precision == "auto":  # of a folder that is no run
            config.precision = automatic(config.device)

    def tokens(self, prompt: str) -> list[int]:
        return [self.tokenizer.start, *map(int, self.tokenizer.encode(prompt.encode()))]

    def net(self, check_memory: Check | None, prompt: int, rows: int = 1) -> Model:
        """The model in eval mode, to go on from `rows` prompts at once, the longest of so many tokens.

        Raises:
            UserError: there are no weights, or there is not enough memory.
        """
        plan = Plan()
        if check_memory is not None and self.config.device.get("memory"):
            check_memory(self.config, plan, self.tokenizer.vocabulary, prompt, self.asked.tokens, rows)
        return restore(self.config, plan, self.run, self.asked.checkpoint)[1].net.eval()


def continuation(asked: Generate, check_memory: Check | None = None) -> Iterator[str]:
    """The text that goes on from `asked.prompt`, piece by piece, up to a mark of its end or a text to stop at.

    Raises:
        UserError: the run, the prompt or what is asked for cannot be used, or there is not enough memory.
    """
    source = Source(asked, [])
    prompt = source.tokens(asked.prompt)
    numbers = generate(source.net(check_memory, len(prompt)), prompt, *asked.drawing, asked.seed)
    return stream(source.tokenizer, numbers, stops(source.tokenizer), asked.stop)
