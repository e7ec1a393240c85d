"""With strategy.compile: one graph of a stage and its loss, made once, with the curve and the weights of a plain loop to 1e-9.

`Stage` asks for whole graphs, so that a break of one fails here, and `run_all` for none made anew. Graphs are run operation by
operation, which takes a fraction of the time that torch's code generation does; that has two cases of its own.
"""

from pathlib import Path

import pytest
from reference import STEPS, overrides, plain_loop, settings
from runner import final_weights, losses, run_all

DEPTH = 4
COMPILED = {"compile": "true"}
CASES = {
    1: {
        "gpt2": [
            {},
            {"accumulate_grad_batches": 4},
            {"recompute": "blocks", "accumulate_grad_batches": 2},
            {"recompute": "2"},
            {"recompute": "operators"},
            {"recompute": "0.5"},
        ],
        "modern": [{}, {"recompute": "blocks"}],
        "llama": [{}],
        "muon": [{"accumulate_grad_batches": 2}],
    },
    2: {
        "gpt2": [
            {"replicate": 2, "accumulate_grad_batches": 2},
            {"shard": 2, "accumulate_grad_batches": 2},
            {"shard": 2, "recompute": "blocks"},
            {"pipeline": 2, "accumulate_grad_batches": 4},
            {"pipeline": 2, "accumulate_grad_batches": 4, "schedule": "interleaved", "recompute": "blocks"},
            {"tensor": 2},
        ],
        "llama": [{"replicate": 2}, {"shard": 2}],
    },
}
EVERY = [(processes, model, plan) for processes, models in CASES.items() for model, plans in models.items() for plan in plans]
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compiled")
    found = {str(case): root / f"{i}" for i, case in enumerate(EVERY)}
    for processes in CASES:
        mine = [case for case in EVERY if case[0] == processes]
        jobs = {found[str(case)]: overrides(case[1], text, case[2] | COMPILED, DEPTH) for case in mine}
        run_all(jobs, processes, "aot_eager")
    return found


@pytest.fixture(scope="module")
def references(text: Path) -> dict[str, tuple]:
    return {model: plain_loop(settings(model, text, DEPTH)) for model in CASES[1]}


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_same_curve_and_weights(case: tuple, text: Path, runs, references) -> None:
    compare(runs[str(case)], case[1], text, references)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [{}, {"recompute": "blocks"}], ids=str)
def test_generated_code(plan: dict, text: Path, tmp_path: Path, references) -> None:
    run_all({tmp_path: overrides("gpt2", text, plan | COMPILED, DEPTH)})
    compare(tmp_path, "gpt2", text, references)


def compare(run: Path, model: str, text: Path, references) -> None:
    curve, weights, _ = references[model]
    assert len(losses(run)) == STEPS
    assert max(abs(a - b) for a, b in zip(losses(run), curve, strict=True)) < 1e-9
    found = final_weights(run, settings(model, text, DEPTH))
    assert max((found[name] - weights[name]).abs().max().item() for name in weights) < 1e-9
