"""What trades time for bytes, alone and in pairs, under every kind of plan: `bitwise` gives equal bits, `rounding` 1e-9."""

from itertools import combinations
from math import prod
from pathlib import Path

import pytest
import torch
from reference import STEPS, overrides, settings, supported
from runner import final_weights, losses, run_all

from leanlm.common.run_folder import Run

DEPTH = 4
TECHNIQUES = {
    "every block": {"recompute": "blocks"},
    "every second block": {"recompute": "2"},
    "operators": {"recompute": "operators"},
    "half may stay": {"recompute": "0.5"},
    "windows": {"recompute_window": 5},
    "activations in a file": {"offload": "activations"},
    "state in a file": {"offload": "optimizer"},
    "all in a file": {"offload": "all"},
    "ZeRO-1": {"zero1": "true"},
    "step in backward": {"step_in_backward": "true"},
    "native": {"rnn_kernel": "native"},
    "compile": {"compile": "true"},
}
ROUNDING = {"windows", "native", "compile"}
RECURRENT_ONLY = {"windows", "native"}
NO_CLIP = ("step in backward",)  # the global norm would be known too late; compared with a plain run that does not clip
PLANS = {
    "single": {},
    "ddp": {"replicate": 2},
    "shard": {"shard": 2, "accumulate_grad_batches": 2},
    "shard at once": {"shard": 2},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2, "accumulate_grad_batches": 4},
    "zero-bubble": {"pipeline": 2, "accumulate_grad_batches": 4, "schedule": "zero-bubble"},
}
MODELS = ["gpt2", "lstm"]


def fits(model: str, plan: str, names: tuple[str, ...]) -> bool:
    """Whether the techniques work with a model and a plan, and with each other: one key has one value."""
    keys = [key for name in names for key in TECHNIQUES[name]]
    if plan == "zero-bubble" and {"operators", "compile"} & set(names):
        return False
    if "compile" in names and torch.__version__ < "2.13":  # refused with the float64 of these runs
        return False
    if ("ZeRO-1" in names and plan != "ddp") or ("compile" in names and model == "lstm"):
        return False
    if ("step in backward" in names) != (plan == "shard at once") and plan not in ("single", "tensor"):
        return False
    return len(keys) == len(set(keys)) and (model == "lstm" or not RECURRENT_ONLY & set(names))


SETS = [(name,) for name in TECHNIQUES] + list(combinations(TECHNIQUES, 2))
CASES = [
    (model, plan, names)
    for plan in PLANS
    for model in MODELS
    for names in SETS
    if fits(model, plan, names) and supported(model, PLANS[plan])
]
CI = [
    *(("gpt2", "single", (name,)) for name in ("every block", "operators", "half may stay", "all in a file")),
    *(("lstm", "single", (name,)) for name in ("every second block", "windows", "all in a file")),
    ("gpt2", "shard", ("every block",)),
    ("lstm", "pipeline", ("every block", "windows")),
    ("gpt2", "ddp", ("state in a file", "ZeRO-1")),
    ("lstm", "shard", ("all in a file",)),
    ("gpt2", "single", ("step in backward",)),
    ("gpt2", "shard at once", ("every block", "step in backward")),
    ("lstm", "single", ("native",)),
    ("gpt2", "tensor", ("activations in a file",)),
]
REST = [case for case in CASES if case not in CI]
Case = tuple[str, str, tuple[str, ...]]


def plain(case: Case) -> Case:
    """What a case is compared with."""
    return (*case[:2], ("no clip",) if set(NO_CLIP) & set(case[2]) else ())


def all_runs(cases: list[Case], text: Path, root: Path) -> dict[Case, Path]:
    cases = sorted({*cases, *map(plain, cases)})
    found = {case: root / f"{i}" for i, case in enumerate(cases)}
    for processes in (1, 2):
        jobs = {}
        for (model, plan, names), path in found.items():
            if prod(PLANS[plan].get(axis, 1) for axis in ("pipeline", "replicate", "shard", "tensor")) == processes:
                how = {key: value for name in names for key, value in TECHNIQUES.get(name, {}).items()}
                jobs[path] = overrides(model, text, PLANS[plan] | how, DEPTH)
                jobs[path] += ["clip=0"] if {"no clip", *NO_CLIP} & set(names) else []
        run_all(jobs, processes)
    return found


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Path]:
    return all_runs(CI, text, tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def other_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Path]:
    return all_runs(REST, text, tmp_path_factory.mktemp("memory"))


def compare(case: Case, runs: dict[Case, Path], text: Path) -> None:
    model, _, names = case
    reference, path = runs[plain(case)], runs[case]
    largest = 1e-9 if ROUNDING & set(names) else 0
    assert len(losses(path)) == STEPS
    assert max(abs(a - b) for a, b in zip(losses(path), losses(reference), strict=True)) <= largest
    config = settings(model, text, DEPTH)
    ours, theirs = final_weights(path, config), final_weights(reference, config)
    assert all((ours[name] - theirs[name]).abs().max() <= largest for name in theirs)
    norms = [[row["grad_norm"] for row in Run(run).rows() if "grad_norm" in row] for run in (path, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CI, ids=str)
def test_same_curve_and_weights(case: Case, runs, text: Path) -> None:
    compare(case, runs, text)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("case", REST, ids=str)
def test_same_curve_and_weights_of_the_rest(case: Case, other_runs, text: Path) -> None:
    compare(case, other_runs, text)
