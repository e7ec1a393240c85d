"""Commands as a shell starts them, each a process of its own with a folder, an environment and streams.

They are forked from a server that has imported everything: importing takes 6 s of a processor's time.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

from leanlm.launch import processes

Env = dict[str, str]


def start(module: str, *arguments: object, cwd: Path, env: Env | None = None, out: Path | None = None) -> "Running":
    """`python -m module arguments`, in the folder `cwd`, with `env` beside this environment, in a group of its own.

    `out`: a named pipe that gets what it prints; the command begins when that is opened to be read."""
    return Running(module, [*map(str, arguments)], cwd, {**os.environ, **(env or {})}, out)


def command(module: str, *arguments: object, cwd: Path, env: Env | None = None, timeout: float = 120) -> CompletedProcess[str]:
    """The same, until it ends."""
    return start(module, *arguments, cwd=cwd, env=env).wait(timeout)


class Running:
    """A command that has been started."""

    def __init__(self, module: str, arguments: list[str], cwd: Path, env: Env, out: Path | None = None) -> None:
        self.arguments, self.streams = [module, *arguments], Path(tempfile.mkdtemp())
        context: Any = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_main, args=(module, arguments, cwd, env, self.streams, out))
        self.process.start()
        self.pid: int = self.process.pid

    @property
    def ended(self) -> bool:
        return self.process.exitcode is not None

    def wait(self, timeout: float) -> CompletedProcess[str]:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutExpired(self.arguments, timeout, *(self._said(name) for name in ("out", "err")))
        return CompletedProcess(self.arguments, self.process.exitcode, self._said("out"), self._said("err"))

    def _said(self, name: str) -> str:
        return (self.streams / name).read_text()


def _main(module: str, arguments: list[str], cwd: Path, env: Env, streams: Path, out: Path | None) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(streams / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if out:
        os.dup2(os.open(out, os.O_WRONLY), 1)
    os.setsid()  # a signal to its group is for it and what it starts
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [module, *arguments]
    processes.START_METHOD = "fork"  # this process has computed nothing yet, so that no thread can be missing
    runpy.run_module(module, run_name="__main__", alter_sys=True)
