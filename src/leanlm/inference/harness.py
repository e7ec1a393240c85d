"""Tasks of EleutherAI's lm-evaluation-harness (the package lm_eval) for a trained model."""

import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from leanlm.common.errors import UserError, refuse
from leanlm.common.files import write
from leanlm.config.arguments import nearest
from leanlm.config.checks import check
from leanlm.config.pretrained import is_run
from leanlm.data.documents import renderer
from leanlm.inference.restoring import find, restore, tokenizer_of
from leanlm.strategies.plan import Plan


@dataclass
class Harness:
    """What `conf/harness.yaml` sets."""

    run: str = "latest"
    checkpoint: str = "last"
    tasks: str | None = None
    include: str | None = None
    fewshot: int | None = None
    limit: float | None = None
    chat: bool = False
    sequence: int | None = None
    rows: int = 16
    samples: bool = False
    to: str | None = None
    device: Any = None

    @property
    def names(self) -> list[str]:
        return re.findall(r"[^\s,\[\]]+", self.tasks or "")

    def problems(self) -> list[str]:
        found = []
        if find_spec("lm_eval") is None:
            found.append("the harness needs the package lm_eval, which is not installed: pip install -e '.[harness]'")
        if not self.names:
            found.append("tasks=null: name tasks, such as tasks=hellaswag,arc_easy")
        if self.include and not Path(self.include).is_dir():
            found.append(f"include={self.include}: there is no such folder")
        if self.to and not Path(os.path.expanduser(self.to)).absolute().parent.is_dir():
            found.append(f"to={self.to}: the folder for this file is not there: make it first")
        if self.rows < 1:
            found.append(f"rows={self.rows}: it must be at least 1")
        if self.fewshot is not None and self.fewshot < 0:
            found.append(f"fewshot={self.fewshot}: it must not be negative")
        if self.limit is not None and self.limit <= 0:
            found.append(f"limit={self.limit:g}: a number of documents, a share below 1, or null for all")
        if (self.device or {}).get("memory"):
            found.append("device.memory: the harness keeps to no budget: leave it out; rows=1 takes least")
        return found


def results_of(asked: Harness) -> tuple[dict[str, Any], Path | None]:
    """Score a model on tasks.

    Returns:
        What `lm_eval.simple_evaluate` gives, and the file that holds it as JSON: of foreign weights only where `to` names one.

    Raises:
        UserError: the run or what is asked for cannot be used, lm_eval is not installed, or a task asks for more than there is.
    """
    refuse(asked.problems())
    run, config = find(asked.run, asked.sequence, longest=sys.maxsize)
    given: dict[str, Any] = dict.fromkeys(("callbacks", "logger"))
    config.update(given | {"devices": 1, "strategy": asdict(Plan()), "device": asked.device or config.device})
    settings, of_run = check(config, needs_text=False), is_run(str(run.path))
    if asked.chat and renderer(tokenizer_of(run)) is None:
        raise UserError(f"chat=true: the tokenizer of {run.path} has no chat template")
    manager = _with_tasks(asked)

    import lm_eval
    from lm_eval.utils import handle_non_serializable

    from leanlm.inference.harness_model import HarnessModel

    tokenizer, parallel, _ = restore(settings.config, Plan(), run, asked.checkpoint)
    results = lm_eval.simple_evaluate(
        HarnessModel(parallel.net.eval(), tokenizer, asked.rows, [] if of_run else _put_before(run.path)),
        model_args={"run": str(run.path), "checkpoint": asked.checkpoint, "sequence": settings.config.sequence},
        tasks=asked.names,
        task_manager=manager,
        num_fewshot=asked.fewshot,
        batch_size=asked.rows,
        limit=asked.limit,
        log_samples=asked.samples,
        apply_chat_template=asked.chat,
    )
    kind = "" if asked.checkpoint == "last" else f"-{asked.checkpoint}"
    name = re.sub(r"[^\w.+-]+", "-", "-".join(asked.names))[:100]
    file = Path(os.path.expanduser(asked.to)) if asked.to else run.path / f"harness-{name}{kind}.json" if of_run else None
    if file:
        write(file, json.dumps(results, indent=2, ensure_ascii=False, default=handle_non_serializable))
    return results, file


def _with_tasks(asked: Harness) -> Any:
    """lm_eval's TaskManager, which gives the tasks that are asked for: loaded once, before there is a model."""
    from lm_eval.tasks import TaskManager

    manager: Any = TaskManager(include_path=asked.include, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in asked.names):  # it takes a while to read the thousands that lm_eval has
        manager = TaskManager(include_path=asked.include)
    refuse(
        f"tasks: there is no task {name}{nearest(name, manager.all_tasks)}; include=FOLDER names one with more"
        for name in asked.names
        if not manager.match_tasks([name])
    )
    try:
        found = manager.load(manager.match_tasks(asked.names))
    except Exception as error:  # whatever a task's own code and the libraries that fetch its data raise
        raise UserError(f"tasks={asked.tasks}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
    manager.load = lambda _: found
    return manager


def _put_before(folder: Path) -> list[int]:
    """Tokens that the tokenizer in Hugging Face's layout puts before every text."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode("").ids
