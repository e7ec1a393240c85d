"""A run's folder is claimed by making it; the folder of the configuration is found wherever the package lies."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from conftest import composed

from leanlm import train
from leanlm.common.errors import UserError
from leanlm.common.files import CONF
from leanlm.common.run_folder import Run, claim
from leanlm.config.schema import Settings


def test_as_many_folders_as_claims(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as threads:
        folders = list(threads.map(claim, [tmp_path / "runs" / "now"] * 64))
    assert {folder.name for folder in folders} == {"now", *(f"now_{number}" for number in range(2, 65))}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made: "):
        claim(tmp_path / "file" / "run")


def test_runs_of_one_second_have_a_folder_each(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "now")
    config = composed("data=text", f"data.path={text}", "sequence=16", "model=lstm", "device=cpu")
    failing = [False, False, True, False]

    def launch(work: Any, arguments: tuple[Settings, Path], *_: Any) -> dict[str, Any]:
        assert arguments[1].is_dir()
        if failing.pop(0):
            raise UserError("no")
        return {"path": arguments[1]}

    monkeypatch.setattr("leanlm.train.launch", launch)
    found = [train.train(config)["path"] for _ in range(2)]
    with pytest.raises(UserError):
        train.train(config)
    found.append(train.train(config)["path"])
    assert [path.name for path in found] == ["now_run", "now_run_2", "now_run_3"], "what failed has left none"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("leanlm.train.launch", lambda _, arguments, *__: {"path": arguments[1]})
    train.train(config)
    assert len(list((tmp_path / "runs").iterdir())) == 3, "another rank hears of the folder from rank 0"


def test_jobs_of_a_sweep_are_those_with_a_number(tmp_path: Path) -> None:
    for name in ("10_seed-3", "2_seed-1", "2026-11-28_notes", "about", "x_1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "3_empty").mkdir()
    assert [path.name for path in Run.jobs(tmp_path)] == ["2_seed-1", "10_seed-3"]


def test_a_built_package_has_the_configuration_in_it(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    root = CONF.parent
    for name in ("src", "conf"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True, timeout=100)
    shutil.rmtree(tmp_path / "conf")
    package = tmp_path / "built" / "leanlm"
    spec = spec_from_file_location("files", package / "common" / "files.py")
    assert spec is not None
    assert spec.loader is not None
    files = module_from_spec(spec)
    spec.loader.exec_module(files)
    assert package / "conf" == files.CONF
    inside = {str(file.relative_to(CONF)): file.read_text() for file in CONF.rglob("*.yaml")}
    assert {str(file.relative_to(files.CONF)): file.read_text() for file in files.CONF.rglob("*.yaml")} == inside


def test_a_folder_is_given_to_one_run_at_a_time(tmp_path: Path) -> None:
    with Run.folder(str(tmp_path / "run"), tmp_path, 0) as folder:
        assert folder.is_dir()
        with pytest.raises(UserError, match="another process is at work"), Run.folder(str(folder), tmp_path, 0):
            raise AssertionError
    with Run.folder(str(folder), tmp_path, 0):
        pass
