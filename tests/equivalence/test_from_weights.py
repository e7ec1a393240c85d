"""Training that begins from weights is the same under every plan, and as transformers' own model takes its steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runner import losses, run_all

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.data.corpus import text as text_of
from leanlm.data.tokenizer import Subwords, given
from leanlm.inference.continuation import Generate, continuation
from leanlm.inference.evaluation import Evaluate, evaluate

transformers = pytest.importorskip("transformers")

TYPES, STEPS = 280, 20
PLANS = {
    "single": (1, []),
    "accumulate": (1, ["strategy.accumulate_grad_batches=4"]),
    "ddp": (2, ["strategy.replicate=2"]),
    "fsdp": (2, ["strategy.shard=2", "strategy.accumulate_grad_batches=2"]),
    "tensor": (2, ["strategy.tensor=2"]),
    "pipeline": (2, ["strategy.pipeline=2", "strategy.accumulate_grad_batches=4"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Qwen3: biases aside it has all that a family may add, scales of query and key norms too."""
    folder = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(1)
    config = transformers.Qwen3Config(
        vocab_size=TYPES, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(Subwords.train([text.read_bytes()], TYPES).state()["model"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    root = tmp_path_factory.mktemp("runs")
    arguments = [
        f"init_from={folder}", "data=text", f"data.path={text}", "sequence=16", "global_batch=8", f"max_steps={STEPS}",
        "precision=fp64", "optim=adamw", "optim.lr=0.01", "model.dropout=0.1", "log_every=1", "val_every=1000", "logger=csv",
        "device=cpu", "sample_tokens=2",
    ]  # fmt: skip
    for processes in (1, 2):
        run_all({root / name: [*arguments, *plan] for name, (count, plan) in PLANS.items() if count == processes}, processes)
    return {name: losses(root / name) for name in PLANS}


@pytest.mark.parametrize("plan", PLANS)
def test_same_curve(plan: str, runs: dict[str, list[float]]) -> None:
    assert len(runs[plan]) == STEPS
    assert runs[plan] == pytest.approx(runs["single"], abs=1e-9)
    assert runs[plan][-1] < runs[plan][0] - 0.5


CPU: dict[str, Any] = {"accelerator": "cpu"}


@torch.no_grad()
def test_a_folder_is_scored_and_goes_on_as_transformers_has_it(folder: Path, text: Path) -> None:
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), given(str(folder))
    data = {"_target_": "leanlm.data.corpus.text", "path": str(text)}
    found = evaluate(Evaluate(run=str(folder), data=data, sequence=32, device=CPU))
    numbers = [tokenizer.start, *tokenizer.encode(b"".join(text_of(str(text)).chunks("validation"))).tolist()]
    rows = [numbers[first : first + 33] for first in range(0, len(numbers) - 1, 32)]
    nats = sum(
        torch.nn.functional.cross_entropy(model(torch.tensor([row[:-1]])).logits[0], torch.tensor(row[1:]), reduction="sum")
        for row in rows
    )
    assert found["tokens"] == len(numbers) - 1
    assert found["loss"] == pytest.approx(float(nats) / found["tokens"], abs=1e-5)
    begun = [tokenizer.start, *tokenizer.encode(b"the of").tolist()]
    theirs = model.generate(torch.tensor([begun]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, len(begun) :]
    ours = continuation(Generate(run=str(folder), prompt="the of", tokens=12, temperature=0, device=CPU))
    assert "".join(ours) == tokenizer.decode(theirs.tolist())


def test_text_of_weights_that_are_not_as_told_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "intermediate_size": 40}))
    with pytest.raises(UserError, match=r"mlp.up_proj.weight is \[48, 32\]; by config.json it should be \[40, 32\]"):
        "".join(continuation(Generate(run=str(tmp_path), prompt="the of", tokens=3, device=CPU)))


def test_a_run_begins_from_another(folder: Path, text: Path, tmp_path: Path) -> None:
    asked = ["data=text", f"data.path={text}", "sequence=16", "global_batch=8", "optim=adamw", "logger=csv", "device=cpu",
             "sample_tokens=2"]  # fmt: skip
    run_all({tmp_path / "first": [*asked, "model=gpt2", "model.width=16", "model.depth=1", "model.heads=2", "max_steps=5"]})
    run_all({tmp_path / "then": [*asked, f"init_from={tmp_path / 'first'}", "max_steps=1", "optim.lr=1e-12", "seed=9"]})
    first, then = (Run(tmp_path / name).results() for name in ("first", "then"))
    assert then["loss"] == pytest.approx(first["loss"], abs=1e-6)
    assert then["parameters"] == first["parameters"]
