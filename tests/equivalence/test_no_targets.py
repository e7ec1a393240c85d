"""A step none of whose targets counts has the loss 0 and changes nothing but carried state, under every plan."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import WORDS, composed
from reference import STEPS, overrides, plain_loop
from runner import final_weights, losses, run_all

from leanlm.common.errors import UserError
from leanlm.config.checks import check
from leanlm.inference.evaluation import Evaluate, evaluate
from leanlm.training.callbacks.average import WeightAverage
from leanlm.training.data import tokens

IGNORED = ["data.ignore=[z,'\n']", "data.validation=0.21"]
PLANS = {
    "single": ("muon", {}),
    "accumulate": ("lstm", {"accumulate_grad_batches": 4}),
    "step in backward": ("gpt2", {"step_in_backward": "true"}),
    "ddp, accumulate": ("gpt2", {"replicate": 2, "accumulate_grad_batches": 2}),
    "shard": ("muon", {"shard": 2}),
    "tensor": ("gpt2", {"tensor": 2}),
    "pipeline": ("lstm", {"pipeline": 2, "accumulate_grad_batches": 2}),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Whether a model carries state -> a text in which long stretches are not counted: in all lanes at about the same step."""
    folder = tmp_path_factory.mktemp("rare")
    (folder / "windows.txt").write_text((WORDS + "z" * 1000 + "\n") * 30)
    (folder / "lanes.txt").write_text(((WORDS[:40] + "z" * 50) * 4 + "\n") * 10)
    return {False: folder / "windows.txt", True: folder / "lanes.txt"}


def asked(plan: str, texts: dict[bool, Path], cut: bool = True) -> list[str]:
    model, axes = PLANS[plan]
    return [
        *overrides(model, texts[model == "lstm"], axes if cut else None),
        *IGNORED,
        *(["clip=0"] if plan == "step in backward" else []),
    ]


@pytest.mark.timeout(420)
def test_a_step_without_targets_changes_nothing(texts: dict[bool, Path], tmp_path: Path) -> None:
    for processes in (1, 2):
        two = [plan for plan, (_, cut) in PLANS.items() if {"replicate", "shard", "tensor", "pipeline"} & cut.keys()]
        run_all({tmp_path / plan: asked(plan, texts) for plan in PLANS if (plan in two) == (processes == 2)}, processes)
    for plan in PLANS:
        whole = check(composed(*asked(plan, texts, cut=False)))
        curve, weights, _ = plain_loop(whole)
        assert 0.0 in curve[:-1], "a step without targets comes before others"
        assert curve.count(0.0) < STEPS - 2
        got = losses(tmp_path / plan)
        assert len(got) == STEPS
        assert max(abs(a - b) for a, b in zip(got, curve, strict=True)) < 1e-9, plan
        found = final_weights(tmp_path / plan, whole)
        assert max((found[name] - weights[name]).abs().max().item() for name in weights) < 1e-9, plan


def test_a_text_of_which_nothing_counts_is_refused(text: Path, tmp_path: Path) -> None:
    rare = tmp_path / "rare.txt"
    rare.write_text(text.read_text() + ("z" * 99 + "\n") * 1000)
    with pytest.raises(UserError, match="data.ignore leaves nothing to count: .* of the validation split"):
        tokens(check(composed(*overrides("gpt2", rare), *IGNORED)))
    run_all({tmp_path / "run": [*overrides("gpt2", text), "max_steps=1"]})
    with pytest.raises(UserError, match="no token of this text is counted"):
        evaluate(Evaluate(run=str(tmp_path / "run"), text="e e"))


def test_an_average_does_not_move_in_a_step_without_targets() -> None:
    average, weight = torch.zeros(2), torch.ones(2)
    kept = WeightAverage(decay=0.75)
    kept.averages, kept.weights = [average], [weight]
    module, batch = SimpleNamespace(plan=SimpleNamespace(batches_per_step=2), counts=False), SimpleNamespace(micro=1)
    kept.on_train_batch_end(None, module, None, batch, 0)
    assert average.tolist() == [0, 0]
    module.counts = True
    kept.on_train_batch_end(None, module, None, batch, 0)
    assert average.tolist() == [0.25, 0.25]
