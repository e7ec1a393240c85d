"""The signals that end a run, as far as a system has them."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

KILLED = 9  # SIGKILL, which Windows does not name


def named(*names: str) -> list[signal.Signals]:
    """Those of these names that this system has."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def stopping() -> list[signal.Signals]:
    """Those with which people, terminals and batch systems ask a process to end; not the ones that it was told to ignore."""
    return [each for each in named("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if signal.getsignal(each) != signal.SIG_IGN]


class Heard:
    """Hears the signals that ask for an end, from `begin` to `end`, in a thread of its own: Python's handlers wait until a call
    into compiled code has come back, which may take as long as a step.

    What comes within a second of the first is the same one: launchers and shells pass on what a terminal has sent to all.

    Attributes:
        number: the first signal; 0: there was none.
    """

    def __init__(self, first: Callable[[int], None], again: Callable[[int], None]) -> None:
        """What is called with the number of the first, and of one that comes later."""
        self.first, self.again = first, again
        self.number, self.handlers, self.ends = 0, dict[int, Any](), list[int]()

    def begin(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self.handlers = {number: signal.signal(number, self._note) for number in stopping()}
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        self.ends = [writes, signal.set_wakeup_fd(writes, warn_on_full_buffer=False)]
        threading.Thread(target=self._listen, args=(reads, set(self.handlers)), daemon=True).start()

    def end(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.ends:
            signal.set_wakeup_fd(self.ends[1])
            os.close(self.ends[0])
        self.handlers, self.ends = {}, []

    def _note(self, number: int, frame: Any = None) -> None:
        self.number = self.number or number

    def _listen(self, reads: int, asked: set[int]) -> None:
        begun = None
        while number := os.read(reads, 1):
            if number[0] not in asked:
                continue
            self._note(number[0])
            if begun is None:
                begun = time.monotonic()
                self.first(number[0])
            elif time.monotonic() - begun > 1:
                self.again(number[0])
        os.close(reads)
