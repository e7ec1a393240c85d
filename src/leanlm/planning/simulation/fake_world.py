"""What a simulation replaces: what would need storage, other processes, or more time than its repetitions are worth."""

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.device_mesh as device_mesh
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from leanlm.common.dtensors import local
from leanlm.data.batches import Batch
from leanlm.memory import chunks, offload
from leanlm.memory.offload import Scratch
from leanlm.optimizers import build, low_bit, muon
from leanlm.optimizers.adamw import AdamW
from leanlm.planning.simulation import gpu
from leanlm.planning.simulation.compiled import compiler_of
from leanlm.planning.simulation.trace import BEFORE, Trace, Work
from leanlm.strategies.plan import Plan


def batch(rows: int, sequence: int, step: int, micro: int, global_batch: int) -> Batch:
    """So many rows of the global batch that have a shape and no tokens; their numbers are real."""
    tokens, targets = (torch.zeros(rows, sequence, dtype=torch.long) for _ in range(2))
    with _disable_current_modes():
        numbers = torch.arange(micro * rows, (micro + 1) * rows)
    return Batch(tokens, targets, numbers, step, micro, True, global_batch * sequence)


@contextlib.contextmanager
def everything(trace: Trace, plan: Plan, rank: int) -> Iterator[None]:
    """Within it, what is built and run is that of one rank of a plan, without storage, and the trace records it."""
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # a question whether there is one
    with contextlib.ExitStack() as stack:
        for context in (ranks(rank, plan.world), meshes_with_numbers(), resizing(trace, plan), few_pieces(trace),
                        alike_tensors(trace), tables_of_its_own(), sending(plan), file_of_pages(trace),
                        compiler_of(trace),
                        contextlib.nullcontext() if trace.card is None else gpu.kernels_of_a_gpu(trace.card, trace.to_host),
                        FakeTensorMode(allow_non_fake_inputs=True), trace):  # fmt: skip
            stack.enter_context(context)
        yield


@contextlib.contextmanager
def ranks(rank: int, world: int) -> Iterator[None]:
    """As if this process were one of several."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before = dict(os.environ)
    if world > 1:
        words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({key: str(value) for key, value in words.items()})
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        if world > 1:
            dist.destroy_process_group()
            _forget_meshes()
        for key in set(os.environ) - set(before):
            del os.environ[key]
        os.environ.update(before)


def _forget_meshes() -> None:
    """DTensor remembers how it spread the results of operations, on meshes whose groups are gone."""
    from torch.distributed.tensor import DTensor, _redistribute, debug

    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    for module, name in ((_redistribute._gen_transform_infos, "cache_clear"), (debug, "_clear_fast_path_sharding_prop_cache")):
        getattr(module, name, lambda: None)()  # torch 2.11 has not all of them


@contextlib.contextmanager
def meshes_with_numbers() -> Iterator[None]:
    def real(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return run

    mesh = device_mesh.DeviceMesh
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(device_mesh, "init_device_mesh", real(device_mesh.init_device_mesh)))
        for name in ("__init__", "__getitem__", "_flatten", "get_group", "get_local_rank"):
            patches.enter_context(mock.patch.object(mesh, name, real(getattr(mesh, name))))
        yield


@contextlib.contextmanager
def resizing(trace: Trace, plan: Plan) -> Iterator[None]:
    """FSDP2 empties the storage of weights that it had gathered, and fills it again, past the dispatcher: the trace is told."""
    if plan.shard == 1:
        yield
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

    def told(function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def run(tensor: Tensor) -> None:
            function(tensor)
            trace.resized(tensor)

        return run

    with contextlib.ExitStack() as patches:
        for module, name in (
            (_fsdp_param, "alloc_storage"),
            (_fsdp_param, "free_storage"),
            (_fsdp_param_group, "alloc_storage"),
        ):
            if hasattr(module, name):
                patches.enter_context(mock.patch.object(module, name, told(getattr(module, name))))
        yield


class _Sent:
    """What gloo's handle of something sent does: it holds the tensor for as long as someone holds the handle."""

    def __init__(self, work: Any, tensors: list[Tensor]) -> None:
        self.work, self.tensors = work, tensors

    def wait(self, *args: Any) -> Any:
        return self.work.wait(*args)


@contextlib.contextmanager
def sending(plan: Plan) -> Iterator[None]:
    """Several of torch's schedules keep the handles of all that they send until the step ends."""
    if plan.pipeline == 1:
        yield
        return
    from torch.distributed.pipelining import schedules

    every = schedules._batch_p2p

    def held(ops: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        tensors = [op.tensor for op in ops if op.op is dist.isend]
        return [_Sent(work, tensors) for work in every(ops, *args, **kwargs)]

    with mock.patch.object(schedules, "_batch_p2p", held):
        yield


@contextlib.contextmanager
def few_pieces(trace: Trace) -> Iterator[None]:
    """Of a head's chunks of tokens and an optimizer's pieces of a tensor those between the first and the last are alike: one is
    run, and its work counts for all. None is, where an optimizer only gets its state."""

    def few(every: Callable[..., Iterable[Any]]) -> Callable[..., Iterator[Any]]:
        def some(*args: Any) -> Iterator[Any]:
            pieces = [] if trace.gets_state else list(every(*args))
            for i, piece in enumerate(pieces[:2] + pieces[2:][-1:]):
                trace.times = max(1, len(pieces) - 2) if i == 1 else 1
                yield piece
            trace.times = 1

        return some

    with mock.patch.object(chunks, "chunks", few(chunks.chunks)), mock.patch.object(low_bit, "pieces", few(low_bit.pieces)):
        yield


@contextlib.contextmanager
def tables_of_its_own() -> Iterator[None]:
    """Each simulation makes the tables of a quantised state: they weigh in every run, and these have no storage."""

    def forget() -> None:
        low_bit.code_values.cache_clear()
        low_bit.nearest.cache_clear()

    forget()
    yield
    forget()


class _Repeated:
    """What a trace sees of something that is done once, and counts again for all that is like it."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.seen: dict[Any, Any] = {}

    def __call__(self, key: Any, run: Callable[[], Any]) -> Any:
        """What `run` returns: a new tensor, of which others with this key get one as large, or nothing."""
        trace = self.trace
        first, before = len(trace.events), Counter(trace.work[trace.phase])
        if key not in self.seen:
            made = run()
            places = {number: i for i, number in enumerate(dict.fromkeys(number for number, _ in trace.events[first:]), 1)}
            events = [(places[number], size) for number, size in trace.events[first:]]
            parts = {i: trace.parts[number] for number, i in places.items() if number in trace.parts}
            mine, layout = None, ((), ())
            if made is not None:
                mine, layout = places[trace.known[made.untyped_storage()._cdata]], (made.shape, made.stride())
            dtype = None if made is None else made.dtype
            self.seen[key] = events, parts, len(places), mine, layout, trace.work[trace.phase] - before, dtype
            return made
        events, parts, count, mine, layout, work, dtype = self.seen[key]
        base, made = trace.count, None
        trace.count += count
        trace.parts |= {base + i: part for i, part in parts.items()}
        for i, size in events:
            if i == mine:
                made = torch.empty_strided(*layout, dtype=dtype)
                if i in parts:
                    trace.mark(parts[i], [made])
            else:
                trace.events.append((base + i, size))
        trace.work[trace.phase] = before + work
        return made


@contextlib.contextmanager
def alike_tensors(trace: Trace) -> Iterator[None]:
    """Muon does the same to each stack of a shape, and AdamW in pieces to each tensor: it is done to one. Where an optimizer
    only gets its state, Muon's products are not taken."""
    products, update = muon.orthogonal, AdamW._update
    stacks, tensors = _Repeated(trace), _Repeated(trace)

    def once(stack: Tensor, *settings: Any) -> Tensor:
        if trace.gets_state:
            return stack
        return stacks((stack.shape, settings), lambda: products(stack, *settings))

    def update_once(self: AdamW, parameter: Tensor, group: dict[str, Any]) -> None:
        if parameter not in self.state or trace.phase == BEFORE:
            return update(self, parameter, group)
        mine = local(self.owned(parameter))
        key = mine.shape, mine.stride(), mine.dtype, parameter.shape, str(getattr(parameter, "placements", None))
        return tensors(key, lambda: update(self, parameter, group))

    with (
        mock.patch.object(muon, "orthogonal", once),
        mock.patch.object(AdamW, "_update", update_once),
    ):
        yield


@contextlib.contextmanager
def no_moves(module: Any) -> Iterator[None]:
    """Lightning moves a module to its device, where its tensors are already."""
    module.to = module.cpu = lambda *args, **kwargs: module
    yield
    del module.to, module.cpu


class _File(Scratch):
    """Tensors in a file: they take memory from when they are used until they are released."""

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


@contextlib.contextmanager
def file_of_pages(trace: Trace) -> Iterator[None]:
    """What is offloaded goes to a file that only counts."""
    file = _File(trace)
    with contextlib.ExitStack() as patches:
        for module, name in ((offload, "scratch"), (build, "scratch"), (build, "host_memory")):
            patches.enter_context(mock.patch.object(module, name, return_value=file))
        yield


def with_buckets(trace: Trace, plan: Plan, model: nn.Module) -> nn.Module:
    """DDP's reducer as far as memory goes: gradients are views of flat buckets, which stay. Once, before there is a state, they
    move into buckets in the order in which they came."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flat = torch.empty(sum(parameter.numel() for parameter in parameters), dtype=parameters[0].dtype)
    if plan.adds_to_buckets:
        trace.enter("buckets")
        ordered = torch.empty_like(flat)
        trace.mark("gradients", [flat, ordered])
        del ordered
        trace.enter("build")
    places = dict(zip(parameters, flat.split([parameter.numel() for parameter in parameters]), strict=True))

    def into_bucket(parameter: Any) -> None:
        place = places[parameter].view_as(parameter)
        if parameter.grad is not None and parameter.grad.untyped_storage()._cdata != flat.untyped_storage()._cdata:
            place.copy_(parameter.grad)
            parameter.grad = place
            payload = Work(collective="all-reduce", size=place.numel() * place.element_size(), ranks=dist.get_world_size())
            trace.work[trace.phase][payload] += 1

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(into_bucket)
    return model
