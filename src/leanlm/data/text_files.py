"""The one door for text: files as people have them, read as UTF-8, or refused in a line that says what to do."""

import bz2
import codecs
import gzip
import hashlib
import json
import lzma
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from leanlm.common.errors import UserError
from leanlm.common.files import cache_folder, writable, write

CHUNK = 1 << 22  # bytes read at a time
HEAD = 1 << 16  # bytes looked at before any work starts
BETWEEN_WORDS = (b"\n", b"\r", b" ", b"\t", "\u3000".encode())  # the better place to cut first


@dataclass(frozen=True)
class Piece:
    """Bytes `start` to `stop` of a file."""

    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def chunks(self) -> Iterator[bytes]:
        """The text in chunks of some MB, each of whole characters; cut after a line end, on a very long line between words, and
        in a very long word between characters.

        Raises:
            UserError: it is not UTF-8, with the offset in the file.
        """
        with open(self.path, "rb") as file:
            file.seek(self.start)
            left, rest = self.size, b""
            while left:
                read = file.read(min(CHUNK, left))
                if not read:
                    raise UserError(f"{self.path} is shorter than it was a moment ago: {left} bytes are missing")
                left -= len(read)
                block = rest + read
                cut = _cut(block) if left else len(block)
                chunk, rest = block[:cut], block[cut:]
                if chunk:
                    _check(chunk, self.path, self.stop - left - len(block))
                    yield chunk

    def boundary(self, place: int, room: int) -> int:
        """Where to divide the piece: at the first line end of the `room` bytes from `place` on, else between two words, else
        between two characters."""
        with open(self.path, "rb") as file:
            file.seek(place)
            ahead = file.read(min(CHUNK, self.stop - place))
        for mark in BETWEEN_WORDS:
            if (found := ahead.find(mark, 0, room)) >= 0:
                return place + found + len(mark)
        return place + next((i for i, byte in enumerate(ahead) if byte & 0xC0 != 0x80), len(ahead))

    def line_start(self, place: int) -> int:
        """Where the line of the piece begins that holds the byte at `place`."""
        with open(self.path, "rb") as file:
            while place > self.start:
                first = max(self.start, place - CHUNK)
                file.seek(first)
                if (found := file.read(place - first).rfind(b"\n")) >= 0:
                    return first + found + 1
                place = first
        return place


def whole(path: Path) -> Piece:
    """The text of a file, without a byte order mark. What is packed (gzip, xz, bzip2, zstd) or UTF-16 is read from a copy in
    the cache.

    Raises:
        UserError: the file cannot be read, or its beginning is not text.
    """
    try:
        plain = _plain(path)
        with open(plain, "rb") as file:
            head = file.read(HEAD)
        _check(head, plain, 0, more=len(head) == HEAD)
        return Piece(plain, len(codecs.BOM_UTF8) * head.startswith(codecs.BOM_UTF8), plain.stat().st_size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _cut(block: bytes) -> int:
    """Where to end a chunk: after the last line end, else before the last white space, else before the last character."""
    if (line_end := block.rfind(b"\n")) >= 0:
        return line_end + 1
    if (line_end := block.rfind(b"\r", 0, -1)) >= 0:  # behind the last byte a \n may follow
        return line_end + 1
    if (space := max(block.rfind(mark, 1) for mark in BETWEEN_WORDS[2:])) > 0:
        return space
    return max(len(block) - 1 - next((i for i, byte in enumerate(block[:-5:-1]) if byte & 0xC0 != 0x80), 0), 0)


def _check(text: bytes, path: Path, offset: int, more: bool = False) -> None:
    """Raise UserError where bytes of a file, from `offset` on, are not UTF-8 text. `more`: the last character may be cut."""
    name = shlex.quote(str(path))
    zero = text.find(b"\0")
    if zero >= 0:
        raise UserError(
            f"{path}: byte 0 at offset {offset + zero}: this is a binary file, or UTF-16 without its mark: give a text file "
            f"or convert it (iconv -f utf-16le -t utf-8 {name} > new.txt)"
        )
    try:
        codecs.utf_8_decode(text, "strict", not more)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte 0x{text[error.start]:02x} at offset {offset + error.start} is not UTF-8: convert the file from the "
            f"encoding that it has (iconv -f latin1 -t utf-8 {name} > new.txt), or drop what is damaged (iconv -c -t utf-8)"
        ) from None


def _plain(path: Path) -> Path:
    """The file itself or, where it is packed or UTF-16, a copy of its text in the cache."""
    with open(path, "rb") as file:
        head = file.read(10)
    reader = next((reader for magic, reader in READERS.items() if head.startswith(magic)), None)
    if reader is None:
        return path
    stat = path.stat()
    key = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    folder = cache_folder() / "unpacked" / hashlib.sha256(key.encode()).hexdigest()[:24]
    kept = folder / (path.stem if path.suffix in PACKED else path.name)
    if not kept.is_file():
        writable(folder)
        try:
            with reader(path) as source:
                write(kept, iter(lambda: source.read(CHUNK), b""))
        except UserError:
            raise
        except Exception as error:  # each of the libraries that unpack has its own
            raise UserError(f"{path} cannot be unpacked into {folder}: {error}") from None
    return _plain(kept)


def _zstd(path: Path) -> Any:
    for module in ("compression.zstd", "zstandard"):
        try:
            return import_module(module).open(path, "rb")
        except ImportError:
            continue
    raise UserError(f"{path}: this Python cannot unpack zstd: pip install zstandard, or unpack it first (zstd -d)")


def _utf16(path: Path) -> Any:
    return codecs.EncodedFile(open(path, "rb"), "utf-8", "utf-16")  # noqa: SIM115 (closed by whoever reads it)


# What a file begins with -> what reads it as bytes of UTF-8.
READERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ\0": lzma.open,
    **{b"BZh%d1AY&SY" % level: bz2.open for level in range(1, 10)},
    b"\x28\xb5\x2f\xfd": _zstd,
    codecs.BOM_UTF16_LE: _utf16,
    codecs.BOM_UTF16_BE: _utf16,
}
PACKED = (".gz", ".xz", ".bz2", ".zst")
