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

    def __enter__(self) -> "PreparationBar":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.stage:
            self.__exit__()
            self.stage, self.since = what, time.monotonic()
        seconds = time.monotonic() - self.since
        if not sys.stderr.isatty():
            if done == total and seconds > 1:
                print(f"{what}: {total / 1e6:.1f} MB in {seconds:.0f} s", file=sys.stderr, flush=True)
        elif self.bar is None and seconds > 0.3:
            self._begin(total)
        if self.bar is not None:
            self.bar.update(self.task, completed=done)

    def _begin(self, total: int) -> None:
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn(),
            progress.TransferSpeedColumn(), progress.TimeRemainingColumn(),
        )  # fmt: skip
        self.bar = progress.Progress(*columns, console=Console(stderr=True))
        self.task = self.bar.add_task(self.stage, total=total)
        self.bar.start()
