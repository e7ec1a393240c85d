"""The folder of a run: what it always holds, and how to read it again."""

import csv
import errno
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from leanlm.common.errors import UserError
from leanlm.common.files import write

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
            begun = sorted(ROOT.glob("**/config.yaml"), key=lambda file: file.stat().st_mtime)
            found = [file for file in begun if any(file.parent.glob("checkpoints/step-*"))]
            if not found:
                raise UserError(f"there is no run with a checkpoint in {ROOT}/ yet")
            return cls(found[-1].parent)
        if not (Path(name) / "config.yaml").is_file():
            raise UserError(f"{name} is not the folder of a run: it holds no config.yaml")
        return cls(name)

    @classmethod
    def new_path(cls, name: str, root: Path = ROOT) -> Path:
        """A path for a new run that no other run has."""
        base = root / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{name}"
        path, n = base, 1
        while path.exists():
            n += 1
            path = base.with_name(f"{base.name}_{n}")
        return path

    def config(self) -> DictConfig:
        """As it was written, when interpolations were resolved: what looks like one is text, and reads nothing of here."""
        config = OmegaConf.create(literal(OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml"))))
        assert isinstance(config, DictConfig)
        return config

    def create(self, config: DictConfig | dict[str, Any]) -> None:
        """Make the folder and write down the configuration, of which a dict has nothing to resolve."""
        self.path.mkdir(parents=True, exist_ok=True)
        write(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(literal(config)), resolve=True))

    def rows(self) -> list[dict[str, float]]:
        """The rows of `metrics.csv`, without empty fields. A last one without its line end was cut while it was written."""
        if not self.metrics.is_file():
            return []
        whole = self.metrics.read_text().rpartition("\n")[0]
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(whole.splitlines())]

    def results(self) -> dict[str, Any]:
        if not self.result.is_file():
            raise UserError(f"{self.path} has no result.json: the run has not ended")
        return json.loads(self.result.read_text())


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Within it, a disk on which no room is left for the run at `path` ends in one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"{error.filename or path}: {error.strerror}: make room, then resume the run") from None


def literal(value: Any) -> Any:
    """A value in which OmegaConf takes nothing for an interpolation."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value)
    if isinstance(value, dict):
        return {key: literal(part) for key, part in value.items()}
    return [literal(part) for part in value] if isinstance(value, list) else value


class Table:
    """Writes `metrics.csv`: a row per step, the values of one step gathered as they come."""

    def __init__(self, run: Run, after: int, mfu: bool = False) -> None:
        """Go on after step `after`: rows beyond it, which a killed run may have left, are dropped. `mfu`: with its column."""
        kept = [row for row in run.rows() if row["step"] <= after]
        self.pending = kept.pop() if kept else {}  # its validation may come yet
        self.columns = [name for name in COLUMNS if name != "mfu" or mfu or any("mfu" in row for row in kept)]
        lines = [",".join(self.columns), *map(self._line, kept)]
        write(run.metrics, "\n".join(lines) + "\n")
        self.path, self.lines = run.metrics, list[str]()

    def add(self, step: int, values: dict[str, float]) -> None:
        if self.pending and self.pending["step"] != step:
            self._done()
            if len(self.lines) >= TOGETHER:
                self._write()
        self.pending |= {"step": step, **values}

    def flush(self) -> None:
        """Write everything down, the row at hand too; it can be completed no more in this session."""
        if self.pending:
            self._done()
        self._write()

    def _done(self) -> None:
        self.lines.append(self._line(self.pending) + "\n")
        self.pending = {}

    def _write(self) -> None:
        lines, self.lines = self.lines, []
        with open(self.path, "a") as file:  # not kept open: what a full disk has refused would be tried again, without end
            file.writelines(lines)

    def _line(self, row: dict[str, float]) -> str:
        text = {key: str(int(value)) if key == "step" else repr(float(value)) for key, value in row.items()}
        return ",".join(text.get(column, "") for column in self.columns)
