"""Tensors in a file instead of in memory: what is needed later is written, its pages leave the process, and come back by use.

What a GPU has goes to pinned memory of its machine instead.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from leanlm.common.dtensors import layout, local, place, with_layout
from leanlm.common.errors import UserError
from leanlm.memory.malloc import LARGE
from leanlm.models import kernels

CHOICES = ("none", "activations", "optimizer", "all")
SMALLEST = LARGE  # bytes of an activation that is worth moving: smaller ones share pages with others, which stay


class HostMemory:
    """Pinned memory of a GPU's machine."""

    def __init__(self) -> None:
        self.held: set[int] = set()

    def empty(self, size: Iterable[int], dtype: torch.dtype) -> Tensor:
        made = torch.empty(torch.Size(size), dtype=dtype, pin_memory=True)
        self.held.add(made.data_ptr())
        return made

    def holds(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() in self.held

    def release(self, tensor: Tensor) -> None:
        """Nothing: it takes none of the GPU's memory."""

    def forget(self, tensor: Tensor) -> None:
        self.held.discard(tensor.data_ptr())


class Scratch:
    """Tensors in an unnamed file that ends with the process, in a folder where the disk has room."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.size = 0
        self.mapped: dict[int, mmap.mmap] = {}  # address -> what is mapped there
        self.free: dict[int, list[mmap.mmap]] = {}  # by bytes

    def empty(self, size: Iterable[int], dtype: torch.dtype) -> Tensor:
        """A tensor in the file."""
        size = torch.Size(size)
        length = -(-size.numel() * dtype.itemsize // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        free = self.free.get(length)
        part = free.pop() if free else self._grown(length)
        made = torch.frombuffer(part, dtype=dtype, count=size.numel()).view(size)
        self.mapped[made.data_ptr()] = part
        return made

    def _grown(self, length: int) -> mmap.mmap:
        """A place at the end, with room on the disk: the process would be killed when it came to write where none is left."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.file.fileno(), self.size, length)
            else:
                self.file.truncate(self.size + length)
        except OSError as error:
            raise UserError(
                f"strategy.offload has {self.size:,} bytes in {self.folder}, and there is no room for {length:,} more "
                f"({error.strerror}): set LEANLM_CACHE to a folder on a larger disk"
            ) from None
        self.size += length
        return mmap.mmap(self.file.fileno(), length, offset=self.size - length)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() in self.mapped

    def release(self, tensor: Tensor) -> None:
        """Let the pages of a tensor leave memory; it can be used as before."""
        self.mapped[tensor.data_ptr()].madvise(mmap.MADV_DONTNEED)

    def forget(self, tensor: Tensor) -> None:
        """Give the place of a tensor to others; it must not be used any more."""
        part = self.mapped.pop(tensor.data_ptr())
        part.madvise(mmap.MADV_DONTNEED)
        self.free.setdefault(len(part), []).append(part)


Storage = HostMemory | Scratch


@cache
def scratch() -> Scratch:
    """This process's file, in the folder of prepared data."""
    from leanlm.common.files import cache_folder, writable

    return Scratch(writable(cache_folder()))


@cache
def host_memory() -> HostMemory:
    return HostMemory()


def storage(like: Tensor) -> Storage:
    """Where that goes which leaves the memory of a tensor's device."""
    return host_memory() if kernels.on_gpu(like) else scratch()


def release_all() -> None:
    """Let the pages of all that is in this process's file leave memory, after something has read them."""
    for part in scratch().mapped.values() if scratch.cache_info().currsize else ():
        part.madvise(mmap.MADV_DONTNEED)


class _Kept:
    """An activation elsewhere, until it has been read; a GPU's machine does not wait for the copies."""

    def __init__(self, storage: Storage, tensor: Tensor) -> None:
        self.storage, self.strides, self.device = storage, tensor.stride(), tensor.device
        self.tensor = storage.empty(tensor.shape, tensor.dtype)
        self._as_it_was().copy_(tensor, non_blocking=True)
        storage.release(self.tensor)

    def _as_it_was(self) -> Tensor:
        return self.tensor.as_strided(self.tensor.shape, self.strides)  # kernels choose their order of summation by strides

    def read(self) -> Tensor:
        found = self._as_it_was().to(self.device, non_blocking=True, copy=True)
        self.storage.release(self.tensor)
        return found

    def __del__(self) -> None:
        self.storage.forget(self.tensor)


def _dense(tensor: Tensor) -> bool:
    """Whether its elements fill a piece of memory, in whatever order of dimensions."""
    length = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != length:
            return False
        length *= size
    return True


def activations(module: nn.Module) -> AbstractContextManager[Any]:
    """A context in which what autograd keeps for backward leaves the device's memory, but for a module's parameters. Bitwise.

    torch.autograd.graph.save_on_cpu would copy these too, and once for each layer what several read.
    """
    known: dict[tuple, tuple[StorageWeakRef, weakref.ref[_Kept]]] = {}  # what several layers read is kept once

    def pack(tensor: Tensor) -> Any:
        mine = local(tensor)
        if mine.nbytes < max(SMALLEST, 1) or not _dense(mine) or place(mine) in map(place, module.parameters()):
            return tensor.detach()
        key = place(mine), mine.storage_offset(), mine.shape, mine.stride(), mine.dtype, mine._version
        original, before = known.get(key, (None, None))
        kept = before() if before is not None and original is not None and not original.expired() else None
        if kept is None:
            kept = _Kept(storage(mine), mine.detach())
            known[key] = StorageWeakRef(mine.untyped_storage()), weakref.ref(kept)
        return kept, layout(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else with_layout(packed[0].read(), packed[1])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
