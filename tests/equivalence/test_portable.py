"""A checkpoint saved under any plan goes on under any other with the curve of the uninterrupted run, to 1e-9."""

import shutil
from math import prod
from pathlib import Path

import pytest
from reference import overrides, supported
from runner import losses, run_all

from leanlm.common.run_folder import Run
from leanlm.generate import job as write
from leanlm.inference.continuation import Generate
from leanlm.inference.evaluation import Evaluate, evaluate
from leanlm.strategies.plan import Plan
from leanlm.training import checkpoint

DEPTH = 4
PLANS = {
    "single": {},
    "ddp": {"replicate": 2},
    "shard": {"shard": 2, "accumulate_grad_batches": 2},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2, "accumulate_grad_batches": 4},
    "zero-bubble": {"pipeline": 2, "accumulate_grad_batches": 2, "schedule": "zero-bubble"},
    "shard x tensor": {"shard": 2, "tensor": 2},
}
MODELS = ["lstm", "muon", "gpt2"]
NAMES = [plan for plan in PLANS if supported("lstm", PLANS[plan])]
CI = [("lstm", a, b) for a, b in zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True)]
REST = [(model, a, b) for model in MODELS for a in NAMES for b in NAMES if (model, a, b) not in CI]
RESUMED = ("pipeline", "replicate", "shard", "tensor", "accumulate_grad_batches", "schedule")


def arguments(model: str, plan: dict, text: Path) -> list[str]:
    return [*overrides(model, text, plan, DEPTH), "max_steps=8", "checkpoint_every=4", "optim.warmup=3", "val_every=3"]


def continued(cases: list[tuple[str, str, str]], text: Path, root: Path) -> dict[tuple[str, str, str], Path]:
    """Run each first plan to step 8, throw away the checkpoint of step 8, and go on from step 4 under the second."""
    found = {case: root / "-".join(case) for case in cases}
    for processes in (1, 2, 4):
        jobs = {
            root / f"{model}-{plan}": arguments(model, PLANS[plan], text)
            for model in sorted({model for model, _, _ in cases})
            for plan in NAMES
            if devices(plan) == processes
        }
        run_all(jobs, processes)
    for (model, first, _), path in found.items():
        shutil.copytree(root / f"{model}-{first}", path)
        shutil.rmtree(checkpoint.checkpoints(Run(path).checkpoints)[-1])
    for processes in (1, 2, 4):
        resumed = {
            path: [f"resume={path}", *(f"strategy.{key}={PLANS[then].get(key, default(key))}" for key in RESUMED)]
            for (_, _, then), path in found.items()
            if devices(then) == processes
        }
        run_all(resumed, processes)
    return found


def default(key: str) -> object:
    return "1f1b" if key == "schedule" else 1


def devices(plan: str) -> int:
    return prod(PLANS[plan].get(axis, 1) for axis in ("pipeline", "replicate", "shard", "tensor"))


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Path]:
    return continued(CI, text, tmp_path_factory.mktemp("portable"))


@pytest.fixture(scope="module")
def other_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Path]:
    return continued(REST, text, tmp_path_factory.mktemp("portable"))


def same(path: Path, reference: Path) -> None:
    ours, theirs = losses(path), losses(reference)
    assert len(ours) == 8
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-9
    ours, theirs = ([row["val_loss"] for row in Run(p).rows() if "val_loss" in row] for p in (path, reference))
    assert len(ours) == 3
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-9


@pytest.mark.timeout(500)
@pytest.mark.parametrize(("model", "first", "then"), CI)
def test_goes_on_under_another_plan(model: str, first: str, then: str, runs) -> None:
    path = runs[model, first, then]
    same(path, path.parent / f"{model}-single")


@pytest.mark.parametrize("plan", NAMES)
@pytest.mark.parametrize("model", ["lstm"])
def test_one_process_evaluates_and_generates_from_any_plan(model: str, plan: str, runs, capsys) -> None:
    root = next(iter(runs.values())).parent
    loss = {name: evaluate(Evaluate(run=str(root / f"{model}-{name}"), strategy=Plan()))["loss"] for name in ("single", plan)}
    assert abs(loss["single"] - loss[plan]) < 1e-9
    assert loss[plan] == pytest.approx(Run(root / f"{model}-{plan}").results()["loss"], abs=1e-9)
    texts = []
    for name in ("single", plan):
        write(Generate(run=str(root / f"{model}-{name}"), prompt="the", tokens=20))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3 + 20 + 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("model", "first", "then"), REST)
def test_goes_on_under_every_other_plan(model: str, first: str, then: str, other_runs) -> None:
    path = other_runs[model, first, then]
    same(path, path.parent / f"{model}-single")
