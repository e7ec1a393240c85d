"""The model and the tokenizer of a run."""

import json

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.config.schema import Config
from leanlm.data import tokenizer as tokenizers
from leanlm.data.tokenizer import Tokenizer
from leanlm.launch.ranks import say
from leanlm.strategies.parallel_model import ParallelModel
from leanlm.strategies.plan import Plan


def restore(config: Config, plan: Plan, run: Run) -> tuple[Tokenizer, ParallelModel]:
    """Tokenizer and trained weights of a run under a plan, from its newest whole checkpoint, whatever plan made it.

    Raises:
        UserError: the run has no whole checkpoint.
    """
    from leanlm.training import build, checkpoint

    newest, damaged = checkpoint.newest_whole(run.checkpoints)
    for line in damaged:
        say(line)
    if newest is None:
        raise UserError(f"{run.path} has no checkpoint" + (" that is whole" if damaged else " yet"))
    tokenizer = tokenizer_of(run)
    parallel = build.parallel(config, plan, tokenizer.vocabulary)
    checkpoint.load(newest, parallel.named_parameters(), None)
    return tokenizer, parallel


def tokenizer_of(run: Run) -> Tokenizer:
    return tokenizers.restore(json.loads((run.path / "tokenizer.json").read_text()))
