"""What a model adds to the prompts of a file, of which it reads several at a time."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leanlm.common.errors import UserError, refuse
from leanlm.data.decoding import Decoder
from leanlm.data.documents import messages_of, object_of, stops, text_of
from leanlm.inference.chat import Template
from leanlm.inference.continuation import Check, Generate, Source
from leanlm.models.contract import Model, stable_hash
from leanlm.models.generation import generate_rows

SAID = 10  # bad lines of a file that are named

Line = dict[str, Any]  # with `prompt` or `messages`


def completions(asked: Generate, check_memory: Check | None = None) -> Iterator[Line]:
    """The lines of the file `asked.prompts`, each with what the model adds to it: `completion`, or the last of its `messages`.

    What is drawn for a prompt depends on the seed and its number alone.

    Raises:
        UserError: the file, the run or what is asked for cannot be used, or there is not enough memory.
    """
    file = os.path.expanduser(str(asked.prompts))
    lines, bad = read(file)
    source = Source(asked, _first(bad, file))
    template = Template(source.tokenizer)
    prompts: list[list[int]] = []
    for place, line in lines.items():
        try:
            prompts.append(template.tokens(line["messages"]) if "messages" in line else source.tokens(line["prompt"]))
        except (UserError, ValueError) as error:
            bad.append(f"{place}: {error}")
    refuse(_first(bad, file))
    net = source.net(check_memory, max(map(len, prompts)), min(asked.rows, len(prompts)))

    def decoder(line: Line) -> Decoder:
        marks, texts = template.ends if "messages" in line else (stops(source.tokenizer), [])
        return Decoder(source.tokenizer, marks, [*asked.stop, *texts])

    def all_lines() -> Iterator[Line]:
        for first in range(0, len(prompts), asked.rows):
            some = slice(first, first + asked.rows)
            together = [*lines.values()][some]
            added = _added(asked, net, first, prompts[some], [*map(decoder, together)])
            yield from map(_with, together, added)

    return all_lines()


def _added(asked: Generate, net: Model, first: int, prompts: list[list[int]], decoders: list[Decoder]) -> list[str]:
    """The texts that go on from prompts, of which the first has the number `first`."""
    texts, ended = [""] * len(prompts), set[int]()
    seeds = [stable_hash(asked.seed, first + row) for row in range(len(prompts))]
    for row, token in generate_rows(net, prompts, *asked.drawing, seeds, ended):
        texts[row] += decoders[row].add(token)
        if decoders[row].ended:
            ended.add(row)
    return [text + decoder.rest() for text, decoder in zip(texts, decoders, strict=True)]


def _with(line: Line, text: str) -> Line:
    if "messages" in line:
        return {**line, "messages": [*line["messages"], {"role": "assistant", "content": text.strip()}]}
    return {**line, "completion": text}


def read(file: str) -> tuple[dict[str, Line], list[str]]:
    """Of a file of prompts, one a line, or of lines of JSON: place in words -> line, and what is wrong with it."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        return {}, [f"prompts={file} cannot be read: {error.strerror}"]
    except UnicodeDecodeError as error:
        return {}, [f"prompts={file}: it is not UTF-8 at byte {error.start:,}"]
    lines: dict[str, Line] = {}
    bad: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        place = f"{file}, line {number}"
        try:
            if line.strip():
                lines[place] = _object(line) if file.endswith(".jsonl") else {"prompt": line}
        except ValueError as error:
            bad.append(f"{place}: {error}")
    return lines, bad if lines or bad else [f"prompts={file}: it holds no prompts"]


def _object(line: str) -> Line:
    found = object_of(line, "prompt, or messages")
    if "messages" in found:
        messages_of(found["messages"])
    else:
        text_of(found, "prompt")
    return found


def _first(bad: list[str], file: str) -> list[str]:
    return bad[:SAID] + [f"{file}: {len(bad) - SAID:,} more bad lines"] * (len(bad) > SAID)
