"""Whoever does not want the planner deletes it, and all else works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLANNER = ("src/leanlm/planning", "src/leanlm/plan.py", "conf/strategy/auto.yaml")


def test_without_the_planner(text: Path, tmp_path: Path) -> None:
    for folder in ("src", "conf"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in PLANNER:
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def command(module: str, *overrides: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", f"leanlm.{module}", "device=cpu", *overrides], cwd=tmp_path, capture_output=True, text=True,
            timeout=200, env=os.environ | {"PYTHONPATH": str(tmp_path / "src")},
        )  # fmt: skip

    trained = command(
        "train", "max_steps=2", "data=text", f"data.path={text}", "run_dir=run", "model.depth=1", "model.width=32"
    )
    assert trained.returncode == 0, trained.stderr
    scored = command("evaluate", "run=run")
    assert scored.returncode == 0, scored.stderr
    assert "nats per token" in scored.stdout
    wanted = command("train", "strategy.auto=true", "device.memory=1GiB")
    assert wanted.returncode == 2
    assert wanted.stderr.splitlines() == [
        "error: strategy.auto=true: there is no planner here (src/leanlm/planning); write the plan that you want",
        "error: device.memory=1GiB: there is no planner here (src/leanlm/planning) to keep to it",
    ]
