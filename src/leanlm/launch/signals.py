"""The signals that end a run, as far as a system has them."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

KILLED = 9  # SIGKILL, which Windows does not name


def named(*names: str) -> list[signal.Signals]:
    """Those of these names that this system has."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def stopping() -> list[signal.Signals]:
    """Those with which people, terminals and batch systems ask a process to end; not the ones that it was told to ignore."""
    return [each for each in named("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if signal.getsignal(each) != signal.SIG_IGN]


def handled(numbers: Iterable[int], handler: Any) -> dict[int, Any]:
    """Give these signals a handler, where this is the main thread: others may not. Returns those before, for `give_back`."""
    alone = threading.current_thread() is threading.main_thread()
    return {number: signal.signal(number, handler) for number in numbers if alone}


def give_back(handlers: dict[int, Any]) -> None:
    """Empties the dictionary, so that another call changes nothing."""
    while handlers:
        signal.signal(*handlers.popitem())


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
        self.handlers = handled(stopping(), self._note)
        if not self.handlers:
            return
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        self.ends = [writes, signal.set_wakeup_fd(writes, warn_on_full_buffer=False)]
        threading.Thread(target=self._listen, args=(reads, set(self.handlers)), daemon=True).start()

    def end(self) -> None:
        give_back(self.handlers)
        if self.ends:
            signal.set_wakeup_fd(self.ends[1])
            os.close(self.ends[0])
        self.ends = []

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
