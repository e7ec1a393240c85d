"""Rows of documents under every plan, and losses of pairs, against plain loops."""

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import reference
import torch
from conftest import WORDS, composed
from reference import STEPS
from runner import losses, run_all

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.data.batches import Batch
from leanlm.data.tokenizer import Subwords
from leanlm.models.transformer import Transformer
from leanlm.training.data import tokens, training_batches


def pairs(path: Path, count: int, seed: int = 0) -> Path:
    draw = random.Random(seed)

    def some() -> str:
        return " ".join(draw.choices(WORDS.split(), k=draw.randint(1, 9)))

    path.write_text("".join(json.dumps({"prompt": some(), "completion": f" {some()}"}) + "\n" for _ in range(count)))
    return path


def overrides(model: str, path: Path, *more: str) -> list[str]:
    shape = [] if model in ("lstm",) else ["model.heads=2"]
    return [
        f"model={model}", "model.width=16", "model.depth=2", *shape, "optim=adamw", "optim.lr=0.01", "optim.warmup=5",
        "data=jsonl", f"data.path={path}", "data.tokenizer=char", "global_batch=8", "sequence=96", f"max_steps={STEPS}",
        "log_every=1", "clip=0.1", "precision=fp64", "device=cpu", "logger=csv", "sample_tokens=2", *more,
    ]  # fmt: skip


PLANS: dict[str, dict] = {
    "single": {},
    "accumulate": {"accumulate_grad_batches": 4},
    "recompute": {"recompute": "blocks"},
    "ddp": {"replicate": 2, "accumulate_grad_batches": 2},
    "fsdp": {"shard": 2},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2, "accumulate_grad_batches": 4},
}
PACKED, APART = ["model.dropout=0.1"], ["data.isolate=true", "model.dropout=0"]
CASES = {
    "gpt2": ("gpt2", PACKED, ["accumulate", "ddp", "pipeline"]),
    "lstm": ("lstm", PACKED, ["single", "pipeline"]),
    "gpt2 apart": ("gpt2", APART, ["accumulate", "recompute", "ddp", "fsdp", "tensor", "pipeline"]),
    "modern apart": ("transformer", [*APART, "model.window=9"], ["single"]),
    "lstm apart": ("lstm", APART, ["accumulate", "pipeline"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(case, plan) -> folder of the run."""
    root = tmp_path_factory.mktemp("documents")
    path, jobs, found = pairs(root / "a.jsonl", 120), {1: {}, 2: {}}, {}
    for case, (model, more, plans) in CASES.items():
        for name in plans:
            plan = {f"strategy.{key}": value for key, value in PLANS[name].items()}
            world = 1 + any(value == 2 for key, value in PLANS[name].items() if key != "accumulate_grad_batches")
            found[case, name] = root / f"{case}-{name}"
            jobs[world][root / f"{case}-{name}"] = [*overrides(model, path, *more), *(f"{k}={v}" for k, v in plan.items())]
    for processes, those in jobs.items():
        run_all(those, processes)
    return found


def alone(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches with each document of a row in a row of its own."""
    for batch in batches:
        assert batch.positions is not None
        borders = [[*torch.nonzero(row == 0)[:, 0].tolist(), len(row)] for row in batch.positions]

        def apart(part: torch.Tensor, fill: int, borders: list[list[int]] = borders) -> torch.Tensor:
            rows = [row[a:b] for row, ends in zip(part, borders, strict=True) for a, b in pairwise(ends)]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

        yield batch._replace(input=apart(batch.input, 0), target=apart(batch.target, -100))


@pytest.mark.timeout(420)
@pytest.mark.parametrize("case", CASES)
def test_every_plan_has_the_curve_of_a_plain_loop(case: str, runs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model, more, plans = CASES[case]
    if more is not PACKED:
        monkeypatch.setattr(reference, "training_batches", lambda *given: alone(iter(training_batches(*given))))
    curve, _, _ = reference.plain_loop(check(composed(*overrides(model, runs[case, plans[0]].parent / "a.jsonl", *more))))
    for name in plans:
        got = losses(runs[case, name])
        assert max(abs(a - b) for a, b in zip(got, curve, strict=True)) < 1e-9, name
    assert curve[-1] < curve[0] - 0.02, "the run learns"


def test_what_cannot_keep_documents_apart_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pairs(tmp_path / "a.jsonl", 20)
    with pytest.raises(UserError, match=r"data.isolate=true: strategy.recompute_window reads a row in pieces"):
        check(composed(*overrides("lstm", path, "data.isolate=true", "strategy.recompute_window=8")))
    monkeypatch.setattr(Transformer, "isolates", False)
    with pytest.raises(UserError, match=r"data.isolate=true: Transformer cannot keep documents apart"):
        check(composed(*overrides("gpt2", path, "data.isolate=true")))


def test_losses_of_pairs_are_those_of_transformers(tmp_path: Path) -> None:
    """Five steps of gradient descent on all pairs, each read by itself."""
    transformers = pytest.importorskip("transformers")
    path, folder = pairs(tmp_path / "train.jsonl", 24), tmp_path / "weights"
    pairs(tmp_path / "val.jsonl", 9, seed=1)
    Subwords.train([path.read_bytes()], 300).model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, max_position_embeddings=64, **sizes))
    for each in (net, tokenizer):
        each.save_pretrained(folder)
    net = net.double()

    def nats(file: str) -> tuple[torch.Tensor, int]:
        found, count = torch.zeros((), dtype=torch.float64), 0
        for line in (tmp_path / file).read_text().splitlines():
            prompt, completion = (tokenizer(json.loads(line)[field])["input_ids"] for field in ("prompt", "completion"))
            ids = torch.tensor([[tokenizer.bos_token_id, *prompt, *completion, tokenizer.eos_token_id]])
            labels = torch.cat([torch.full((1, 1 + len(prompt)), -100), ids[:, 1 + len(prompt) :]], 1)
            found = found + net(ids, labels=labels).loss * (len(completion) + 1)
            count += len(completion) + 1
        return found, count

    curve, optimizer = [], torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(5):
        loss = torch.div(*nats("train.jsonl"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    told = [
        f"init_from={folder}", "data=jsonl", f"data.path={tmp_path}", "data.isolate=true", "optim=sgd", "optim.lr=0.1",
        "optim.warmup=0", "clip=0", "max_steps=5", "log_every=1", "precision=fp64", "device=cpu", "logger=csv", "sequence=60",
        "sample_tokens=2",
    ]  # fmt: skip
    rows = len(tokens(check(composed(*told))).splits["train"].ends)
    assert rows < 20, "pairs share rows"
    run_all({tmp_path / "run": [*told, f"global_batch={rows}"]})
    got = losses(tmp_path / "run")
    assert max(abs(a - b) for a, b in zip(got, curve, strict=True)) < 1e-6
    result = Run(tmp_path / "run").results()
    assert abs(result["loss"] - torch.div(*nats("val.jsonl")).item()) < 1e-6
    assert curve[-1] < curve[0] - 0.01
