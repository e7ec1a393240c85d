"""Runs one function on N local processes from inside one job, with torchrun's own agent as a library.

Lightning would start the ranks of a job by running its command line again, which under Hydra means a folder for each
rank and sweeps that hang (lightning-hydra-template#393). Here the job stays one: it hands the composed configuration
to its workers. Under torchrun the workers exist already, and the function simply runs.
"""

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from leanlm.common.errors import UserError
from leanlm.launch.ranks import drop_output, launched, set_threads
from leanlm.launch.signals import KILLED, Heard, give_back, handled, named, stopping

START_METHOD = "spawn"  # fresh processes; a fork of one that has used CUDA or OpenMP may hang
PATIENCE = 3600  # seconds that workers have to end their step and save it, once they are told to stop
LOST_A_PEER = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Gloo", "gloo")  # of a RuntimeError
_USER_ERROR = "leanlm user error: "


def in_utf8() -> None:
    """Begin this process again where a C locale has it know no other letters than those of ASCII."""
    if sys.getfilesystemencoding() == "ascii":
        os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})


@contextmanager
def ended_by_closed_pipes() -> Iterator[None]:
    """Within, a pipe that nobody reads any more ends this process as it ends other commands: at once, quietly, by SIGPIPE."""
    before = handled(named("SIGPIPE"), signal.SIG_DFL)
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # of a run that has survived it
            drop_output()
        give_back(before)


class Stopped(Exception):
    """The run was told to stop, and saved a checkpoint."""

    def __init__(self, signum: int, message: str) -> None:
        self.signum, self.message = signum, message
        super().__init__(signum, message)


class WorkerFailed(Exception):
    """A worker process failed; the message names the rank and holds its traceback."""


def memory_ended(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory; the system's killer leaves no other trace than its signal."""
    signs = ("can't allocate memory", "not enough memory", "out of memory", "MemoryError", "SIGKILL")
    return any(sign in f"{type(error).__name__}: {error}" for sign in signs)


def launch(function: Callable[..., Any], arguments: tuple, processes: int, isolate: bool = False, restarts: int = 0) -> Any:
    """`function(*arguments)` on `processes` local processes; what rank 0 returned.

    Args:
        function: importable by name.
        arguments: can be pickled.
        processes: 1 runs in this process.
        isolate: use a process of its own also for 1, so that its peak memory is its own (a sweep shares one process).
        restarts: times that all processes begin again after one failed; `restarted` then tells them.

    Raises:
        UserError, Stopped: as the function did.
        WorkerFailed: one rank failed; all others have been ended.
    """
    if launched() or (processes == 1 and not isolate and not restarts):
        return function(*arguments)

    import torch.distributed.elastic.multiprocessing.errors as errors
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # we say what happened, once
    LocalElasticAgent._shutdown = _shutdown  # type: ignore[assignment,method-assign]
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=restarts, monitor_interval=0.1,
        start_method=START_METHOD, signals_to_handle=",".join(each.name for each in [*stopping(), *named("SIGQUIT")]),
    )  # fmt: skip
    heard = Heard(lambda number: None, _kill_workers)
    heard.begin()
    try:
        return elastic_launch(config, _worker)(function, arguments)[0]
    except errors.ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode - 128 in stopping():
            raise Stopped(failure.exitcode - 128, "") from None
        text = _explain(failure)
        if _USER_ERROR in text:
            raise UserError(*text.rpartition(_USER_ERROR)[2].strip().splitlines()) from None
        raise WorkerFailed(f"rank {rank} of {processes} failed, the others were ended\n{text}") from None
    except SignalException as error:
        raise Stopped(int(error.sigval), "") from None
    finally:
        heard.end()  # the agent keeps its own handlers


def _shutdown(agent: Any, signum: signal.Signals = signal.SIGTERM, timeout: int = 0) -> None:
    """In place of the agent's (torch 2.11 to 2.13), which kills workers that after 30 s have not ended their step."""
    if agent._pcontext:
        agent._pcontext.close(signum, PATIENCE)


def _kill_workers(number: int) -> None:
    """Those that a second signal has not ended: they hang."""
    time.sleep(2)
    for worker in multiprocessing.active_children():
        worker.kill()


def leave(code: int) -> NoReturn:
    """End this process, one of several, at once: a broken process group would wait for its dead peers, the agent's wrapper for
    the agent, and a whole one now and then aborts when the interpreter takes gloo's threads apart."""
    if code == 0:
        atexit._run_exitfuncs()  # a logger may have to send its last lines
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _worker(function: Callable[..., Any], arguments: tuple) -> Any:
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    set_threads()
    handler = get_error_handler()
    handler.initialize()
    code = 1
    try:
        return function(*arguments)
    except Stopped as stopped:
        code = 128 + stopped.signum
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_A_PEER):
            time.sleep(3)  # the rank that failed first has its say; the agent ends this one meanwhile
        if isinstance(error, UserError):
            error.args = (_USER_ERROR + str(error),)
        handler.record_exception(error)
    leave(code)


def _explain(failure: Any) -> str:
    """The traceback a worker left, or how its process ended."""
    message = failure.error_file_data.get("message") if isinstance(failure.error_file_data, dict) else None
    if isinstance(message, dict):
        return message.get("extraInfo", {}).get("py_callstack") or message.get("message", "")
    if failure.exitcode >= 0:
        return failure.message
    hint = " (the system may have run out of memory)" if -failure.exitcode == KILLED else ""
    return f"its process was ended by {signal.Signals(-failure.exitcode).name}{hint}"
