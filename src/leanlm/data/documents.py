"""Text that is not one stream: lines of JSON, each a document, a prompt with its completion, or a conversation."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanlm.common.errors import UserError
from leanlm.data.text_files import CHUNK, Piece
from leanlm.data.tokenizer import Subwords, Tokenizer

FIELDS = {"text": "text", "prompt": "prompt", "completion": "completion", "messages": "messages"}
TOGETHER = 1024  # lines that are encoded together: enough for some cores, little enough for memory
ANNOTATIONS = {"counted": np.uint8, "ends": np.int64}  # of documents, beside their tokens -> types of the files
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "[SEP]", "<eos>")  # marks that end a document, where none is named

Part = tuple[str, bool]  # a text, and whether its tokens count as targets
Render = Callable[[list[dict[str, str]], bool], str]  # (messages, whether an answer is asked for) -> text


@dataclass(frozen=True)
class Form:
    """How lines of JSON are read.

    Attributes:
        fields: names of the fields, for those in FIELDS; of a line that has several kinds, messages are read before prompts,
            and these before texts.
        skip_bad: whether lines that cannot be read are left out and counted.
        isolate: whether no token may attend to another document of its row.
    """

    fields: dict[str, str | None]
    skip_bad: bool = False
    isolate: bool = False


@dataclass(frozen=True)
class Document:
    """Parts of a text. `marked`: the tokenizer's marks of beginning and end are put around it (a chat template has its own)."""

    parts: list[Part]
    marked: bool = True


@dataclass(frozen=True)
class Documents:
    """A split that has been prepared, as memory-mapped arrays.

    Attributes:
        numbers: token numbers of all documents, one after the other, `[tokens]`.
        counted: whether each counts as a target, `[tokens]`.
        ends: where each document ends in them, `[documents]`.
        bad: lines that were left out.
    """

    numbers: NDArray[np.unsignedinteger]
    counted: NDArray[np.uint8]
    ends: NDArray[np.int64]
    bad: int

    def describe(self) -> str:
        left_out = f", {self.bad:,} bad lines left out" if self.bad else ""
        return f"{len(self.ends):,} documents{left_out}, {len(self.numbers):,} tokens"


class Encoder:
    """Lines of JSON to tokens, and whether each counts as a target: those of completions and of an assistant's messages, with
    the mark that ends them; of a plain text all.

    Each part is encoded by itself, as a model meets it that is given a prompt and goes on.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.end = tokenizer, end_of(tokenizer)
        self.render = renderer(tokenizer)

    def __call__(self, documents: list[Document]) -> tuple[NDArray[np.integer], NDArray[np.uint8], list[int]]:
        """Tokens and whether they count, `[tokens]` each, and the number of tokens of every document."""
        encoded = iter(self._encode([text for document in documents for text, _ in document.parts]))
        numbers: list[Any] = []
        counted: list[Any] = []
        lengths = []

        def add(tokens: Any, counts: bool) -> int:
            numbers.append(np.asarray(tokens, np.int64))
            counted.append(np.full(len(tokens), counts, np.uint8))
            return len(tokens)

        for document in documents:
            length = add([self.tokenizer.start], False) if document.marked else 0
            length += sum(add(next(encoded), counts) for _, counts in document.parts)
            if document.marked and self.end is not None:
                length += add([self.end], True)
            lengths.append(length)
        found, targets = np.concatenate(numbers), np.concatenate(counted)
        starts = np.cumsum(lengths) - lengths
        targets[starts[np.array(lengths) > 0]] = 0  # nothing stands before the first token of a document
        return found, targets, lengths

    def _encode(self, texts: list[str]) -> Iterable[Any]:
        if isinstance(self.tokenizer, Subwords):
            return (found.ids for found in self.tokenizer.model.encode_batch(texts, add_special_tokens=False))
        return (self.tokenizer.encode(text.encode()) for text in texts)


def end_of(tokenizer: Tokenizer) -> int | None:
    """The token that ends a document, if the tokenizer has one."""
    if not isinstance(tokenizer, Subwords):
        return None
    found = (tokenizer.numbers(mark) for mark in (*tokenizer.beside.get("marks", ())[-1:], *ENDS))
    return next((number for numbers in found for number in numbers), None)


def stops(tokenizer: Tokenizer) -> set[int]:
    """Tokens with which a model ends a text: those that the files of the tokenizer name, and the one that ends documents."""
    told = tokenizer.beside.get("stop", ()) if isinstance(tokenizer, Subwords) else ()
    end = end_of(tokenizer)
    return {*told, *([] if end is None else [end])}


class Lines:
    """The documents of some pieces of files, those of many lines at a time.

    Attributes:
        bad: lines that were left out.
    """

    def __init__(self, pieces: list[Piece], form: Form, render: Render | None, heard: Callable[[int, int], None]) -> None:
        """`render`: the chat template; None: a plain one. `heard`: is told how many bytes are done, of how many."""
        self.pieces, self.form, self.render, self.heard, self.bad = pieces, form, render, heard, 0

    def __iter__(self) -> Iterator[list[Document]]:
        """Raises UserError: a line cannot be read, with its file and number."""
        done, total = 0, sum(piece.size for piece in self.pieces)
        self.heard(0, total)
        lines = ((piece, number, line) for piece in self.pieces for number, line in enumerate(_lines(piece)))
        while group := list(islice(lines, TOGETHER)):
            if documents := [document for line in group for document in self._documents(*line)]:
                yield documents
            done += sum(len(line) + 1 for _, _, line in group)
            self.heard(min(done, total), total)

    def _documents(self, piece: Piece, number: int, line: bytes) -> list[Document]:
        """Those of the line `number` of a piece."""
        try:
            return self._read(line) if line.strip() else []
        except ValueError as error:
            if not self.form.skip_bad:
                place = f"{piece.path}, line {_lines_before(piece) + number + 1}"
                raise UserError(f"{place}: {error}; data.skip_bad=true leaves such lines out") from None
            self.bad += 1
            return []

    def _read(self, line: bytes) -> list[Document]:
        """Raises ValueError: it has none of the fields, or they do not hold text."""
        found = object_of(line, self._wanted())
        name = self.form.fields
        if name["messages"] in found:
            return answers(messages_of(found[name["messages"]]), self.render)
        if name["prompt"] in found or name["completion"] in found:
            return [Document([(text_of(found, name["prompt"]), False), (text_of(found, name["completion"]), True)])]
        if name["text"] in found:
            return [Document([(text_of(found, name["text"]), True)])]
        raise ValueError(f"it has the fields {', '.join(found) or 'of nothing'}, but needs {self._wanted()} (data.fields)")

    def _wanted(self) -> str:
        name = self.form.fields
        kinds = [name["text"], name["prompt"] and name["completion"] and f"{name['prompt']} and {name['completion']}"]
        return ", or ".join(filter(None, [*kinds, name["messages"]]))


def object_of(line: str | bytes, wanted: str) -> dict[str, Any]:
    """That of a line of JSON. Raises ValueError: it holds none; `wanted` says which fields it should have."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError("a JSON object is expected, with " + wanted)
    return found


def text_of(found: dict[str, Any], field: str | None) -> str:
    """The text of a field. Raises ValueError: there is none."""
    if field not in found:
        raise ValueError(f"it has no field {field}")
    if not isinstance(found[field], str):
        raise ValueError(f"the field {field} is not text")
    if any("\ud800" <= character <= "\udfff" for character in found[field]):
        raise ValueError(f"the field {field} holds half of a character (\\ud800 to \\udfff)")
    return found[field]


def messages_of(found: Any) -> list[dict[str, str]]:
    """The same, as messages. Raises ValueError: they are none."""
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ValueError("messages are not a list of objects with role and content")
    for message in found:
        for field in ("role", "content"):
            text_of(message, field)
    return found


def answers(messages: list[dict[str, str]], render: Render | None) -> list[Document]:
    """A conversation up to its last answer. Of each answer counts what the template writes after the place where it is asked
    for, up to the mark of its end. Where a template writes an answer otherwise once others follow, each makes a document of
    its own, with all that is before it.

    Raises:
        ValueError: there is no such message, or the template does not go on where it asks for an answer.
    """
    write, done = render or plain, ""
    documents: list[Document] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = write(messages[:i], True), write(messages[: i + 1], False)
        if not after.startswith(before):
            raise ValueError(f"the chat template does not write message {i + 1} where it asks for an answer")
        if not documents or not before.startswith(done):
            documents, done = [*documents, Document([], marked=render is None)], ""
        answer = after[len(before) :]
        if not answer.rstrip().endswith(message["content"].rstrip()):
            answer = answer.rstrip()  # it ends with a mark, so that a line end behind it is no part of it
        documents[-1].parts.extend([(before[len(done) :], False), (answer, True)])
        done = before + answer
    if not documents:
        raise ValueError("none of its messages has the role assistant")
    return documents


def plain(messages: list[dict[str, str]], ask: bool) -> str:
    """A conversation as lines of `role: content`."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:" * ask


def renderer(tokenizer: Tokenizer) -> Render | None:
    """The tokenizer's chat template, if it has one. It may come from a stranger: it is rendered in a sandbox."""
    beside = tokenizer.beside if isinstance(tokenizer, Subwords) else {}
    if not isinstance(beside.get("chat"), str):
        return None
    from jinja2.exceptions import TemplateError

    template, marks = _template(beside["chat"]), beside.get("marks", [])
    names = {"bos_token": marks[0] if len(marks) > 1 else "", "eos_token": marks[-1] if marks else ""}

    def render(messages: list[dict[str, str]], ask: bool) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=ask, **names)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template: {error}") from None

    return render


@cache
def _template(source: str) -> Any:
    """As transformers renders it."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> str:
        raise TemplateError(message)

    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    source = re.sub(r"\bgeneration(?=\s*-?%})", "if true", source).replace("endif true", "endif")  # TRL's mark of an answer
    world.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    world.globals["raise_exception"] = refuse
    return world.from_string(source)


def _lines(piece: Piece) -> Iterator[bytes]:
    rest: list[bytes] = []  # of a line that is longer than a chunk
    for chunk in piece.chunks():
        first, *others = chunk.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = others[-1:]
    if any(rest):
        yield b"".join(rest)


def _lines_before(piece: Piece) -> int:
    """Line ends of the file before the piece."""
    with open(piece.path, "rb") as file:
        starts = range(0, piece.start, CHUNK)
        return sum(file.read(min(CHUNK, piece.start - start)).count(b"\n") for start in starts)
