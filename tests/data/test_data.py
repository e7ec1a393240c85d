"""Text to tokens on disk: counts that papers state, exact round trips, and preparations that are killed."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from leanlm.common.errors import UserError
from leanlm.data import corpus as corpora
from leanlm.data import text_files
from leanlm.data import tokenizer as tokenizers
from leanlm.data.corpus import Corpus
from leanlm.data.decoding import stream
from leanlm.data.text_files import Piece, whole
from leanlm.data.tokens import prepare

TEXT = "The café opened.\nNo tea — only coffee…\n\n  two  spaces\tand a tab\nlast line without an end"


@pytest.fixture
def small(tmp_path: Path) -> Corpus:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("more tea\n")
    return Corpus({"train": [whole(tmp_path / "a.txt")], "validation": [whole(tmp_path / "b.txt")]})


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
def test_decoding_gives_the_text_back(name: str, small: Corpus) -> None:
    tokens = prepare(small, name, 300)
    assert tokens.tokenizer.decode(tokens.splits["train"].tolist()) == TEXT
    assert tokens.bytes == {"train": len(TEXT.encode()), "validation": 9}
    assert int(tokens.splits["train"].max()) < tokens.tokenizer.vocabulary
    again = tokenizers.restore(tokens.tokenizer.state())
    assert np.array_equal(again.encode(b"tea and coffee"), tokens.tokenizer.encode(b"tea and coffee"))


def test_words_are_counted_as_the_wikitext_papers_count(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" = Title = \n\n the <unk> cat , the cat \n")
    (tmp_path / "b.txt").write_text("the dog\n")
    tokens = prepare(Corpus({"train": [whole(tmp_path / "a.txt")], "validation": [whole(tmp_path / "b.txt")]}), "word", 0)
    words = tokens.tokenizer.state()["words"]
    assert [words[i] for i in tokens.splits["train"]] == [
        "=",
        "Title",
        "=",
        "<eos>",
        "<eos>",
        "the",
        "<unk>",
        "cat",
        ",",
        "the",
        "cat",
        "<eos>",
    ]
    assert [words[i] for i in tokens.splits["validation"]] == ["the", "<unk>", "<eos>"]
    assert sorted(words) == sorted({"=", "Title", "<eos>", "the", "<unk>", "cat", ","})


def test_a_given_tokenizer_json_is_used(small: Corpus, tmp_path: Path) -> None:
    trained = prepare(small, "bpe", 290).tokenizer
    (tmp_path / "tokenizer.json").write_text(trained.state()["model"])
    tokens = prepare(small, str(tmp_path / "tokenizer.json"), 0)
    assert np.array_equal(tokens.splits["train"], prepare(small, "bpe", 290).splits["train"])
    assert tokens.tokenizer.start == trained.start


@pytest.mark.parametrize("name", ["byte", "char", "word", "bpe"])
def test_chunks_do_not_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are those of the text read in one go."""
    body = "".join(f"line {i} äöü€ {'x' * (i % 50)}\n" for i in range(500))
    (tmp_path / "t.txt").write_text(body)
    files = Corpus({"train": [whole(tmp_path / "t.txt")], "validation": [whole(tmp_path / "t.txt")]})
    whole_text = prepare(files, name, 300).splits["train"].tolist()
    monkeypatch.setattr(text_files, "CHUNK", 97)
    monkeypatch.setenv("LEANLM_CACHE", str(tmp_path / "other"))
    assert prepare(files, name, 300).splits["train"].tolist() == whole_text


def test_long_lines_are_cut_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "CHUNK", 10)
    (tmp_path / "t.txt").write_text("€äx" * 100)
    chunks = list(Corpus({"train": [whole(tmp_path / "t.txt")]}).chunks("train"))
    assert "".join(chunk.decode() for chunk in chunks) == "€äx" * 100
    assert max(map(len, chunks)) < 20


def test_prepared_once_and_again_when_text_or_tokenizer_changes(
    small: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEANLM_CACHE", str(tmp_path / "cache"))
    work: list[str] = []

    def note(what: str, done: int, total: int) -> None:
        work.append(what)

    first = prepare(small, "byte", 0, note)
    assert any("tokenising" in what for what in work)
    work.clear()
    assert prepare(small, "byte", 0, note).fingerprint == first.fingerprint
    assert work == [], "nothing was read"
    os.utime(tmp_path / "a.txt", (1, 1))
    assert prepare(small, "byte", 0, note).fingerprint == first.fingerprint
    assert {what.split()[0] for what in work} == {"fingerprint"}, "touched, but the same text"
    assert prepare(small, "char", 0).fingerprint != first.fingerprint
    (tmp_path / "a.txt").write_text(TEXT.replace("tea", "pea"))
    changed = prepare(small, "byte", 0)
    assert changed.fingerprint != first.fingerprint
    assert b"pea" in changed.splits["train"].tobytes()


def test_survives_being_killed_half_way(tmp_path: Path) -> None:
    file = tmp_path / "big.txt"
    file.write_bytes(b"".join(b"%d some words to tokenise\n" % i for i in range(1_500_000)))
    code = f"""
from pathlib import Path
from leanlm.data.corpus import Corpus
from leanlm.data.text_files import whole
from leanlm.data.tokens import prepare
file = Path({str(file)!r})
corpus = Corpus({{"train": [whole(file)], "validation": [whole(file)]}})
prepare(corpus, "char", 0, lambda what, done, total: print(what, done, flush=True))
"""
    env = {**os.environ, "LEANLM_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("tokenising train") and not line.endswith(" 0\n"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    left = [path.name for path in (tmp_path / "cache" / "tokens").iterdir() if path.name != "by-stat"]
    assert len(left) == 1
    assert left[0].startswith("."), "only an unfinished folder"
    os.utime(tmp_path / "cache" / "tokens" / left[0] / "train.bin", (1, 1))
    os.utime(tmp_path / "cache" / "tokens" / left[0], (1, 1))
    subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.DEVNULL, timeout=120)
    names = sorted(path.name for path in (tmp_path / "cache" / "tokens").iterdir())
    assert not any(name.startswith(".") for name in names), "what was left is gone"
    folder = next(path for path in (tmp_path / "cache" / "tokens").iterdir() if path.name != "by-stat")
    assert (folder / "train.bin").stat().st_size == file.stat().st_size


def test_own_text_is_split_by_names_or_at_a_line_end(tmp_path: Path) -> None:
    lines = [f"line number {i}\n" for i in range(100)]
    (tmp_path / "one.txt").write_text("".join(lines))
    split = corpora.text(str(tmp_path / "one.txt"), validation=0.25)
    train, validation = (b"".join(split.chunks(name)).decode() for name in ("train", "validation"))
    assert train + validation == "".join(lines)
    assert train.endswith("\n")
    assert len(validation) == pytest.approx(0.25 * len("".join(lines)), rel=0.05)
    folder = tmp_path / "named"
    folder.mkdir()
    for name in ("train-1.txt", "train-2.txt", "valid.txt", "test.txt"):
        (folder / name).write_text(name)
    named = corpora.text(str(folder))
    assert {split: b"".join(named.chunks(split)) for split in named.splits} == {
        "train": b"train-1.txttrain-2.txt", "validation": b"valid.txt", "test": b"test.txt",
    }  # fmt: skip
    with pytest.raises(UserError, match="no such file"):
        corpora.text(str(tmp_path / "nothing"))


def test_stdlib_is_there_and_split_by_file() -> None:
    library = corpora.stdlib()
    assert library.size("train") > 3_000_000
    assert library.size("validation") > 50_000
    names = {split: {piece.path for piece in pieces} for split, pieces in library.splits.items()}
    assert names["train"].isdisjoint(names["validation"] | names["test"])
    assert library == corpora.stdlib()


def test_published_files_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"to be or not to be\n" * 20
    served = tmp_path / "served"
    served.mkdir()
    (served / "input.txt").write_bytes(content)
    source = served.as_uri(), {"input.txt": hashlib.sha256(content).hexdigest()}
    monkeypatch.setitem(corpora.PUBLISHED, "tinyshakespeare", source)
    monkeypatch.setenv("LEANLM_CACHE", str(tmp_path / "cache"))
    got = corpora.tinyshakespeare()
    assert b"".join(got.chunks("train")) + b"".join(got.chunks("validation")) == content
    assert got.size("train") == int(0.9 * len(content))
    (served / "input.txt").write_bytes(b"something else")
    assert corpora.tinyshakespeare() == got, "kept from the first time"
    with pytest.raises(UserError, match="sha256"):
        corpora.tinyshakespeare(str(served))
    with pytest.raises(UserError, match="exists; set data.path"):
        corpora.tinyshakespeare(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["byte", "char", "word", "bpe"])
def test_streaming_shows_what_decoding_at_once_shows(name: str, small: Corpus) -> None:
    tokens = prepare(small, name, 280)
    numbers = tokens.splits["train"].tolist()
    parts = list(stream(tokens.tokenizer, numbers))
    assert "".join(parts) == tokens.tokenizer.decode(numbers)
    assert not any("\ufffd" in part for part in parts)
    assert len(parts) > len(numbers) / 4, "as it comes, not all at the end"


def test_a_piece_is_a_range_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"0123456789")
    assert b"".join(Corpus({"train": [Piece(tmp_path / "t", 2, 5)]}).chunks("train")) == b"234"


def test_two_processes_may_prepare_at_once(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes(b"some words\n" * 200_000)
    code = f"""
from pathlib import Path
from leanlm.data.corpus import Corpus
from leanlm.data.text_files import whole
from leanlm.data.tokens import prepare
file = Path({str(file)!r})
print(prepare(Corpus({{"train": [whole(file)], "validation": [whole(file)]}}), "word", 0).splits["train"].shape)
"""
    env = {**os.environ, "LEANLM_CACHE": str(tmp_path / "cache")}
    both = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    deadline = time.monotonic() + 60
    assert [process.communicate(timeout=deadline - time.monotonic())[0] for process in both] == ["(600000,)\n"] * 2
