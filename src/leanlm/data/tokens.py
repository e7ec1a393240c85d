"""Token numbers on disk: made once for each text and tokenizer, read as memory-mapped arrays.

A prepared folder is named by a fingerprint of the text and the tokenizer. It is written under another name and renamed
when it is whole, so a preparation that was killed leaves nothing that looks finished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from leanlm.common.errors import UserError
from leanlm.common.files import SET_CACHE, cache_folder, writable, write
from leanlm.data import tokenizer as tokenizers
from leanlm.data.corpus import Corpus
from leanlm.data.documents import ANNOTATIONS, Documents, Encoder, Lines, Render
from leanlm.data.tokenizer import Tokenizer

FORMAT = 1  # of the folder; part of the fingerprint
DOCUMENTS = "documents, 1"  # their format, and how they are read; part of the fingerprint
IN_ONE_PIECE = "in one piece"  # how text is given to the tokenizers library; part of the fingerprint
READING = "reading the vocabulary"
ABANDONED = 3600  # seconds in which a preparation that lives has written something

Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


@dataclass(frozen=True)
class Tokens:
    """A corpus ready to train on."""

    fingerprint: str  # names the text and the tokenizer
    tokenizer: Tokenizer
    splits: dict[str, Any]  # split name -> memory-mapped token numbers `[tokens]`, or documents
    bytes: dict[str, int]  # split name -> bytes of text, of documents of what is counted

    def describe(self, corpus: Corpus) -> str:
        """What was found, in a line."""
        found = (
            f"{name} {part.describe() if hasattr(part, 'describe') else f'{len(part):,} tokens'} "
            f"({self.bytes[name]:,} bytes, {corpus.origin(name)})"
            for name, part in self.splits.items()
        )
        return f"{', '.join(found)}; {self.tokenizer.vocabulary:,} token types"


def prepare(corpus: Corpus, tokenizer: str | Tokenizer, vocabulary: int, progress: Progress | None = None) -> Tokens:
    """The tokens of a corpus, prepared now unless a folder with the same fingerprint exists.

    Memory does not grow with the text: it is read, tokenised and written in chunks of a few MB. (A word vocabulary and
    the pair counts of BPE training grow with the number of different words.)
    `tokenizer`: one of byte, char, word, bpe, or the path of a `tokenizer.json`; or one that was made for another text.
    `vocabulary`: its size, if it is a bpe that is trained here.
    """
    report = progress or (lambda what, done, total: None)
    folder = cache_folder() / "tokens" / fingerprint(corpus, tokenizer, vocabulary, report)
    if not folder.is_dir():
        _make(corpus, tokenizer, vocabulary, folder, report)
    return load(folder)


def common_tokenizer(corpus: Corpus, tokenizer: str, vocabulary: int, progress: Progress) -> Tokenizer:
    """The tokenizer of all sources of a mixture, trained now on the text of all unless it is in the cache."""
    folder = cache_folder() / "tokens" / fingerprint(corpus, tokenizer, vocabulary, progress)
    if not folder.is_dir():
        made = tokenizers.train(tokenizer, vocabulary, lambda split: _texts(corpus, split, progress))
        whole(folder, lambda inside: write(inside / "meta.json", json.dumps({"tokenizer": made.state()})))
    return tokenizers.restore(json.loads((folder / "meta.json").read_text())["tokenizer"])


def fingerprint(corpus: Corpus, tokenizer: str | Tokenizer, vocabulary: int, report: Progress) -> str:
    """Names the text and the tokenizer. Files that are known by their size and times are not read again."""
    if corpus.sources:
        parts = {name: fingerprint(source, tokenizer, vocabulary, report) for name, source in corpus.sources.items()}
        return hashlib.sha256(json.dumps(list(parts.items())).encode()).hexdigest()[:24]
    key: list[Any] = [FORMAT, _tokenizer_key(tokenizer, vocabulary)]
    if corpus.form is not None:
        key += [DOCUMENTS, corpus.form.fields, corpus.form.skip_bad]
    known = cache_folder() / "tokens" / "by-stat" / _named_by_stat(corpus, key)
    if known.is_file():
        return known.read_text()
    digest = hashlib.sha256(json.dumps(key).encode())
    for name in corpus.splits:
        digest.update(f"\0{name}\0{corpus.size(name)}\0".encode())
        for chunk in _read(corpus, name, f"fingerprint of {name}", report):
            digest.update(chunk)
    found = digest.hexdigest()[:24]
    with suppress(OSError, UserError):  # a cache that holds the tokens may be read-only
        write(writable(known.parent) / known.name, found)
    return found


def load(folder: Path) -> Tokens:
    """Open a prepared folder."""
    meta = json.loads((folder / "meta.json").read_text())
    splits: dict[str, Any] = {name: np.memmap(folder / f"{name}.bin", meta["dtype"], "r") for name in meta["bytes"]}
    for name, bad in meta.get("bad_lines", {}).items():
        counted, ends = (
            np.asarray(np.memmap(folder / f"{name}.{part}.bin", dtype, "r")) for part, dtype in ANNOTATIONS.items()
        )
        splits[name] = Documents(np.asarray(splits[name]), counted, ends, bad)
    return Tokens(folder.name, tokenizers.restore(meta["tokenizer"]), splits, meta["bytes"])


def _make(corpus: Corpus, tokenizer: str | Tokenizer, vocabulary: int, folder: Path, report: Progress) -> None:
    """Prepare a folder, unless another process is quicker."""
    if isinstance(tokenizer, str):
        tokenizer = tokenizers.train(tokenizer, vocabulary, lambda split: _texts(corpus, split, report))
    whole(folder, partial(_write, corpus, tokenizer, report))


def whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder of the cache of what `fill` writes, in one go, unless another process is quicker, with the same content."""
    root = writable(folder.parent)
    part = root / f".{folder.name}.{os.urandom(6).hex()}"
    try:
        part.mkdir()
        _sweep(root, part.stat().st_mtime)
        fill(part)
        if not folder.is_dir():
            part.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise UserError(f"prepared data cannot be kept in {root} ({error.strerror or error}): {SET_CACHE}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(corpus: Corpus, tokenizer: Tokenizer, report: Progress, folder: Path) -> None:
    size = tokenizer.vocabulary
    dtype = np.dtype(np.uint8 if size <= 1 << 8 else np.uint16 if size <= 1 << 16 else np.uint32)
    meta: dict[str, Any] = {"tokenizer": tokenizer.state(), "dtype": dtype.name}
    if corpus.form is not None:
        meta |= _write_documents(corpus, tokenizer, dtype, report, folder)
    else:
        for name in corpus.splits:
            chunks = _read(corpus, name, f"tokenising {name}", report)
            with written(folder / f"{name}.bin") as file:
                file.writelines(numbers.astype(dtype).data for numbers in tokenizers.encoded(tokenizer, chunks))
                if not file.tell():
                    raise UserError(f"the {name} split ({corpus.origin(name)}) has no tokens: it holds nothing but white space")
        meta["bytes"] = {name: corpus.size(name) for name in corpus.splits}
    (folder / "meta.json").write_text(json.dumps(meta))


def _write_documents(corpus: Corpus, tokenizer: Tokenizer, dtype: Any, report: Progress, folder: Path) -> dict[str, Any]:
    """The tokens of each split, whether each counts, and where documents end. Returns what is to be known beside them."""
    encode, size, bad = Encoder(tokenizer), dict.fromkeys(corpus.splits, 0), {}
    for name in corpus.splits:
        lines, end = _lines(corpus, [name], f"tokenising {name}", report, encode.render), 0
        with (
            written(folder / f"{name}.bin") as numbers_file,
            written(folder / f"{name}.counted.bin") as counted_file,
            written(folder / f"{name}.ends.bin") as ends_file,
        ):
            for documents in lines:
                numbers, counted, lengths = encode(documents)
                ends = end + np.cumsum(lengths, dtype=np.int64)
                for file, values in ((numbers_file, numbers.astype(dtype)), (counted_file, counted), (ends_file, ends)):
                    file.write(values.data)
                end = int(ends[-1])
                size[name] += sum(len(text.encode()) for document in documents for text, counts in document.parts if counts)
        bad[name] = lines.bad
        if not size[name]:
            nothing = f"no text, completion or answer to learn ({lines.bad:,} bad lines left out)"
            raise UserError(f"the {name} split ({corpus.origin(name)}) has {nothing}")
    return {"bytes": size, "bad_lines": bad}


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file that is on the disk when it is closed."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _texts(corpus: Corpus, split: str | None, report: Progress) -> Iterator[bytes]:
    """The text of a split, or of all, of which a tokenizer is made."""
    if corpus.sources:
        yield from chain.from_iterable(_texts(source, split, report) for source in corpus.sources.values())
        return
    if corpus.form is None:
        yield from _read(corpus, split, READING, report)
        return
    for documents in _lines(corpus, corpus.splits if split is None else [split], READING, report, None):
        yield from ("".join(text for text, _ in document.parts).encode() for document in documents)


def _lines(corpus: Corpus, names: Iterable[str], what: str, report: Progress, render: Render | None) -> Lines:
    """The documents of some splits, while `report` hears how far it is."""
    assert corpus.form is not None
    pieces = [piece for name in names for piece in corpus.splits[name]]
    return Lines(pieces, corpus.form, render, partial(report, what))


def _read(corpus: Corpus, split: str | None, what: str, report: Progress) -> Iterator[bytes]:
    """The text of a split, or of all, while `report` hears how far it is."""
    names = corpus.splits if split is None else [split]
    done, total = 0, sum(map(corpus.size, names))
    report(what, 0, total)
    for chunk in chain.from_iterable(map(corpus.chunks, names)):
        yield chunk
        done += len(chunk)
        report(what, done, total)


def _tokenizer_key(tokenizer: str | Tokenizer, vocabulary: int) -> list:
    if tokenizer == "bpe":
        return [tokenizer, vocabulary, IN_ONE_PIECE]
    if tokenizer in tokenizers.NAMES:
        return [tokenizer, None]
    if isinstance(tokenizer, str) and os.path.isfile(os.path.expanduser(tokenizer)):
        content = Path(os.path.expanduser(tokenizer)).read_bytes()
    else:
        made = tokenizers.given(tokenizer) if isinstance(tokenizer, str) else tokenizer
        content = json.dumps(made.state()).encode()
    return [hashlib.sha256(content).hexdigest(), IN_ONE_PIECE]


def _named_by_stat(corpus: Corpus, key: list) -> str:
    """Names the same files, unchanged as far as size and times tell; spares reading them again."""
    files = [
        (name, str(piece.path.resolve()), piece.start, piece.stop, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for name, pieces in corpus.splits.items()
        for piece in pieces
        for stat in [piece.path.stat()]
    ]
    return hashlib.sha256(json.dumps([*key, files]).encode()).hexdigest()[:24]


def _sweep(root: Path, now: float) -> None:
    """Remove what preparations have left that were killed, on whatever machine: nothing in it has changed for long. `now`: by
    the clock of the file system."""
    for part in root.glob(".*.*"):
        with suppress(OSError):  # another process removes it, or renames it
            if now - max(each.stat().st_mtime for each in (part, *part.iterdir())) > ABANDONED:
                shutil.rmtree(part)
