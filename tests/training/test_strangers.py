"""Nothing in the folder of a run can run code."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import composed
from runner import run_all
from test_resume import overrides
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.inference.continuation import Generate, continuation
from leanlm.inference.evaluation import Evaluate, evaluate
from leanlm.train import train
from leanlm.training import checkpoint


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def given(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("given") / "run"
    run_all({path: [*overrides("transformer", text), "max_steps=1"]})
    return path


@pytest.fixture
def run(given: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(given, tmp_path / "run"))


def read(run: Path) -> None:
    """Every command that reads a checkpoint."""
    for command in (
        lambda: list(continuation(Generate(run=str(run), tokens=1))),
        lambda: evaluate(Evaluate(run=str(run), text="the")),
        lambda: train(composed(f"resume={run}", "max_steps=2")),
    ):
        with pytest.raises(UserError) as error:
            command()
        assert all(len(problem.splitlines()) == 1 for problem in error.value.problems)


def signed(folder: Path) -> None:
    """With a manifest that says that all files are as they were written."""
    files = [file for file in folder.iterdir() if file.name != "manifest.json"]
    manifest = {file.name: [file.stat().st_size, checkpoint._digest(file)] for file in files}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_metadata_of_a_checkpoint(run: Path, tmp_path: Path) -> None:
    (folder,) = checkpoint.checkpoints(Run(run).checkpoints)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = Evil(tmp_path / "mark")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    signed(folder)
    read(run)
    assert not (tmp_path / "mark").exists()
    dcp.FileSystemReader(folder).read_metadata()  # as torch reads it
    assert (tmp_path / "mark").exists()


def test_what_a_checkpoint_says_is_no_tensor(run: Path, tmp_path: Path) -> None:
    """torch unpickles it freely. As the average of a weight it would be read."""
    (folder,) = checkpoint.checkpoints(Run(run).checkpoints)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    stored, places = metadata.state_dict_metadata, metadata.storage_data
    for name in [name for name in stored if name.startswith("model.")]:
        average = name.replace("model.", "average.")
        stored[average] = stored[name]
        for index in [index for index in places if index.fqn == name]:
            places[MetadataIndex(average, index.offset, index.index)] = places[index]
    torch.save({"a": Evil(tmp_path / "mark")}, folder / "evil.distcp")
    stored[average] = BytesStorageMetadata()
    places[MetadataIndex(average)] = type(places[index])("evil.distcp", 0, (folder / "evil.distcp").stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    signed(folder)
    with pytest.raises(UserError, match=f"{average} is not a tensor in this checkpoint"):
        list(continuation(Generate(run=str(run), tokens=1)))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("group", ["model", "data", "callbacks.mine", "logger.mine"])
def test_what_the_configuration_names(group: str, run: Path, tmp_path: Path) -> None:
    config = Run(run).config()
    call = {"_target_": "os.system", "command": f"touch {tmp_path / 'mark'}", "into": "into"}
    first, _, rest = group.partition(".")
    config[first] = {rest: call} if rest else call
    Run(run).create(config)
    if group == "model":
        read(run)
    else:
        if group == "data":
            with pytest.raises(UserError, match="declared to return"):
                evaluate(Evaluate(run=str(run)))
        else:
            evaluate(Evaluate(run=str(run)))
        with pytest.raises(UserError, match=r"os\.system: it must be "):
            train(composed(f"resume={run}", "max_steps=2"))
        list(continuation(Generate(run=str(run), tokens=1)))
    assert not (tmp_path / "mark").exists()


def test_what_stands_inside_an_argument(run: Path, tmp_path: Path) -> None:
    config = Run(run).config()
    config.model.dropout = {"_target_": "os.system", "command": f"touch {tmp_path / 'mark'}"}
    Run(run).create(config)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever a model says to it
        list(continuation(Generate(run=str(run), tokens=1)))
    assert not (tmp_path / "mark").exists()


def test_interpolations_are_text(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "known")
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("sample: ", "sample: ${oc.env:SECRET}  # "))
    assert Run(run).config().sample == "${oc.env:SECRET}"
    train(composed(f"resume={run}", "max_steps=2"))
    assert Run(run).config().sample == "${oc.env:SECRET}"
