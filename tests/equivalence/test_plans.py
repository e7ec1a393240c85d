"""The heart of the project: under every plan, every model has the curve and the weights of a plain loop, to 1e-9.

One process with accumulation, and DDP; `test_cuts.py` has the plans that cut the model.
"""

from pathlib import Path

import pytest
import torch
from conftest import composed
from reference import MODELS, ROWS, STEPS, overrides, plain_loop, settings
from runner import final_weights, losses, run_all

from leanlm.config.checks import check
from leanlm.training import build
from leanlm.training.data import tokens, training_batches
from leanlm.training.lightning_module import LanguageModel

PLANS = {
    "single": {},
    "a row at a time": {"accumulate_grad_batches": ROWS},
    "ddp 2, accumulate 2": {"replicate": 2, "accumulate_grad_batches": 2},
}
IN_PARTS = ("lstm", "lstm_token_dropout", "gpt2", "muon", "adaptive")  # models that CI runs under every plan
CI = [(model, plan) for model in MODELS for plan in PLANS if plan == "single" or model in IN_PARTS]
REST = [(model, plan) for model in MODELS for plan in PLANS if (model, plan) not in CI]


@pytest.fixture(scope="module")
def references(text: Path) -> dict[str, tuple]:
    return {model: plain_loop(settings(model, text)) for model in MODELS}


def all_runs(pairs: list[tuple[str, str]], text: Path, root: Path) -> dict[tuple[str, str], Path]:
    """(model, plan) -> folder of the run."""
    found = {(model, plan): root / f"{model}-{plan}" for model, plan in pairs}
    for processes in (1, 2):
        jobs = {
            path: overrides(model, text, PLANS[plan])
            for (model, plan), path in found.items()
            if PLANS[plan].get("replicate", 1) == processes
        }
        run_all(jobs, processes)
    return found


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    return all_runs(CI, text, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def other_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    return all_runs(REST, text, tmp_path_factory.mktemp("runs"))


@pytest.mark.timeout(420)
@pytest.mark.parametrize(("model", "plan"), CI)
def test_same_curve_and_weights(model: str, plan: str, text: Path, references, runs) -> None:
    compare(model, plan, text, references, runs)


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize(("model", "plan"), REST)
def test_same_curve_and_weights_of_the_rest(model: str, plan: str, text: Path, references, other_runs) -> None:
    compare(model, plan, text, references, other_runs)


def compare(model: str, plan: str, text: Path, references: dict, runs: dict) -> None:
    curve, weights, norms = references[model]
    got = losses(runs[model, plan])
    assert len(got) == STEPS
    assert max(abs(a - b) for a, b in zip(got, curve, strict=True)) < 1e-9
    found = final_weights(runs[model, plan], settings(model, text))
    assert found.keys() == weights.keys()
    assert max((found[name] - weights[name]).abs().max().item() for name in weights) < 1e-9
    assert curve[-1] < curve[0] - 0.02, "the run learns"
    assert sum(norm > 0.1 for norm in norms) > 3, "clipping is active"


def test_counts_are_unequal(text: Path) -> None:
    """Without this, a mean of means would pass the tests above."""
    config = check(composed(*overrides("gpt2", text, {"accumulate_grad_batches": 4})))
    prepared = tokens(config)
    net = build.parallel_model(config.config, config.plan, prepared.tokenizer.vocabulary).net
    micros = list(training_batches(config, prepared, net).step(0))
    counts = [(micro.target != -100).sum().item() for micro in micros]
    assert len(set(counts)) > 1
    assert {micro.step_tokens for micro in micros} == {sum(counts)}


@pytest.mark.parametrize("wrong", ["missing 1/n", "mean of means"])
def test_the_comparison_catches_a_wrong_normalisation(wrong: str, text: Path, tmp_path: Path, monkeypatch) -> None:
    step, backward = LanguageModel.training_step, LanguageModel.manual_backward

    def look(self: LanguageModel, batch, index: int) -> None:
        self.batch = batch
        step(self, batch, index)

    def broken(self: LanguageModel, loss: torch.Tensor) -> None:
        micros, tokens = self.plan.accumulate_grad_batches, (self.batch.target != -100).sum()
        backward(self, loss * (micros if wrong == "missing 1/n" else self.batch.step_tokens / (micros * tokens)))

    sgd = ["optim=sgd", "optim.lr=0.5", "clip=0"]  # AdamW hides a wrong factor
    run_all({tmp_path / "right": [*overrides("gpt2", text, {"accumulate_grad_batches": 2}), *sgd]})
    monkeypatch.setattr(LanguageModel, "training_step", look)
    monkeypatch.setattr(LanguageModel, "manual_backward", broken)
    run_all({tmp_path / "wrong": [*overrides("gpt2", text, {"accumulate_grad_batches": 2}), *sgd]})
    got, curve = losses(tmp_path / "wrong"), losses(tmp_path / "right")
    assert max(abs(a - b) for a, b in zip(got, curve, strict=True)) > 1e-4
