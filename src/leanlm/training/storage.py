"""How torch.distributed.checkpoint writes and reads here: what is offloaded comes back a tensor at a time, numbers that are not
finite are not written, and nothing that is read can run code.

checkpoint.py imports it with the first checkpoint: torch's module takes its time.
"""

import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

from leanlm.common.errors import UserError
from leanlm.common.run_folder import FULL
from leanlm.launch.ranks import patient
from leanlm.memory import offload

# What `.metadata` names (torch 2.11 to 2.13), beside the types of numbers and the path where it was written.
KNOWN = {
    f"{each.__module__}.{each.__qualname__}": each
    for each in (
        metadata.Metadata, metadata.MetadataIndex, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata, metadata.TensorProperties, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo, torch.Size,
    )
} | {"torch.serialization._get_layout": lambda name: torch.strided}  # fmt: skip


class Writer(dcp.FileSystemWriter):
    """Says why a file could not be written."""

    def write_data(self, *args: Any) -> Any:
        try:
            return super().write_data(*args)
        except RuntimeError as error:  # of torch.save, which hides what the system has said
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


class WritesFinite(dcp.DefaultSavePlanner):
    """Refuses numbers that are not finite: whoever resumes from them has lost the run."""

    def resolve_data(self, write_item: Any) -> Any:
        offload.release_all()  # all of it together is what may not fit
        data = super().resolve_data(write_item)
        if isinstance(data, Tensor) and data.is_floating_point() and data.numel():
            ends = torch.stack(torch.aminmax(data.detach())).tolist()  # which makes no copy, as `isfinite` does
            if not all(map(math.isfinite, ends)):
                raise UserError(f"{write_item.index.fqn} is not finite: lower optim.lr or clip")
        return data


class Reader(dcp.FileSystemReader):
    """Makes nothing of `.metadata`, which torch unpickles, but descriptions of tensors.

    Raises:
        UserError: it asks for something else.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        path = Path(self.path, ".metadata")
        try:
            with open(path, "rb") as file:
                return _Unpickler(file).load()
        except Exception as error:  # whatever a damaged pickle comes to
            raise UserError(f"{path} cannot be read: {error}") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = KNOWN.get(f"{module}.{name}", getattr(torch, name, None) if module == "torch" else None)
        if found in KNOWN.values() or isinstance(found, torch.dtype):
            return found
        if module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return PurePath
        raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")


class ReadsTensors(dcp.DefaultLoadPlanner):
    """Reads tensors alone: torch unpickles anything else."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise UserError(f"{read_item.dest_index.fqn} is not a tensor in this checkpoint")

    def resolve_tensor(self, read_item: Any) -> Tensor:
        offload.release_all()
        return super().resolve_tensor(read_item)


def save(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write this rank's tensors by their global names. All ranks must call it."""
    dcp.save(tensors, storage_writer=Writer(folder), planner=WritesFinite(), process_group=patient(), no_dist=patient() is None)


def load(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill this rank's tensors. All ranks must call it.

    Raises:
        UserError: on all ranks: the files do not hold them.
    """
    how: dict[str, Any] = {"process_group": patient(), "no_dist": patient() is None}
    if reason := failure(lambda: dcp.load(tensors, storage_reader=Reader(folder), planner=ReadsTensors(), **how)):
        raise UserError(f"{folder} cannot be read: {reason}")


def tensors_in(folder: Path) -> dict[str, metadata.TensorStorageMetadata]:
    """Name -> type and size of each tensor of a checkpoint."""
    found = Reader(folder).read_metadata().state_dict_metadata
    return {name: each for name, each in found.items() if isinstance(each, metadata.TensorStorageMetadata)}


def failure(action: Callable[[], None]) -> str | None:
    """What has kept an action from being done, that a user can mend; None: it is done."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dcp warns that it runs without a process group, which is what we ask for
            action()
    except BaseException as error:  # torch's CheckpointException, with what has failed on each rank, is no Exception
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        first = min(causes, key=lambda cause: not isinstance(cause, UserError | OSError))
        if isinstance(first, OSError) and first.errno in FULL:
            return f"{first.strerror}: make room, then resume the run"
        if isinstance(first, UserError | OSError):
            return str(first)
        raise first from None
    return None
