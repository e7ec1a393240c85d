"""The model and the tokenizer of a run, or of a folder in Hugging Face's layout."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from leanlm.common.errors import UserError, refuse
from leanlm.common.files import CONF, literal
from leanlm.common.run_folder import Run
from leanlm.config.arguments import typed
from leanlm.config.pretrained import begun_from_weights, is_run, weights_problems
from leanlm.config.schema import Config
from leanlm.data import tokenizer as tokenizers
from leanlm.data.tokenizer import Tokenizer
from leanlm.models.pretrained import CONFIG, read_json
from leanlm.strategies.parallel_model import ParallelModel
from leanlm.strategies.plan import Plan

FOLDERS = {"last": "checkpoints", "best": "best"}  # in the folder of a run
LONGEST = 1024  # tokens of context of a foreign model, which may know many more, where no other number is asked for


def find(name: str, sequence: int | None = None, data: Any = None, longest: int = LONGEST) -> tuple[Run, DictConfig]:
    """A run, or a folder in Hugging Face's layout, and its configuration. `sequence` and `data`: others than its own.
    `longest`: tokens of context of a foreign model that knows more.

    Raises:
        UserError: it is neither.
    """
    folder = Path(os.path.expanduser(name))
    if is_run(name) or not (folder / CONFIG).is_file():
        run = Run.find(name)
        config = run.config()
        if not config.get("adapter"):
            OmegaConf.update(config, "init_from", literal(str(run.path)) if sequence else None)  # has it as many positions?
    else:
        inside = GlobalHydra.instance().is_initialized()  # of a command of ours
        with nullcontext() if inside else initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train")
        config.init_from = literal(str(folder))
        run, config, told = Run(folder), begun_from_weights(config, []), read_json(folder / CONFIG)
        config.sequence = min(longest, told.get("max_position_embeddings", told.get("n_positions", LONGEST)))
    config.sequence = sequence or config.sequence
    if data is not None:
        own = {key: config.data[key] for key in ("tokenizer", "vocabulary") if key in config.data}
        OmegaConf.update(config, "data", literal({**data, **own}), merge=False)
    return run, config


def restore(config: Config, plan: Plan, run: Run, which: str = "last") -> "tuple[Tokenizer, ParallelModel, dict[str, Any]]":
    """Tokenizer, trained weights and `state.json` of a run under a plan, from its newest whole checkpoint, whatever plan made
    it: of the weights their average over the steps, if the run kept one. `which`: of FOLDERS; `best` is the checkpoint that
    `callbacks=best` keeps.

    Raises:
        UserError: the run has no whole checkpoint, or the weights are not those that config.json tells of.
    """
    from leanlm.training import base, build, checkpoint

    if not is_run(str(run.path)):
        refuse(weights_problems(config))
        tokenizer = tokenizer_of(run)
        return tokenizer, build.parallel_model(config, plan, tokenizer.vocabulary, str(run.path)), {}
    if which not in FOLDERS:
        raise UserError(f"checkpoint={which}: choose one of {', '.join(FOLDERS)}")
    newest = checkpoint.newest_whole(run.path / FOLDERS[which])
    if newest is None:
        what = "best checkpoint (callbacks=best keeps one)" if which == "best" else "checkpoint"
        raise UserError(f"{run.path} has no {what} yet")
    tokenizer = tokenizer_of(run)
    own = typed(run.config())[1]
    base.check_base(run, checkpoint.state_of(newest), base.base_of(own))
    parallel = build.parallel_model(config, plan, tokenizer.vocabulary, own.init_from if own.adapter else None)
    _, state = checkpoint.load(newest, parallel.named_parameters(), None, prefer_average=True)
    return tokenizer, parallel, state


def tokenizer_of(run: Run) -> Tokenizer:
    return tokenizers.given(str(run.path))
