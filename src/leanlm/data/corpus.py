"""Where text comes from. A corpus names, for each split, the byte ranges of files that make it up, in a fixed order.

To add a data set: write a function that returns a `Corpus` and a YAML file in `conf/data` whose `_target_` names it.
"""

import hashlib
import lzma
import os
import sysconfig
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from leanlm.common.errors import UserError
from leanlm.common.files import cache_folder

CHUNK = 1 << 22  # bytes read at a time; a chunk ends at a line end


@dataclass(frozen=True)
class Piece:
    """Bytes `start` to `stop` of a file."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Corpus:
    """The pieces of each split ("train", "validation" and perhaps "test"), in reading order."""

    splits: dict[str, list[Piece]]

    def size(self, split: str) -> int:
        """Bytes of text in a split."""
        return sum(piece.stop - piece.start for piece in self.splits[split])

    def chunks(self, split: str) -> Iterator[bytes]:
        """The text of a split in chunks that end at a line end, or a piece's end, or (very long lines) between two
        UTF-8 characters."""
        for piece in self.splits[split]:
            with open(piece.path, "rb") as file:
                file.seek(piece.start)
                left, rest = piece.stop - piece.start, b""
                while left:
                    read = file.read(min(CHUNK, left))
                    if not read:
                        raise UserError(f"{piece.path} is shorter than it was a moment ago: {left} bytes are missing")
                    left -= len(read)
                    block = rest + read
                    cut = len(block) if not left else _cut(block)
                    rest = block[cut:]
                    if cut:
                        yield block[:cut]


def _cut(block: bytes) -> int:
    newline = block.rfind(b"\n")
    if newline >= 0:
        return newline + 1
    cut = len(block)
    while cut and block[cut - 1] & 0xC0 == 0x80:  # a continuation byte
        cut -= 1
    return max(cut - 1, 0)


def whole(path: Path) -> Piece:
    return Piece(path, 0, path.stat().st_size)


def stdlib(path: str | None = None) -> Corpus:
    """The source files of the running Python's standard library: some 13 MB that every machine has.

    Files are split by a hash of their name: 98% train, 1% validation, 1% test. Test suites, caches and installed
    packages are left out.

    Args:
        path: another folder of `*.py` files to read instead.
    """
    root = Path(path or sysconfig.get_paths()["stdlib"]).expanduser()
    if not root.is_dir():
        raise UserError(f"data.path={root}: there is no such folder")
    skip = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idle_test", "lib2to3"}
    splits: dict[str, list[Piece]] = {"train": [], "validation": [], "test": []}
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [each for each in inner if each not in skip]  # of these nothing is looked at: packages have many files
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()):
        name = file.relative_to(root)
        if file.stat().st_size:
            part = hashlib.sha256(name.as_posix().encode()).digest()[0] % 100
            splits["validation" if part == 0 else "test" if part == 1 else "train"].append(whole(file))
    if not all(splits.values()):
        found = sum(map(len, splits.values()))
        raise UserError(f"data=stdlib: {found} *.py files in {root} are too few to split; try data=text data.path=...")
    return Corpus(splits)


def text(path: str | None = None, validation: float = 0.1) -> Corpus:
    """Your own text.

    Args:
        path: a file, or a folder. A folder with files named `train*`, `valid*` and perhaps `test*` is split so;
            any other folder is its `*.txt`, `*.md` and `*.py` files joined in the order of their names.
        validation: share of the bytes, from the end, to keep for validation where the names do not say.
    """
    if path is None:
        raise UserError("data=text needs data.path=FILE_OR_FOLDER")
    root = Path(path).expanduser()
    if root.is_dir():
        named = {split: sorted(root.glob(f"{split[:5]}*")) for split in ("train", "validation", "test")}
        if named["train"] and named["validation"]:
            return Corpus({split: [whole(file) for file in files] for split, files in named.items() if files})
        files = sorted(file for file in root.rglob("*") if file.suffix in {".txt", ".md", ".py"} and file.is_file())
    elif root.is_file():
        files = [root]
    else:
        raise UserError(f"data.path={root}: there is no such file or folder")
    pieces = [whole(file) for file in files if file.stat().st_size]
    if not pieces:
        raise UserError(f"data.path={root}: no text in it (looked for *.txt, *.md, *.py)")
    return _split_at(pieces, 1 - validation)


def tinyshakespeare(path: str | None = None) -> Corpus:
    """Tiny Shakespeare, split as nanoGPT splits it: the first 90% to train on, the last 10% to validate."""
    file = _fetch(path, "tinyshakespeare", "input.txt", TINYSHAKESPEARE)
    size = file.stat().st_size
    return Corpus({"train": [Piece(file, 0, int(0.9 * size))], "validation": [Piece(file, int(0.9 * size), size)]})


def wikitext2(path: str | None = None) -> Corpus:
    """WikiText-2 (Merity et al. 2016), the tokenised version with `<unk>`, as papers use it."""
    names = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
    return Corpus({split: [whole(_fetch(path, "wikitext-2", name, WIKITEXT2))] for split, name in names.items()})


def _split_at(pieces: list[Piece], share: float) -> Corpus:
    """Cut a list of pieces at `share` of its bytes, moved to the next line end."""
    target = int(share * sum(piece.stop - piece.start for piece in pieces))
    train: list[Piece] = []
    for i, piece in enumerate(pieces):
        if target < piece.stop - piece.start:
            with open(piece.path, "rb") as file:
                file.seek(piece.start + target)
                file.readline(CHUNK)
                cut = min(file.tell(), piece.stop)
            head = [Piece(piece.path, piece.start, cut)] if cut > piece.start else []
            tail = [Piece(piece.path, cut, piece.stop)] if cut < piece.stop else []
            validation = tail + pieces[i + 1 :]
            if not validation:
                raise UserError(f"data.validation={1 - share:g} leaves no text for validation: take a larger share")
            return Corpus({"train": train + head, "validation": validation})
        train.append(piece)
        target -= piece.stop - piece.start
    raise UserError(f"data.validation={1 - share:g} leaves no text for validation: it must be above 0")


@dataclass(frozen=True)
class Download:
    url: str  # of the folder
    sha256: dict[str, str]  # file name -> digest of its content


TINYSHAKESPEARE = Download(
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare",
    {"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
)
WIKITEXT2 = Download(
    "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2",
    {
        "train.txt": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
        "valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        "test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    },
)


def _fetch(path: str | None, corpus: str, name: str, source: Download) -> Path:
    """A checked local copy of a file: from `path`, or `LEANLM_DATA/<corpus>`, or downloaded; `.xz` is unpacked.

    Raises UserError when the bytes are not those that published results were measured on.
    """
    kept = cache_folder() / "downloads" / corpus / name
    if path is None and "LEANLM_DATA" in os.environ:
        path = str(Path(os.environ["LEANLM_DATA"]) / corpus)
    if path is not None:
        given = Path(path).expanduser()
        given = given / name if given.is_dir() else given
        packed = given.with_name(given.name + ".xz")
        if given.is_file():
            _check(given.read_bytes(), name, source, str(given))
            return given
        if not packed.is_file():
            raise UserError(f"data={corpus}: neither {given} nor {packed.name} beside it exists; set data.path")
        if not kept.is_file():
            _keep(kept, lzma.decompress(packed.read_bytes()), name, source, str(packed))
        return kept
    if not kept.is_file():
        url = f"{source.url}/{name}"
        try:
            with urllib.request.urlopen(url, timeout=60) as reply:
                content = reply.read()
        except OSError as error:
            raise UserError(
                f"data={corpus}: {name} could not be downloaded ({error}); set data.path or LEANLM_DATA to a copy"
            ) from None
        _keep(kept, content, name, source, url)
    return kept


def _check(content: bytes, name: str, source: Download, origin: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != source.sha256[name]:
        raise UserError(f"{origin} is not the published file: sha256 {digest}, expected {source.sha256[name]}")


def _keep(kept: Path, content: bytes, name: str, source: Download, origin: str) -> None:
    _check(content, name, source, origin)
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_name(f".{kept.name}.{os.getpid()}")
    part.write_bytes(content)
    part.rename(kept)
