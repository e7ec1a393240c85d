"""Pictures and loggers are comfort: a run goes on without them, and a resumed run goes on with them."""

import shutil
from pathlib import Path

import pytest
from conftest import composed
from lightning.pytorch.loggers import TensorBoardLogger

from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.training.checkpoint import checkpoints
from leanlm.training.fit import fit

SMALL = ["model=lstm", "model.width=12", "data=text", "data.tokenizer=char", "global_batch=4", "sequence=16", "log_every=1",
         "device=cpu", "sample_tokens=0"]  # fmt: skip


def test_what_is_comfort_may_fail(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A picture and a logger: the run comes to its end and says so, once."""

    def fails(*arguments: object) -> None:
        raise OSError("nobody listens")

    monkeypatch.setattr("leanlm.training.fit.loss_curve", fails)
    monkeypatch.setattr(TensorBoardLogger, "log_metrics", fails)
    config = composed(*SMALL, f"data.path={text}", "max_steps=3", "logger=tensorboard")
    assert fit(check(config), tmp_path)["steps"] == 3
    said = capsys.readouterr().out
    assert said.count("TensorBoardLogger failed: OSError: nobody listens") == 1
    assert said.count("the picture failed: OSError: nobody listens") == 1


def test_a_resumed_run_has_one_curve_in_tensorboard(text: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    common = [*SMALL, f"data.path={text}", "max_steps=6", "checkpoint_every=2", "keep_checkpoints=9", "logger=tensorboard"]
    path = tmp_path / "run"
    fit(check(composed(*common)), path)
    for checkpoint in checkpoints(Run(path).checkpoints)[1:]:
        shutil.rmtree(checkpoint)
    fit(check(composed(f"resume={path}")), path)
    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4, 5, 6]
    assert (path / "tensorboard" / "hparams.yaml").is_file()
