"""Configuration to objects, the same way for training, evaluation and generation."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn

from leanlm.config import Config, Settings
from leanlm.data.batches import GlobalBatches, Lanes, WholeSplit, Windows
from leanlm.data.tokenizer import Tokenizer
from leanlm.data.tokens import Tokens
from leanlm.errors import UserError
from leanlm.launch import local_world_size, rank, world_size
from leanlm.memory import kernels
from leanlm.models.contract import Model, initialize, without_storage
from leanlm.module import LanguageModel, RecurrentLanguageModel
from leanlm.precision import PRECISIONS, STOCHASTIC
from leanlm.prepare import ignored
from leanlm.strategies import balance
from leanlm.strategies.cut import Cut
from leanlm.strategies.plan import Plan


def model(config: Config, plan: Plan, vocabulary: int) -> Model:
    """The configured model in its parameters' type, without initial values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(PRECISIONS[config.precision][0])
    try:
        net = instantiate(config.model, vocabulary=vocabulary, sequence=config.sequence)
    finally:
        torch.set_default_dtype(before)
    kernels.choose(net, plan.rnn_kernel)
    return net


def cut(config: Config, plan: Plan, vocabulary: int) -> Cut:
    """What this rank holds of the configured model, with its initial weights. All ranks must call it."""
    if not plan.cuts_model:
        net = model(config, plan, vocabulary)
        initialize(net, config.seed)
        return Cut(net, plan, config.seed, device(config))
    with without_storage():
        net = model(config, plan, vocabulary)
    cost = balance.costs(net) if plan.pipeline > 1 else None
    return Cut(net, plan, config.seed, device(config), cost)


def device(config: Config) -> torch.device:
    """This rank's device."""
    if config.device["accelerator"] == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def module(settings: Settings, cut: Cut, training: bool = True) -> LanguageModel:
    config = settings.config
    kind = RecurrentLanguageModel if cut.net.carries_state else LanguageModel
    rows = config.global_batch // cut.plan.readers
    pipeline = None
    if training and cut.plan.pipeline > 1:
        from leanlm.strategies.pipeline import Pipeline

        pipeline = Pipeline(cut, rows, config.sequence)
    return kind(cut, pipeline, config.optim, config.max_steps, config.clip, config.precision == STOCHASTIC)


def training_batches(settings: Settings, tokens: Tokens, net: Model) -> GlobalBatches:
    """This rank's micro-batches."""
    config, plan = settings.config, settings.plan
    order = (Lanes if net.carries_state else Windows)(
        len(tokens.splits["train"]), config.sequence, config.global_batch, config.seed
    )
    return GlobalBatches(
        tokens.splits["train"],
        order,
        plan.readers,
        plan.reader(rank()),
        plan.batches_per_step,
        ignored(config, tokens.tokenizer),
    )


def whole_split(settings: Settings, tokenizer: Tokenizer, net: Model, numbers: Any) -> WholeSplit:
    """This rank's part of a split (or of any token numbers), each token once."""
    config, plan = settings.config, settings.plan
    overlap = config.val_overlap
    if net.carries_state:
        overlap = max(overlap, config.sequence)  # a lane first reads some text to come to a state
        length = WholeSplit.lane_length(len(numbers), config.val_lanes, overlap)
    else:
        length = config.sequence
    rows = max(1, min(plan.micro_batch(config.global_batch), -(-len(numbers) // length)))
    return WholeSplit(
        numbers,
        tokenizer.start,
        config.sequence,
        length,
        overlap,
        rows,
        plan.readers,
        plan.reader(rank()),
        ignored(config, tokenizer),
    )


def trainer(settings: Settings, callbacks: Sequence[pl.Callback], loggers: Sequence[Logger], max_steps: int = -1) -> pl.Trainer:
    """Lightning's Trainer for a plan. Intervals are in optimizer steps; Lightning counts micro-batches."""
    config, plan = settings.config, settings.plan
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    made = pl.Trainer(
        accelerator=config.device["accelerator"],
        devices=local_world_size(),
        num_nodes=world_size() // local_world_size(),
        strategy=strategy(plan),
        precision=PRECISIONS[config.precision][1],  # type: ignore[arg-type]
        accumulate_grad_batches=plan.batches_per_step,
        max_steps=max_steps,
        max_epochs=-1,
        val_check_interval=config.val_every * plan.batches_per_step,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,  # carried state and sharded parameters outlive a validation
        callbacks=list(callbacks),
        logger=list(loggers),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning asks all ranks for a SIGTERM before each batch and waits for the device's answer; `Checkpoints` has that signal
    made.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return made


def strategy(plan: Plan) -> Strategy | str:
    if plan.world == 1:
        return "auto"
    kind = CutStrategy if plan.cuts_model else BucketsOnly
    return kind(gradient_as_bucket_view=True, broadcast_buffers=False)


class BucketsOnly(DDPStrategy):
    """Lightning's DDP, of which micro-batches add to the buckets from the first on.

    Gradients that begin without a sum over the ranks are tensors of their own beside the buckets. So the first micro-batch of
    all is summed at once: the mean that the step's last one takes leaves what is a mean already as it is. `zero_grad` must
    then keep the gradients (`module.py`).
    """

    def determine_ddp_device_ids(self) -> None:
        """None: with a device's number DDP would copy row numbers to it, which Python reads on the CPU."""

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        assert self.model is not None
        if any(parameter.requires_grad and parameter.grad is None for parameter in self.model.parameters()):
            yield
            return
        with super().block_backward_sync():
            yield


class CutStrategy(DDPStrategy):
    """Lightning's DDP without its wrapper and its copying: `Cut` has placed and spread the parameters."""

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()


def loggers(config: Config, run_path: str) -> list[Logger]:
    """The loggers of `conf/logger`, for the run's folder; only rank 0 has any."""
    if rank() != 0 or not config.logger:
        return []
    nodes = [dict(node) for node in config.logger.values()]
    try:
        return [instantiate(node | {node.pop("into"): run_path}) for node in nodes if node.pop("needs")]
    except InstantiationException as error:
        raise UserError(f"the logger could not be set up: {error.__cause__ or error}") from None
