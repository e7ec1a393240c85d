"""Masks: their shares, what they leave alone, and that no slicing changes them."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import WORDS, composed

from leanlm.common.errors import UserError
from leanlm.config.checks import check
from leanlm.data.objectives import FIXED, Masked, Text
from leanlm.data.tokenizer import Bytes, Characters, Subwords, Words, restore
from leanlm.inference.evaluation import Evaluate, evaluate
from leanlm.inference.restoring import restore as restored
from leanlm.strategies.plan import Plan
from leanlm.training import build
from leanlm.training.data import split_of, tokens, training_batches, whole_split

ROWS, LENGTH = 64, 512


def within(count: int, of: int, share: float) -> bool:
    """Three standard deviations of a binomial count."""
    return abs(count - of * share) < 3 * math.sqrt(of * share * (1 - share))


def rows_of(objective: Masked, tokens: torch.Tensor, step: int = 0, rows: torch.Tensor | None = None) -> tuple:
    rows = torch.arange(len(tokens)) if rows is None else rows
    return objective.of_rows(Text(tokens, tokens, tokens), step, rows)


def test_shares_of_masks_and_that_they_are_the_same_however_rows_are_cut() -> None:
    tokenizer = Bytes().with_mask()
    tokens = torch.randint(256, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    objective = Masked(rate=0.15).ready(tokenizer, seed=1)
    shown, target = rows_of(objective, tokens)
    chosen = target != -100
    assert torch.equal(target[chosen], tokens[chosen])
    assert torch.equal(shown[~chosen], tokens[~chosen])
    count = int(chosen.sum())
    assert within(count, tokens.numel(), 0.15)
    assert within(int((shown[chosen] == 256).sum()), count, 0.8)
    assert within(int((shown[chosen] == tokens[chosen]).sum()), count, 0.1 + 0.1 / 256)
    for places in (chosen.sum(0), chosen.sum(1)):  # no place and no row is preferred: chi-squared, 5 sigma
        mean, free = float(places.double().mean()), len(places) - 1
        spread = float(((places - mean) ** 2).sum() / (mean * 0.85))
        assert abs(spread - free) < 5 * math.sqrt(2 * free)
    part = slice(24, 40)
    for whole, cut in zip((shown, target), rows_of(objective, tokens[part], rows=torch.arange(24, 40)), strict=True):
        assert torch.equal(whole[part], cut)
    for other in (rows_of(objective, tokens, step=1), rows_of(Masked(rate=0.15).ready(tokenizer, seed=2), tokens)):
        assert within(int((chosen & (other[1] != -100)).sum()), tokens.numel(), 0.15**2), "independent of it"
    alone, target = rows_of(Masked(random=0, kept=0).ready(tokenizer, 1), tokens)
    assert torch.equal(alone == 256, target != -100)
    assert within(int((alone == 256).sum()), tokens.numel(), 0.3)


def test_words_are_hidden_whole() -> None:
    tokenizer = Characters.train([WORDS.encode()]).with_mask()
    tokens = torch.from_numpy(tokenizer.encode((" ".join([WORDS] * 100)).encode()))[: 8 * LENGTH].long().view(8, LENGTH)
    _, target = rows_of(Masked(whole_words=True).ready(tokenizer, 1), tokens)
    chosen = target != -100
    assert abs(float(chosen.double().mean()) - 0.3) < 0.04, "three standard deviations of some 1,400 words"
    for row, mine in zip(tokens.tolist(), chosen.tolist(), strict=True):
        for (a, b), (left, right) in zip(zip(row, row[1:], strict=False), zip(mine, mine[1:], strict=False), strict=True):
            if " " not in tokenizer.decode([a, b]):
                assert left == right


def test_subwords_and_marks() -> None:
    from tokenizers import Tokenizer, models

    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "cards", ","]
    model = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[PAD]"))
    model.add_special_tokens(names[:4])
    tokenizer = Subwords(model.to_str())
    assert tokenizer.with_mask().pieces() == ["", "", "", "", " play", "ing", " cards", " ,"]
    assert tokenizer.mask == 3
    tokens = torch.tensor([[1, 4, 5, 6, 7, 2, 0, 0]]).repeat(300, 1)
    shown, target = rows_of(Masked(rate=0.5, whole_words=True).ready(tokenizer, 1), tokens)
    chosen = target != -100
    assert not chosen[:, [0, 5, 6, 7]].any(), "marks stay"
    assert torch.equal(chosen[:, 1], chosen[:, 2])
    assert not torch.equal(chosen[:, 2], chosen[:, 3])
    assert set(shown[chosen].tolist()) == {3, 4, 5, 6, 7}, "nor does one stand in a token's place"
    made = Subwords.train([b"the cat sat on the mat\n" * 9], 270)
    masked = restore(json.loads(json.dumps(made.with_mask().state())))
    assert (masked.mask, masked.vocabulary) == (made.vocabulary, made.vocabulary + 1)
    assert masked.numbers("[MASK]") == [masked.mask]
    assert masked.pieces()[masked.mask] == masked.pieces()[masked.numbers("<|endoftext|>")[0]] == ""
    assert masked.pieces()[int(made.encode(b"the cat")[-1])].strip(" cat") == ""
    for other in (Bytes(), Characters("ab \n"), Words(["<eos>", "<unk>", "a"])):
        again = restore(json.loads(json.dumps(other.with_mask().state())))
        assert again.mask == other.vocabulary == again.vocabulary - 1
        assert "[MASK]" in again.decode([again.mask])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["objective.rate=1.5"], r"objective.rate=1.5: a share above 0"),
        (["objective.random=0.7", "objective.kept=0.4"], "at most 1 together"),
        (["model=lstm"], "RNN reads a text in one direction"),
        (["objective=causal", "model.causal=false"], "each token would see the one"),
    ],
)
def test_what_cannot_work_is_said(asked: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(composed("objective=masked", *asked), needs_text=False)


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from runner import run_all

    folder = tmp_path_factory.mktemp("masked") / "run"
    shape = ["model=small", "model.width=16", "model.depth=2", "model.heads=2", "model.zero_init=false"]
    run_all({folder: [*shape, "objective=masked", "data=text", f"data.path={text}", "data.tokenizer=char", "sequence=24",
                      "data.validation=0.02", "max_steps=3", "precision=fp64", "device=cpu", "logger=csv"]})  # fmt: skip
    return folder


@torch.no_grad()
def test_evaluation_hides_a_fixed_share_and_pseudo_perplexity_each_token(run: Path) -> None:
    device = {"accelerator": "cpu"}
    found = [evaluate(Evaluate(run=str(run), rows=rows, device=device)) for rows in (3, 16)]
    assert found[0] == pytest.approx(found[1], abs=1e-12)
    result = json.loads((run / "result.json").read_text())
    assert (result["loss"], result["accuracy"]) == pytest.approx((found[0]["loss"], found[0]["accuracy"]), abs=1e-12)

    config = check(composed(f"resume={run}", "max_steps=9")).config
    settings = check(composed(f"resume={run}", "max_steps=9", "device=cpu"))
    tokenizer, parallel, _ = restored(config, Plan(), build.Run(run))
    net = parallel.net.eval()
    numbers, _ = split_of(settings, "validation", tokenizer)
    counts = 0
    for batch in whole_split(settings, tokenizer, net, numbers):
        counts += int((batch.target != -100).sum())
    assert found[0]["tokens"] == counts
    assert within(counts, len(numbers), FIXED["rate"])

    text = " ".join(WORDS.split()[:9])
    scored = evaluate(Evaluate(run=str(run), text=text, device=device))
    encoded = torch.from_numpy(tokenizer.encode(text.encode())).long()
    windows, nats, right = encoded.split(24), 0.0, 0
    for window in windows:
        for i in range(len(window)):
            logits = net(torch.where(torch.arange(len(window)) == i, tokenizer.mask, window)[None])[0][0, i]
            nats -= float(logits.log_softmax(0)[window[i]])
            right += int(logits.argmax() == window[i])
    assert scored["tokens"] == len(encoded)
    assert scored["log_probability"] == pytest.approx(-nats, abs=1e-9)
    assert scored["accuracy"] == pytest.approx(right / len(encoded))
    pseudo = evaluate(Evaluate(run=str(run), pseudo=True, device=device))
    assert pseudo["tokens"] == len(numbers)


def test_documents_and_mixtures_count_what_is_masked(text: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "the of and", "completion": f" a to in {'is ' * (i % 7)}"} for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    books, chat = f"{{data: text, path: '{text}'}}", f"{{data: jsonl, path: '{tmp_path}/a.jsonl'}}"
    settings = check(composed("model=small", "objective=masked", "data=mixture", "data.tokenizer=char", "device=cpu",
                              f"data.sources={{books: {books}, chat: {chat}}}", "sequence=48",
                              "strategy.accumulate_grad_batches=4"))  # fmt: skip
    made = tokens(settings)
    net = build.parallel_model(settings.config, settings.plan, made.tokenizer.vocabulary).net
    batches = training_batches(settings, made, net)
    micros = list(batches.step(0))
    counted = torch.cat([micro.target != -100 for micro in micros])
    assert {micro.step_tokens for micro in micros} == {int(counted.sum())}
    assert micros[0].source_tokens == (int(counted[::2].sum()), int(counted[1::2].sum()))
    assert len({int((micro.target != -100).sum()) for micro in micros}) > 1, "micro-batches have unequal counts"
    may = training_batches(check(composed("data=mixture", "data.tokenizer=char", "device=cpu", "sequence=48",
                                          f"data.sources={{books: {books}, chat: {chat}}}")), made, net)  # fmt: skip
    completions = torch.cat([batch.target != -100 for batch in may.step(0)])
    assert not (counted & ~completions).any(), "prompts are not hidden"
