"""A run goes on exactly where it stopped: killed at any moment, stopped by a signal, under another plan."""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import composed
from runner import final_weights, losses, run_all

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run, Table
from leanlm.config.checks import check
from leanlm.inference.evaluation import Evaluate, evaluate
from leanlm.launch.processes import Stopped
from leanlm.train import train
from leanlm.training import checkpoint
from leanlm.training.fit import fit

STEPS = 48
MODELS = {
    "lstm": ["model=lstm", "model.width=12", "model.depth=2", "optim=adamw"],
    "transformer": ["model=transformer", "model.width=16", "model.depth=2", "model.heads=2", "optim=muon"],
}
PLANS = {"single": [1, 1], "accumulate": [4, 1], "ddp": [1, 2], "ddp, accumulate": [2, 2]}


def overrides(model: str, text: Path, plan: str = "single") -> list[str]:
    accumulate, replicate = PLANS[plan]
    return [
        *MODELS[model], "optim.lr=0.01", "optim.warmup=5", "model.dropout=0.1", "model.tied=true", "data=text",
        f"data.path={text}", "data.tokenizer=char", "data.ignore=[e]", "global_batch=8", "sequence=12", f"max_steps={STEPS}",
        "log_every=1", "val_every=7", "checkpoint_every=2", "clip=0.1", "precision=fp64", "device=cpu", "logger=csv",
        "val_lanes=4", "sample_tokens=8", f"strategy.accumulate_grad_batches={accumulate}", f"strategy.replicate={replicate}",
    ]  # fmt: skip


def resumed(path: Path, plan: str, *more: str) -> list[str]:
    accumulate, replicate = PLANS[plan]
    return [
        f"resume={path}",
        f"strategy.accumulate_grad_batches={accumulate}",
        f"strategy.replicate={replicate}",
        *more,
    ]


def live(arguments: list[str], path: Path) -> None:
    """One life of a run, in a process of its own."""
    config = composed(*arguments)
    fit(check(config), path)


def start_life(arguments: list[str], path: Path) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")  # imports once, forks for each life
    context.set_forkserver_preload(["test_resume"])
    process = context.Process(target=live, args=(arguments, path))
    process.start()
    return process


@pytest.fixture(scope="module", params=MODELS)
def whole(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp(request.param) / "whole"
    run_all({path: overrides(request.param, text)})
    return request.param, path


def same(path: Path, reference: Path, tolerance: float = 0.0) -> None:
    ours, theirs = Run(path).rows(), Run(reference).rows()
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"tokens_per_second"}:
            assert abs(a[key] - b[key]) <= tolerance, (a["step"], key)
    ours, theirs = (json.loads((p / "result.json").read_text()) for p in (path, reference))
    assert ours["tokens"] == theirs["tokens"]
    assert abs(ours["loss"] - theirs["loss"]) <= tolerance


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed(kills: int, whole: tuple[str, Path], text: Path, tmp_path: Path) -> None:
    model, reference = whole
    if kills == 2 and model != "transformer":
        pytest.skip("the slow test kills both models")
    draw = random.Random(kills)
    path, killed, writing, progress = tmp_path / "run", 0, 0, []
    while True:
        plan = draw.choice(["single", "accumulate"])
        known = (path / "config.yaml").is_file()
        process = start_life(resumed(path, plan) if known else [*overrides(model, text, plan), "checkpoint_every=1"], path)
        if killed < kills:
            folder = Run(path).checkpoints
            target = newest_step(folder) + draw.randint(0, STEPS // kills - 1)
            aim = killed % 2  # every other life ends inside the writing of a checkpoint
            deadline = time.monotonic() + 60
            while newest_step(folder) < target and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0 if aim else draw.uniform(0, 0.05))
            while aim and not list(folder.glob(".writing-*")) and time.monotonic() < deadline:
                pass
            os.kill(process.pid, signal.SIGKILL)
            process.join(60)
            assert process.exitcode == -signal.SIGKILL, "it was still running"
            killed += 1
            writing += bool(list(folder.glob(".writing-*")))
            progress.append(newest_step(folder))
        else:
            process.join(240)
            assert process.exitcode == 0
            break
    assert writing >= kills // 4, "some were killed while they wrote a checkpoint"
    assert len(set(progress)) >= 2, "they were killed at different places"
    assert not list(Run(path).checkpoints.glob(".writing-*")), "and what they left is gone"
    same(path, reference, 1e-9)


def newest_step(folder: Path) -> int:
    found = checkpoint.checkpoints(folder)
    return int(found[-1].name.removeprefix("step-")) if found else 0


@pytest.mark.parametrize(("first", "then"), [("single", "ddp"), pytest.param("ddp, accumulate", "ddp", marks=pytest.mark.slow)])
def test_resumes_under_another_plan(first: str, then: str, whole: tuple[str, Path], text: Path, tmp_path: Path) -> None:
    model, reference = whole
    path = tmp_path / "run"
    stop = [*overrides(model, text, first), "checkpoint_every=13"]
    run_all({path: stop}, PLANS[first][1])
    shutil.rmtree(checkpoint.checkpoints(Run(path).checkpoints)[-1])  # the last is of step 48; left is 39
    run_all({path: resumed(path, then)}, PLANS[then][1])
    same(path, reference, 1e-9)


def test_resume_with_the_same_plan_is_bitwise(whole: tuple[str, Path], text: Path, tmp_path: Path) -> None:
    model, reference = whole
    run_all({tmp_path / "run": [*overrides(model, text), "checkpoint_every=11"]})
    shutil.rmtree(checkpoint.checkpoints(Run(tmp_path / "run").checkpoints)[-1])
    run_all({tmp_path / "run": resumed(tmp_path / "run", "single")})
    same(tmp_path / "run", reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_first(number: int, whole: tuple[str, Path], text: Path, tmp_path: Path) -> None:
    model, reference = whole
    path, handler = tmp_path / "run", signal.getsignal(number)

    from leanlm.training.callbacks.record import Record

    step = Record.on_train_batch_end

    def kill_at_17(self, trainer, *args):
        step(self, trainer, *args)
        if trainer.global_step == 17:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "on_train_batch_end", kill_at_17)
        with pytest.raises(Stopped) as stopped:
            live([*overrides(model, text, "accumulate"), "checkpoint_every=100"], path)
    assert stopped.value.signum == number
    assert f"python -m leanlm.train resume={path}" in stopped.value.message
    assert newest_step(Run(path).checkpoints) == 17
    assert signal.getsignal(number) == handler, "handlers are given back"
    run_all({path: resumed(path, "single")})
    same(path, reference, 1e-9)


@pytest.mark.parametrize("step", [14, STEPS])
def test_stopped_in_validation_goes_on_with_it(step: int, whole: tuple[str, Path], text: Path, tmp_path: Path) -> None:
    model, reference = whole
    path = tmp_path / "run"

    from leanlm.training.callbacks.checkpoints import Checkpoints

    class Kill(Checkpoints):
        def on_validation_batch_start(self, trainer, *args):
            if trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            super().on_validation_batch_start(trainer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leanlm.training.fit.Checkpoints", Kill)
        with pytest.raises(Stopped):
            live(overrides(model, text), path)
    assert newest_step(Run(path).checkpoints) == step
    run_all({path: resumed(path, "single")})
    same(path, reference)


def test_killed_after_its_last_checkpoint_it_has_its_result_yet_to_come(whole: tuple[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole[1], path)
    Run(path).result.unlink()
    run_all({path: resumed(path, "single")})
    same(path, whole[1])
    with pytest.raises(UserError, match="has done its 48 steps"):
        train(composed(f"resume={path}"))


def test_killed_before_it_writes_a_run_that_goes_on_has_all_its_rows(tmp_path: Path) -> None:
    run = Run(tmp_path)
    table = Table(run, 0)
    for step in range(1, 8):
        table.add(step, {"train_loss": 1 / step})
    table.flush()
    rows = run.rows()
    Table(run, 5)  # a life that ends here
    table = Table(run, 5)
    table.add(5, {"val_loss": 0.5})
    table.add(6, {"train_loss": 1 / 6})
    table.flush()
    assert run.rows() == [*rows[:4], rows[4] | {"val_loss": 0.5}, rows[5]]


@pytest.mark.parametrize("damage", ["truncated", "a flipped byte", "a missing file", "no manifest", "a cut state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: str, whole: tuple[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, reference = whole
    path = tmp_path / "run"
    shutil.copytree(reference, path)
    before, last = checkpoint.checkpoints(Run(path).checkpoints)
    victim = next(last.glob("*.distcp"))
    content = victim.read_bytes()
    if damage == "truncated":
        victim.write_bytes(content[:-10])
    elif damage == "a flipped byte":
        victim.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    elif damage == "a missing file":
        victim.unlink()
    elif damage == "no manifest":
        (last / "manifest.json").unlink()
    else:
        (last / "state.json").write_text("{")
        assert math.isfinite(evaluate(Evaluate(run=str(path)))["loss"])
        assert f"{last} is damaged" in capsys.readouterr().out
    run_all({path: resumed(path, "single")})
    said = capsys.readouterr().out
    assert f"{last} is damaged" in said
    assert before.name in said
    same(path, reference)


def test_all_damaged_is_an_error_and_nothing_is_lost(whole: tuple[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole[1], path)
    for folder in checkpoint.checkpoints(Run(path).checkpoints):
        next(folder.glob("*.distcp")).write_bytes(b"")
    before = (path / "metrics.csv").read_bytes()
    with pytest.raises(UserError, match="no whole checkpoint"):
        train(composed(f"resume={path}"))
    assert (path / "metrics.csv").read_bytes() == before


def test_what_would_make_another_run_is_refused(whole: tuple[str, Path], text: Path) -> None:
    with pytest.raises(UserError) as error:
        composed(f"resume={whole[1]}", "seed=2", "model=gru", "strategy=ddp", "optim.lr=1")
    assert len(error.value.problems) == 3
    with pytest.raises(UserError, match="has done its 48 steps"):
        train(composed(f"resume={whole[1]}"))


def test_a_run_goes_on_in_its_precision_whatever_the_strategy(text: Path, tmp_path: Path) -> None:
    """Not in that of the machine or of the group that `strategy=` composes."""
    command = [*overrides("transformer", text), "optim.state=int8", "max_steps=2"]
    begun = train(composed(*command, f"run_dir={tmp_path / 'run'}"))
    goes_on = [f"resume={tmp_path / 'run'}", "strategy=accumulate", "max_steps=4"]
    ended = train(composed(*goes_on))
    assert begun["precision"] == ended["precision"] == "fp64"
    assert begun["held_bytes"][0]["parameters"] == ended["held_bytes"][0]["parameters"] == 8 * begun["parameters"]
    config = Run(tmp_path / "run").config()
    assert (config.precision, config.optim.state, config.strategy.accumulate_grad_batches) == ("fp64", "int8", 4)
    for key in "precision=fp32", "optim.state=fp32":
        with pytest.raises(UserError, match="would make another run"):
            composed(*goes_on, key)


def test_a_changed_text_is_refused(text: Path, tmp_path: Path) -> None:
    own = tmp_path / "text.txt"
    shutil.copy(text, own)
    run_all({tmp_path / "run": [*overrides("transformer", own), "max_steps=4"]})
    own.write_text(own.read_text().replace("the", "teh"))
    with pytest.raises(UserError, match="not those that"):
        train(composed(f"resume={tmp_path / 'run'}", "max_steps=8"))


def test_longer_run_from_a_finished_one(text: Path, tmp_path: Path) -> None:
    """With a constant rate, 10 steps and 38 more are 48 steps."""
    constant = ["optim.schedule=constant", "val_every=100"]
    run_all({tmp_path / "a": [*overrides("transformer", text), *constant]})
    run_all({tmp_path / "b": [*overrides("transformer", text), *constant, "max_steps=10"]})
    run_all({tmp_path / "b": [f"resume={tmp_path / 'b'}", "max_steps=48"]})
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Within it, a file cannot become longer: as on a disk that is full at this byte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """Full at any byte of a checkpoint's longest file, of which each of the others has fewer."""
    net = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(net.parameters())
    states = {"callback": {"numbers": torch.zeros(2000)}}

    def save(step: int) -> None:
        checkpoint.save(tmp_path, net.named_parameters(), optimizer, {}, {"step": step}, keep=1, callbacks=states)

    save(1)
    longest = max(file.stat().st_size for file in (tmp_path / "step-00000001").iterdir())
    draw = random.Random(0)
    for size in [0, 1, longest - 1, *(draw.randrange(longest) for _ in range(20))]:
        with files_of_at_most(size), pytest.raises(UserError) as error:
            save(2)
        (line,) = error.value.problems
        assert line.startswith("no checkpoint of step 2 was written: File too large: make room, then resume the run")
        assert [each.name for each in tmp_path.iterdir()] == ["step-00000001"]
        assert checkpoint.newest_whole(tmp_path) == tmp_path / "step-00000001"
    save(2)
    assert checkpoint.newest_whole(tmp_path) == tmp_path / "step-00000002"


def test_a_full_disk_ends_a_run_in_one_line(whole: tuple[str, Path], text: Path, tmp_path: Path) -> None:
    from leanlm.train import work

    path = tmp_path / "run"
    shutil.copytree(whole[1], path)
    shutil.rmtree(checkpoint.checkpoints(Run(path).checkpoints)[-1])
    settings = check(composed(*resumed(path, "single")))
    size = Run(path).metrics.stat().st_size - 100
    with files_of_at_most(size), pytest.raises(UserError, match=r"File too large: make room, then resume the run$") as error:
        work(settings, path)
    assert len(error.value.problems) == 1


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        for where in ("weight", "average of the gradient"):
            net = torch.nn.Linear(3, 3)
            optimizer = torch.optim.AdamW(net.parameters())
            net(torch.ones(3)).sum().backward()
            optimizer.step()
            checkpoint.save(tmp_path, net.named_parameters(), optimizer, {}, {"step": 1}, keep=1)
            broken = net.weight if where == "weight" else optimizer.state[net.weight]["exp_avg"]
            broken.data[1, 2] = value
            with pytest.raises(
                UserError, match=r"weight(\.exp_avg)? is not finite: lower optim.lr or clip; the last checkpoint is"
            ):
                checkpoint.save(tmp_path, net.named_parameters(), optimizer, {}, {"step": 2}, keep=1)
            assert [each.name for each in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("replicate", [1, 2])
def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoint(replicate: int, text: Path, tmp_path: Path) -> None:
    """At once, on all ranks, also where no step's loss is logged."""
    diverging = ["optim=sgd", "optim.lr=1e305", "optim.warmup=6", "clip=0", "checkpoint_every=1", "log_every=40"]
    plan = [f"strategy.replicate={replicate}"]
    with pytest.raises(UserError, match="lower optim.lr .*; the last checkpoint is ") as error:
        run_all({tmp_path / "run": [*overrides("lstm", text), *diverging, *plan]}, replicate)
    assert len(error.value.problems) == 1
    last = checkpoint.newest_whole(Run(tmp_path / "run").checkpoints)
    assert last is not None
    assert str(last) in str(error.value)
    assert last == checkpoint.checkpoints(Run(tmp_path / "run").checkpoints)[-1]  # none after it is damaged
    assert not list(Run(tmp_path / "run").checkpoints.glob(".writing-*"))
    settings = check(composed(*overrides("lstm", text)))
    assert all(weight.isfinite().all() for weight in final_weights(tmp_path / "run", settings).values())


def test_a_row_that_was_cut_is_dropped(whole: tuple[str, Path], text: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole[1], path)
    shutil.rmtree(checkpoint.checkpoints(Run(path).checkpoints)[-1])
    rows, content = Run(path).rows(), Run(path).metrics.read_bytes()
    for cut in range(1, len(content.splitlines()[-1])):
        Run(path).metrics.write_bytes(content[: -1 - cut])
        assert Run(path).rows() == rows[:-1]
    Run(path).metrics.write_bytes(content[:3])
    assert Run(path).rows() == []
    Run(path).metrics.write_bytes(content[:-20])
    run_all({path: resumed(path, "single")})
    same(path, whole[1])


def test_a_run_may_go_on_in_a_new_folder_but_not_in_that_of_another(
    whole: tuple[str, Path], text: Path, tmp_path: Path
) -> None:
    model, reference = whole
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(reference, old)
    shutil.rmtree(checkpoint.checkpoints(Run(old).checkpoints)[-1])
    before = (old / "metrics.csv").read_bytes()
    run_all({new: resumed(old, "single", f"run_dir={new}")})
    same(new, reference)
    assert (old / "metrics.csv").read_bytes() == before
    with pytest.raises(UserError, match="holds a run already"):
        check(composed(*resumed(old, "single", f"run_dir={new}")))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_does_not_crowd_out_whole_ones(keep: int, tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(net.parameters())
    for step in (1, 9):
        checkpoint.save(tmp_path, net.named_parameters(), optimizer, {}, {"step": step}, keep=2)
    (tmp_path / "step-00000009" / "manifest.json").unlink()
    for step in (2, 3):  # resumed after step 1
        checkpoint.save(tmp_path, net.named_parameters(), optimizer, {}, {"step": step}, keep)
        assert checkpoint.newest_whole(tmp_path) == checkpoint.checkpoints(tmp_path)[-1] == tmp_path / f"step-{step:08d}"
    assert len(checkpoint.checkpoints(tmp_path)) == keep
