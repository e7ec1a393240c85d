"""What a person types, from the shell: sweeps, several processes, torchrun, failures, signals, evaluate, generate."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from runner import losses
from shell import command, start

from leanlm import compare, evaluate, generate
from leanlm.common.run_folder import COLUMNS, Run

SMALL = [
    "model.width=16", "data=text", "data.tokenizer=char", "global_batch=8", "sequence=12", "max_steps=6", "log_every=1",
    "device=cpu", "logger=csv", "val_lanes=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shell") / "run"
    done = command(
        "leanlm.train",
        *SMALL,
        f"data.path={text}",
        "model=lstm",
        f"run_dir={path}",
        "logger=tensorboard",
        cwd=path.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "validation loss" in done.stdout
    assert str(path) in done.stdout.replace("\n", "")
    return path


def test_the_folder_of_a_run_holds_what_it_promises(run: Path) -> None:
    assert Run(run).metrics.read_text().splitlines()[0] == ",".join(name for name in COLUMNS if name != "mfu")
    assert [row["step"] for row in Run(run).rows()] == [1, 2, 3, 4, 5, 6]
    assert "val_loss" in Run(run).rows()[-1]
    result = json.loads((run / "result.json").read_text())
    assert {
        "loss",
        "perplexity",
        "steps",
        "tokens",
        "tokens_per_second",
        "peak_memory_bytes",
        "seconds",
        "plan",
        "parameters",
        "versions",
    } <= result.keys()
    assert result["steps"] == 6
    assert result["tokens"] == 6 * 8 * 12
    assert 50e6 < result["peak_memory_bytes"][0] < 2e9
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((run / "samples.txt").read_text()) > 100
    assert list((run / "tensorboard").glob("events*"))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert Run(run).config().global_batch == 8


def test_a_sweep_gives_clean_jobs_and_one_comparison(text: Path, tmp_path: Path) -> None:
    done = command(
        "leanlm.train", "-m", "strategy=single,ddp", "model=lstm", *SMALL, f"data.path={text}",
        "precision=fp64", "hydra.sweep.dir=sweep", cwd=tmp_path, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folders = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert len(folders) == 2
    assert all((path / "result.json").is_file() for path in folders)
    assert {path.name for path in tmp_path.iterdir()} == {"sweep"}, "nothing else was made"
    for number in range(2):
        assert done.stdout.count(f"\njob {number}: ") == 1
    assert done.stdout.count("step 6/6  validation loss") == 2, "each line once, not once per rank"
    single, ddp = map(losses, folders)
    assert max(abs(a - b) for a, b in zip(single, ddp, strict=True)) < 1e-9
    assert (tmp_path / "sweep" / "comparison.png").is_file()
    assert "largest difference" in done.stdout
    ddp = json.loads((folders[1] / "result.json").read_text())
    assert len(ddp["peak_memory_bytes"]) == 2


@pytest.mark.slow
def test_under_torchrun(text: Path, tmp_path: Path) -> None:
    common = [*SMALL, f"data.path={text}", "model=gru", "precision=fp64"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613"]
    asked = [*torchrun, "-m", "leanlm.train", "strategy=ddp", *common]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    alone = command("leanlm.train", *common, "run_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert max(abs(a - b) for a, b in zip(losses(path), losses(tmp_path / "alone"), strict=True)) < 1e-9
    assert done.stdout.count("validation loss") == alone.stdout.count("validation loss")


FAILING = """
from leanlm.training.callbacks.record import Record
from leanlm.launch.ranks import rank

def fail(self, trainer, module, batch, batch_idx):
    if rank() == 1 and batch.step == 3:
        raise ValueError("the cat walked over rank 1")

Record.on_train_batch_start = fail
"""


def test_a_failing_rank_ends_all_with_one_traceback(text: Path, tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAILING + "\nfrom leanlm.models.rnn import RNN\n\nclass Faulty(RNN):\n    pass\n")
    begin = time.monotonic()
    asked = ["model=lstm", "model._target_=faulty.Faulty", "strategy=ddp", "max_steps=100000", "run_dir=run"]
    done = command(
        "leanlm.train", *SMALL, f"data.path={text}", *asked, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, timeout=90
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert "rank 1 of 2 failed" in done.stderr
    assert "ValueError: the cat walked over rank 1" in done.stderr
    assert time.monotonic() - begin < 60
    assert not [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(tmp_path)], "every process has ended"


@pytest.mark.parametrize("to", [pytest.param("launcher", marks=pytest.mark.slow), "group"])
def test_ctrl_c_ends_every_process_and_saves(to: str, text: Path, tmp_path: Path) -> None:
    """`group` is what a terminal does: the launcher and the workers all get the signal."""
    asked = [*SMALL, f"data.path={text}", "model=lstm", "strategy=ddp", "max_steps=1000000", "run_dir=run"]
    process = start("leanlm.train", *asked, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while len(Run(tmp_path / "run").rows()) < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    begin = time.monotonic()
    if to == "group":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, signal.SIGINT)
    done = process.wait(timeout=30)
    assert time.monotonic() - begin < 10
    assert done.returncode == 130, done.stderr
    assert "resume=run" in done.stdout + done.stderr
    assert [line for line in done.stderr.splitlines() if "stopped by SIGINT" not in line] == [], "one line"
    assert psutil.wait_procs(children, timeout=3)[1] == []
    assert Run(tmp_path / "run").checkpoints.is_dir()
    assert [path for path in Run(tmp_path / "run").checkpoints.iterdir() if path.name.startswith("step-")]


def test_sigterm_saves_and_says_how_to_go_on(text: Path, tmp_path: Path) -> None:
    asked = [*SMALL, f"data.path={text}", "model=lstm", "max_steps=1000000", "run_dir=run"]
    process = start("leanlm.train", *asked, cwd=tmp_path)
    while len(Run(tmp_path / "run").rows()) < 1:
        time.sleep(0.1)
        assert not process.ended
    os.kill(process.pid, signal.SIGTERM)
    done = process.wait(timeout=30)
    assert done.returncode == 128 + signal.SIGTERM
    assert "python -m leanlm.train resume=run" in done.stderr
    step = int(done.stderr.split("after step ")[1].split(";")[0])
    done = command("leanlm.train", "resume=run", f"max_steps={step + 3}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {step}" in done.stdout
    assert Run(tmp_path / "run").rows()[-1]["step"] == step + 3


def test_evaluate_is_the_same_under_every_plan_and_batch(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for more in ([], ["rows=3"], ["strategy=ddp", "devices=2", "rows=2"]):
        assert here(evaluate, monkeypatch, f"run={run}", *more) == 0
        found.append(json.loads((run / "evaluation-validation.json").read_text()))
    result = json.loads((run / "result.json").read_text())
    for one in found:
        assert one["tokens"] == found[0]["tokens"]
        assert one["loss"] == pytest.approx(result["loss"], abs=1e-6)
    assert command("leanlm.evaluate", f"run={run}", "split=test", cwd=tmp_path).returncode == 2


def here(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit status of a command that is run in this process, which has imported all that it needs."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    try:
        module.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def test_generate_streams_and_repeats(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    first = command("leanlm.generate", f"run={run}", "prompt=the", "tokens=50", "seed=3", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the")
    assert len(first.stdout) == 3 + 50 + 1
    assert here(generate, monkeypatch, f"run={run}", "prompt=the", "tokens=50", "seed=3") == 0
    assert capsys.readouterr().out == first.stdout
    assert here(generate, monkeypatch, f"run={run}", "prompt=Ω", "top_p=2", "tokens=-1") == 2
    assert capsys.readouterr().err.count("error: ") == 2
    assert here(generate, monkeypatch, f"run={run}", "prompt=f(x): 'Ω', \\") == 2
    assert "the character" in capsys.readouterr().err


def test_compare(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    done = command("leanlm.compare", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert here(compare, monkeypatch, tmp_path) == 1
    monkeypatch.chdir(tmp_path)
    for name in ("x/run", "y/run", "s/0_a", "s/1_b", "s/[red]", "s/2026-11-28_notes"):
        shutil.copytree(run, name)
    assert here(compare, monkeypatch, "x/run", "y/run", "s", "s/[red]") == 0
    rows = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "bitwise" in line]
    assert rows == ["x/run", "y/run", "0_a", "1_b", "[red]"]


@pytest.mark.parametrize("asked", ["generate tokens=400", "train --help", "train --cfg all", "compare"])
def test_a_closed_pipe_ends_a_command_quietly(asked: str, run: Path, tmp_path: Path) -> None:
    name, *arguments = asked.split()
    arguments += {"generate": [f"run={run}"], "compare": [str(run)]}.get(name, [])
    os.mkfifo(tmp_path / "pipe")
    process = start(f"leanlm.{name}", *arguments, cwd=tmp_path, out=tmp_path / "pipe")
    os.close(os.open(tmp_path / "pipe", os.O_RDONLY))
    done = process.wait(60)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def test_a_run_whose_output_nobody_reads_stops_in_good_order(text: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    process = start(
        "leanlm.train", *SMALL, f"data.path={text}", "model=lstm", "max_steps=1000000", "val_every=20", "run_dir=a [run]",
        cwd=tmp_path, out=tmp_path / "pipe",
    )  # fmt: skip
    reader = os.open(tmp_path / "pipe", os.O_RDONLY)
    printed = b""
    while b"validation loss" not in printed:
        printed += os.read(reader, 1000)
    os.close(reader)
    done = process.wait(60)
    assert done.returncode == 128 + signal.SIGTERM
    (line,) = done.stderr.splitlines()
    assert line.endswith("to go on: python -m leanlm.train 'resume=a [run]'")
    assert list((tmp_path / "a [run]" / "checkpoints").glob("step-*"))


def test_a_peak_is_of_the_process_itself_and_not_of_the_one_that_started_it() -> None:
    large = b"x" * (1 << 30)
    code = "from leanlm.common.machine import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert 50e6 < int(done.stdout) < len(large)
