"""What a training step allocates and computes, seen operation by operation, with real tensors or with fake ones."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leanlm.common.dtensors import here, place
from leanlm.memory.malloc import ENDS, LARGE
from leanlm.planning.simulation import gpu
from leanlm.planning.simulation.operations import caller, dispatches, flops_of, lstm_scratch, lstm_workspace, read_again

WORKSPACES = "workspaces"  # the part that is cuBLAS's
BEFORE = "before"  # phase in which the optimizer gets its state, which no run has
COLLECTIVES = {"allreduce": "all-reduce", "all_reduce": "all-reduce", "allgather": "all-gather", "all_gather": "all-gather",
               "reduce_scatter": "reduce-scatter", "send": "send", "recv": "recv", "broadcast": "broadcast"}  # fmt: skip


class Work(NamedTuple):
    """One operation: what bounds its time."""

    flops: int = 0  # floating-point operations in matrix products, attention and recurrences
    moved: int = 0  # bytes that it reads and writes
    fresh: int = 0  # of these, bytes of new pages beyond `small`; on a CPU what is freed goes back to the system
    small: int = 0  # bytes that come as slowly as pages of 4 KiB do: of each tensor as many as `malloc.ENDS`
    dtype: str = ""  # of its result, or its factors
    collective: str = ""  # kind of communication; empty: none
    size: int = 0  # bytes of the payload
    ranks: int = 1  # that take part
    launches: int = 1  # of a GPU's kernels, one after the other
    dispatches: int = 1  # operations that take as long to start


class Trace(TorchDispatchMode):
    """Records every storage that comes and goes, and every operation, by phase.

    Under FakeTensorMode it must be entered after it. What is asked of a fake value (`if lost.any()`) is answered False.

    Args:
        vocabulary: token types; what has so many rows or columns is called logits.
        copies: count the copy that gloo makes of what it gathers or scatters (measured: all of the payload, until it is done).
        own: bytes from which on a tensor has pages of its own.
        pinned: whether the heap of smaller ones never shrinks: what a recurrence makes last, at its end, goes last too.
        card: the GPU whose kernels are meant; None: a CPU's.
    """

    def __init__(self, vocabulary: int, copies: bool = False, own: int = LARGE, pinned: bool = False,
                 card: Any = None) -> None:  # fmt: skip
        super().__init__()
        self.vocabulary, self.copies, self.own, self.pinned, self.card = vocabulary, copies, own, pinned, card
        self.events: list[tuple[int, int]] = []  # (number of a storage, its bytes; negative when it goes), in order
        self.phases: list[tuple[int, str]] = [(0, "build")]  # (index of the first event, name), in order
        self.work: dict[str, Counter[Work]] = defaultdict(Counter)  # phase -> how often each kind of operation ran in it
        self.parts: dict[int, str] = {}  # number of a storage -> what it is, of those in `parts.PARTS`
        self.known: dict[int, int] = {}  # address of a storage that lives -> its number
        self.sizes: dict[int, int] = {}
        self.away: dict[int, int] = {}  # address of a storage whose pages have left -> its bytes
        self.summed: set[int] = set()  # storages of gradients that autograd has summed
        self.beside: list[int] = []  # by the operation at hand, taken beside its results
        self.in_flight: tuple[int, int] | None = None  # number and bytes of gloo's copy
        self.handles: set[bool] = set()  # of cuBLAS: whether one is of autograd's thread
        self.count = 0
        self.times = 1  # that what runs now counts for
        self.phase, self.counting = "build", True

    def uncounted(self) -> AbstractContextManager[Any]:
        """Within it, storages come and go, and operations are no work."""
        return mock.patch.object(self, "counting", False)

    def enter(self, phase: str) -> None:
        """What comes next belongs to another phase."""
        self._copied()
        self.phase = phase
        self.phases.append((len(self.events), phase))

    def pieces(self) -> list[tuple[str, int, int]]:
        """Name of each phase, its first event and that of the next, in order."""
        ends = [first for first, _ in self.phases[1:]] + [len(self.events)]
        return [(name, first, end) for (first, name), end in zip(self.phases, ends, strict=True)]

    def mark(self, part: str, tensors: Iterable[Any]) -> None:
        """Say what these tensors are; None: one that is gone already."""
        for tensor in tensors:
            if tensor is not None and place(tensor) in self.known:
                self.parts[self.known[place(tensor)]] = part

    def mark_new(self, part: str, since: int) -> None:
        """Say what those storages are that came after event number `since`, live, and are not known for something else."""
        living = set(self.known.values())
        for number, size in self.events[since:]:
            if size > 0 and number in living:
                self.parts.setdefault(number, part)

    def resized(self, tensor: Any) -> None:
        """A storage was emptied, or got its memory again: torch resizes it past the dispatcher."""
        number, now = self.known[place(tensor)], here(tensor).untyped_storage().nbytes()
        if now != self.sizes[number]:
            self.did(Work(0, 0, *self._pages([now])))
            self._resize(number, now)

    def leave(self, tensor: Any) -> None:
        """The pages of a tensor leave memory until it is used again."""
        key = place(tensor)
        number = self.known[key]
        if key not in self.away:
            self.away[key] = size = self.sizes[number]
            if self.card is None:
                self.did(Work(small=size))
            else:
                self.to_host(2 * size)
            self._resize(number, 0)

    def to_host(self, size: int) -> None:
        """So many bytes go to the memory of a GPU's machine, or come from there."""
        self.did(Work(collective="host", size=size))

    def did(self, work: Work) -> None:
        """Something was done in this phase."""
        self.work[self.phase][work] += self.times

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # of each fake tensor it is asked often
            return args[0].fake_device
        kwargs = kwargs or {}
        inputs, faked = _tensors((args, kwargs)), active_fake_mode() is not None
        if faked and inputs and all(type(part) is Tensor for part in inputs):  # row numbers and meshes, which have values
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self._come_back(inputs)
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            return {torch.bool: False}.get(args[0].dtype, 1)
        sums = faked and name == "aten::add" and len(inputs) == 2 and _by_autograd()
        if sums and self.known.get(place(inputs[0])) in self.summed:  # as it does with real tensors
            func, name, sums = torch.ops.aten.add_.Tensor, "aten::add_", False
        out = self._run(func, name, args, kwargs)
        fresh = self._allocated(func, name, args, out)
        if sums and fresh:
            self.summed.add(self.known[place(fresh[0])])
        if "mkldnn_rnn_layer" in name:
            backward = name.endswith("backward")
            scratch = lstm_scratch(backward, args, self.sizes[self.known[place(args[-1])]] if backward else 0)
            self._take(scratch)
            self._take(-scratch)
        if self.counting:
            self._count(func, name, args, kwargs, out, inputs, fresh)
        return out

    def _run(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """An operation's result, where torch's fake kernel does not know it all."""
        if name == "aten::nonzero":  # of no one knows how many: the most that there can be
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        out = gpu.run(func, args, kwargs)
        if name == "aten::mkldnn_rnn_layer" and kwargs.get("train", args[-1]):  # torch's fake kernel leaves the workspace empty
            asked, touched = lstm_workspace(*args[0].shape, len(args[2]) // 4, args[0].dtype)
            out = *out[:3], args[0].new_empty(asked, dtype=torch.uint8)
            self._see(out[3], name, touched)
        return out

    def _allocated(self, func: Any, name: str, args: Any, out: Any) -> list[Tensor]:
        """Those of an operation's results that are new."""
        results, fresh = _tensors(out), []
        for part in results if self.card is None else gpu.allocations(func, args, results, self.card.threads):
            if isinstance(part, int):
                self._take(part)
            elif self._see(part, name):
                fresh.append(part)
        return fresh

    def _see(self, tensor: Tensor, name: str, touched: int | None = None) -> bool:
        """Whether an operation `name` has made the storage of a tensor, of which so many bytes are `touched`, None: all."""
        storage, key = here(tensor).untyped_storage(), place(tensor)
        if key in self.known or tensor.device.type == "meta":
            return False
        size = storage.nbytes() if touched is None else touched
        logits = tensor.dim() > 1 and self.vocabulary in (tensor.shape[0], tensor.shape[-1])
        sent = name.startswith(("c10d::", "_c10d_functional::", "fsdp::"))
        self.known[key] = number = self._new(size, "buffers" if sent else "logits" if logits else None)
        self.sizes[number] = size
        weakref.finalize(storage, self._gone, key, number)
        return True

    def _gone(self, key: int, number: int) -> None:
        if self.known.get(key) == number:
            del self.known[key]
            self.away.pop(key, None)
        self.events.append((number, -self.sizes.pop(number)))

    def _new(self, size: int, part: str | None = None) -> int:
        """The number of a storage that comes."""
        self.count += 1
        self.events.append((self.count, size))
        if part is not None:
            self.parts[self.count] = part
        return self.count

    def _resize(self, number: int, size: int) -> None:
        self.events.append((number, size - self.sizes[number]))
        self.sizes[number] = size

    def _come_back(self, tensors: list[Tensor]) -> None:
        """What had left memory is used."""
        for key in map(place, tensors) if self.away else ():
            if key in self.away:
                self._resize(self.known[key], self.away.pop(key))

    def _take(self, size: int) -> None:
        """An operation takes so much beside its results; negative: what it took last goes."""
        if size > 0:
            self.beside.append(self._new(size))
        elif size:
            self.events.append((self.beside.pop(), size))

    def _workspace(self) -> None:
        """cuBLAS takes one for each thread that multiplies, when it first does."""
        of_autograd = torch._C._current_graph_task_id() != -1
        if of_autograd not in self.handles and self.phase != BEFORE:
            self.handles.add(of_autograd)
            self._new(self.card.workspace, WORKSPACES)

    def _copied(self) -> None:
        """gloo is done with its last copy."""
        if self.in_flight:
            number, size = self.in_flight
            self.events.append((number, -size))
            self.in_flight = None

    def _count(
        self, func: Any, name: str, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], fresh: Sequence[Tensor]
    ) -> None:
        space, _, kind = name.partition("::")
        if space in ("c10d", "_c10d_functional"):
            return self._count_collective(kind, args, [*inputs, *fresh])
        writes = fresh or ([args[0]] if kind.endswith("_") and inputs else [])
        if not writes and "out" not in kwargs:  # a view
            return self.did(Work(dispatches=dispatches()))
        flops = flops_of(func, args, kwargs, out)
        moved = sum(map(_bytes, {id(part): part for part in [*inputs, *fresh]}.values())) + read_again(func, args)
        if flops and self.card is not None and func._overloadpacket not in gpu.RECURRENT:
            self._workspace()
        made = inputs[1] if flops and len(inputs) > 1 else writes[0] if writes and isinstance(writes[0], Tensor) else inputs[0]
        dtype = str(made.dtype).removeprefix("torch.")  # of a product that of its factors, whatever it is summed in
        launches = 1 if self.card is None else gpu.launches(func, args)
        pages = self._pages(map(_bytes, fresh))
        return self.did(Work(flops, moved, *pages, dtype, launches=launches, dispatches=dispatches()))

    def _count_collective(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        kind = next((kind for key, kind in COLLECTIVES.items() if key in name), "")
        if kind:
            payload = max(map(_bytes, tensors))
            self.did(Work(collective=kind, size=payload, ranks=_ranks(args)))
            self._copied()
            if self.copies and payload and kind in ("all-gather", "reduce-scatter"):
                self.in_flight = self._new(payload, "buffers"), payload

    def _pages(self, sizes: Iterable[int]) -> tuple[int, int]:
        """`fresh` and `small` bytes of new tensors, see `Work`."""
        paged = [size for size in sizes if size >= self.own]
        small = sum(min(size, ENDS) for size in paged)
        return sum(paged) - small, small


def _tensors(tree: Any) -> list[Tensor]:
    return [part for part in tree_leaves(tree) if isinstance(part, Tensor)]


def _by_autograd() -> bool:
    """Whether autograd's engine itself has called the operation at hand, to sum gradients; not a backward in Python."""
    return caller(2).f_code.co_name == "_engine_run_backward"


def _bytes(tensor: Any) -> int:
    return here(tensor).nbytes


def _ranks(args: Any) -> int:
    """Of the group in the arguments of a collective operation."""
    for part in args:
        if isinstance(part, str) and not part.isalpha():
            return _resolve_process_group(part).size()  # type: ignore[arg-type]
        if isinstance(part, torch.ScriptObject):
            return int(part.size()) if hasattr(part, "size") else dist.ProcessGroup.unbox(part).size()
    return 1
