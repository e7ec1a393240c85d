"""A world without storage and without other processes, in which one rank of a plan is built and run."""

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, _redistribute, debug
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from leanlm.data.batches import Batch
from leanlm.memory import offload
from leanlm.optimizers import low_bit
from leanlm.planning.simulation import patches, repetitions
from leanlm.planning.simulation.compiled import compiler_of
from leanlm.planning.simulation.trace import Trace, Work
from leanlm.strategies.plan import Plan


@dataclass
class Batches:
    """Rows that have a shape and no tokens, made as they are asked for; their numbers are real."""

    sequence: int
    global_batch: int
    parts: list[tuple[int, int, int]]  # rows, step and micro-batch of each batch
    isolate: bool = False  # whether documents of a row do not see each other

    def __iter__(self) -> Iterator[Batch]:
        for rows, step, micro in self.parts:
            tokens, targets = (torch.zeros(rows, self.sequence, dtype=torch.long) for _ in range(2))
            with _disable_current_modes():
                numbers = torch.arange(micro * rows, (micro + 1) * rows)
            positions = torch.zeros_like(tokens) if self.isolate else None
            yield Batch(tokens, targets, numbers, step, micro, True, self.global_batch * self.sequence, positions)


@contextmanager
def everything(trace: Trace, plan: Plan, rank: int) -> Iterator[None]:
    """Within it, what is built and run is that of one rank of a plan, without storage, and the trace records it."""
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # a question whether there is one
    file = _File(trace)
    with ExitStack() as stack:
        stack.enter_context(ranks(rank, plan.world))
        replaced = [
            *patches.meshes_with_numbers(),
            *(patches.resizing(trace.resized) if plan.shard > 1 else ()),
            *repetitions.few_pieces(trace),
            *repetitions.alike_tensors(trace),
            *(patches.sending() if plan.pipeline > 1 else ()),
            (offload, "storage", lambda like: file),
            # each simulation makes the tables of a quantised state: they weigh in every run, and these have no storage
            *((low_bit, name, cache(getattr(low_bit, name).__wrapped__)) for name in ("code_values", "nearest")),
            compiler_of(trace),
            *(patches.kernels_of_a_gpu(trace.card, trace.to_host) if trace.card is not None else ()),
        ]
        for context in (patches.replaced(replaced), FakeTensorMode(allow_non_fake_inputs=True), trace):
            stack.enter_context(context)
        yield


@contextmanager
def ranks(rank: int, world: int) -> Iterator[None]:
    """As if this process were one of several."""
    words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world} if world > 1 else {}
    here = mock.patch.object(rank_zero_only, "rank", rank)  # Lightning sets it, and does not set it back
    with here, mock.patch.dict(os.environ, {key: str(value) for key, value in words.items()}):
        if world > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            yield
        finally:
            if world > 1:
                dist.destroy_process_group()
                _forget_meshes()


def _forget_meshes() -> None:
    """DTensor remembers how it laid out the results of operations, on meshes whose groups are gone."""
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    for place, name in ((_redistribute._gen_transform_infos, "cache_clear"), (debug, "_clear_fast_path_sharding_prop_cache")):
        getattr(place, name, lambda: None)()  # torch 2.11 has not all of them


class _File(offload.Scratch):
    """What is offloaded: it takes memory from when it is used until it is released."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.held = trace, set[int]()

    def empty(self, size: Any, dtype: torch.dtype) -> Tensor:
        made = torch.empty(size, dtype=dtype)
        self.held.add(made.untyped_storage()._cdata)
        return made

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.held

    def release(self, tensor: Tensor) -> None:
        self.trace.leave(tensor)

    def forget(self, tensor: Tensor) -> None:
        self.held.discard(tensor.untyped_storage()._cdata)
        self.trace.leave(tensor)


def with_buckets(trace: Trace, plan: Plan, model: nn.Module) -> nn.Module:
    """DDP's reducer as far as memory goes: gradients are views of flat buckets, which stay. Once, before there is a state, they
    move into buckets in the order in which they came."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.empty(sum(sizes), dtype=parameters[0].dtype)
    if plan.adds_to_buckets:
        trace.enter("buckets")
        ordered = torch.empty_like(flat)
        trace.mark("gradients", [flat, ordered])
        del ordered
        trace.enter("build")
    places = dict(zip(parameters, flat.split(sizes), strict=True))

    def into_bucket(parameter: Any) -> None:
        place = places[parameter].view_as(parameter)
        if parameter.grad is not None and parameter.grad.untyped_storage()._cdata != flat.untyped_storage()._cdata:
            place.copy_(parameter.grad)
            parameter.grad = place
            trace.did(Work(collective="all-reduce", size=place.nbytes, ranks=dist.get_world_size()))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(into_bucket)
    return model
