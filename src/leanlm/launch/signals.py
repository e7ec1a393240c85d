"""The signals that end a run, as far as a system has them."""

import signal

KILLED = 9  # SIGKILL, which Windows does not name


def named(*names: str) -> list[signal.Signals]:
    """Those of these names that this system has."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def stopping() -> list[signal.Signals]:
    """Those with which people, terminals and batch systems ask a process to end; not the ones that it was told to ignore."""
    return [each for each in named("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if signal.getsignal(each) != signal.SIG_IGN]
