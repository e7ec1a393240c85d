"""One rank killed, out of memory or raising, under plans that cut the model: all end, the message says who and why, the
checkpoint stays whole, and `restarts` goes on from it."""

import time
from pathlib import Path

import psutil
import pytest
from runner import losses, run_all
from shell import command

from leanlm.common.run_folder import Run
from leanlm.launch.supervisor import OUT_OF_MEMORY
from leanlm.training import checkpoint

FAULTY = """
import os, pathlib, resource, signal, time, torch
from leanlm.training.callbacks.record import Record
from leanlm.launch.ranks import rank
from leanlm.models.transformer import Transformer

class Faulty(Transformer):
    pass

begin = Record.on_train_batch_start

def fail(self, trainer, module, batch, batch_idx):
    begin(self, trainer, module, batch, batch_idx)
    mark = pathlib.Path("failed")
    if rank() == 1 and batch.step == 5 and not mark.exists():
        mark.write_text(str(time.time()))
        fault = os.environ["FAULT"]
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "raising":
            raise ValueError("the cat walked over rank 1")
        if fault == "out of memory":
            resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
            torch.ones(1 << 40)

Record.on_train_batch_start = fail
"""
CAUSES = {
    "killed": "SIGKILL (the system may have run out of memory)",
    "raising": "ValueError: the cat walked over rank 1",
    "out of memory": "can't allocate memory",
}
PLANS = {
    "pipeline": ["strategy=pipeline", "strategy.accumulate_grad_batches=4"],
    "fsdp": ["strategy=fsdp"],
    "tensor": ["strategy=tensor"],
}


def asked(text: Path, *more: str) -> list[str]:
    return [
        "model=small", "model._target_=faulty.Faulty", "model.width=16", "model.depth=2",
        "data=text", "data.tokenizer=char", f"data.path={text}", "global_batch=8", "sequence=12", "max_steps=8", "log_every=1",
        "device=cpu", "logger=csv", "sample_tokens=8", "checkpoint_every=3", "precision=fp64", "run_dir=run", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "plan"),
    [
        ("killed", "pipeline"),
        ("out of memory", "fsdp"),
        pytest.param("raising", "tensor", marks=pytest.mark.slow),
    ],
)
def test_all_end_and_the_message_names_rank_and_cause(fault: str, plan: str, text: Path, tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    done = command("leanlm.train", *asked(text, *PLANS[plan]), cwd=tmp_path, env=environment(tmp_path, fault))
    assert time.time() - float((tmp_path / "failed").read_text()) < 30
    status = 1 if fault == "raising" else OUT_OF_MEMORY  # what was killed may have had too little
    assert done.returncode == status, done.stderr
    assert "rank 1 of 2 failed" in done.stderr
    assert CAUSES[fault] in done.stderr
    assert not [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(tmp_path)], "every process has ended"
    assert checkpoint.newest_whole(Run(tmp_path / "run").checkpoints).name == "step-00000003"


def environment(cwd: Path, fault: str) -> dict[str, str]:
    return {"PYTHONPATH": str(cwd), "FAULT": fault}


def succeeds(cwd: Path, fault: str, arguments: list[str]) -> str:
    (cwd / "faulty.py").write_text(FAULTY)
    (cwd / "failed").unlink(missing_ok=True)
    done = command("leanlm.train", *arguments, cwd=cwd, env=environment(cwd, fault), timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_restarts_go_on_from_the_last_checkpoint(text: Path, tmp_path: Path) -> None:
    run_all({tmp_path / "whole": [*asked(text), "model._target_=leanlm.models.transformer.Transformer"]})
    said = succeeds(tmp_path, "killed", asked(text, *PLANS["pipeline"], "run_dir=run", "restarts=1"))
    assert "begun again after a failure, 1 of at most 1 times" in said
    assert "resuming after step 3" in said
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-9, rel=0)


@pytest.mark.slow
def test_a_restart_before_the_first_checkpoint_begins_where_the_run_was_told_to(text: Path, tmp_path: Path) -> None:
    for more in (["run_dir=whole"], ["run_dir=begun", "max_steps=4", "checkpoint_every=4"]):
        succeeds(tmp_path, "none", asked(text, *PLANS["fsdp"], "optim.schedule=constant", *more))
    more = ["resume=begun", "run_dir=run", "max_steps=8", "checkpoint_every=100", "restarts=1"]
    said = succeeds(tmp_path, "killed", more)
    assert said.count("resuming after step 4") == 2
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
