"""A mixture of streams and documents under every plan, and after a stop, against a plain loop."""

import shutil
from pathlib import Path

import pytest
import reference
from conftest import composed, make_text
from reference import STEPS
from runner import losses, run_all
from test_documents import PLANS, alone, pairs

from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.inference.evaluation import Evaluate, evaluate
from leanlm.training.data import tokens, training_batches

CASES = {
    "gpt2": ["model=gpt2", "model.heads=2", "model.dropout=0.1"],
    "gpt2 apart": ["model=gpt2", "model.heads=2", "model.dropout=0", "data.isolate=true"],
    "lstm": ["model=lstm", "model.dropout=0.1"],
}
DONE = {"gpt2": ["single", "accumulate", "ddp"], "gpt2 apart": ["accumulate", "pipeline"], "lstm": ["accumulate", "ddp"]}


def overrides(case: str, folder: Path, *more: str) -> list[str]:
    books, chat = f"{{data: text, path: '{folder}/a.txt', weight: 3}}", f"{{data: jsonl, path: '{folder}/b.jsonl'}}"
    return [
        *CASES[case], "model.width=16", "model.depth=2", "optim=adamw", "optim.lr=0.01", "optim.warmup=5", "data=mixture",
        f"data.sources={{books: {books}, chat: {chat}}}",
        "data.tokenizer=char", "global_batch=8", "sequence=96", f"max_steps={STEPS}", "log_every=1", "clip=0.1",
        "precision=fp64", "device=cpu", "logger=csv", "sample_tokens=2", "val_lanes=4",
        "checkpoint_every=3", "keep_checkpoints=9", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sources, and of each (case, plan) the folder of its run."""
    root = tmp_path_factory.mktemp("mixture")
    make_text(root / "a.txt", 900)
    pairs(root / "b.jsonl", 60)
    jobs: dict[int, dict[Path, list[str]]] = {1: {}, 2: {}}
    for case, plans in DONE.items():
        for name in plans:
            plan = [f"strategy.{key}={value}" for key, value in PLANS[name].items()]
            world = 1 + any(value == 2 for key, value in PLANS[name].items() if key != "accumulate_grad_batches")
            jobs[world][root / f"{case}-{name}"] = overrides(case, root, *plan)
    for processes, those in jobs.items():
        run_all(those, processes)
    return root


@pytest.mark.parametrize("case", CASES)
def test_every_plan_has_the_curve_of_a_plain_loop(case: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "apart" in case:
        monkeypatch.setattr(reference, "training_batches", lambda *given: alone(iter(training_batches(*given))))
    curve, _, _ = reference.plain_loop(check(composed(*overrides(case, root))))
    for name in DONE[case]:
        got = losses(root / f"{case}-{name}")
        assert max(abs(a - b) for a, b in zip(got, curve, strict=True)) < 1e-9, name
    assert curve[-1] < curve[0] - 0.02, "the run learns"
    validated = [Run(root / f"{case}-{name}").results()["loss"] for name in DONE[case]]
    assert max(validated) - min(validated) < 1e-9


def test_the_result_holds_exact_shares_and_the_losses_of_all_and_each(root: Path) -> None:
    settings = check(composed(*overrides("gpt2", root)))
    made = tokens(settings)
    batches = training_batches(settings, made, reference.build.parallel_model(
        settings.config, settings.plan, made.tokenizer.vocabulary).net)  # fmt: skip
    counted = [int((batch.target != -100).sum()) for batch, _ in zip(iter(batches), range(STEPS), strict=False)]
    for name in DONE["gpt2"]:
        result = Run(root / f"gpt2-{name}").results()
        books, chat = result["sources"].values()
        assert (books["fraction"], books["rows"], chat["rows"], books["share_of_rows"]) == (0.75, 60, 20, 0.75)
        assert books["tokens"] == 60 * 96
        assert books["tokens"] + chat["tokens"] == result["tokens"] == sum(counted)
        assert chat["share_of_tokens"] == chat["tokens"] / sum(counted)
        sizes = [len(part) for part in made.splits["validation"].parts.values()]
        together = (books["loss"] * sizes[0] + chat["loss"] * sizes[1]) / sum(sizes)
        assert abs(result["loss"] - together) < 1e-12
    asked = Evaluate(run=str(root / "gpt2-ddp"), device={"accelerator": "cpu"})
    found = evaluate(asked)
    assert abs(found["loss"] - result["loss"]) < 1e-9
    assert found["tokens"] == sum(sizes)
    assert found["sources"] == pytest.approx({"books": books["loss"], "chat": chat["loss"]}, abs=1e-9)
    config = check(composed("data=text", f"data.path={root}/a.txt")).config.data
    alone = evaluate(Evaluate(run=asked.run, device=asked.device, data={**config, "validation": 0.1}))
    assert abs(alone["loss"] - books["loss"]) < 1e-9
    assert alone["tokens"] == sizes[0]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(root: Path) -> None:
    whole, stopped = root / "gpt2-single", root / "stopped"
    shutil.copytree(whole, stopped)
    (stopped / "result.json").unlink()
    for each in sorted((stopped / "checkpoints").iterdir())[1:]:
        shutil.rmtree(each)
    moved = root / "moved"
    moved.mkdir()
    shutil.copy(root / "a.txt", moved)
    told = [f"resume={stopped}", f"run_dir={root}/resumed", "strategy=accumulate", f"+data.sources.books.path={moved}/a.txt"]
    run_all({root / "resumed": told})
    assert max(abs(a - b) for a, b in zip(losses(root / "resumed"), losses(whole), strict=True)) < 1e-9
    for name, one in Run(root / "resumed").results()["sources"].items():
        assert one == pytest.approx(Run(whole).results()["sources"][name], abs=1e-9)
    assert Run(root / "resumed").config().data.sources.books.path == str(moved / "a.txt")
