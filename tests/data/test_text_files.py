"""Text as people have it: encodings, packed files, line ends, lines without end, folders of all layouts, shared caches."""

import bz2
import gzip
import lzma
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from leanlm.common.errors import UserError
from leanlm.common.files import cache_folder
from leanlm.data import corpus, text_files, tokens
from leanlm.data.corpus import Corpus
from leanlm.data.text_files import whole
from leanlm.data.tokenizer import Words

TEXT = "Der Käse — 3 €\nund 日本\n" * 30


def content(pieces: Corpus, split: str) -> str:
    return b"".join(pieces.chunks(split)).decode()


def lay_out(root: Path, *files: str) -> Path:
    """Files whose text is their own name and a line end."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name}\n")
    return root


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.txt", TEXT.encode()),
        ("bom.txt", b"\xef\xbb\xbf" + TEXT.encode()),
        ("windows.txt", TEXT.encode("utf-16")),
        ("big-endian.txt", b"\xfe\xff" + TEXT.encode("utf-16-be")),
        ("a.txt.gz", gzip.compress(TEXT.encode(), mtime=0)),
        ("a.txt.xz", lzma.compress(TEXT.encode())),
        ("a.txt.bz2", bz2.compress(TEXT.encode())),
        ("called-otherwise", gzip.compress(TEXT.encode("utf-16"), mtime=0)),
    ],
)
def test_what_holds_the_same_text_is_the_same_corpus(name: str, raw: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    found = corpus.text(str(tmp_path / name), 0.5)
    assert content(found, "train") + content(found, "validation") == TEXT
    assert found.size("train") == pytest.approx(len(TEXT.encode()) / 2, abs=30)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("Der Käse\n".encode("latin1") * 9, "byte 0xe4 at offset 5 is not UTF-8"),
        (b"\xef\xbb\xbfabc\xff\n", "byte 0xff at offset 6 is not UTF-8"),
        (b"some text\n\0\n", "byte 0 at offset 10: this is a binary file"),
        ("Kaese\n".encode("utf-16-le"), "byte 0 at offset 1"),
        (gzip.compress(bytes(99), mtime=0), "byte 0 at offset 0"),
        (gzip.compress(TEXT.encode(), mtime=0)[:-20], "cannot be unpacked"),
        (b"\x28\xb5\x2f\xfdxxxxxxxxxx", "cannot be unpacked|zstd -d"),
        ("Käse".encode()[:2], "byte 0xc3 at offset 1 is not UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_in_a_line(raw: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(UserError, match=said) as refused:
        corpus.text(str(tmp_path / "a.txt"))
    assert str(tmp_path / "a.txt") in str(refused.value) or str(cache_folder()) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_bad_byte_behind_the_beginning_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "HEAD", 100)
    monkeypatch.setattr(text_files, "CHUNK", 64)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"line\n" * 99 + b"\xe4")
    for name in ("byte", "char"):
        with pytest.raises(UserError, match=f"byte 0xe4 at offset {3 + 5 * 99} "):
            tokens.prepare(corpus.text(str(tmp_path / "a.txt")), name, 0)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_words_and_splits_know_all_line_ends(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "CHUNK", 50)
    lines = [f"line number {i}" for i in range(100)]
    (tmp_path / "a.txt").write_bytes("".join(line + end for line in lines).encode())
    found = corpus.text(str(tmp_path / "a.txt"), 0.25)
    for split in ("train", "validation"):
        assert content(found, split).endswith(end)
        assert content(found, split).startswith("line")
    words = Words.train(found.chunks("train"))
    made = [words.words[i] for split in found.splits for chunk in found.chunks(split) for i in words.encode(chunk)]
    assert made[:8] == ["line", "number", "0", "<eos>", "line", "number", "1", "<eos>"]
    assert made.count("<eos>") == 100
    assert made[-1] == "<eos>"


@pytest.mark.parametrize(("space", "size"), [(" ", 16), ("\u3000", 16), ("", 16)])
def test_one_line_without_end_is_cut_between_words_else_characters(
    space: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "CHUNK", size)
    words = ["één", "twee", "drie", "日本", "a"] * 200
    (tmp_path / "a.txt").write_bytes(space.join(words).encode())
    found = corpus.text(str(tmp_path / "a.txt"), 0.1)
    parts = [chunk.decode() for split in found.splits for chunk in found.chunks(split)]
    assert "".join(parts) == space.join(words)
    assert max(map(len, parts)) < 2 * size
    assert found.size("validation") == pytest.approx(0.1 * (tmp_path / "a.txt").stat().st_size, abs=12)
    if space:
        assert [word for part in parts for word in part.split()] == words


def test_a_short_last_line_behind_a_long_one_is_not_the_whole_validation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words " * 1000 + "\nend\n")
    assert corpus.text(str(tmp_path / "a.txt"), 0.1).size("validation") == pytest.approx(1100, abs=12)


@pytest.mark.parametrize(
    ("files", "train", "validation", "test"),
    [
        (("train.txt", "val.txt", "test.txt", "README.md"), ["train.txt"], ["val.txt"], ["test.txt"]),
        (("train-0.txt", "train-1.txt", "validation.txt"), ["train-0.txt", "train-1.txt"], ["validation.txt"], []),
        (("training.txt", "dev.txt"), ["training.txt"], ["dev.txt"], []),
        (("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"), ["wiki.train.tokens"], ["wiki.valid.tokens"],
         ["wiki.test.tokens"]),
        (("train/b.txt", "train/a/c.txt", "valid/a.txt"), ["train/a/c.txt", "train/b.txt"], ["valid/a.txt"], []),
        (("corpus-1/train.txt", "corpus-1/valid.txt", "corpus-1/test.txt"), ["corpus-1/train.txt"], ["corpus-1/valid.txt"],
         ["corpus-1/test.txt"]),
        (("book.txt", "notes.md", "valid.txt", ".git/x.txt", ".hidden.txt", "picture.png"), ["book.txt", "notes.md"],
         ["valid.txt"], []),
    ],
)  # fmt: skip
def test_folders_as_people_lay_them_out(
    files: Iterable[str], train: list[str], validation: list[str], test: list[str], tmp_path: Path
) -> None:
    found = corpus.text(str(lay_out(tmp_path, *files)))
    lines = {split: content(found, split).splitlines() for split in found.splits}
    assert lines == {"train": train, "validation": validation} | ({"test": test} if test else {})


def test_validation_comes_from_the_training_files_where_nothing_is_named_for_it(tmp_path: Path) -> None:
    lay_out(tmp_path, "train.txt", "test.txt", "notes.txt", "train.py")
    (tmp_path / "train.txt").write_text("to train on\n" * 100)
    found = corpus.text(str(tmp_path))
    assert content(found, "train") + content(found, "validation") == "to train on\n" * 100
    assert content(found, "test") == "test.txt\n"
    assert found.origin("validation") == "train.txt"


def test_code_and_notes_are_no_splits(tmp_path: Path) -> None:
    lay_out(tmp_path, "train.py", "test.py", "how-to-train.md", "testament.txt", "driving test.md", "value.txt")
    found = corpus.text(str(tmp_path), 0.2)
    assert len((content(found, "train") + content(found, "validation")).splitlines()) == 6
    assert set(found.splits) == {"train", "validation"}


@pytest.mark.parametrize("validation", [10, 1.5, 1, 0, -0.1, float("nan")])
def test_validation_is_a_share(validation: float, text: Path) -> None:
    with pytest.raises(UserError, match=r"data.validation=.*above 0 and below 1"):
        corpus.text(str(text), validation)


def test_a_split_of_white_space_has_no_words(tmp_path: Path) -> None:
    lay_out(tmp_path, "train.txt")
    (tmp_path / "valid.txt").write_text(" \t ")
    with pytest.raises(UserError, match=r"the validation split \(valid.txt\) has no tokens"):
        tokens.prepare(corpus.text(str(tmp_path)), "word", 0)


def test_a_preparation_of_another_machine_is_left_alone_until_it_is_old(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process is not among those here, so that only the age of its files can tell."""
    monkeypatch.setenv("LEANLM_CACHE", str(tmp_path))
    other = tmp_path / "tokens" / ".fingerprint.1"
    other.mkdir(parents=True)
    (other / "train.bin").write_bytes(b"x")
    made = Corpus({"train": [whole(text)], "validation": [whole(text)]})
    tokens.prepare(made, "byte", 0)
    assert (other / "train.bin").exists()
    os.utime(other, (1, 1))
    tokens.prepare(made, "char", 0)
    assert (other / "train.bin").exists(), "it has written something a moment ago"
    os.utime(other / "train.bin", (1, 1))
    tokens.prepare(made, "word", 0)
    assert not other.exists()


def test_the_same_process_number_in_two_containers(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both may be at work on the same text in one cache."""
    monkeypatch.setenv("LEANLM_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "getpid", lambda: 7)
    made, inner = Corpus({"train": [whole(text)], "validation": [whole(text)]}), []

    def another(what: str, done: int, total: int) -> None:
        if what == "tokenising train" and not inner:
            inner.append(None)
            inner.append(tokens.prepare(made, "byte", 0))

    outer = tokens.prepare(made, "byte", 0, another)
    assert outer.fingerprint == inner[1].fingerprint
    assert np.array_equal(outer.splits["train"], inner[1].splits["train"])
    assert not [*(tmp_path / "tokens").glob(".*")], "what the slower one made is gone"


def test_a_cache_that_cannot_be_written(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds is used, whatever path and time the text has now; what it does not hold is refused."""
    monkeypatch.setenv("LEANLM_CACHE", str(tmp_path / "cache"))
    made = Corpus({"train": [whole(text)], "validation": [whole(text)]})
    first = tokens.prepare(made, "byte", 0)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a superuser may write what is read-only
    moved = tmp_path / "moved.txt"
    moved.write_bytes(text.read_bytes())
    again = tokens.prepare(Corpus({"train": [whole(moved)], "validation": [whole(moved)]}), "byte", 0)
    assert again.fingerprint == first.fingerprint
    with pytest.raises(UserError, match="cannot be kept in .*read-only.*LEANLM_CACHE"):
        tokens.prepare(made, "char", 0)


def test_no_home_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a home
    assert cache_folder() == Path(os.environ["LEANLM_CACHE"])
    monkeypatch.delenv("LEANLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "leanlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(UserError, match="no home folder.*LEANLM_CACHE"):
        cache_folder()


def test_a_full_disk_leaves_a_line_and_nothing_else(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("LEANLM_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device.*LEANLM_CACHE"):
        tokens.prepare(Corpus({"train": [whole(text)], "validation": [whole(text)]}), "byte", 0)
    assert [path.name for path in (tmp_path / "tokens").iterdir()] in ([], ["by-stat"]), "no tokens that are not whole"
