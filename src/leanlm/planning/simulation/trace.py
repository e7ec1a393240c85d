"""What a training step allocates and computes, seen operation by operation, with real tensors or with fake ones."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leanlm.memory.malloc import ENDS, LARGE
from leanlm.planning.simulation import gpu
from leanlm.planning.simulation.operations import caller, dispatches, flops_of, lstm_scratch, lstm_workspace, read_again

WORKSPACES = "workspaces"  # the part that is cuBLAS's
HOST = "host"  # kind of communication
BEFORE = "before"  # phase in which the optimizer gets its state, which no run has
COLLECTIVES = {"allreduce": "all-reduce", "all_reduce": "all-reduce", "allgather": "all-gather", "all_gather": "all-gather",
               "reduce_scatter": "reduce-scatter", "send": "send", "recv": "recv", "broadcast": "broadcast"}  # fmt: skip
DEVICE = torch.ops.prim.device.default


class Work(NamedTuple):
    """One operation: what bounds its time.

    Attributes:
        flops: floating-point operations in matrix products, attention and recurrences.
        moved: bytes that it reads and writes.
        fresh: of these, bytes of new pages beyond `small`; on a CPU what is freed goes back to the system.
        small: bytes that come as slowly as pages of 4 KiB do: of each tensor as many as `malloc.ENDS`.
        dtype: of its result, or its factors.
        collective: kind of communication; empty: none.
        size: bytes of the payload.
        ranks: that take part.
        launches: of a GPU's kernels, one after the other.
        starts: operations that take as long to start.
    """

    flops: int = 0
    moved: int = 0
    fresh: int = 0
    small: int = 0
    dtype: str = ""
    collective: str = ""
    size: int = 0
    ranks: int = 1
    launches: int = 1
    dispatches: int = 1


class Trace(TorchDispatchMode):
    """Records every storage that comes and goes, and every operation, by phase.

    Under FakeTensorMode it must be entered after it. What is asked of a fake value (`if lost.any()`) is answered False.

    Args:
        vocabulary: token types; what has so many rows or columns is called logits.
        copies: count the copy that gloo makes of what it gathers or scatters (measured: all of the payload, until it is done).
        own: bytes from which on a tensor has pages of its own.
        pinned: whether the heap of smaller ones never shrinks: what a recurrence makes last, at its end, goes last too.
        card: the GPU whose kernels are meant; None: a CPU's.

    Attributes:
        events: (number of a storage, its bytes; negative when it goes), in order.
        phases: (index of the first event, name), in order.
        work: phase -> how often each kind of operation ran in it.
    """

    def __init__(self, vocabulary: int, copies: bool = False, own: int = LARGE, pinned: bool = False,
                 card: Any = None) -> None:  # fmt: skip
        super().__init__()
        self.vocabulary, self.copies, self.own, self.pinned, self.card = vocabulary, copies, own, pinned, card
        self.in_flight = (0, 0)  # number and bytes of such a copy
        self.events: list[tuple[int, int]] = []
        self.phases: list[tuple[int, str]] = [(0, "build")]
        self.work: dict[str, Counter[Work]] = defaultdict(Counter)
        self.parts: dict[int, str] = {}
        self.known: dict[int, int] = {}  # address of a storage that lives -> its number
        self.sizes: dict[int, int] = {}
        self.away: dict[int, int] = {}  # address of a storage whose pages have left -> its bytes
        self.sums: set[int] = set()  # storages of gradients that autograd has summed
        self.allocations: list[int] = []  # by the operation at hand, beside its results
        self.handles: set[bool] = set()  # of cuBLAS: whether one is of autograd's thread
        self.count = 0
        self.phase, self.faked = "build", False
        self.times = 1  # that what runs now counts for
        self.counting = True

    def __enter__(self) -> "Trace":
        self.faked = active_fake_mode() is not None
        super().__enter__()
        return self

    @property
    def gets_state(self) -> bool:
        """Whether nothing counts of what an optimizer does but its state; a heap that never shrinks keeps the rest as well."""
        return self.phase == BEFORE and not self.pinned

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within it, storages come and go, and operations are no work."""
        before, self.counting = self.counting, False
        try:
            yield
        finally:
            self.counting = before

    def enter(self, phase: str) -> None:
        """What comes next belongs to another phase."""
        self._copy(0)
        self.phase = phase
        self.phases.append((len(self.events), phase))

    def mark(self, part: str, tensors: Iterable[Any]) -> None:
        """Say what these tensors are; None: one that is gone already."""
        for tensor in (tensor for tensor in tensors if tensor is not None):
            number = self.known.get(_local(tensor).untyped_storage()._cdata)
            if number is not None:
                self.parts[number] = part

    def mark_new(self, part: str, since: int) -> None:
        """Say what those storages are that came after event number `since`, live, and are not known for something else."""
        living = set(self.known.values())
        for number, size in self.events[since:]:
            if size > 0 and number in living and self.parts.get(number) is None:
                self.parts[number] = part

    def resized(self, tensor: Any) -> None:
        """A storage was emptied, or got its memory again: torch resizes it past the dispatcher."""
        storage = _local(tensor).untyped_storage()
        number, now = self.known[storage._cdata], storage.nbytes()
        if now != self.sizes[number]:
            self.work[self.phase][Work(0, 0, *_pages([now] if now >= self.own else []))] += self.times
            self.events.append((number, now - self.sizes[number]))
            self.sizes[number] = now

    def leave(self, tensor: Any) -> None:
        """The pages of a tensor leave memory until it is used again."""
        key = _local(tensor).untyped_storage()._cdata
        number = self.known[key]
        if key not in self.away:
            self.away[key] = self.sizes[number]
            if self.card is None:
                self.work[self.phase][Work(small=self.sizes[number])] += self.times
            else:
                self.to_host(2 * self.sizes[number])
            self.events.append((number, -self.sizes[number]))
            self.sizes[number] = 0

    def to_host(self, size: int) -> None:
        """So many bytes go to the memory of a GPU's machine, or come from there."""
        self.work[self.phase][Work(collective=HOST, size=size)] += self.times

    def _return(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            key = _local(tensor).untyped_storage()._cdata
            if key in self.away:
                number = self.known[key]
                self.sizes[number] = self.away.pop(key)
                self.events.append((number, self.sizes[number]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:  # of each fake tensor it is asked often
            return args[0].fake_device
        kwargs = kwargs or {}
        inputs = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        plain = all(type(part) is Tensor for part in inputs)  # row numbers and device meshes, which have values
        if self.faked and inputs and plain:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if self.away:
            self._return(inputs)
        name = func._schema.name
        summed = self.faked and name == "aten::add" and len(inputs) == 2 and _by_autograd()
        if summed and self.known.get(_local(inputs[0]).untyped_storage()._cdata) in self.sums:  # as it does with real tensors
            func, name, summed = torch.ops.aten.add_.Tensor, "aten::add_", False
        if name == "aten::_local_scalar_dense":
            return {torch.bool: False}.get(args[0].dtype, 1)
        if name == "aten::nonzero":  # of no one knows how many: the most that there can be
            out = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        else:
            out = gpu.run(func, args, kwargs)
        if name == "aten::mkldnn_rnn_layer" and kwargs.get("train", args[-1]):  # torch's fake kernel leaves the workspace empty
            asked, touched = lstm_workspace(*args[0].shape, len(args[2]) // 4, args[0].dtype)
            out = *out[:3], args[0].new_empty(asked, dtype=torch.uint8)
            self._see(out[3], name, touched)
        found = [part for part in tree_leaves(out) if isinstance(part, Tensor)]
        fresh = []
        for part in found if self.card is None else gpu.allocations(func, args, found, self.card.threads):
            if isinstance(part, int):
                self._beside(part)
            elif self._see(part, name):
                fresh.append(part)
        if summed and fresh:
            self.sums.add(self.known[_local(fresh[0]).untyped_storage()._cdata])
        if "mkldnn_rnn_layer" in name:
            backward = name.endswith("backward")
            touched = self.sizes[self.known[args[-1].untyped_storage()._cdata]] if backward else 0
            self._passing(lstm_scratch(backward, args, touched))
        if self.counting:
            self._count(func, name, args, kwargs, out, inputs, fresh)
        return out

    def _see(self, tensor: Tensor, name: str, touched: int | None = None) -> bool:
        storage = _local(tensor).untyped_storage()
        key = storage._cdata
        if key in self.known or tensor.device.type == "meta":
            return False
        size = storage.nbytes() if touched is None else touched
        self.count += 1
        self.known[key] = number = self.count
        self.sizes[number] = size
        self.events.append((number, size))
        if name.startswith(("c10d::", "_c10d_functional::", "fsdp::")):
            self.parts[number] = "buffers"
        elif tensor.dim() > 1 and self.vocabulary in (tensor.shape[0], tensor.shape[-1]):
            self.parts[number] = "logits"
        weakref.finalize(storage, self._gone, key, number)
        return True

    def _gone(self, key: int, number: int) -> None:
        if self.known.get(key) == number:
            del self.known[key]
            self.away.pop(key, None)
        self.events.append((number, -self.sizes.pop(number)))

    def _passing(self, size: int) -> None:
        """What an operation takes beside its results, and gives back before it ends."""
        self._beside(size)
        self._beside(-size)

    def _beside(self, size: int) -> None:
        """It takes so much; negative: what it took last goes."""
        if size > 0:
            self.count += 1
            self.allocations.append(self.count)
        if size:
            self.events.append((self.allocations[-1] if size > 0 else self.allocations.pop(), size))

    def _workspace(self, of_autograd: bool) -> None:
        """cuBLAS takes one for each thread that multiplies, when it first does."""
        if of_autograd not in self.handles and self.phase != BEFORE:
            self.handles.add(of_autograd)
            self.count += 1
            self.parts[self.count] = WORKSPACES
            self.events.append((self.count, self.card.workspace))

    def _copy(self, size: int) -> None:
        """The last copy is done with; there may be another."""
        number, before = self.in_flight
        if before:
            self.events.append((number, -before))
        self.in_flight = (0, 0)
        if size and self.copies:
            self.count += 1
            self.in_flight = self.count, size
            self.parts[self.count] = "buffers"
            self.events.append((self.count, size))

    def _count(
        self, func: Any, name: str, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], fresh: Sequence[Tensor]
    ) -> None:
        space, _, kind = name.partition("::")
        if space in ("c10d", "_c10d_functional"):
            collective = next((its for key, its in COLLECTIVES.items() if key in kind), "")
            if collective:
                tensors = [*inputs, *fresh]
                payload = max(map(_bytes, tensors))
                self.work[self.phase][Work(collective=collective, size=payload, ranks=_ranks(args))] += self.times
                self._copy(payload if collective in ("all-gather", "reduce-scatter") else 0)
            return
        writes = fresh or ([args[0]] if kind.rstrip("_") != kind and inputs else [])
        if not writes and "out" not in kwargs:  # a view
            self.work[self.phase][Work(dispatches=dispatches())] += self.times
            return
        flops = flops_of(func, args, kwargs, out)
        moved = sum(map(_bytes, {id(part): part for part in [*inputs, *fresh]}.values())) + read_again(func, args)
        pages = _pages(size for size in map(_bytes, fresh) if size >= self.own)
        if flops and self.card is not None and func._overloadpacket not in gpu.RECURRENT:
            self._workspace(torch._C._current_graph_task_id() != -1)
        made = inputs[1] if flops and len(inputs) > 1 else writes[0] if writes and isinstance(writes[0], Tensor) else inputs[0]
        dtype = str(made.dtype).removeprefix("torch.")  # of a product that of its factors, whatever it is summed in
        launched = 1 if self.card is None else gpu.launches(func, args)
        kind_of_work = Work(flops, moved, *pages, dtype, launches=launched, dispatches=dispatches())
        self.work[self.phase][kind_of_work] += self.times


def _by_autograd() -> bool:
    """Whether autograd's engine itself has called the operation at hand, to sum gradients; not a backward in Python."""
    return caller(2).f_code.co_name == "_engine_run_backward"


def _local(tensor: Any) -> Tensor:
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


def _bytes(tensor: Any) -> int:
    mine = _local(tensor)
    return mine.numel() * mine.element_size()


def _pages(sizes: Iterable[int]) -> tuple[int, int]:
    """`fresh` and `small` bytes of new tensors, see `Work`."""
    every = list(sizes)
    small = sum(min(size, ENDS) for size in every)
    return sum(every) - small, small


def _ranks(args: Any) -> int:
    """Of the group in the arguments of a collective operation."""
    for part in args:
        if isinstance(part, str) and not part.isalpha():
            from torch.distributed.distributed_c10d import _resolve_process_group

            return _resolve_process_group(part).size()  # type: ignore[arg-type]
        if isinstance(part, torch.ScriptObject) and hasattr(part, "size"):
            return int(part.size())
        if isinstance(part, torch.ScriptObject):
            import torch.distributed as dist

            return dist.ProcessGroup.unbox(part).size()
    return 1
