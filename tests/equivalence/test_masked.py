"""Masked language models under every plan, and after a stop, against a plain loop."""

import shutil
from pathlib import Path

import pytest
from conftest import composed
from reference import STEPS, plain_loop
from runner import losses, run_all
from test_documents import PLANS

from leanlm.common.run_folder import Run
from leanlm.config.checks import check


def overrides(text: Path, *more: str) -> list[str]:
    return [
        "model=small", "model.width=16", "model.depth=2", "model.heads=2", "model.dropout=0.1", "objective=masked",
        "objective.whole_words=true", "optim=adamw", "optim.lr=0.01", "optim.warmup=5", "data=text", f"data.path={text}",
        "data.tokenizer=char", "data.validation=0.02", "global_batch=8", "sequence=24", f"max_steps={STEPS}", "log_every=1",
        "clip=0.1", "precision=fp64", "device=cpu", "logger=csv", "checkpoint_every=4", "keep_checkpoints=9", *more,
    ]  # fmt: skip


@pytest.mark.timeout(420)
def test_every_plan_has_the_curve_of_a_plain_loop_and_so_has_a_run_that_was_stopped(text: Path, tmp_path: Path) -> None:
    jobs: dict[int, dict[Path, list[str]]] = {1: {}, 2: {}}
    for name, plan in PLANS.items():
        world = 1 + any(value == 2 for key, value in plan.items() if key != "accumulate_grad_batches")
        jobs[world][tmp_path / name] = overrides(text, *(f"strategy.{key}={value}" for key, value in plan.items()))
    for processes, those in jobs.items():
        run_all(those, processes)
    shutil.copytree(tmp_path / "fsdp", tmp_path / "stopped")
    (tmp_path / "stopped" / "result.json").unlink()
    for each in sorted((tmp_path / "stopped" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(each)
    resumed = [f"resume={tmp_path}/stopped", f"run_dir={tmp_path}/resumed", "strategy=accumulate", "device=cpu"]
    run_all({tmp_path / "resumed": resumed})

    curve, _, _ = plain_loop(check(composed(*overrides(text))))
    assert curve[-1] < curve[0] - 0.02, "the run learns"
    results = {name: Run(tmp_path / name).results() for name in (*PLANS, "resumed")}
    for name, result in results.items():
        assert max(abs(a - b) for a, b in zip(losses(tmp_path / name), curve, strict=True)) < 1e-9, name
        assert result["loss"] == pytest.approx(results["single"]["loss"], abs=1e-9), name
        assert result["accuracy"] == results["single"]["accuracy"], name
    assert 0 < results["single"]["accuracy"] < 1
