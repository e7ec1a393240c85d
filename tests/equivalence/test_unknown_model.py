"""A model of one file and one YAML, which nothing in leanlm knows, runs under every axis that it declares."""

import ast
from math import prod
from pathlib import Path

import pytest
import torch
from conftest import composed
from reference import ROWS, STEPS, plain_loop
from runner import final_weights, losses, run_all

import leanlm
from leanlm.common.errors import UserError
from leanlm.config.checks import check

TESTS = Path(__file__).resolve().parents[1]
PLANS = {
    "shard": {"shard": 2, "accumulate_grad_batches": 2},
    "tensor": {"tensor": 2},
    "zero-bubble": {"pipeline": 2, "schedule": "zero-bubble", "accumulate_grad_batches": 4},
    "shard x tensor": {"shard": 2, "tensor": 2},
    "pipeline x tensor": {"pipeline": 2, "tensor": 2, "accumulate_grad_batches": 4},
}


def overrides(text: Path, plan: dict) -> list[str]:
    return [
        f"hydra.searchpath=[file://{TESTS / 'conf'}]", "model=gated", "data=text", f"data.path={text}", "data.tokenizer=char",
        "data.ignore=[e]", "data.validation=0.02", f"global_batch={ROWS}", "sequence=12",
        f"max_steps={STEPS}", "log_every=1", "clip=0.1",
        "optim.lr=0.01", "optim.warmup=5", "optim=muon", "precision=fp64", "device=cpu", "logger=csv",
        "sample_tokens=2",
        *(f"strategy.{key}={value}" for key, value in plan.items()),
    ]  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_axis_has_the_curve_of_a_plain_loop(processes: int, text: Path, tmp_path: Path) -> None:
    whole = check(composed(*overrides(text, {})))
    curve, weights, norms = plain_loop(whole)
    assert curve[-1] < curve[0] - 0.1
    assert max(norms) > 0.1
    plans = {name: plan for name, plan in PLANS.items() if prod_of(plan) == processes}
    run_all({tmp_path / name: overrides(text, plan) for name, plan in plans.items()}, processes)
    for name in plans:
        assert max(abs(a - b) for a, b in zip(losses(tmp_path / name), curve, strict=True)) < 1e-9, name
        found = final_weights(tmp_path / name, whole)
        assert max((found[key] - weights[key]).abs().max().item() for key in weights) < 1e-9, name


def prod_of(plan: dict) -> int:
    return prod(plan.get(axis, 1) for axis in ("pipeline", "replicate", "shard", "tensor"))


def test_its_limits_are_found_before_anything_starts(text: Path) -> None:
    with pytest.raises(UserError) as error:
        check(composed(*overrides(text, {"tensor": 3})))
    assert "model.width=32 does not divide by tensor=3: write strategy.tensor=2" in str(error.value)


KNOWN = {f"leanlm.models.{name}" for name in ("borders", "contract", "dropout", "kernels", "lora")}


def test_strategies_know_the_contract_of_models_and_no_model() -> None:
    for file in (Path(leanlm.__file__).parent / "strategies").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("leanlm.models"):
                assert node.module in KNOWN or {alias.name for alias in node.names} <= {"kernels"}, file
    for file in (Path(leanlm.__file__).parent / "models").glob("*.py"):
        assert "distributed" not in file.read_text(), file
    assert torch.distributed.is_available()
