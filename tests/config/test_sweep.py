"""What an optimizing sweeper of Hydra's needs: each job's validation loss, and a command line that is checked beforehand."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.experimental.callback import Callback

from leanlm import train
from leanlm.common.errors import UserError
from leanlm.config.command_line import check_jobs, run
from leanlm.config.line import Line
from leanlm.config.schema import Config

RETURNED: list[Any] = []


class Recorder(Callback):
    """Hydra callback: hears of each job what a sweeper hears."""

    def on_job_end(self, config: Any, job_return: Any, **_: Any) -> None:
        RETURNED.append(job_return.return_value)


def test_a_job_returns_its_validation_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["-m", "optim.lr=1e-3,1e-2,1e-1", f"hydra.sweep.dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "+hydra.callbacks.recorder._target_=test_sweep.Recorder"])
    monkeypatch.setenv("LEANLM_SWEPT", "")  # which a sweep sets

    def trained(config: Any, *_: Any, **__: Any) -> dict[str, float]:
        if config.optim.lr == 1e-2:
            raise UserError("too much")
        return {"loss": config.optim.lr + 1, "perplexity": 9.0}

    monkeypatch.setattr(train, "train", trained)
    with pytest.raises(SystemExit, match="2"):
        run("train", Config, train.job)
    assert RETURNED == [1.001, None, 1.1]


def problems(*arguments: str) -> list[str]:
    try:
        check_jobs(Line(["-m", *arguments]), "train", Config)
    except UserError as error:
        return list(error.problems)
    return []


def test_each_value_that_a_search_may_choose_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    compose = sys.modules["leanlm.config.command_line"]._compose
    monkeypatch.setattr("leanlm.config.command_line._compose", lambda name, job: seen.append(job) or compose(name, job))
    search = ["hydra/sweeper=basic", "model.depth=range(2,5)", "optim.lr=tag(log,interval(1e-3,0.1))", "seed=choice(1,2)"]
    assert problems(*search) == []
    assert [job[1:] for job in seen] == [
        ["model.depth=2", "optim.lr=0.001", "seed=1"],
        ["model.depth=3", "optim.lr=0.001", "seed=1"],
        ["model.depth=4", "optim.lr=0.001", "seed=1"],
        ["model.depth=2", "optim.lr=0.1", "seed=1"],
        ["model.depth=2", "optim.lr=0.001", "seed=2"],
    ]


def test_mistakes_in_a_search_are_found_before_it_starts() -> None:
    assert problems("hydra/sweeper=basic", "optim.lr=interval(-1,1)", "model.depth=1,0") == [
        "optim.lr=-1.0: it must be above 0",
        "model: depth=0: it must be at least 1",
    ]
    assert problems("optim.lr=interval(1e-3,1)") == ["optim.lr=interval(1e-3,1): an interval needs hydra/sweeper=optimize"]
    assert problems("optim.lr=1e-3,-1", "seed=1,2") == ["optim.lr=-1.0: it must be above 0"]
