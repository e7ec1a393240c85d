"""Text that a trained model writes: `python -m leanlm.generate run=runs/X [prompt="def "] [chat=true] [prompts=FILE]`."""

import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from leanlm.common.errors import UserError
from leanlm.config import command_line
from leanlm.inference.chat import Conversation, said
from leanlm.inference.continuation import Generate, continuation
from leanlm.inference.prompts import completions


def job(asked: Generate) -> None:
    if asked.prompts is not None:
        lines = completions(asked, check_memory)  # or an error, before anything is written
        with Path(asked.to).expanduser().open("x", encoding="utf-8") if asked.to else nullcontext() as file:
            for line in lines:
                print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
    elif asked.chat:
        conversation = Conversation(asked, check_memory)
        for message in said(asked.prompt):
            try:
                show(conversation.answer(message))
            except UserError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        pieces = continuation(asked, check_memory)
        sys.stdout.write(asked.prompt)
        show(pieces)


def show(pieces: Iterable[str]) -> None:
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
