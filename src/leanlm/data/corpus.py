"""Where text comes from. A corpus names, for each split, the byte ranges of files that make it up, in a fixed order.

To add a data set: write a function that returns a `Corpus` and a YAML file in `conf/data` whose `_target_` names it.
"""

import hashlib
import os
import re
import sysconfig
import urllib.request
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from leanlm.common.errors import UserError
from leanlm.common.files import cache_folder, writable, write
from leanlm.data.documents import FIELDS, Form
from leanlm.data.text_files import Piece, whole


@dataclass(frozen=True)
class Corpus:
    """The pieces of each split ("train", "validation" and perhaps "test"), in reading order.

    `form`: how their lines are read, each a document of its own; None: they are one stream of text.
    `sources`: of a mixture, by name; its own pieces are those of all. `shares`: rows of each source in sum(shares) rows.
    """

    splits: dict[str, list[Piece]]
    form: Form | None = None
    sources: dict[str, "Corpus"] = field(default_factory=dict)
    shares: tuple[int, ...] = ()

    def only(self, split: str) -> "Corpus":
        """A split alone, of the sources that have it."""
        sources = {name: source.only(split) for name, source in self.sources.items() if split in source.splits}
        return replace(self, splits={split: self.splits[split]}, sources=sources)

    def size(self, split: str) -> int:
        """Bytes of text in a split."""
        return sum(piece.size for piece in self.splits[split])

    def chunks(self, split: str) -> Iterator[bytes]:
        """The text of a split, as `Piece.chunks` cuts each of its pieces."""
        for piece in self.splits[split]:
            yield from piece.chunks()

    def origin(self, split: str) -> str:
        """The name of the file that a split is of, or how many files there are."""
        names = [piece.path.name for piece in self.splits[split] if piece.size]
        return names[0] if len(names) == 1 else f"{len(names):,} files"


def stdlib(path: str | None = None) -> Corpus:
    """The source files of the running Python's standard library: some 13 MB that every machine has.

    Files are split by a hash of their name: 98% train, 1% validation, 1% test. Test suites, caches and installed
    packages are left out. `path`: another folder of `*.py` files to read instead.
    """
    root = Path(os.path.expanduser(path or sysconfig.get_paths()["stdlib"]))
    if not root.is_dir():
        raise UserError(f"data.path={root}: there is no such folder")
    skip = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idle_test", "lib2to3"}
    splits: dict[str, list[Piece]] = {"train": [], "validation": [], "test": []}
    for name in sorted(file.relative_to(root).as_posix() for file in _files(root, skip) if file.suffix == ".py"):
        if (root / name).stat().st_size:
            part = hashlib.sha256(name.encode()).digest()[0] % 100
            splits["validation" if part == 0 else "test" if part == 1 else "train"].append(whole(root / name))
    if not all(splits.values()):
        found = sum(map(len, splits.values()))
        raise UserError(f"data=stdlib: {found} *.py files in {root} are too few to split; try data=text data.path=...")
    return Corpus(splits)


def text(path: str | None = None, validation: float = 0.1) -> Corpus:
    """Your own text.

    Args:
        path: a file, or a folder. What is named for a split in a folder (files or folders called train..., val... or dev...,
            test...) is that split. Where nothing is named for training, all other `*.txt`, `*.md` and `*.py` files are joined
            for it, in the order of their names. Packed files count, hidden ones do not.
        validation: share of the bytes, from the end, to keep for validation where no name says what is.
    """
    return Corpus(_of_files("text", path, validation, r"txt|md|py"))


def jsonl(
    path: str | None = None,
    validation: float = 0.1,
    fields: dict[str, str | None] | None = None,
    isolate: bool = False,
    skip_bad: bool = False,
) -> Corpus:
    """Your own documents, prompts with completions, or conversations: one JSON object a line.

    Args:
        path: a file, or a folder, whose `*.jsonl` are split as `text` splits files.
        validation: share of the bytes, from the end, to keep for validation where no name says what is; in whole lines.
        fields: names of the fields, as in `documents.FIELDS`; null: such lines are not read.
        isolate: no token attends to another document of its row.
        skip_bad: leave out and count lines that cannot be read.
    """
    if unknown := (fields or {}).keys() - FIELDS.keys():
        raise UserError(f"data.fields.{min(unknown)}: there are {', '.join(FIELDS)}")
    form = Form({**FIELDS, **(fields or {})}, skip_bad, isolate)
    return Corpus(_of_files("jsonl", path, validation, r"jsonl"), form)


def _of_files(data: str, path: str | None, validation: float, kinds: str) -> dict[str, list[Piece]]:
    """The splits of a file, or of what a folder has of some kinds of files."""
    if path is None:
        raise UserError(f"data={data} needs data.path=FILE_OR_FOLDER")
    if not 0 < validation < 1:
        raise UserError(f"data.validation={validation:g}: a share of the bytes, above 0 and below 1 (0.1 is a tenth)")
    root = Path(os.path.expanduser(path))
    named: dict[str | None, list[Path]] = {"train": [root] if root.is_file() else [], "validation": [], "test": [], None: []}
    for file in _files(root):
        named[next(filter(None, map(_named_for, file.relative_to(root).parts)), None)].append(file)
    if not named["train"]:
        named = {split: _kept(files, kinds) for split, files in named.items()}
        named["train"] = named[None]
    splits = {
        split: [whole(file) for file in _kept(files, kinds) or files] for split, files in named.items() if split and files
    }
    if not any(piece.size for piece in splits.get("train", [])):
        looked = ", ".join(f"*.{kind}" for kind in kinds.split("|"))
        missing = f"no text to train on (looked for {looked})" if root.is_dir() else "the file is empty"
        raise UserError(f"data.path={root}: {missing if root.exists() else 'there is no such file or folder'}")
    if "validation" not in splits:
        splits |= _divided(splits["train"], validation, in_lines=data == "jsonl")
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}


def _files(root: Path, skip: Container[str] = ()) -> list[Path]:
    """The files below a folder, without what is hidden and what lies in folders called as in `skip`."""
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [each for each in inner if each not in skip and not each.startswith(".")]  # of these nothing is looked at
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def _named_for(part: str) -> str | None:
    """The split that a part of a path names: `train.txt`, `validation-00001.txt.gz`, `ptb.valid.txt`, `dev`."""
    word = r"(?:^|\.)(train|val|dev|eval|test)(?:ing|id|idation|elopment|uation|set|data)*(?:[._-]|\s*\d|$)"
    found = re.search(word, part.lower())
    if found is None or part.endswith(".py"):  # train.py is code
        return None
    return found[1] if found[1] in ("train", "test") else "validation"


def _kept(files: list[Path], kinds: str) -> list[Path]:
    return [file for file in files if re.search(rf"\.({kinds})(\.(gz|xz|bz2|zst))?$", file.name.lower())]


def _divided(pieces: list[Piece], validation: float, in_lines: bool) -> dict[str, list[Piece]]:
    """Training and validation text: pieces cut at a share of their bytes, moved to the next line end; `in_lines`: to the
    beginning of the line that this share would cut."""
    size = rest = sum(piece.size for piece in pieces)
    place = int((1 - validation) * rest)
    for i, piece in enumerate(pieces):
        if place < piece.size:
            middle = piece.start + place
            cut = piece.line_start(middle) if in_lines else piece.boundary(middle, room=(rest - place) // 2)
            train, held = [*pieces[:i], replace(piece, stop=cut)], [replace(piece, start=cut), *pieces[i + 1 :]]
            if all(any(each.size for each in part) for part in (train, held)):
                return {"train": train, "validation": held}
            break
        place, rest = place - piece.size, rest - piece.size
    raise UserError(f"data.validation={validation:g} of {size:,} bytes leaves one of two splits empty: take another share")


def tinyshakespeare(path: str | None = None) -> Corpus:
    """Tiny Shakespeare, split as nanoGPT splits it: the first 90% to train on, the last 10% to validate."""
    file = _fetch(path, "tinyshakespeare", "input.txt")
    size = file.stat().st_size
    return Corpus({"train": [Piece(file, 0, int(0.9 * size))], "validation": [Piece(file, int(0.9 * size), size)]})


def wikitext2(path: str | None = None) -> Corpus:
    """WikiText-2 (Merity et al. 2016), the tokenised version with `<unk>`, as papers use it."""
    names = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
    return Corpus({split: [whole(_fetch(path, "wikitext-2", name))] for split, name in names.items()})


# Corpus -> the folder that it is published in, and the sha256 of each file that results were measured on.
PUBLISHED = {
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare",
        {"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
    ),
    "wikitext-2": (
        "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2",
        {
            "train.txt": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
            "valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            "test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        },
    ),
}


def _fetch(path: str | None, corpus: str, name: str) -> Path:
    """A checked local copy of a file: from `path`, or `LEANLM_DATA/<corpus>`, or downloaded; `.xz` is unpacked.

    Raises UserError when the bytes are not those of PUBLISHED.
    """
    if path is None and "LEANLM_DATA" in os.environ:
        path = str(Path(os.environ["LEANLM_DATA"]) / corpus)
    if path is not None:
        given = Path(os.path.expanduser(path))
        given = given / name if given.is_dir() else given
        packed = given.with_name(given.name + ".xz")
        if not given.is_file() and not packed.is_file():
            raise UserError(f"data={corpus}: neither {given} nor {packed.name} beside it exists; set data.path")
        file = whole(given if given.is_file() else packed).path
        _check(file.read_bytes(), PUBLISHED[corpus][1][name], str(given))
        return file
    kept = cache_folder() / "downloads" / corpus / name
    if not kept.is_file():
        url = f"{PUBLISHED[corpus][0]}/{name}"
        try:
            with urllib.request.urlopen(url, timeout=60) as reply:
                content = reply.read()
        except OSError as error:
            raise UserError(
                f"data={corpus}: {name} could not be downloaded ({error}); set data.path or LEANLM_DATA to a copy"
            ) from None
        _check(content, PUBLISHED[corpus][1][name], url)
        write(writable(kept.parent) / name, [content])
    return kept


def _check(content: bytes, expected: str, origin: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
        raise UserError(f"{origin} is not the published file: sha256 {digest}, expected {expected}")
