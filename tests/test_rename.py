"""`make rename` leaves nothing of the earlier name, and what it leaves can be run."""

import ast
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "rename.py"))
EARLIER = SCRIPT["package"](ROOT).name
NAME = "house_of" + "_words"  # in two, so that the way back does not find it in this file


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project without git."""
    for path in SCRIPT["files"](ROOT):
        to = tmp_path / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    return tmp_path


def renamed(root: Path, name: str) -> str:
    """What the script complains of; it runs without installed packages, of which this one is one."""
    command = [sys.executable, "-S", "-E", "scripts/rename.py", name]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60).stderr


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in SCRIPT["files"](root)}


def test_nothing_of_the_earlier_name_is_left_and_the_way_back_is_exact(copy: Path) -> None:
    before = contents(copy)
    assert renamed(copy, NAME) == ""
    after = contents(copy)
    assert len(after) == len(before)
    assert {path for path, data in after.items() if EARLIER in (path + data.decode("latin1")).lower()} <= {"LICENSE"}
    assert after["LICENSE"] == before["LICENSE"]
    assert any(f"{NAME}_CACHE".upper().encode() in data for data in after.values())
    for path, data in after.items():
        if path.endswith(".py"):
            ast.parse(data, path)
    command = [sys.executable, "-m", f"{NAME}.train", "--help"]
    env = {**os.environ, "PYTHONPATH": "src"}
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert renamed(copy, EARLIER) == ""
    assert contents(copy) == before


def test_a_name_that_cannot_be_is_refused_and_nothing_is_changed(copy: Path) -> None:
    before = contents(copy)
    for name, why in (
        ("my-lm", "cannot be the name of a package"),
        ("lambda", "cannot be the name of a package"),
        ("json", "there is a module json already"),
        ("conftest", "there is a module conftest already"),
        ("numpy", "means something else"),
    ):
        assert why in renamed(copy, name)
    assert contents(copy) == before


def test_changes_that_are_not_committed_are_refused(copy: Path) -> None:
    def git(*arguments: str) -> None:
        settings = ("user.name=A", "user.email=a@example.com", "commit.gpgsign=false")
        options = [part for setting in settings for part in ("-c", setting)]
        subprocess.run(["git", *options, *arguments], cwd=copy, check=True)

    if not shutil.which("git"):
        pytest.skip("there is no git")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    (copy / "README.md").write_text("another")
    assert "not committed" in renamed(copy, NAME)
    git("checkout", "--quiet", "README.md")
    assert renamed(copy, NAME) == ""
    assert (copy / "src" / NAME / "__init__.py").is_file()
