"""Text to token numbers and back: by byte, character, word, or a `tokenizers` model (BPE trained here, or a given file).

Every tokenizer knows `start`: the token that stands before the first one of a text, so that the first token too has a
probability (a line end, or an end-of-text mark).
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from leanlm.common.errors import UserError

NAMES = ("byte", "char", "word", "bpe")


class Tokenizer(Protocol):
    vocabulary: int
    start: int

    def encode(self, text: bytes) -> NDArray[np.integer]: ...
    def decode(self, tokens: Iterable[int]) -> str: ...
    def numbers(self, text: str) -> list[int]: ...  # of a token's own name, [] if there is no such token
    def state(self) -> dict: ...  # JSON from which `restore` makes it again


class Bytes:
    """The 256 bytes. Knows every text."""

    vocabulary, start = 256, ord("\n")

    def encode(self, text: bytes) -> NDArray[np.integer]:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    def numbers(self, text: str) -> list[int]:
        return list(text.encode()) if len(text.encode()) == 1 else []

    def state(self) -> dict:
        return {"kind": "byte"}


class Characters:
    """The characters that the corpus holds, in the order of their code points."""

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.vocabulary = len(characters)
        self.start = max(characters.find("\n"), 0)
        self.table = np.full(0x110000, -1, np.int32)  # code point -> token
        self.table[[ord(c) for c in characters]] = np.arange(len(characters))

    @classmethod
    def train(cls, chunks: Iterable[bytes]) -> "Characters":
        seen: set[str] = set()
        for chunk in chunks:
            seen.update(chunk.decode("utf-8", "replace"))
        return cls("".join(sorted(seen)))

    def encode(self, text: bytes) -> NDArray[np.integer]:
        points = np.frombuffer(text.decode("utf-8", "replace").encode("utf-32-le"), np.uint32)
        tokens = self.table[points]
        if (tokens < 0).any():
            unknown = chr(points[(tokens < 0).argmax()])
            raise UserError(f"the character {unknown!r} is not among the {self.vocabulary} that the corpus holds")
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(self.characters[token] for token in tokens)

    def numbers(self, text: str) -> list[int]:
        return [self.characters.index(text)] if len(text) == 1 and text in self.characters else []

    def state(self) -> dict:
        return {"kind": "char", "characters": self.characters}


class Words:
    """Words between white space, and `<eos>` at every line end, as the WikiText papers count; the rest is `<unk>`."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.vocabulary = len(words)
        self.index = {word: i for i, word in enumerate(words)}
        self.start, self.unknown = self.index["<eos>"], self.index["<unk>"]

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


def _words(chunk: bytes) -> Iterator[str]:
    lines = chunk.decode("utf-8", "replace").split("\n")
    for line in lines[:-1]:
        yield from line.split()
        yield "<eos>"
    yield from lines[-1].split()


class Subwords:
    """A model of the `tokenizers` library: byte-level BPE trained on the corpus, or a given `tokenizer.json`."""

    def __init__(self, model: str) -> None:
        from tokenizers import Tokenizer as Model

        self.model = Model.from_str(model)
        self.vocabulary = self.model.get_vocab_size()
        marks = ("<|endoftext|>", "</s>", "<|end_of_text|>", "[SEP]", "<eos>", "\n", "Ċ", "<0x0A>")
        numbers = [self.model.token_to_id(mark) for mark in marks]
        self.start: int = next((number for number in numbers if number is not None), 0)

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
        lines = (line for chunk in chunks for line in chunk.decode("utf-8", "replace").splitlines(keepends=True))
        model.train_from_iterator(lines, trainer)
        return cls(model.to_str())

    def encode(self, text: bytes) -> NDArray[np.integer]:
        lines = text.decode("utf-8", "replace").splitlines(keepends=True)
        encoded = self.model.encode_batch_fast(lines, add_special_tokens=False)
        return np.array([token for line in encoded for token in line.ids], np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.model.decode(list(tokens), skip_special_tokens=False)

    def numbers(self, text: str) -> list[int]:
        number = self.model.token_to_id(text)
        return [] if number is None else [number]

    def state(self) -> dict:
        return {"kind": "subword", "model": self.model.to_str()}


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
    return Subwords(Path(name).expanduser().read_text())


def restore(state: dict) -> Tokenizer:
    match state:
        case {"kind": "byte"}:
            return Bytes()
        case {"kind": "char", "characters": characters}:
            return Characters(characters)
        case {"kind": "word", "words": words}:
            return Words(words)
        case {"kind": "subword", "model": model}:
            return Subwords(model)
    raise UserError(f"unknown tokenizer: {json.dumps(state)[:80]}")


def stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Decode tokens as they come, holding back a character whose bytes are not complete.

    Decoding each token alone would lose the spaces that some models put between tokens, so a short tail of tokens that
    were printed already is decoded again with each new one.
    """
    printed: list[int] = []
    fresh: list[int] = []
    for token in tokens:
        fresh.append(token)
        before, text = tokenizer.decode(printed), tokenizer.decode(printed + fresh)
        if not text.endswith("\ufffd") or len(fresh) > 4:
            yield text[len(before) :]
            printed, fresh = fresh, []
    if fresh:
        yield tokenizer.decode(printed + fresh)[len(tokenizer.decode(printed)) :]
