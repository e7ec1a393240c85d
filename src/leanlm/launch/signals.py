"""The signals that end a run, as far as a system has them."""

import signal
import threading
from collections.abc import Iterable
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
