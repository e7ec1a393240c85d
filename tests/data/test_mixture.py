"""Mixtures: which source a row comes from and which row of it, the shared tokenizer, and what of a configuration is refused."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed, make_text

from leanlm.common.errors import UserError
from leanlm.config.checks import check
from leanlm.config.schema import Settings
from leanlm.config.words import read, typed
from leanlm.data.batches import Batch, Windows
from leanlm.data.mixture import PERIOD, rows_of, shares_of, turns
from leanlm.data.packing import Rows
from leanlm.models.contract import Model
from leanlm.models.head import IGNORE
from leanlm.strategies.plan import Plan
from leanlm.training import data


class Carries(Model):
    """Stands for a recurrent model."""

    carries_state = True

    def __init__(self) -> None:
        pass


def sources(folder: Path) -> dict[str, dict[str, Any]]:
    make_text(folder / "a.txt", 900)
    make_text(folder / "c.txt", 300, seed=2)
    lines = [{"prompt": "the of" * (i % 3), "completion": " and a" * (1 + i % 4)} for i in range(40)]
    (folder / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "books": {"data": "text", "path": str(folder / "a.txt"), "weight": 2},
        "chat": {"data": "jsonl", "path": str(folder / "b.jsonl")},
        "own": {"_target_": "leanlm.data.corpus.text", "path": str(folder / "c.txt"), "weight": 0.5},
    }


def settings(nodes: Any, *more: str) -> Settings:
    config = composed("data=mixture", "global_batch=8", "sequence=32", "device=cpu", "model.width=32", "model.heads=2", *more)
    config.data.sources = nodes
    return check(config)


def problems(nodes: Any, *more: str) -> list[str]:
    with pytest.raises(UserError) as refused:
        settings(nodes, *more)
    assert not any("\n" in line for line in refused.value.problems)
    return list(refused.value.problems)


@pytest.mark.parametrize(
    "weights", [[3, 1], [1], [0.7, 0.2, 0.1], [1] * 7, [97, 1, 1, 1], [50, 31, 17, 5, 5, 3, 2, 2, 1], [1 / 3, 2 / 7, 0.1234567]]
)
def test_every_prefix_is_less_than_a_row_from_its_due(weights: list[float]) -> None:
    shares = shares_of(weights)
    period = turns(shares)
    assert len(period) == sum(shares) <= PERIOD
    asked = [weight / sum(weights) for weight in weights]
    assert max(abs(share / sum(shares) - each) for share, each in zip(shares, asked, strict=True)) < 1 / PERIOD
    had, total = [0] * len(shares), sum(shares)
    for count, source in enumerate(np.concatenate([period, period]).tolist(), 1):
        had[source] += 1
        assert all(abs(mine * total - share * count) < total for mine, share in zip(had, shares, strict=True))
        if count % 997 < 3 or count == total:
            assert rows_of(period, count).tolist() == had


def test_exact_weights_stay_exact() -> None:
    assert shares_of([3, 1]) == (3, 1)
    assert shares_of([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert shares_of([50, 25]) == (2, 1)
    assert turns((3, 1)).tolist() == [0, 0, 0, 1]
    assert turns((1, 3)).tolist() == [1, 1, 0, 1]
    assert turns((2, 1, 1)).tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize(("isolate", "ignore"), product((False, True), ("[]", "[e]")))
def test_rows_of_a_step_are_those_of_each_source_in_turn(isolate: bool, ignore: str, tmp_path: Path) -> None:
    mine = settings(sources(tmp_path), f"data.isolate={isolate}", f"data.ignore={ignore}", "seed=5")
    made = data.tokens(mine)
    parts = made.splits["train"].parts
    order = ["books", "books", "chat", "books", "chat", "books", "own"]  # weights 2, 1, 0.5: of 7 rows 4, 2, 1
    assert [list(parts)[i] for i in turns((4, 2, 1))] == order
    next_of = dict.fromkeys(parts, 0)
    wanted: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]] = []
    for row in range(8 * 9):
        name = order[row % 7]
        part, number = parts[name], next_of[name]
        next_of[name] += 1
        if name == "chat":
            place = Rows(len(part.ends), 32, 1, 5).offsets(number)[0][0]
            tokens, _, target, positions = (each[0] for each in part.read([part.row(place)], 32, []))
        else:
            start = Windows(len(part), 32, 1, 5).offsets(number)[0][0]
            tokens, target = (torch.from_numpy(part[start + i : start + i + 32].astype(np.int64)) for i in (0, 1))
            positions = torch.arange(32)
        wanted.append((tokens, target if ignore == "[]" else target.masked_fill(target == ord("e"), IGNORE), positions, name))

    def of(step: int, plan: Plan = mine.plan, first: int = 0) -> list[Batch]:
        batches = data.training_batches(Settings(mine.config, plan, mine.corpus), made, Carries(), first)
        return list(batches.step(step)) if not first else [next(iter(batches))]

    for step in (0, 5, 8):
        (whole,) = of(step)
        rows = wanted[8 * step : 8 * step + 8]
        assert torch.equal(whole.input, torch.stack([row[0] for row in rows]))
        assert torch.equal(whole.target, torch.stack([row[1] for row in rows]))
        assert (whole.positions is not None) == isolate
        assert not isolate or torch.equal(whole.positions, torch.stack([row[2] for row in rows]))
        counts = {name: sum(int((row[1] != IGNORE).sum()) for row in rows if row[3] == name) for name in parts}
        assert whole.source_tokens == tuple(counts.values())
        assert whole.step_tokens == sum(counts.values())
        assert whole.fresh, "a state begins anew with each row"
        cut = of(step, Plan(accumulate_grad_batches=4))
        assert torch.equal(torch.cat([batch.input for batch in cut]), whole.input)
        assert {batch.source_tokens for batch in cut} == {whole.source_tokens}
    assert torch.equal(of(0, first=8)[0].input, of(8)[0].input)


def test_one_tokenizer_of_the_training_text_of_all(tmp_path: Path) -> None:
    nodes = sources(tmp_path)
    (tmp_path / "c.txt").write_text((tmp_path / "c.txt").read_text() + "é" * 40 + "ß" * 60)
    mine = settings(nodes, "data.tokenizer=char")
    made = data.tokens(mine)
    text = (tmp_path / "a.txt").read_text() + (tmp_path / "c.txt").read_text()
    documents = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    text += "".join(each["prompt"] + each["completion"] for each in documents)
    assert made.tokenizer.state()["characters"] == "".join(sorted(set(text)))
    validation = made.splits["validation"]
    assert len(validation) == sum(map(len, validation.parts.values()))
    books = validation.parts["books"]
    assert made.tokenizer.decode(books.tolist()) == (tmp_path / "a.txt").read_text()[-len(books) :]
    whole, size = data.split_of(mine, "validation", made.tokenizer)
    assert np.array_equal(whole.parts["books"], books)
    assert size == made.bytes["validation"]
    assert data.differs(mine, made.fingerprint) is None
    (tmp_path / "c.txt").write_text(text[::-1])
    assert data.differs(settings(nodes, "data.tokenizer=char"), made.fingerprint) is not None


def test_mistakes_are_reported_together_in_a_line_each(tmp_path: Path) -> None:
    good = sources(tmp_path)
    assert problems(None) == ["data=mixture needs data.sources={NAME: {data: text, path: FILE_OR_FOLDER, weight: 1}, ...}"]
    wrong = {
        "a": {"data": "text", "path": "/nowhere", "weight": 0},
        "b": {**good["books"], "pth": "x"},
        "c": {"data": "text", "path": "/nowhere.txt", "weight": 1},
        "d": {"data": "txt"},
        "e": {**good["chat"], "isolate": True},
        "f": 3,
        "g": {"_target_": "leanlm.data.mixture.mixture"},
        "h": {"_target_": "os.system", "weight": "much"},
    }
    found = problems(wrong, "data.tokenizer=bpee", "+data.foo=1")
    starts = [
        "data.foo=1: mixture has no such argument", "data.tokenizer=bpee: ",
        "data.sources.a.weight=0: it must be a number above 0",
        "data.sources.a: data.path=/nowhere: there is no such file or folder",
        "data.sources.b.pth=x: text has no such argument (did you mean path?)",
        "data.sources.c: data.path=/nowhere.txt: there is no such file or folder",
        "data.sources.d.data=txt: choose one of jsonl, stdlib, text, tinyshakespeare, wikitext2",
        "data.sources.e.isolate: it is the same for all sources, so write data.isolate", "data.sources.f=3: write {data: text,",
        "data.sources.g: a mixture has no mixtures", "data.sources.h.weight=much: it must be a number above 0",
        "data.sources.h._target_=os.system: ",
    ]  # fmt: skip
    assert len(found) == len(starts)
    assert [line for line, start in zip(found, starts, strict=True) if not line.startswith(start)] == []
    (line,) = problems({**good, "small": {**good["books"], "weight": 1e-5}})
    assert line.startswith("data.sources.small: its weight is less than one row of 10,000")
    assert [line.partition(" has ")[0] for line in problems(good, "sequence=1500")] == ["the training text of data.sources.own"]


def test_paths_of_sources_are_as_typed_and_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    word = "+data.sources.books.path=my notes, =1.txt"
    assert read([word]) == ["+data.sources.books.path='my notes, =1.txt'"]
    assert typed(read([word])[0]) == word
    nodes = sources(tmp_path)
    nodes["books"]["path"] = "a.txt"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").touch()
    kept = settings(nodes).as_run()["data"]["sources"]
    assert kept["books"] == {"data": "text", "path": str(tmp_path / "a.txt"), "weight": 2}
