"""The planner's search, its command, and `strategy=auto`."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from conftest import composed
from runner import run_all
from shell import start
from test_planning import HERE, MODEL, settings

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.config.schema import Settings
from leanlm.launch.processes import WorkerFailed
from leanlm.planning import auto as planner
from leanlm.planning import report
from leanlm.planning import search as searching
from leanlm.planning.auto import choose
from leanlm.planning.candidates import Estimate, families, meshes
from leanlm.planning.choice import Choice
from leanlm.planning.hardware.devices import Device
from leanlm.planning.predict import predict
from leanlm.planning.report import reason
from leanlm.planning.search import Answer, _Worker, search
from leanlm.planning.simulation.step import stages
from leanlm.strategies.plan import Plan


def test_every_mesh_and_only_plans_that_keep_the_curve(text: Path) -> None:
    assert len(list(meshes(8))) == 20  # ways to write 8 as an ordered product of four numbers
    asked = settings(text)
    for allow, changes in ((), False), (("optim.state",), True):
        plans = [plan for group in families(asked, 2, stages(asked.config, Plan(), 256), HERE, allow) for plan in group]
        assert {plan.world for plan in plans} == {2}
        assert {plan.pipeline for plan in plans} == {1, 2}
        assert all(8 % (plan.data_parallel_size * plan.accumulate_grad_batches) == 0 for plan in plans)
        assert any(plan.exactness == "changes" for plan in plans) == changes


def test_the_command_prints_plans_that_can_be_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from leanlm import plan as command

    arguments = ["data=text", f"data.path={text}", *MODEL, "optim=adamw", "devices=2", "show=2", "device.memory=4GiB"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(searching, "SHORTEST", 20.0)  # it ends as soon as two fit
    monkeypatch.setattr(sys, "argv", ["plan", *arguments, "json=true"])
    command.main()
    found = json.loads(capsys.readouterr().out)
    assert len(found["fits"]) >= 2
    assert [one["seconds"] for one in found["fits"]] == sorted(one["seconds"] for one in found["fits"])
    for one in found["fits"]:
        peak = max(one["peak_memory_bytes"].values())
        assert sum(one["parts_bytes"].values()) == peak == found["budget_bytes"] - one["headroom_bytes"]
        python, dash, module, *overrides = one["command"].split()
        assert (python, dash, module) == ("python", "-m", "leanlm.train")
        assert check(composed(*overrides)).plan.asdict() == one["plan"]
    monkeypatch.setattr(sys, "argv", ["plan", *arguments, "device.memory=500MiB"])
    command.main()
    said = capsys.readouterr().out
    assert "no plan fits 2 x" in said
    assert "too much;" in said
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_a_run_that_meets_the_end_of_memory_goes_on_with_a_plan_for_less(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process is killed after its checkpoint of step 2, as the system would; the curve is one of a run left alone."""
    from leanlm import train as module

    common = ["data=text", f"data.path={text}", "model=gpt2", "model.width=32", "model.heads=2", "model.depth=2",
              "global_batch=8", "sequence=16", "val_every=4", "checkpoint_every=2", "log_every=1", "logger=csv",
              "sample_tokens=0"]  # fmt: skip
    common.append("optim.schedule=constant")  # a run of two steps, which the first is, then has the same rates
    run_all({tmp_path / "alone": [*common, "max_steps=4"]})
    asked, real = [], planner.launch

    def choose(settings: Settings, scale: float) -> tuple[Settings, list[str]]:
        asked.append((scale, settings.config.resume))
        plan = replace(settings.plan, auto=False, accumulate_grad_batches=len(asked))
        return replace(settings, plan=plan), []

    def killed_once(function: Any, arguments: tuple, *rest: Any) -> Any:
        if len(asked) == 1:
            shorter = replace(arguments[0], config=replace(arguments[0].config, max_steps=2))
            real(function, (shorter, *arguments[1:]), *rest)
            raise WorkerFailed("rank 0 of 1 failed\nits process was ended by SIGKILL")
        return real(function, arguments, *rest)

    monkeypatch.setattr(planner, "choose", choose)
    monkeypatch.setattr(planner, "launch", killed_once)
    path = tmp_path / "auto"
    result = module.train(composed(*common, "max_steps=4", "strategy=auto", f"run_dir={path}"))
    assert asked == [(1.0, None), (0.85, str(path))]
    assert result["steps"] == 4
    curves = [[row["train_loss"] for row in Run(each).rows()] for each in (tmp_path / "alone", path)]
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert len(curves[1]) == 4


def test_a_search_whose_time_is_up_goes_on_until_two_plans_can_be_compared(text: Path) -> None:
    with mock.patch.multiple(searching, SECONDS=0.0, SHORTEST=0.0):
        answer = search(settings(text), 256, replace(HERE, memory=4 << 30), 2, wanted=6)
    assert len(answer.fitting) >= 2
    assert answer.simulated < answer.candidates


def test_a_family_begins_with_its_fastest_count_of_micro_batches(text: Path) -> None:
    """Measured on two processes: four micro-batches under zero-bubble took 0.61 s, two 0.90 s, which `auto` had taken."""
    asked, machine = settings(text, "model.width=384", "sequence=128"), replace(HERE, memory=4 << 30)
    queue, candidates = searching._in_order(asked, 256, machine, 2, ())
    rough = Estimate(asked, 256, machine)
    assert candidates > len(queue) > 10
    for family in queue:
        assert rough(family.plans[0]).seconds == min(rough(plan).seconds for plan in family.plans)
    first = next(family.plans[0] for family in queue if family.plans[0].schedule == "zero-bubble")
    assert first.accumulate_grad_batches > first.pipeline


def test_a_table_of_six_plans_fits_80_columns(text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = predict(settings(text), 256, HERE)
    found.needs[0].parts["weights"] = 150 << 30
    found.seconds = 2.0
    report._print_table([found] * 6, 1, 2 * 1234567)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, cell in (("weights", "153,600"), ("tokens/s", "1,234,567"), ("exactness", "bitwise")):
        (line,) = (line for line in lines if name in line)
        assert line.split() == [name, *[cell] * 6]


def test_a_command_writes_every_key_of_a_plan(text: Path) -> None:
    """The run is the plan that was predicted."""
    plan = replace(Plan(), shard=2, accumulate_grad_batches=2, reshard_after_forward=False, reduce_every_micro_batch=False)
    for asked in (plan, replace(Plan(), pipeline=2, schedule="interleaved", stages_per_device=3, accumulate_grad_batches=2)):
        written = report.arguments(Choice(**asked.asdict())).split()
        assert check(composed("data=text", f"data.path={text}", *MODEL, "strategy=single", *written)).plan == asked


class _Answers:
    """In a worker's place: every plan needs as much as it is told, and says so at once."""

    peak = 0

    def __init__(self, settings: Settings, vocabulary: int, device: Device) -> None:
        self.pipe, self.memory, self.process = self, device.memory, mock.Mock()
        self.ours, self.theirs = multiprocessing.Pipe()

    def fileno(self) -> int:
        return self.ours.fileno()

    def send(self, plan: Plan) -> None:
        self.plan = plan
        self.theirs.send(0)

    def answer(self, last: bool) -> Any:
        self.ours.recv()
        need = SimpleNamespace(peak=self.peak, memory=self.memory, over=self.peak - self.memory)
        return SimpleNamespace(plan=self.plan, fits=False, tight=False, fullest=need, seconds=1.0)


def test_all_families_are_looked_at_before_it_is_said_that_none_fits(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest had been tried, and a budget refused that a slower plan would have kept."""
    monkeypatch.setattr(searching, "SECONDS", 0.0)
    monkeypatch.setattr(searching, "SHORTEST", 0.0)
    monkeypatch.setattr(searching, "_Worker", _Answers)
    asked = settings(text)
    for far, all_of_them in ((1.1, True), (2.0, False)):  # budgets
        monkeypatch.setattr(_Answers, "peak", round(far * HERE.memory))
        answer = search(asked, 256, HERE, 2, unfit=1000)
        groups = families(asked, 2, stages(asked.config, Plan(), 256), HERE, ())
        looked = {repr(found.plan) for found in answer.others}
        assert all(repr(group[-1]) in looked for group in groups[2:]) == all_of_them


def _chosen(asked: Settings, device: Device, beside: int | None = None) -> tuple[Settings, list[str]]:
    """Where the search has found one plan."""

    def one(asked: Settings, vocabulary: int, device: Device, *_: Any, **__: Any) -> Answer:
        found = predict(asked, vocabulary, device)
        return Answer([found] * found.fits, [found] * (not found.fits), found, 1, 1)

    with (
        mock.patch("leanlm.planning.auto.search", one),
        mock.patch("leanlm.planning.hardware.devices.of_config", return_value=device),
    ):
        return choose(asked, beside=beside)


def test_auto_tries_what_may_fit_if_nothing_leaves_the_margin_and_nothing_larger(text: Path) -> None:
    asked = settings(text)
    peak = predict(asked, 256, HERE).fullest.peak
    found, lines = _chosen(asked, replace(HERE, memory=peak))
    assert found.plan == asked.plan
    assert "none leaves 5% of it free" in lines[2]
    assert "0 MiB are left" in reason(predict(asked, 256, replace(HERE, memory=peak)))
    with pytest.raises(UserError, match="no plan fits"):
        _chosen(asked, replace(HERE, memory=peak - 1))
    pages = replace(HERE, shared=True, memory=peak - 5000, common=5000)  # of libraries, which the system may drop
    assert _chosen(asked, pages, beside=0)[0].plan == asked.plan
    assert "0 MiB too much, which dropping pages of libraries may give" in reason(predict(asked, 256, pages))
    with pytest.raises(UserError, match="no plan fits"):
        _chosen(asked, replace(pages, memory=peak - 5001), beside=0)


def test_what_waits_for_a_run_counts_in_the_budget_of_one_device(text: Path) -> None:
    asked, torch, slim = settings(text), 64 << 20, 8 << 20
    machine = replace(HERE, shared=True, process=(0, 0, torch))
    peak = predict(asked, 256, HERE).fullest.peak
    for beside, held in ((None, torch), (slim, slim)):
        assert _chosen(asked, replace(machine, memory=peak + held), beside)
        with pytest.raises(UserError, match="no plan fits"):
            _chosen(asked, replace(machine, memory=peak + held - 1), beside)
    begins_again = replace(asked, config=replace(asked.config, restarts=1))  # what does that has torch
    with pytest.raises(UserError, match="no plan fits"):
        _chosen(begins_again, replace(machine, memory=peak + slim), slim)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the run's process in /proc")
def test_a_run_that_the_system_kills_is_planned_again_with_the_same_curve(text: Path, tmp_path: Path) -> None:
    """From the command line, killed after its first checkpoint as the system does without memory to give."""
    common = ["data=text", f"data.path={text}", "model=gpt2", "model.width=32", "model.heads=2", "model.depth=2",
              "global_batch=8", "sequence=16", "max_steps=60", "val_every=60", "checkpoint_every=2", "log_every=1",
              "logger=csv", "sample_tokens=0"]  # fmt: skip
    path = tmp_path / "a run, its folder's name"
    auto = start("leanlm.train", *common, "strategy=auto", "device.memory=3GiB", f"run_dir={path}", cwd=tmp_path)
    until = time.monotonic() + 100
    while not any((path / "checkpoints").glob("step-*")):
        assert time.monotonic() < until
        assert not auto.ended
        time.sleep(0.01)
    children = Path(f"/proc/{auto.pid}/task/{auto.pid}/children").read_text().split()
    (child,) = (number for number in children if Path(f"/proc/{number}/cmdline").read_text())  # the others have ended
    assert "torch" not in Path(f"/proc/{auto.pid}/maps").read_text()  # what waits is slim
    os.kill(int(child), signal.SIGKILL)
    done = auto.wait(timeout=100)
    assert done.returncode == 0, done.stderr
    assert "memory ended: planning for less" in done.stdout
    assert "resuming after step" in done.stdout
    budgets = re.findall(r"of 1 x ([0-9,]+) MiB", done.stdout)
    assert [int(budget.replace(",", "")) for budget in budgets] == [3 * 1024 - 8, round(0.85 * 3 * 1024) - 8]
    run_all({tmp_path / "alone": common})
    curves = [[row["train_loss"] for row in Run(each).rows()] for each in (path, tmp_path / "alone")]
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert Run(path).results()["predicted_peak_memory_bytes"][0] < 3 << 30


def test_a_planner_that_is_ended_says_so(text: Path) -> None:
    worker = _Worker(settings(text), 256, HERE)
    worker.process.kill()
    assert worker.answer(last=False) is None
    with pytest.raises(UserError, match="exit status -9"):
        worker.answer(last=True)


def test_a_search_goes_on_with_the_workers_that_are_left(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory has room for one of two: the plan of the one that is gone is simulated all the same."""
    begun: list[_Worker] = []

    def worker(*fixed: Any) -> _Worker:
        begun.append(_Worker(*fixed))
        if len(begun) == 2:  # the one that begins first
            begun[1].process.kill()
            begun[1].process.join()
        return begun[-1]

    monkeypatch.setattr(searching, "_Worker", worker)
    monkeypatch.setattr(searching, "cores", lambda: 2)
    answer = search(settings(text), 256, replace(HERE, memory=4 << 30), 2, wanted=3)
    assert len(begun) == 2
    assert len(answer.fitting) >= 2


def test_auto_trains_within_its_budget_as_the_plan_it_chose_would(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leanlm.train import train

    common = ["data=text", f"data.path={text}", "model=gpt2", "model.width=32", "model.heads=2", "model.depth=2",
              "global_batch=8", "sequence=16", "max_steps=3", "val_every=3", "logger=csv", "sample_tokens=0"]  # fmt: skip
    auto = train(composed(*common, "strategy=auto", "device.memory=2GiB", f"run_dir={tmp_path}/auto"))
    assert auto["predicted_peak_memory_bytes"][0] < 2 << 30
    assert auto["plan"]["auto"] is False
    alone = train(composed(*common, f"run_dir={tmp_path}/single"), isolate=True)
    assert auto["loss"] == pytest.approx(alone["loss"], abs=1e-4)
    assert json.loads((tmp_path / "auto" / "result.json").read_text())["predicted_seconds_per_step"] > 0
    with pytest.raises(UserError, match="no plan fits"):
        train(composed(*common, "strategy=auto", "device.memory=200MiB", f"run_dir={tmp_path}/none"))
