"""Configuration to objects, the same way for training, evaluation and generation."""

import hashlib
import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from leanlm.common.errors import UserError
from leanlm.common.precision import PRECISIONS, STOCHASTIC
from leanlm.common.run_folder import Run
from leanlm.config.arguments import made
from leanlm.config.callbacks import FIRST_RANK, class_name
from leanlm.config.pretrained import is_run
from leanlm.config.schema import Config, Settings
from leanlm.launch.ranks import local_world_size, rank, world_size
from leanlm.memory.hits import loss_and_hits
from leanlm.models import kernels
from leanlm.models.contract import Model, initial, initialize, without_storage
from leanlm.models.pretrained import Weights
from leanlm.strategies import balance
from leanlm.strategies.lightning import strategy
from leanlm.strategies.parallel_model import ParallelModel
from leanlm.strategies.patches import without_asking_for_sigterm
from leanlm.strategies.plan import Plan
from leanlm.training import checkpoint, data
from leanlm.training.lightning_module import LanguageModel


def model(config: Config, plan: Plan, vocabulary: int) -> Model:
    """The configured model in its parameters' type, without initial values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(PRECISIONS[config.precision][0])
    try:
        net = made("model", config.model, vocabulary=vocabulary, sequence=config.sequence)
        if config.adapter:
            made("adapter", config.adapter).apply(net)
    finally:
        torch.set_default_dtype(before)
    kernels.choose(net, plan.rnn_kernel)
    return net


def parallel_model(config: Config, plan: Plan, vocabulary: int, source: str | None = None) -> ParallelModel:
    """What this rank holds of the configured model, with initial weights. All ranks must call it.

    Args:
        source: where its own weights come from, a folder in Hugging Face's layout or a run's; None: they are drawn. Those of an
            adapter always are.

    Raises:
        UserError: `source` cannot be used.
    """
    weights = Weights(Path(source)) if source and not is_run(source) else None
    with without_storage() if plan.splits_model or weights else nullcontext():
        net = model(config, plan, vocabulary)
    if not plan.splits_model and weights is None:
        initialize(net, config.seed)

    def value_of(name: str, like: Tensor) -> Tensor:
        if weights is None or (config.adapter and like.requires_grad) or name not in weights:
            return initial(net, config.seed, name, like)
        return weights(name, like)

    cost = balance.costs(net) if plan.pipeline > 1 else None
    parallel = ParallelModel(net, plan, config.seed, device(config), cost, PRECISIONS[config.precision][1], value_of)
    if source and weights is None:
        whole = checkpoint.newest_whole(Run(source).checkpoints)
        if whole is None:
            raise UserError(f"init_from={source}: it has no whole checkpoint")
        own = parallel.frozen_parameters() if config.adapter else parallel.named_parameters()
        checkpoint.load(whole, own, None, prefer_average=True)
    return parallel


def device(config: Config) -> torch.device:
    """This rank's device."""
    if config.device["accelerator"] == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def module(settings: Settings, parallel: ParallelModel, training: bool = True) -> LanguageModel:
    config = settings.config
    rows = config.global_batch // parallel.plan.data_parallel_size
    pipeline = None
    if training and parallel.plan.pipeline > 1:
        from leanlm.strategies.pipeline import Pipeline

        pipeline = Pipeline(parallel, rows, config.sequence)
    if data.objective(config).chooses and (last := parallel.stages.get(parallel.last)):
        last.score = partial(loss_and_hits, parallel.net.head)
    chance = config.seed if config.precision == STOCHASTIC else None
    return LanguageModel(
        parallel, pipeline, config.optim, config.max_steps, config.clip, chance, len(settings.corpus.sources) or 1
    )


def trainer(
    settings: Settings,
    callbacks: Sequence[pl.Callback],
    loggers: Sequence[Logger],
    max_steps: int = -1,
    folder: Path | None = None,
) -> pl.Trainer:
    """Lightning's Trainer for a plan. Intervals are in optimizer steps; Lightning counts micro-batches. `folder`: of the run,
    where a callback may write."""
    config, plan = settings.config, settings.plan
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning = pl.Trainer(
        accelerator=device(config).type,  # Lightning's "auto" would take what leanlm does not know, such as a Mac's GPU
        devices=local_world_size(),
        num_nodes=world_size() // local_world_size(),
        strategy=strategy(plan),
        max_steps=max_steps,
        max_epochs=-1,
        val_check_interval=config.val_every * plan.batches_per_step,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,  # carried state and sharded parameters outlive a validation
        callbacks=list(callbacks),
        logger=list(loggers),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return without_asking_for_sigterm(lightning)


def loggers(config: Config, run_path: Path, step: int) -> list[Logger]:
    """The loggers of `conf/logger`, for the run's folder and the step from which it goes on; only rank 0 has any."""
    if rank() != 0:
        return []
    name = hashlib.sha256(str(run_path.resolve()).encode()).hexdigest()[:16]
    given = {"into": str(run_path), "step_into": step + 1 if step else None, "name_into": name}
    return [
        _made("logger", {**node, **{node[key]: value for key, value in given.items() if key in node}}, ("needs", *given))
        for node in (config.logger or {}).values()
    ]


def callbacks(config: Config) -> list[pl.Callback]:
    """The callbacks of `conf/callbacks`; those that write to loggers where these are."""
    nodes = (config.callbacks or {}).values()
    return [_made("callbacks", node, ("needs",)) for node in nodes if rank() == 0 or class_name(node) not in FIRST_RANK]


def _made(group: str, node: dict[str, Any], ours: tuple[str, ...]) -> Any:
    """What a node's `_target_` makes of its other keys, but for those that are leanlm's own."""
    try:
        return made(group, node, ours)
    except Exception as error:  # whatever it is that a class of others' does not like
        raise UserError(f"{group}: {node['_target_']} could not be set up: {error}".splitlines()[0]) from None
