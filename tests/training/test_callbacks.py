"""Callbacks: the average of the weights against one taken by hand, under every kind of plan; the best checkpoint; early
stopping;
and what cannot work, refused beforehand."""

import json
from pathlib import Path

import pytest
import torch
from conftest import composed
from runner import losses, run_all

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.inference.evaluation import Evaluate, evaluate
from leanlm.strategies.plan import Plan
from leanlm.training.checkpoint import CALLBACKS, callback_states, checkpoints
from leanlm.training.fit import fit

STEPS, DECAY = 6, 0.7
PLANS = {
    "ddp": "strategy=ddp strategy.accumulate_grad_batches=2",
    "shard": "strategy=fsdp strategy.reshard_after_forward=false",
    "tensor": "strategy=tensor",
    "pipeline": "strategy=zero_bubble strategy.accumulate_grad_batches=2",
}


def asked(text: Path, *more: str) -> list[str]:
    return [
        "data=text", f"data.path={text}", "data.tokenizer=char", "data.validation=0.02",
        "model=gpt2", "model.width=16", "model.heads=2",
        "model.depth=4",
        "global_batch=4", "sequence=16", "precision=fp64", "device=cpu", "logger=csv", f"max_steps={STEPS}", "log_every=1",
        "val_every=2", "checkpoint_every=1", "keep_checkpoints=9", "optim=adamw", "optim.lr=0.05", "optim.warmup=1",
        "optim.schedule=constant", "sample_tokens=0", *more,
    ]  # fmt: skip


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its name."""
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in metadata.items() if hasattr(each, "size")
    }
    dcp.load(found, checkpoint_id=checkpoint, no_dist=True)
    return found


def validation(path: Path) -> list[float]:
    return [row["val_loss"] for row in Run(path).rows() if "val_loss" in row]


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("averages")
    ema = ["callbacks=ema", f"callbacks.ema.decay={DECAY}"]
    alone = {root / "plain": asked(text), root / "single": asked(text, *ema), root / "short": asked(text, *ema, "max_steps=3")}
    run_all(alone, 1)
    run_all({root / name: asked(text, *ema, "devices=2", *plan.split()) for name, plan in PLANS.items()}, 2)
    run_all({root / "resumed": [f"resume={root}/short", f"max_steps={STEPS}"]}, 1)
    return {path.name: path for path in root.iterdir()}


def test_an_average_is_that_of_the_weights_after_each_step(runs: dict[str, Path]) -> None:
    """The weights of each step are those of a run without one; the first average is of the initial weights, which no checkpoint
    has: it is what the average after the first step makes of it."""
    plain = [stored(each) for each in checkpoints(Run(runs["plain"]).checkpoints)]
    averaged = [stored(each) for each in checkpoints(Run(runs["single"]).checkpoints)]
    assert len(plain) == len(averaged) == STEPS
    names = [name.removeprefix("average.") for name in averaged[0] if name.startswith("average.")]
    assert len(names) == len([name for name in plain[0] if name.startswith("model.")])
    for name in names:
        by_hand = averaged[0][f"average.{name}"]
        for before, after in zip(plain[1:], averaged[1:], strict=True):
            by_hand = DECAY * by_hand + (1 - DECAY) * before[f"model.{name}"]
            torch.testing.assert_close(after[f"average.{name}"], by_hand, atol=1e-12, rtol=0)
            torch.testing.assert_close(after[f"model.{name}"], before[f"model.{name}"], atol=0, rtol=0)


@pytest.mark.parametrize("name", [*PLANS, "resumed"])
def test_every_plan_has_the_same_averages(name: str, runs: dict[str, Path]) -> None:
    assert losses(runs[name])[-3:] == pytest.approx(losses(runs["single"])[-3:], abs=1e-9)
    assert validation(runs[name])[-2:] == pytest.approx(validation(runs["single"])[-2:], abs=1e-9)
    one, other = (stored(checkpoints(Run(runs[each]).checkpoints)[-1]) for each in ("single", name))
    for key in one:
        if key.startswith(("average.", "model.")):
            torch.testing.assert_close(other[key], one[key], atol=1e-9, rtol=0)


def test_averages_are_what_is_validated_and_evaluated(runs: dict[str, Path]) -> None:
    assert losses(runs["single"]) == losses(runs["plain"])
    assert abs(validation(runs["single"])[-1] - validation(runs["plain"])[-1]) > 1e-3
    found = evaluate(Evaluate(run=str(runs["single"]), strategy=Plan()))
    assert found["loss"] == pytest.approx(validation(runs["single"])[-1], abs=1e-9)


def test_best_is_the_lowest_and_early_stopping_ends_a_run_that_gets_worse(text: Path, tmp_path: Path) -> None:
    """At a rate that grows until the loss does."""
    stop = ["callbacks=[early_stopping,best]", "callbacks.early_stopping.patience=2", "max_steps=200", "optim.lr=0.5",
            "optim.warmup=40", "optim.schedule=constant", "clip=0", "checkpoint_every=50"]  # fmt: skip
    config = composed(*asked(text, *stop))
    result = fit(check(config), tmp_path / "run")
    found = validation(tmp_path / "run")
    best = min(range(len(found)), key=found.__getitem__)
    assert result["steps"] < 200
    assert len(found) == best + 1 + 2
    state = json.loads((checkpoints(tmp_path / "run" / "best")[0] / "state.json").read_text())
    assert state["step"] == 2 * (best + 1)
    scored = [evaluate(Evaluate(run=str(tmp_path / "run"), checkpoint=which))["loss"] for which in ("best", "last")]
    assert scored == pytest.approx([found[best], found[-1]], abs=1e-9)
    with pytest.raises(UserError, match="choose one of last, best"):
        evaluate(Evaluate(run=str(tmp_path / "run"), checkpoint="newest"))


def test_the_profiler_names_the_costliest_operations(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = composed(*asked(text, "callbacks=profiler", "callbacks.profiler.skip=1", "callbacks.profiler.steps=2"))
    fit(check(config), tmp_path)
    trace = json.loads((tmp_path / "profile" / "rank-0.json").read_text())
    products = [each for each in trace["traceEvents"] if each.get("name") in ("aten::addmm", "aten::mm")]
    assert len(products) > 2 * 4 * 6 * 2  # steps, blocks, matrices, and twice in backward
    shown = capsys.readouterr().out
    assert "aten::" in shown
    assert "of 2 steps" in shown


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["callbacks=memory_snapshot"], "memory_snapshot: it records a GPU's allocations, and this run is on a CPU"),
        (["callbacks=profiler"], "skip=5 + 1 + steps=3 = 9 steps, but max_steps=6: write max_steps=9 or more"),
        (["callbacks=ema", "callbacks.ema.decay=1.5"], "callbacks.ema: decay=1.5: a share above 0 and below 1"),
        (["callbacks=ema", "precision=bf16"], "precision=bf16: bf16 weights round such small changes away"),
        (["callbacks=device_stats"], "DeviceStatsMonitor writes to a logger, and logger=csv has none"),
        (["callbacks=early_stopping", "+callbacks.early_stopping.patiense=2"], "did you mean patience?"),
        (["+callbacks.mine._target_=lightning.pytorch.callbacks.ModelCheckpoint"], "callbacks=best keeps the best"),
        (["+callbacks.mine._target_=nowhere.Nothing"], "there is no such class or function"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], problem: str, text: Path) -> None:
    with pytest.raises(UserError, match=".*") as error:
        check(composed(*asked(text, *overrides)))
    assert problem in str(error.value)


def test_a_callback_of_ones_own(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import lightning.pytorch as pl\nfrom pathlib import Path\n\nclass Count(pl.Callback):\n"
        "    def __init__(self, by: int = 1) -> None:\n        self.by, self.count = by, 0\n\n"
        "    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:\n"
        "        self.count += self.by\n\n"
        "    def on_train_end(self, trainer, module) -> None:\n"
        "        Path(trainer.default_root_dir, 'count').write_text(str(self.count))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = composed(*asked(text, "+callbacks.count._target_=mine.Count", "+callbacks.count.by=3"))
    fit(check(config), tmp_path / "run")
    assert (tmp_path / "run" / "count").read_text() == str(3 * STEPS)


def test_a_callback_whose_state_may_not_be_read_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A path is an object, which only free unpickling would make."""
    assert callback_states(tmp_path) == {}
    for states, found in (({"Mine": {"seen": torch.ones(2)}}, {"Mine"}), ({"Mine": {"where": tmp_path}}, set())):
        torch.save(states, tmp_path / CALLBACKS)
        assert callback_states(tmp_path).keys() == found
    assert "callbacks begin anew" in capsys.readouterr().out
