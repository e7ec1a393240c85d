"""The one exception that means "the person at the command line can mend this": shown without a stack trace."""


class UserError(Exception):
    """Something to put right, one line each: what is wrong, the arithmetic, what to write instead."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))
