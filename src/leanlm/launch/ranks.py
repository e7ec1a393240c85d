"""Which process this is of how many, whoever started them: `launch`, torchrun or SLURM."""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from leanlm.common.errors import UserError, refuse
from leanlm.common.machine import cores

PATIENCE = timedelta(days=7)  # for what one rank does while others wait, such as preparing a text
_patient: Any = None  # see `patient`


def launched() -> bool:
    """Whether torchrun, or `launch`, started this process as one of several."""
    return "LOCAL_RANK" in os.environ


def world_size() -> int:
    return _number("WORLD_SIZE", 1)


def local_world_size() -> int:
    """Processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1)


def rank() -> int:
    return _number("RANK", 0)


def restarted() -> int:
    """How often this process's group has been begun again after a failure, by `launch` or torchrun."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def _number(name: str, otherwise: int) -> int:
    """What torchrun's environment says, or `launch`'s, if either started this process."""
    return int(os.environ.get(name, otherwise)) if launched() else otherwise


def adopt_slurm() -> None:
    """Where srun started this process as one of several, say so in torchrun's words, which all else here reads.

    The address and the port are those that Lightning's SLURMEnvironment takes: the first node, and a port made of the job's
    number.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))  # of srun; a batch script has not been started by it
    if launched() or tasks < 2:
        return
    from lightning.fabric.plugins.environments import SLURMEnvironment

    slurm = SLURMEnvironment(auto_requeue=False)
    os.environ |= {
        "MASTER_ADDR": slurm.main_address,
        "MASTER_PORT": str(slurm.main_port),
        "WORLD_SIZE": str(tasks),
        "RANK": str(slurm.global_rank()),
        "LOCAL_RANK": str(slurm.local_rank()),
        "GROUP_RANK": str(slurm.node_rank()),
        "LOCAL_WORLD_SIZE": str(_tasks_of_node(os.environ["SLURM_STEP_TASKS_PER_NODE"], slurm.node_rank())),
    }


def _tasks_of_node(listed: str, node: int) -> int:
    """Of SLURM's list of the tasks of each node, such as `2(x3),1`."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", listed)
    return [int(count) for count, times in parts for _ in range(int(times or 1))][node]


def drop_output() -> None:
    """What is printed from here on goes nowhere, since nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Print, once for all ranks. Where nobody reads it any more, the process is told to stop, as a run does in good order."""
    if rank() == 0:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            drop_output()
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def comfort(what: str) -> Iterator[None]:
    """For what a run can do without: should it fail, a line says so and the run goes on."""
    try:
        yield
    except Exception as error:
        say(f"{what} failed: {type(error).__name__}: {error}".splitlines()[0])


@contextmanager
def process_group(accelerator: str) -> Iterator[None]:
    """The default process group of all ranks, if there are several, and the one in which they wait for each other."""
    global _patient
    if world_size() == 1:
        yield
        return
    cuda = accelerator != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, _, _ = next(dist.rendezvous("env://"))
    # The agent may keep its store over restarts, and in it the addresses of processes that are gone.
    store = dist.PrefixStore(f"attempt {restarted()}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank(), world_size=world_size())
    _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    yield
    dist.barrier(_patient)  # NCCL's end waits for all ranks, too
    _patient = None
    dist.destroy_process_group()  # not after an exception: it would wait for ranks that are gone


def set_threads() -> None:
    """Share the cores among the processes of this machine."""
    if local_world_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // local_world_size()))


def patient() -> Any:
    """The group for what may have to wait for long: NCCL ends a process that waits in it for more than 10 minutes. None where
    no `process_group` has made it."""
    return _patient


def of_ranks(value: Any) -> list[Any]:
    """`value` of each rank. All ranks must call it."""
    if _patient is None:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, _patient)
    return gathered


def on_rank_0(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on all ranks, which wait for as long as it takes. All ranks must call it.

    Raises:
        UserError: on all ranks, where rank 0 has met it.
    """
    found: list[Any] = [None, ()]  # what is made, and problems
    try:
        if rank() == 0 or _patient is None:
            found[0] = make()
    except UserError as error:
        found[1] = error.problems
    if _patient is not None:
        dist.broadcast_object_list(found, group=_patient)
    refuse(found[1])
    return found[0]


def on_rank_0_first(make: Callable[[], Any]) -> Any:
    """What each rank makes, after rank 0 has made it and has left it on disk. All ranks must call it."""
    made: list[Any] = []
    on_rank_0(lambda: made.append(make()))  # which gives back nothing that is sent
    return made[0] if made else make()
