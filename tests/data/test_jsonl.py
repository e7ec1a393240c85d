"""Documents: what of a line of JSON is read and counted, which rows it shares, and that losses are those of each document."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS

from leanlm.common.errors import UserError
from leanlm.data import packing
from leanlm.data.batches import Batch
from leanlm.data.corpus import jsonl
from leanlm.data.documents import Documents, answers
from leanlm.data.packing import Packed, PackedBatches, PieceByPiece, Rows, first_fit, packed
from leanlm.data.tokenizer import Bytes, Subwords
from leanlm.data.tokens import Tokens, prepare
from leanlm.models.head import IGNORE

CHAT = """{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|end|>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def pairs(count: int, seed: int = 0, words: int = 9) -> list[dict[str, str]]:
    draw = random.Random(seed)

    def some() -> str:
        return " ".join(draw.choices(WORDS.split(), k=draw.randint(1, words)))

    return [{"prompt": some(), "completion": f" {some()}"} for _ in range(count)]


def silent(*_: Any) -> None:
    pass


def read(path: Path, tokenizer: Any = "byte", **how: Any) -> Tokens:
    return prepare(jsonl(str(path), **how), tokenizer, 0)


def texts(documents: Documents, tokenizer: Any) -> list[tuple[str, str]]:
    """Of each document: all of it, and what counts."""
    parts = np.split(documents.numbers, documents.ends[:-1]), np.split(documents.counted, documents.ends[:-1])
    return [(tokenizer.decode(n.tolist()), tokenizer.decode(n[c > 0].tolist())) for n, c in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def subwords(text: Path) -> Subwords:
    made = Subwords.train([text.read_bytes(), b"<|end|> <user> <assistant>"], 300)
    model = json.loads(made.state()["model"])
    names = ["<s>", "<|end|>", "<user>", "<assistant>"]
    model["added_tokens"] += [
        {"id": 300 + i, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, name in enumerate(names)
    ]
    return Subwords(json.dumps(model), {"marks": ["<s>", "<|end|>"], "chat": CHAT, "vocabulary": 304})


def test_what_is_read_and_what_counts(tmp_path: Path, subwords: Subwords) -> None:
    talk = [("user", "a is"), ("assistant", "b "), ("user", "the c"), ("assistant", "of d"), ("user", "e")]
    messages = [{"role": role, "content": content} for role, content in talk]
    lines = {"text": "in\nit"}, "\n", {"prompt": "on", "completion": " by", "text": "not"}, {"messages": messages}
    path = write(tmp_path / "train.jsonl", *lines, {"text": "as"})
    write(tmp_path / "val.jsonl", {"prompt": "x", "completion": "y"})
    plain = "\nuser: a is\nassistant: b \nuser: the c\nassistant: of d\n"  # a line end is the byte that begins a text
    found = read(tmp_path)
    assert texts(found.splits["train"], Bytes()) == [
        ("\nin\nit", "in\nit"), ("\non by", " by"), (plain, " b \n of d\n"), ("\nas", "as"),
    ]  # fmt: skip
    assert found.bytes["train"] == len("in\nit by b \n of d\nas")
    chat = "<user>a is<|end|>\n<assistant>b<|end|>\n<user>the c<|end|>\n<assistant>of d<|end|>"
    assert texts(read(tmp_path, subwords).splits["train"], subwords) == [
        ("<s>in\nit<|end|>", "in\nit<|end|>"), ("<s>on by<|end|>", " by<|end|>"), (chat, "b<|end|>of d<|end|>"),
        ("<s>as<|end|>", "as<|end|>"),
    ]  # fmt: skip
    named = read(tmp_path, fields={"messages": None, "text": "prompt", "prompt": None, "completion": None}, skip_bad=True)
    assert texts(named.splits["train"], Bytes()) == [("\non", "on")]
    assert named.splits["train"].bad == 3
    assert "3 bad lines left out" in named.describe(jsonl(str(path)))


def test_a_template_that_rewrites_earlier_answers_makes_a_document_of_each() -> None:
    def render(messages: list[dict[str, str]], ask: bool) -> str:
        last = len(messages) - 1
        turns = [f"{m['role'][0]}{'!' * (i == last and i % 2)}{m['content']}." for i, m in enumerate(messages)]
        return "".join(turns) + "a" * ask

    messages = [{"role": role, "content": content} for role, content in zip(["user", "assistant"] * 2, "wxyz", strict=True)]
    parts = [document.parts for document in answers(messages, render)]
    assert parts == [[("uw.a", False), ("!x.", True)], [("uw.ax.uy.a", False), ("!z.", True)]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oh\n", "no JSON"),
        ('"text"\n', "a JSON object is expected, with text, or prompt and completion, or messages"),
        ({"txt": "x"}, "it has the fields txt, but needs text, or prompt"),
        ({"text": 3}, "the field text is not text"),
        ({"prompt": "x"}, "it has no field completion"),
        ({"text": "\ud800"}, "half of a character"),
        ({"messages": "x"}, "messages are not a list"),
        ({"messages": [{"role": "assistant"}]}, "it has no field content"),
        ({"messages": [{"role": "user", "content": "x"}]}, "none of its messages has the role assistant"),
    ],
)
def test_a_bad_line_is_named_or_counted(line: Any, said: str, tmp_path: Path) -> None:
    good = {"text": "good"}
    path = write(tmp_path / "a.jsonl", good, "\n", *[good] * 6, line)
    with pytest.raises(UserError, match=said) as refused:
        read(path, validation=0.01)
    assert f"{path}, line 9: " in str(refused.value), "also where validation begins in the middle of the file"
    assert "\n" not in str(refused.value)
    found = read(write(tmp_path / "b.jsonl", good, line, good), validation=0.1, skip_bad=True)
    assert (found.splits["train"].bad, len(found.splits["train"].ends)) == (1, 1)


def test_files_splits_and_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs(50))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    write(tmp_path / "packed" / "README.md", "no JSON")
    whole = read(write(tmp_path / "b.jsonl", lines), validation=0.3)
    for name, size in (("leanlm.data.text_files.CHUNK", 64), ("leanlm.data.documents.TOGETHER", 7)):
        monkeypatch.setattr(name, size)
    monkeypatch.setattr("leanlm.data.tokens.DOCUMENTS", "made anew")
    again = read(tmp_path / "packed", validation=0.3)
    for split in ("train", "validation"):
        for part in ("numbers", "counted", "ends"):
            assert np.array_equal(getattr(again.splits[split], part), getattr(whole.splits[split], part))
    assert [len(whole.splits[split].ends) for split in ("train", "validation")] == [34, 16]
    with pytest.raises(UserError, match=r"data.fields.txt: there are text, prompt"):
        jsonl(str(tmp_path), fields={"txt": "x"})
    with pytest.raises(UserError, match=r"looked for \*.jsonl"):
        jsonl(str(write(tmp_path / "none" / "a.txt", "x").parent))


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packed:
    """100 short and 3 long pairs in rows of 40 tokens, and one that cannot count."""
    monkeypatch.setattr(packing, "TOGETHER", 30)
    long = {"prompt": "p" * 90, "completion": "c" * 95}
    lines = [*pairs(50, 1, 4), long, {"prompt": "nothing", "completion": ""}, *pairs(50, 2, 4), long, long]
    write(tmp_path / "validation.jsonl", {"text": "x"})
    found = read(write(tmp_path / "train.jsonl", *lines).parent)
    return packed(found.splits["train"], f"{tmp_path.name}-train", 40, 3, silent)


def test_rows_hold_every_counted_token_once_and_cut_no_pair_that_fits(rows: Packed) -> None:
    documents = rows.documents
    assert (rows.pieces[:, 1] <= 40).all()
    sizes = np.array([rows.row(i)[:, 1].sum() for i in range(len(rows.ends))])
    assert (sizes <= 40).all()
    assert rows.ends[-1] == len(rows.pieces)
    starts = np.concatenate([[0], documents.ends[:-1]])
    lengths = dict(zip(starts.tolist(), (documents.ends - starts - 1).tolist(), strict=True))
    short = {start: length for start, length in lengths.items() if length <= 40}
    found = dict(rows.pieces[np.isin(rows.pieces[:, 0], list(short))].tolist())
    assert len(short) - len(found) == 1, "all but the one without a completion"
    assert all(short[start] == length for start, length in found.items())
    inputs, _, targets, positions = rows.read(map(rows.row, range(len(rows.ends))), 40, [])
    assert ((targets != IGNORE).sum(1) > 0).all()
    assert np.array_equal((targets != IGNORE).sum(1), rows.counts)
    assert len(rows) == documents.counted.sum()
    assert sorted(targets[targets != IGNORE].tolist()) == sorted(documents.numbers[documents.counted > 0].tolist())
    inside = (targets[:, :-1] != IGNORE) & (positions[:, 1:] > 0)
    assert torch.equal(inputs[:, 1:][inside], targets[:, :-1][inside])
    assert (positions[:, 0] == 0).all()
    assert sizes.sum() / sizes.size > 33, "rows are well filled"


def test_packing_is_first_fit_and_a_function_of_the_seed(rows: Packed) -> None:
    assert first_fit(np.array([5, 10, 6, 4, 10, 3, 2, 1]), 10).tolist() == [0, 3, 1, 0, 4, 1, 2, 0]
    again = packed(rows.documents, "again-train", 40, 3, silent)
    other = packed(rows.documents, "again-train", 40, 4, silent)
    assert np.array_equal(again.pieces, rows.pieces)
    assert not np.array_equal(other.pieces, rows.pieces)
    assert {*map(tuple, other.pieces.tolist())} == {*map(tuple, rows.pieces.tolist())}


def test_rank_and_micro_batch_only_slice_and_steps_are_pure(rows: Packed) -> None:
    order = Rows(len(rows.ends), 40, 12, 5)
    seen = np.concatenate([order.offsets(step)[0] for step in range(2 * order.rows)])
    for epoch in range(20):
        assert sorted(seen[epoch * order.rows : (epoch + 1) * order.rows]) == list(range(order.rows))
    assert not np.array_equal(seen[: order.rows], seen[order.rows : 2 * order.rows])

    def batches(*share: Any, ignore: tuple[int, ...] = ()) -> list[Batch]:
        made = PackedBatches(rows.documents.numbers, order, *share, list(ignore), packed=rows, isolate=True)
        return list(made.step(7))

    for ignore in ((), (ord("e"),)):
        (whole,) = batches(1, 0, 1, ignore=ignore)
        parts = [batch for rank in range(3) for batch in batches(3, rank, 2, ignore=ignore)]
        for name in ("input", "target", "rows", "positions"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in parts]), getattr(whole, name))
        assert {batch.step_tokens for batch in parts} == {int((whole.target != IGNORE).sum())}
        assert whole.fresh
    late = PackedBatches(rows.documents.numbers, order, packed=rows, isolate=False, first_step=7)
    (again,) = batches(1, 0, 1)
    assert torch.equal(next(iter(late)).input, again.input)


@pytest.mark.parametrize(("count", "replicas"), [(1, 1), (5, 1), (4, 3)])
def test_evaluation_counts_every_target_once_in_its_own_document(rows: Packed, count: int, replicas: int) -> None:
    seen: list[int] = []
    lengths = set()
    for rank in range(replicas):
        split = PieceByPiece(rows, count, replicas, rank)
        batches = list(split)
        lengths.add(len(batches))
        assert len(split) == len(batches)
        for batch in batches:
            seen += batch.target[batch.target != IGNORE].tolist()
            inside = batch.target[:, :-1] != IGNORE
            here = inside & (batch.target[:, 1:] != IGNORE)
            assert torch.equal(batch.input[:, 1:][here], batch.target[:, :-1][here])
    documents = rows.documents
    assert sorted(seen) == sorted(documents.numbers[documents.counted > 0].tolist())
    assert len(lengths) == 1, "every rank has as many batches"
