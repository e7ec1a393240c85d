"""The tokens of a configured text, prepared with a progress bar. Imports neither torch nor Lightning."""

import sys
import time
from typing import Any

from leanlm.config import Config, Settings, fits
from leanlm.data.tokenizer import Tokenizer
from leanlm.data.tokens import Tokens, prepare
from leanlm.errors import UserError


def tokens(settings: Settings) -> Tokens:
    """The tokens of the configured text.

    Raises:
        UserError: the text is too short, or `data.ignore` names a token that does not exist.
    """
    data = settings.config.data

    with PreparationBar() as bar:
        made = prepare(settings.corpus, data["tokenizer"], data["vocabulary"], bar)
    problems = fits(settings.config, {split: len(numbers) for split, numbers in made.splits.items()})
    problems += [
        f"data.ignore: the tokenizer has no token {name!r}"
        for name in data.get("ignore", [])
        if not made.tokenizer.numbers(name)
    ]
    if problems:
        raise UserError(*problems)
    return made


def ignored(config: Config, tokenizer: Tokenizer) -> list[int]:
    """Numbers of the tokens that are not counted as targets."""
    return [number for name in config.data.get("ignore", []) for number in tokenizer.numbers(name)]


class PreparationBar:
    """A progress bar while text is tokenised; without a terminal, a line when a stage is done. Shown only for work of
    more than a moment."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.stage = ""
        self.since = time.monotonic()

    def __enter__(self) -> "PreparationBar":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.stage:
            self.stage, self.since = what, time.monotonic()
            if self.bar is not None:
                self.bar.stop()
                self.bar = None
        if not sys.stderr.isatty():
            if done == total and time.monotonic() - self.since > 1:
                print(
                    f"{what}: {total / 1e6:.1f} MB in {time.monotonic() - self.since:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            return
        if self.bar is None and time.monotonic() - self.since > 0.3:
            from rich import progress
            from rich.console import Console

            self.bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(what, total=total)
            self.bar.start()
        if self.bar is not None:
            self.bar.update(self.task, completed=done)
