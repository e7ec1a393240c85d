"""Compare runs: `python -m leanlm.compare runs/A runs/B ...` prints a table and draws their curves, speed and memory."""

import sys
from pathlib import Path

from leanlm.common.errors import UserError
from leanlm.launch.processes import ended_by_closed_pipes, in_utf8
from leanlm.reporting.comparison import compare


def main() -> None:
    in_utf8()
    paths = [Path(argument) for argument in sys.argv[1:]]
    if not paths or any(argument.startswith("-") for argument in sys.argv[1:]):
        sys.exit(f"{__doc__}")
    with ended_by_closed_pipes():
        try:
            compare(paths, paths[0].parent)
        except UserError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
