"""The one exception that means "the person at the command line can mend this": shown without a stack trace."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: there is no room


class UserError(Exception):
    """Something to put right, one line each: what is wrong, the arithmetic, what to write instead."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Within it, a disk on which no room is left for the run at `path` ends in one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"{error.filename or path}: {error.strerror}: make room, then resume the run") from None
