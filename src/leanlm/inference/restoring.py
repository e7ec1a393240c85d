"""The model and the tokenizer of a run."""

import json
from typing import Any

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.config.schema import Config
from leanlm.data import tokenizer as tokenizers
from leanlm.data.tokenizer import Tokenizer
from leanlm.strategies.parallel_model import ParallelModel
from leanlm.strategies.plan import Plan

FOLDERS = {"last": "checkpoints", "best": "best"}  # in the folder of a run


def restore(config: Config, plan: Plan, run: Run, which: str = "last") -> "tuple[Tokenizer, ParallelModel, dict[str, Any]]":
    """Tokenizer, trained weights and `state.json` of a run under a plan, from its newest whole checkpoint, whatever plan made
    it: of the weights their average over the steps, if the run kept one. `which`: of FOLDERS; `best` is the checkpoint that
    `callbacks=best` keeps.

    Raises:
        UserError: the run has no whole checkpoint.
    """
    from leanlm.training import build, checkpoint

    if which not in FOLDERS:
        raise UserError(f"checkpoint={which}: choose one of {', '.join(FOLDERS)}")
    newest = checkpoint.newest_whole(run.path / FOLDERS[which])
    if newest is None:
        what = "best checkpoint (callbacks=best keeps one)" if which == "best" else "checkpoint"
        raise UserError(f"{run.path} has no {what} yet")
    tokenizer = tokenizer_of(run)
    parallel = build.parallel_model(config, plan, tokenizer.vocabulary)
    _, state = checkpoint.load(newest, parallel.named_parameters(), None, prefer_average=True)
    return tokenizer, parallel, state


def tokenizer_of(run: Run) -> Tokenizer:
    return tokenizers.restore(json.loads((run.path / "tokenizer.json").read_text()))
