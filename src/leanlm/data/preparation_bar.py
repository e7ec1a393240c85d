"""Progress of the preparation of a text."""

import sys
import time
from typing import Any


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
