"""Ranks wait for one of them outside the default group, whose patience is short: NCCL's is 10 minutes."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from conftest import composed
from runner import losses

from leanlm.common.errors import UserError
from leanlm.config.checks import check
from leanlm.launch.processes import launch
from leanlm.launch.ranks import of_ranks, on_rank_0, process_group, rank
from leanlm.training import fit, storage

SHORT = timedelta(seconds=2)
ASKED = [
    "model=small", "model.width=16", "model.depth=1", "data=text", "data.tokenizer=char", "global_batch=4", "sequence=12",
    "max_steps=2", "log_every=1", "device=cpu", "logger=csv", "sample_tokens=0", "strategy=ddp", "precision=fp64",
]  # fmt: skip


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same on rank 0, as late as the default group does not wait."""

    def late(*arguments: Any, **named: Any) -> Any:
        if rank() == 0:
            time.sleep(1.25 * SHORT.total_seconds())
        return function(*arguments, **named)

    return late


def impatient(patch: pytest.MonkeyPatch) -> None:
    begin = dist.init_process_group
    patch.setattr(dist, "init_process_group", lambda *given, **named: begin(*given, **named, timeout=SHORT))


def refused() -> list[Any]:
    def refuse() -> None:
        raise UserError("one", "two")

    with process_group("cpu"):
        try:
            on_rank_0(refuse)
        except UserError as error:
            return of_ranks(error.problems)
    return []


def test_what_rank_0_refuses_is_refused_on_all_ranks() -> None:
    assert launch(refused, (), 2) == [("one", "two")] * 2


def run(asked: list[str], path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        impatient(patch)
        for place, name in ((fit.data, "tokens"), (fit, "make_folder"), (storage, "save")):
            patch.setattr(place, name, slow(getattr(place, name)))
        patch.setattr(fit, "sample_of", slow(lambda *_: None))
        with process_group("cpu"):
            fit.fit(check(composed(*asked)), path)


def test_a_run_waits_for_its_text_its_checkpoints_and_its_sample(text: Path, tmp_path: Path) -> None:
    asked = [*ASKED, f"data.path={text}"]
    launch(run, (asked, tmp_path / "run"), 2)
    assert len(losses(tmp_path / "run")) == 2
