"""The loss of documents, against a plain loop."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed

from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.data.tokenizer import Bytes
from leanlm.inference.evaluation import Evaluate, evaluate
from leanlm.strategies.plan import Plan
from leanlm.training import build, checkpoint


@torch.no_grad()
@pytest.mark.parametrize("model", ["llama", "lstm"])
def test_of_prompts_and_completions_the_completions_count(model: str, tmp_path: Path) -> None:
    asked = [f"model={model}", "model.width=16", "model.depth=2", *(["model.heads=4"] if model == "llama" else [])]
    settings = check(composed(*asked, "model.init=0.3", "sequence=32", "precision=fp64", "device=cpu"), needs_text=False)
    run, net = Run(tmp_path / "run"), build.parallel_model(settings.config, Plan(), 256)
    run.create(settings.as_run())
    (run.path / "tokenizer.json").write_text(json.dumps(Bytes().state()))
    named = list(net.named_parameters())
    checkpoint.save(run.checkpoints, named, torch.optim.SGD(net.net.parameters()), {}, {"step": 1, "text": ""}, 1)
    lines = [("one and", " two"), ("", "été"), ("nothing", ""), ("a longer one than", " the others"), ("x", "y")]
    for split in ("train", "validation"):
        text = "".join(json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in lines)
        (tmp_path / f"{split}.jsonl").write_text(text)
    nats, tokens = 0.0, 0
    for prompt, completion in lines:
        numbers, counted = torch.tensor([ord("\n"), *prompt.encode(), *completion.encode()]), len(completion.encode())
        each = torch.nn.functional.cross_entropy(net.net.eval()(numbers[None, :-1])[0][0], numbers[1:], reduction="none")
        nats, tokens = nats + float(each[len(each) - counted :].sum()), tokens + counted
    data: dict[str, Any] = {"_target_": "leanlm.data.corpus.jsonl", "path": str(tmp_path)}
    for rows in (1, 3):
        found = evaluate(Evaluate(run=str(run.path), data=data, rows=rows, device={"accelerator": "cpu"}))
        assert found["tokens"] == tokens
        assert found["loss"] == pytest.approx(nats / tokens, abs=1e-9)
        assert found["log_probability"] == pytest.approx(-nats, abs=1e-8)
        assert found["bits_per_byte"] == pytest.approx(nats / tokens / math.log(2), abs=1e-9)
