"""A training step without storage and without other processes: what one rank of a plan would hold and compute.

Model, optimizer and trainer are built by the functions that training uses, and Lightning's loop runs them, under torch's
FakeTensorMode and a process group that only pretends (torch.testing's FakeProcessGroup). What is replaced stands in patches.py
and repetitions.py; DDP's reducer, which is C++ and looks into memory, by one that holds its buckets (fake_world.py).
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from leanlm.config.schema import Settings
from leanlm.data.batches import Batch
from leanlm.memory import malloc
from leanlm.models.contract import without_storage
from leanlm.planning.hardware.devices import Device
from leanlm.planning.simulation import fake_world
from leanlm.planning.simulation.patches import no_moves, of_strategy, replaced
from leanlm.planning.simulation.trace import BEFORE, Trace
from leanlm.strategies import balance
from leanlm.strategies.plan import Plan
from leanlm.training import build
from leanlm.training.callbacks.average import WeightAverage, averages

Order = dict[int, list[tuple[str, int, int]]]  # of a pipeline: device -> its work in order, see `balance.bubble`


@dataclass
class Step:
    """A simulated rank."""

    trace: Trace  # of all steps
    blocks: int  # that this rank holds, as far as they were built
    order: Order  # of a pipeline's work, else empty


def simulate(
    settings: Settings, vocabulary: int, rank: int = 0, blocks: int | None = None, device: Device | None = None
) -> Step:
    """A training step of one rank, by an optimizer that has its state.

    Args:
        settings: `plan` is resolved; the corpus is not read.
        blocks: build at most so many of each stage, of a model whose `depth` is their number; None: all.
        device: of a CPU, the copies that gloo makes count too; of a GPU, its kernels; None: torch's part on a CPU.
    """
    card = device.card if device is not None else None
    copies = device is not None and card is None
    config, plan = replace(settings.config, device={"accelerator": "cpu"}), settings.plan
    if card is None:
        plan = replace(plan, compile=False)  # on a CPU a compiler holds no more
    whole = stages(config, plan, vocabulary)
    settings = _with_blocks(replace(settings, config=config, plan=plan), whole, blocks)
    trace = Trace(vocabulary, copies, malloc.own_pages(whole.parameters), pinned=whole.recurrent and copies, card=card)
    steps = 2 if plan.step_in_backward else 1  # only its own step gives such an optimizer its state
    with fake_world.everything(trace, plan, rank):
        parallel = build.parallel_model(settings.config, settings.plan, vocabulary)
        module = build.module(settings, parallel)
        trace.mark("weights", parallel.net.parameters())
        trace.mark("buffers", parallel.net.buffers())
        kept = [each for each in build.callbacks(settings.config) if isinstance(each, WeightAverage)]
        trainer = build.trainer(settings, [_Phases(trace, ends(plan)), *kept], [], steps)
        wrap = partial(fake_world.with_buckets, trace, plan) if plan.world > 1 and not plan.splits_model else None
        with contextlib.redirect_stdout(None), replaced([*no_moves(module), *of_strategy(trainer.strategy, wrap)]):
            # a recurrence pads documents to the longest, which no simulation knows
            isolate = bool((config.data or {}).get("isolate")) and not parallel.net.carries_state
            trainer.fit(module, replace(_batches(settings, steps), isolate=isolate))
    pipeline = module.pipeline
    order = {} if pipeline is None else balance.order_of(pipeline.schedule)
    return Step(trace, sum(len(stage.blocks) for stage in parallel.stages.values()), order)


def _with_blocks(settings: Settings, whole: "Stages", blocks: int | None) -> Settings:
    """Settings of a model that has at most so many blocks in each stage; None: all."""
    config, plan = settings.config, settings.plan
    built = [len(names[:blocks]) for names in whole.split]
    if plan.pipeline > 1:
        plan = replace(plan, stage_blocks=built)
    if blocks is not None:
        config = replace(config, model={**config.model, "depth": sum(built)})
    return replace(settings, config=config, plan=plan)


@dataclass(frozen=True)
class Stages:
    """A model as a plan's pipeline splits it."""

    split: list[list[str]]  # blocks of each stage
    cost: dict[str, float]  # of each part
    alike: bool  # whether `depth` is how many blocks of one kind there are
    parameters: int
    trained: int  # of these
    elements: dict[str, int]  # of the parameters, by part
    recurrent: bool
    width: int  # of the hidden state


_known: dict[Any, Any] = {}


def stages(config: Any, plan: Plan, vocabulary: int) -> Stages:
    key = repr((config.model, config.adapter, config.sequence, vocabulary))
    if key not in _known:
        with without_storage():
            net = build.model(config, replace(plan, rnn_kernel="onednn"), vocabulary)
        shapes = {tuple((name, p.shape) for name, p in block.named_parameters()) for block in net.blocks.values()}
        parts = {"embed": net.embed, **dict(net.blocks.items()), "head": net.head}
        elements = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        count = sum(parameter.numel() for parameter in net.parameters())
        trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
        alike = len(shapes) == 1 and config.model.get("depth") == len(net.blocks)
        _known[key] = balance.costs(net), alike, count, trained, elements, net.carries_state, net.width
    cost, *rest = _known[key]
    return Stages(balance.split(cost, plan), cost, *rest)


def _batches(settings: Settings, steps: int) -> fake_world.Batches:
    config, plan = settings.config, settings.plan
    rows = config.global_batch // (plan.data_parallel_size * plan.batches_per_step)
    state = rows if plan.pipeline > 1 else 1  # one row makes a state, unless stages have agreed on shapes
    parts = [(rows if n else state, n, micro) for n in range(2 - steps, 2) for micro in range(plan.batches_per_step)]
    return fake_world.Batches(config.sequence, config.global_batch, parts)


class _Phases(pl.Callback):
    """Names the phases of a step, and what its tensors are."""

    def __init__(self, trace: Trace, ends: int) -> None:
        self.trace, self.ends = trace, ends

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.trace.mark("state", (average for _, average in averages(trainer)))
        self.step = self.micro = 0
        module.update = partial(self._update, module, module.update)
        for stage in module.parallel.stages.values():
            stage.register_forward_pre_hook(self._begin, prepend=True)
            stage.register_forward_hook(self._end)
            blocks = list(stage.blocks.values())
            for i, block in enumerate(blocks):
                here, after = (_place(number, len(blocks), self.ends) for number in (i, i + 1))
                block.register_forward_hook(partial(self._block, here, after))
        for _, parameter in module.parallel.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: self.trace.mark("gradients", [p.grad]))
        if not module.plan.step_in_backward:
            (optimizer,) = trainer.optimizers
            self.trace.enter(BEFORE)
            for _, parameter in module.parallel.named_parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            self._mark_state(optimizer)
            optimizer.zero_grad()

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, index: int) -> None:
        self.step, self.micro, self.backwards = batch.step, batch.micro, False
        self._enter("embed")

    def _enter(self, name: str) -> None:
        self.trace.enter(f"step {self.step}, micro-batch {min(self.micro, 1)}, {name}")

    def _block(self, place: str, after: str, block: Any, inputs: Any, outputs: Any) -> None:
        if torch.compiler.is_compiling() or self.backwards:  # a graph has no blocks
            return
        if outputs[0].requires_grad:
            outputs[0].register_hook(lambda _: self._enter(f"backward {place}"))
        self._enter(f"forward {after}")

    def _update(self, module: Any, update: Callable[[], None]) -> None:
        self.trace.mark("gradients", [p.grad for _, p in module.parallel.named_parameters()])
        self.trace.enter(f"step {self.step}, optimizer")
        update()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, index: int) -> None:
        self._mark_state(trainer.optimizers[0])

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.trace.enter("after training")

    def _mark_state(self, optimizer: torch.optim.Optimizer) -> None:
        state = [value for values in optimizer.state.values() for value in values.values()]
        self.trace.mark("state", [value for value in state if isinstance(value, Tensor)])

    def _begin(self, *_: Any) -> None:
        self.first, self.backwards = len(self.trace.events), False

    def _end(self, *_: Any) -> None:
        self.trace.mark_new("activations", self.first)
        self.backwards = True  # what runs again from here on belongs to the backward pass


def ends(plan: Plan) -> int:
    """Blocks at either end of a stage that have phases of their own: what grows along the others is largest at one of these.
    FSDP2 gathers the next block while one runs."""
    return 2 if plan.shard > 1 else 1


def _place(block: int, blocks: int, ends: int) -> str:
    if block == blocks:
        return "head"
    return str(block) if block < ends else str(block - blocks) if blocks - block <= ends else "middle"
