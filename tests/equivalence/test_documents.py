"""Rows of documents under every plan, and losses of pairs, against plain loops."""

import json
import random
from pathlib import Path

import pytest
from conftest import WORDS, composed
from reference import plain_loop
from runner import losses, run_all

from leanlm.config.checks import check


def pairs(path: Path, count: int) -> Path:
    draw = random.Random(0)

    def some() -> str:
        return " ".join(draw.choices(WORDS.split(), k=draw.randint(1, 9)))

    path.write_text("".join(json.dumps({"prompt": some(), "completion": f" {some()}"}) + "\n" for _ in range(count)))
    return path


def overrides(model: str, path: Path, *more: str) -> list[str]:
    shape = ["model.width=16", "model.depth=2", "model.dropout=0.1", *(["model.heads=2"] if model == "gpt2" else [])]
    return [
        f"model={model}", *shape, "optim=adamw", "optim.lr=0.01", "optim.warmup=5", "data=jsonl", f"data.path={path}",
        "data.tokenizer=char", "global_batch=8", "sequence=48", "max_steps=10", "log_every=1", "clip=0.1", "precision=fp64",
        "device=cpu", "logger=csv", "sample_tokens=2", *more,
    ]  # fmt: skip


PLANS = {
    "single": {},
    "accumulate": {"accumulate_grad_batches": 4},
    "ddp": {"replicate": 2, "accumulate_grad_batches": 2},
    "pipeline": {"pipeline": 2, "accumulate_grad_batches": 4},
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", ["gpt2", "lstm"])
def test_every_plan_has_the_curve_of_a_plain_loop(model: str, tmp_path: Path) -> None:
    path = pairs(tmp_path / "a.jsonl", 120)
    jobs: dict[int, dict[Path, list[str]]] = {1: {}, 2: {}}
    for name, plan in PLANS.items():
        processes = plan.get("replicate", 1) * plan.get("pipeline", 1)
        jobs[processes][tmp_path / name] = overrides(model, path, *(f"strategy.{key}={value}" for key, value in plan.items()))
    for processes, those in jobs.items():
        run_all(those, processes)
    curve, _, _ = plain_loop(check(composed(*overrides(model, path))))
    for name in PLANS:
        got = losses(tmp_path / name)
        assert max(abs(a - b) for a, b in zip(got, curve, strict=True)) < 1e-9, name
    assert curve[-1] < curve[0] - 0.02, "the run learns"
