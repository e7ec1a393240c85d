"""Text to token numbers and back: by byte, character, word, or a `tokenizers` model (BPE trained here, or a given file).

Every tokenizer knows `start`: the token that stands before the first one of a text, so that the first token too has a
probability (a line end, or an end-of-text mark).
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from leanlm.common.errors import UserError

NAMES = ("byte", "char", "word", "bpe")
PIECE, OVERLAP = 1 << 16, 1 << 12  # characters that the tokenizers library gets at a time, and that two pieces share
OF_A_LINE = re.compile(rf"(?s).{{{PIECE}}}\S*|.+")  # all of it, unless it is very long
TOGETHER = 16  # pieces: enough for some cores, little enough for memory
MASK = "[MASK]"  # name of the token that is added where a text is masked
SPACES = str.maketrans("ĠĊĉ▁", " \n\t ")  # as vocabularies write white space
ALIKE = 8  # tokens before a place, and from it on, that tell that two pieces agree there


class Tokenizer(Protocol):
    vocabulary: int
    start: int
    mask: int | None  # the token that hides others, if there is one

    def encode(self, text: bytes) -> NDArray[np.integer]: ...
    def decode(self, tokens: Iterable[int]) -> str: ...
    def numbers(self, text: str) -> list[int]: ...  # of a token's own name, [] if there is no such token
    def state(self) -> dict: ...  # JSON from which `restore` makes it again
    def with_mask(self) -> "Tokenizer": ...  # the same with one more token, `mask`
    def pieces(self) -> list[str]: ...  # text of each token, which begins with white space where a word does; "" of a mark


class Bytes:
    """The 256 bytes. Knows every text. `masked`: and a mask token."""

    start = ord("\n")

    def __init__(self, masked: bool = False) -> None:
        self.vocabulary, self.mask = 256 + masked, 256 if masked else None

    def encode(self, text: bytes) -> NDArray[np.integer]:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(MASK.encode() if token == self.mask else bytes([token]) for token in tokens).decode("utf-8", "replace")

    def numbers(self, text: str) -> list[int]:
        return list(text.encode()) if len(text.encode()) == 1 else []

    def state(self) -> dict:
        return {"kind": "byte"} | ({} if self.mask is None else {"masked": True})

    def with_mask(self) -> "Bytes":
        return Bytes(masked=True)

    def pieces(self) -> list[str]:
        return [chr(byte) if byte < 0x80 else "?" for byte in range(256)] + [""] * (self.vocabulary - 256)


class Characters:
    """The characters that the corpus holds, in the order of their code points. `masked`: and a mask token."""

    def __init__(self, characters: str, masked: bool = False) -> None:
        self.characters = characters
        self.vocabulary, self.mask = len(characters) + masked, len(characters) if masked else None
        self.start = max(characters.find("\n"), characters.find("\r"), 0)
        self.table = np.full(0x110000, -1, np.int32)  # code point -> token
        self.table[[ord(c) for c in characters]] = np.arange(len(characters))

    @classmethod
    def train(cls, chunks: Iterable[bytes]) -> "Characters":
        seen: set[str] = set()
        for chunk in chunks:
            seen.update(chunk.decode())
        return cls("".join(sorted(seen)))

    def encode(self, text: bytes) -> NDArray[np.integer]:
        points = np.frombuffer(text.decode("utf-8", "replace").encode("utf-32-le"), np.uint32)
        tokens = self.table[points]
        if (tokens < 0).any():
            unknown = chr(points[(tokens < 0).argmax()])
            raise UserError(f"the character {unknown!r} is not among the {len(self.characters)} that the corpus holds")
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(MASK if token == self.mask else self.characters[token] for token in tokens)

    def numbers(self, text: str) -> list[int]:
        return [self.characters.index(text)] if len(text) == 1 and text in self.characters else []

    def state(self) -> dict:
        return {"kind": "char", "characters": self.characters} | ({} if self.mask is None else {"masked": True})

    def with_mask(self) -> "Characters":
        return Characters(self.characters, masked=True)

    def pieces(self) -> list[str]:
        return [*self.characters] + [""] * (self.vocabulary - len(self.characters))


class Words:
    """Words between white space, and `<eos>` at every line end, as the WikiText papers count; the rest is `<unk>`."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.vocabulary = len(words)
        self.index = {word: i for i, word in enumerate(words)}
        self.start, self.unknown, self.mask = self.index["<eos>"], self.index["<unk>"], self.index.get(MASK)

    @classmethod
    def train(cls, chunks: Iterable[bytes]) -> "Words":
        counts: Counter[str] = Counter({"<eos>": 0, "<unk>": 0})
        for chunk in chunks:
            counts.update(_words(chunk))
        return cls([word for word, _ in counts.most_common()])

    def encode(self, text: bytes) -> NDArray[np.integer]:
        return np.array([self.index.get(word, self.unknown) for word in _words(text)], np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join("\n" if token == self.start else self.words[token] + " " for token in tokens)

    def numbers(self, text: str) -> list[int]:
        return [self.index[text]] if text in self.index else []

    def state(self) -> dict:
        return {"kind": "word", "words": self.words}

    def with_mask(self) -> "Words":
        return Words([*self.words, MASK])

    def pieces(self) -> list[str]:
        return ["" if i in (self.start, self.unknown, self.mask) else f" {word}" for i, word in enumerate(self.words)]


def _words(chunk: bytes) -> Iterator[str]:
    lines = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").decode("utf-8", "replace").split("\n")
    for line in lines[:-1]:
        yield from line.split()
        yield "<eos>"
    yield from lines[-1].split()


class Subwords:
    """A model of the `tokenizers` library: byte-level BPE trained on the corpus, or a given `tokenizer.json`.

    What the file says of sequences (truncation, padding, marks at the ends) is not for a text, and left out.

    Args:
        model: as JSON.
        beside: what the files beside it say, see `_beside`.
    """

    def __init__(self, model: str, beside: dict[str, Any] | None = None) -> None:
        from tokenizers import Tokenizer as Model

        self.beside = beside or {}
        self.model = Model.from_str(json.dumps(json.loads(model) | dict.fromkeys(("truncation", "padding", "post_processor"))))
        known = 1 + max(self.model.get_vocab().values())  # there may be holes
        self.vocabulary = self.beside.get("vocabulary", known)
        if known > self.vocabulary:
            raise UserError(f"it has {known:,} token types, the model beside it {self.vocabulary:,}")
        marks = ("<|endoftext|>", "</s>", "<|end_of_text|>", "[CLS]", "[SEP]", "<eos>", "\n", "Ċ", "<0x0A>")
        numbers = [self.model.token_to_id(mark) for mark in (*self.beside.get("marks", ()), *marks)]
        self.start: int = next((number for number in numbers if number is not None), 0)
        self.mask = next((number for mark in (MASK, "<mask>") for number in self.numbers(mark)), None)

    @classmethod
    def train(cls, chunks: Iterable[bytes], vocabulary: int) -> "Subwords":
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers, trainers

        model = Model(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        lines = (line for chunk in chunks for line in chunk.decode().splitlines(keepends=True))
        parts = (part for line in lines for part in OF_A_LINE.findall(line))
        model.train_from_iterator(parts, trainer)
        return cls(model.to_str())

    def encode(self, text: bytes) -> NDArray[np.integer]:
        return np.array(self.model.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids, np.int32)

    def encode_all(self, chunks: Iterable[bytes]) -> Iterator[NDArray[np.integer]]:
        """Tokens of a text that comes in chunks: those that `encode` makes of it in one piece.

        Pieces of it overlap. Near its ends a piece may have other tokens than the whole text has there, so in the middle of
        each overlap a place is looked for around which both pieces have the same tokens.
        """
        left, length, first = None, 0, 0  # the last piece, its characters, and its first token that has not been given yet
        pieces = _pieces(chunks)
        while batch := list(islice(pieces, TOGETHER)):
            for piece, right in zip(batch, self.model.encode_batch(batch, add_special_tokens=False), strict=True):
                if left is not None:
                    stop, start = _meeting(left, right, length - OVERLAP, OVERLAP)
                    if start is None:  # such as a very long run of one character: cut there
                        piece, start = piece[OVERLAP:], 0
                        right = self.model.encode(piece, add_special_tokens=False)
                    yield np.array(left.ids[first:stop], np.int32)
                    first = start
                left, length = right, len(piece)
        if left is not None:
            yield np.array(left.ids[first:], np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.model.decode(list(tokens), skip_special_tokens=False)

    def numbers(self, text: str) -> list[int]:
        number = self.model.token_to_id(text)
        return [] if number is None else [number]

    def state(self) -> dict:
        return {"kind": "subword", "model": self.model.to_str(), **({"beside": self.beside} if self.beside else {})}

    def with_mask(self) -> "Subwords":
        made = Subwords(self.model.to_str())
        made.model.add_special_tokens([MASK])
        known = 1 + max(made.model.get_vocab().values())
        padded = {"vocabulary": max(self.vocabulary, known)} if "vocabulary" in self.beside else {}
        return Subwords(made.model.to_str(), self.beside | padded)

    def pieces(self) -> list[str]:
        marks = {number for number, token in self.model.get_added_tokens_decoder().items() if token.special}
        names = [(self.model.id_to_token(i) if i not in marks else None) or "" for i in range(self.vocabulary)]
        if any(name.startswith("##") for name in names):  # WordPiece marks what goes on with a word
            return [name[2:] if name.startswith("##") and name[2:] else name and f" {name}" for name in names]
        return [name.translate(SPACES) for name in names]


def _pieces(chunks: Iterable[bytes]) -> Iterator[str]:
    """The same text in pieces, of which each begins with the last OVERLAP characters of the one before."""
    text = ""
    for chunk in chunks:
        text += chunk.decode()
        while len(text) > PIECE + OVERLAP:
            yield text[: PIECE + OVERLAP]
            text = text[PIECE:]
    if text:
        yield text


def _meeting(left: Any, right: Any, shift: int, shared: int) -> tuple[int, int | None]:
    """Where one encoding goes on as another does: (first token of `left` not to use, first token of `right` to use), the latter
    None if nowhere. The last `shared` characters of `left`, from number `shift` on, are the first ones of `right`."""

    def around(encoding: Any, ids: list[int], token: int, origin: int) -> list[tuple[int, int]]:
        near = range(max(0, token - ALIKE), min(len(ids), token + ALIKE))
        return [(ids[k], encoding.token_to_chars(k)[0] - origin) for k in near]

    left_ids, right_ids = left.ids, right.ids
    for place in range(shared // 2, shared - shared // 4, max(1, shared // 256)):
        i, j = left.char_to_token(shift + place), right.char_to_token(place)
        if i is not None and j is not None:
            alike = around(left, left_ids, i, shift)
            if len(alike) == 2 * ALIKE and alike == around(right, right_ids, j, 0):
                return i, j
    return len(left_ids), None


KINDS: dict[str, Callable[..., Tokenizer]] = {"byte": Bytes, "char": Characters, "word": Words, "subword": Subwords}


def encoded(tokenizer: Tokenizer, chunks: Iterable[bytes]) -> Iterator[NDArray[np.integer]]:
    """Tokens of a text that comes in chunks, each of whole words."""
    return tokenizer.encode_all(chunks) if isinstance(tokenizer, Subwords) else map(tokenizer.encode, chunks)


def train(name: str, vocabulary: int, chunks: Callable[[str | None], Iterable[bytes]]) -> Tokenizer:
    """Make the tokenizer `name`; `chunks(split)` reads a split's text, `chunks(None)` all splits."""
    if name == "byte":
        return Bytes()
    if name == "char":
        return Characters.train(chunks(None))
    if name == "word":
        return Words.train(chunks("train"))
    if name == "bpe":
        return Subwords.train(chunks("train"), vocabulary)
    return given(name)


def given(path: str) -> Tokenizer:
    """That of a `tokenizer.json`, of a folder in Hugging Face's layout that has one, or of a run's folder.

    Raises:
        UserError: there is none.
    """
    place = Path(os.path.expanduser(path))
    file = place / "tokenizer.json" if place.is_dir() else place
    if not file.is_file():
        raise UserError(f"data.tokenizer={path}: one of {', '.join(NAMES)}, or the path of a tokenizer.json (no such file)")
    try:
        text = file.read_text(encoding="utf-8")
        if (place / "config.yaml").is_file():
            return restore(json.loads(text))
        return Subwords(text, _beside(place) if place.is_dir() else None)
    except Exception as error:  # the library raises no other
        raise UserError(f"data.tokenizer={path}: not a tokenizer.json of the tokenizers library: {error}") from None


def _beside(folder: Path) -> dict[str, Any]:
    """What a folder in Hugging Face's layout says of its tokenizer: `vocabulary`, the rows of the model's embedding; `marks`,
    the token that begins a text, then the one that ends it; `stop`, tokens that end an answer; `chat`, a template."""
    read = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("config", "tokenizer_config", "generation_config") if (folder / f"{name}.json").is_file()}  # fmt: skip
    told, config = read.get("tokenizer_config", {}), read.get("config", {})
    marks = [told.get("bos_token") or told.get("cls_token"), told.get("eos_token") or told.get("sep_token")]
    stop = read.get("generation_config", {}).get("eos_token_id", config.get("eos_token_id"))
    template = folder / "chat_template.jinja"
    found = {
        "vocabulary": config.get("vocab_size"),
        "marks": [mark["content"] if isinstance(mark, dict) else mark for mark in marks if mark],
        "stop": stop if isinstance(stop, list) else [stop] if isinstance(stop, int) else None,
        "chat": template.read_text(encoding="utf-8") if template.is_file() else told.get("chat_template"),
    }
    return {key: value for key, value in found.items() if value}


def restore(state: dict) -> Tokenizer:
    try:
        return KINDS[state["kind"]](**{key: value for key, value in state.items() if key != "kind"})
    except (KeyError, TypeError):
        raise UserError(f"unknown tokenizer: {json.dumps(state)[:80]}") from None
