"""Write text with a trained model: `python -m leanlm.generate run=runs/X prompt="def " tokens=200`."""

import sys
from typing import Any

from leanlm.config import command_line
from leanlm.inference.continuation import Generate, continuation


def job(asked: Generate) -> None:
    pieces = continuation(asked, check_memory)  # or an error, before anything is written
    sys.stdout.write(asked.prompt)
    for text in pieces:
        sys.stdout.write(text)
        sys.stdout.flush()
    print()


def check_memory(*asked: Any) -> None:
    from leanlm.planning.inference import check_generation

    check_generation(*asked)


def main() -> None:
    command_line.run("generate", Generate, job)


if __name__ == "__main__":
    main()
