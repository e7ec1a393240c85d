"""The folder of a run: what it always holds, and how to read it again."""

import csv
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from leanlm.common.errors import UserError
from leanlm.common.files import literal, write

COLUMNS = ("step", "train_loss", "grad_norm", "lr", "tokens_per_second", "mfu", "val_loss")
ROOT = Path("runs")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: there is no room
TOGETHER = 64  # rows of metrics.csv that are written together


class Run:
    """A run's folder: `config.yaml`, `metrics.csv`, `loss.png`, `samples.txt`, `result.json`, `checkpoints/`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.csv"
        self.result = self.path / "result.json"

    @classmethod
    def find(cls, name: str) -> "Run":
        """An earlier run by its path; `latest` is the one begun last in `runs/` that has a checkpoint."""
        if name == "latest":
            found = [file for file in ROOT.glob("**/config.yaml") if any(file.parent.glob("checkpoints/step-*"))]
            if not found:
                raise UserError(f"there is no run with a checkpoint in {ROOT}/ yet")
            return cls(max(found, key=lambda file: file.stat().st_mtime).parent)
        if not (Path(name) / "config.yaml").is_file():
            raise UserError(f"{name} is not the folder of a run: it holds no config.yaml")
        return cls(name)

    @staticmethod
    def new_path(name: str) -> Path:
        """A path for a new run in `runs/`, which begins with the time."""
        return ROOT / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{name}"

    @staticmethod
    @contextmanager
    def folder(named: str | None, wished: Path, rank: int) -> Iterator[Path]:
        """The folder for the run within: `named`, or one that rank 0 makes (see `claim`), from which other ranks hear of it.

        What it has made goes if the run ends with an exception and has put nothing there.

        Raises:
            UserError: it cannot be made, or another process is at work in it.
        """
        if rank:
            yield Path(named or wished)
            return
        folder = claim(Path(named or wished), shared=bool(named))
        with _alone(folder):
            try:
                yield folder
            except BaseException:
                with suppress(OSError):
                    folder.rmdir()  # only an empty one
                raise

    @staticmethod
    def jobs(sweep: Path) -> list[Path]:
        """The folders that the jobs of a sweep have made in its own, in the order of their numbers."""
        folders = [file.parent for file in sweep.glob("*_*/config.yaml") if file.parent.name.split("_")[0].isdecimal()]
        return sorted(folders, key=lambda folder: int(folder.name.split("_")[0]))

    def config(self) -> DictConfig:
        """As it was written, when interpolations were resolved: what looks like one is text, and reads nothing of here."""
        config = OmegaConf.create(literal(OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml"))))
        assert isinstance(config, DictConfig)
        return config

    def create(self, config: DictConfig | dict[str, Any]) -> None:
        """Make the folder and write down the configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        write(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(literal(config)), resolve=True))

    def rows(self) -> list[dict[str, float]]:
        """The rows of `metrics.csv`, without empty fields. A last one without its line end was cut while it was written."""
        whole = self.metrics.read_text().rpartition("\n")[0] if self.metrics.is_file() else ""
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(whole.splitlines())]

    def results(self) -> dict[str, Any]:
        if not self.result.is_file():
            raise UserError(f"{self.path} has no result.json: the run has not ended")
        return json.loads(self.result.read_text())


def claim(path: Path, shared: bool = False) -> Path:
    """Make the folder `path`, or the first of `path_2`, `path_3`, ... that is not there: no other process gets the same.
    `shared`: the folder `path` itself, which may be there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shared:
            path.mkdir(exist_ok=True)
            return path
        for number in count(1):
            folder = path if number == 1 else path.with_name(f"{path.name}_{number}")
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made: {error.strerror}") from None
    raise AssertionError


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within it, no other process gets this folder; a lock of the system's ends with its process, however that ends."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is at work on the run there; wait for it, or name another") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Within it, a disk on which no room is left for the run at `path` ends in one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"{error.filename or path}: {error.strerror}: make room, then resume the run") from None


class Table:
    """Writes `metrics.csv`: a row per step, the values of one step gathered as they come."""

    def __init__(self, run: Run, after: int, mfu: bool = False) -> None:
        """Go on after step `after`: rows beyond it, which a killed run may have left, go when more are written. `mfu`: with its
        column."""
        kept = [row for row in run.rows() if row["step"] <= after]
        self.columns = [name for name in COLUMNS if name != "mfu" or mfu or any("mfu" in row for row in kept)]
        self.path, self.begun, self.waiting = run.metrics, False, kept

    def add(self, step: int, values: dict[str, float]) -> None:
        if not self.waiting or self.waiting[-1]["step"] != step:
            if len(self.waiting) >= TOGETHER:
                self.flush()
            self.waiting.append({"step": step})
        self.waiting[-1] |= values

    def flush(self) -> None:
        """Write everything down, the row at hand too; it can be completed no more in this session."""
        rows, self.waiting = self.waiting, []
        begun, self.begun = self.begun, True
        if not begun:  # in one go: a run that is killed before this has its rows still, the one at hand too
            write(self.path, ",".join(self.columns) + "\n" + "".join(map(self._line, rows)))
            return
        with open(self.path, "a") as file:  # not kept open: what a full disk has refused would be tried again, without end
            file.writelines(map(self._line, rows))

    def _line(self, row: dict[str, float]) -> str:
        text = {key: str(int(value)) if key == "step" else repr(float(value)) for key, value in row.items()}
        return ",".join(text.get(column, "") for column in self.columns) + "\n"
