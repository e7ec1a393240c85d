"""With strategy.compile: one graph of a stage and its loss, made once, with the curve and the weights of a plain loop to 1e-9.

`Stage` asks for whole graphs, so that a break of one fails here, and `run_all` for none made anew. Graphs are run operation by
operation, which takes a fraction of the time that torch's code generation does; that has two cases of its own.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import composed
from reference import STEPS, overrides, plain_loop, settings
from runner import final_weights, losses, run_all

from leanlm.config.checks import check
from leanlm.memory import chunks
from leanlm.training import build

COMPILED = {"compile": "true"}
CASES = {  # model, plan, processes
    ("gpt2", "", 1),
    ("gpt2", "accumulate_grad_batches=2 recompute=blocks", 1),
    ("modern", "accumulate_grad_batches=4", 1),
    ("gpt2", "replicate=2 accumulate_grad_batches=2", 2),
    ("gpt2", "shard=2 accumulate_grad_batches=2 recompute=blocks", 2),
    ("modern", "pipeline=2 accumulate_grad_batches=4", 2),
}
SLOW = {
    *(("gpt2", f"recompute={level}", 1) for level in ("2", "operators", "0.5")),
    ("llama", "recompute=blocks", 1),
    ("muon", "accumulate_grad_batches=2", 1),
    ("modern", "recompute=blocks", 1),
    ("llama", "replicate=2", 2),
    ("llama", "shard=2", 2),
    ("gpt2", "pipeline=2 accumulate_grad_batches=4 schedule=interleaved recompute=blocks", 2),
    ("gpt2", "tensor=2", 2),
}
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.__version__ < "2.13", reason="refused: torch cannot compile attention in float64"),
]


def depth(plan: str) -> int:
    return 4 if "interleaved" in plan else 2


def all_runs(cases: set[tuple[str, str, int]], text: Path, root: Path) -> dict[tuple, Path]:
    found = {case: root / f"{i}" for i, case in enumerate(sorted(cases))}
    for processes in (1, 2):
        jobs = {}
        for (model, plan, count), path in found.items():
            if count == processes:
                how = dict(part.split("=") for part in plan.split()) | COMPILED
                jobs[path] = overrides(model, text, how, depth(plan))
        run_all(jobs, processes, "aot_eager")
    return found


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Path]:
    return all_runs(CASES, text, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def other_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Path]:
    return all_runs(SLOW, text, tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("case", sorted(CASES), ids=str)
def test_same_curve_and_weights(case: tuple, text: Path, runs) -> None:
    compare(runs[case], case[0], text, depth(case[1]))


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(SLOW), ids=str)
def test_same_curve_and_weights_of_the_rest(case: tuple, text: Path, other_runs) -> None:
    compare(other_runs[case], case[0], text, depth(case[1]))


@pytest.mark.slow
@pytest.mark.parametrize("plan", [{}, {"recompute": "blocks"}], ids=str)
def test_generated_code(plan: dict, text: Path, tmp_path: Path) -> None:
    run_all({tmp_path: overrides("gpt2", text, plan | COMPILED, 2)})
    compare(tmp_path, "gpt2", text, 2)


def compare(run: Path, model: str, text: Path, depth: int) -> None:
    curve, weights, _ = plain_loop(settings(model, text, depth))
    assert len(losses(run)) == STEPS
    assert max(abs(a - b) for a, b in zip(losses(run), curve, strict=True)) < 1e-9
    found = final_weights(run, settings(model, text, depth))
    assert max((found[name] - weights[name]).abs().max().item() for name in weights) < 1e-9


@pytest.mark.parametrize("precision", ["fp64", "bf16-mixed"])
def test_one_graph_with_chunks_of_logits(precision: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunked loss is one operation of the graph; under autocast too, with dropout and a recomputed block, none breaks."""
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(chunks, "CHUNK", 1)
    found = {}
    for compiled in ("false", "true"):
        how = {"compile": compiled, "recompute": "2"}
        checked = check(composed(*overrides("gpt2", text, how, 2), f"precision={precision}"))
        parallel = build.parallel_model(checked.config, checked.plan, 20)
        (stage,) = parallel.stages.values()
        for step in range(2):
            stage.begin(step, True)
            tokens = torch.arange(48).view(4, 12) * 7 % 20
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp64"):
                nats = stage(tokens, torch.arange(4), (tokens * 3 + step) % 20)
            (nats / 7).backward()
        found[compiled] = nats, *(parameter.grad for parameter in parallel.net.parameters())
    for ours, theirs in zip(found["true"], found["false"], strict=True):
        assert (ours - theirs).norm() <= (1e-9 if precision == "fp64" else 0.02) * max(
            theirs.norm(), 1
        )  # one of a key's bias is 0
