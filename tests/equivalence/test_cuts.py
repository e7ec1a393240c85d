"""Sharded, tensor-parallel and pipelined plans, alone and composed, have the curve and the weights of a plain loop, to 1e-9.

Five blocks, so that no number of stages divides them. CI runs one model under most plans, so that every model is there;
the slow test runs all of the others, and eight devices.
"""

from itertools import cycle
from math import prod
from pathlib import Path

import pytest
from reference import MODELS, STEPS, overrides, plain_loop, settings, supported
from runner import final_weights, losses, run_all

DEPTH = 5
P2, P3 = {"pipeline": 2}, {"pipeline": 3}
ONCE = {"reduce_every_micro_batch": "false", "reshard_after_forward": "false"}
PLANS = {
    "ddp 4": {"replicate": 4},
    "shard": {"shard": 2},
    "shard, accumulate": {"shard": 2, "accumulate_grad_batches": 2},
    "shard, accumulate, kept and reduced once": {"shard": 2, "accumulate_grad_batches": 2, **ONCE},
    "tensor": {"tensor": 2},
    "tensor, accumulate": {"tensor": 2, "accumulate_grad_batches": 4},
    "gpipe": {**P2, "schedule": "gpipe", "accumulate_grad_batches": 4},
    "1f1b": {**P2, "accumulate_grad_batches": 8},
    "1f1b, stages by hand": {**P2, "accumulate_grad_batches": 2, "stage_blocks": "[1,4]"},
    "interleaved": {**P2, "schedule": "interleaved", "accumulate_grad_batches": 4},
    "zero-bubble": {**P2, "schedule": "zero-bubble", "accumulate_grad_batches": 4},
    "LoopedBFS": {**P2, "schedule": "LoopedBFS", "accumulate_grad_batches": 2},
    "InterleavedZeroBubble": {**P2, "schedule": "InterleavedZeroBubble", "accumulate_grad_batches": 4},
    "InterleavedZeroBubble, one stage": {
        **P2, "schedule": "InterleavedZeroBubble", "stages_per_device": 1, "accumulate_grad_batches": 2,
    },
    "DualPipeV": {**P2, "schedule": "DualPipeV", "accumulate_grad_batches": 4},
    "1f1b on 3": {**P3, "accumulate_grad_batches": 4},
    "gpipe on 3": {**P3, "schedule": "gpipe", "accumulate_grad_batches": 4},
    "replicate x shard": {"replicate": 2, "shard": 2, "accumulate_grad_batches": 2},
    "replicate x tensor": {"replicate": 2, "tensor": 2, "accumulate_grad_batches": 2},
    "shard x tensor": {"shard": 2, "tensor": 2, "accumulate_grad_batches": 2},
    "pipeline x replicate": {**P2, "replicate": 2, "accumulate_grad_batches": 2},
    "pipeline x shard": {**P2, "shard": 2, "accumulate_grad_batches": 4},
    "zero-bubble x shard": {**P2, "shard": 2, "schedule": "zero-bubble", "accumulate_grad_batches": 2},
    "pipeline x tensor": {**P2, "tensor": 2, "accumulate_grad_batches": 2},
    "zero-bubble x tensor": {**P2, "tensor": 2, "schedule": "zero-bubble", "accumulate_grad_batches": 4},
    "pipeline x shard x tensor": {**P2, "shard": 2, "tensor": 2, "accumulate_grad_batches": 2},
}  # fmt: skip
TRANSFORMERS = ["gpt2", "modern", "muon", "llama", "adafactor"]
ENCODERS = ["roberta", "modernbert"]
RECURRENT = ["lstm", "elman_tanh", "gru", "lstm_muon", "elman_relu", "lstm_token_dropout", "adaptive"]


def pairs_for_ci() -> list[tuple[str, str]]:
    found = []
    models = {True: cycle(TRANSFORMERS), False: cycle(RECURRENT)}
    left_out = {
        "ddp 4", "tensor, accumulate", "1f1b, stages by hand", "LoopedBFS", "InterleavedZeroBubble, one stage", "gpipe on 3",
        "replicate x tensor", "pipeline x replicate", "zero-bubble x shard", "zero-bubble x tensor",
        "pipeline x shard x tensor",
    }  # fmt: skip
    for i, plan in enumerate(plan for plan in PLANS if plan not in left_out):
        found.append((next(models[i % 2 == 0]), plan))
    found += [("adaptive", "tensor"), ("roberta", "shard"), ("roberta", "pipeline x tensor"), ("modernbert", "tensor"),
              ("modernbert", "1f1b"), ("modernbert", "pipeline x shard")]  # fmt: skip
    return [(model, plan) for model, plan in found if supported(model, PLANS[plan])]


def devices(plan: str) -> int:
    return prod(PLANS[plan].get(axis, 1) for axis in ("pipeline", "replicate", "shard", "tensor"))


CI = pairs_for_ci()
REST = [(m, p) for p in PLANS for m in [*TRANSFORMERS, *ENCODERS, *RECURRENT] if (m, p) not in CI and supported(m, PLANS[p])]


def all_runs(pairs: list[tuple[str, str]], text: Path, root: Path) -> dict[tuple[str, str], Path]:
    found = {(model, plan): root / f"{model}-{plan}" for model, plan in pairs}
    for processes in sorted({devices(plan) for _, plan in pairs}):
        jobs = {
            path: overrides(model, text, PLANS[plan], DEPTH)
            for (model, plan), path in found.items()
            if devices(plan) == processes
        }
        run_all(jobs, processes)
    return found


@pytest.fixture(scope="module")
def references(text: Path) -> dict[str, tuple]:
    configs = {model: settings(model, text, DEPTH) for model in MODELS}
    return {model: (config, *plain_loop(config)) for model, config in configs.items()}


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    return all_runs(CI, text, tmp_path_factory.mktemp("cuts"))


@pytest.fixture(scope="module")
def other_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    return all_runs(REST, text, tmp_path_factory.mktemp("cuts"))


def compare(path: Path, reference: tuple) -> None:
    config, curve, weights, norms = reference
    got = losses(path)
    assert len(got) == STEPS
    assert max(abs(a - b) for a, b in zip(got, curve, strict=True)) < 1e-9
    found = final_weights(path, config)
    assert found.keys() == weights.keys()
    assert max((found[name] - weights[name]).abs().max().item() for name in weights) < 1e-9
    assert sum(norm > 0.1 for norm in norms) > 3, "clipping is active"


@pytest.mark.timeout(500)
@pytest.mark.parametrize(("model", "plan"), CI)
def test_same_curve_and_weights(model: str, plan: str, references, runs) -> None:
    compare(runs[model, plan], references[model])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("model", "plan"), REST)
def test_same_curve_and_weights_of_the_rest(model: str, plan: str, references, other_runs) -> None:
    compare(other_runs[model, plan], references[model])
