"""The one exception that means "the person at the command line can mend this": shown without a stack trace."""

from collections.abc import Iterable


class UserError(Exception):
    """Something to put right, one line each: what is wrong, the arithmetic, what to write instead."""

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(problem.strip().replace("\n", "\\n") for problem in problems)  # a value may hold a line end
        super().__init__("\n".join(self.problems))


def refuse(problems: Iterable[str]) -> None:
    """Raise UserError with these problems, if there are any."""
    if found := tuple(problems):
        raise UserError(*found)
