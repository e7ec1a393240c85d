"""What all commands share: one check of the whole command line, Hydra, and one clear line for each mistake."""

import difflib
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from leanlm.common.errors import UserError
from leanlm.common.files import CONF, literal
from leanlm.common.run_folder import Run, claim
from leanlm.config import words
from leanlm.config.arguments import MOVED, leaves, moved, typed
from leanlm.config.checks import check
from leanlm.config.help import help_text
from leanlm.config.line import Line
from leanlm.config.pretrained import begun_from_weights
from leanlm.config.resume import effective
from leanlm.config.schema import Config
from leanlm.launch.processes import (
    Stopped,
    WorkerFailed,
    ended_by_closed_pipes,
    in_utf8,
    leave,
    memory_ended,
    survive_closed_pipes,
)
from leanlm.launch.ranks import adopt_slurm, launched, rank, say, world_size
from leanlm.launch.supervisor import OUT_OF_MEMORY


def run(name: str, schema: type, function: Callable[[Any], Any]) -> None:
    """The command `name`: compose `conf/<name>.yaml` with the command line and call `function`, once for each job.

    `function` gets the composed configuration (of the class `schema`, except for `Config`, which it checks itself).
    The process ends with 2 after a mistake of the user's, 137 where memory ended, 1 after another failure, 128 + n after
    signal n.
    """
    in_utf8()
    statuses = [0]

    @hydra.main(config_path=str(CONF), config_name=name, version_base="1.3")
    def hydra_job(config: DictConfig) -> Any:
        adopt_slurm()  # here, not before Hydra starts: submitit runs only this function in the jobs that it queues
        if schema is Config:
            survive_closed_pipes()
        try:
            task = list(HydraConfig.get().overrides.task)
            return function(config if schema is Config else typed(begun_from_weights(config, task), schema)[1])
        except Stopped as stopped:
            raise SystemExit(128 + stopped.signum) from None
        except Exception as error:
            if not HydraConfig.get().launcher._target_.endswith("BasicLauncher"):
                raise  # in a job of its own, whose launcher has to hear of it
            statuses.append(_complain(error))

    with ended_by_closed_pipes():
        try:
            line = Line(sys.argv[1:])
            if line.asked.help:
                print(help_text(name, line.overrides))
            else:
                check_jobs(line, name, schema)
                sys.argv[1:] = line.for_hydra()
                if line.sweeps and schema is Config:
                    sys.argv += sweep_folder(line, name)
                hydra_job()
        except (UserError, KeyboardInterrupt) as error:
            statuses.append(_complain(error))
    if launched() and world_size() > 1:
        leave(max(statuses))
    if max(statuses):
        sys.exit(max(statuses))


def _complain(error: BaseException) -> int:
    """Say what went wrong, and return the status with which the process is to end."""
    if isinstance(error, UserError):
        lines, status = [f"error: {problem}" for problem in error.problems if rank() == 0], 2
    elif isinstance(error, KeyboardInterrupt):
        lines, status = ["interrupted"], 128 + signal.SIGINT
    elif isinstance(error, BrokenPipeError):
        lines, status = [], 128 + signal.SIGPIPE
    elif isinstance(error, WorkerFailed):
        lines, status = [f"error: {error}"], OUT_OF_MEMORY if error.out_of_memory else 1
    else:
        lines, status = traceback.format_exception(error), OUT_OF_MEMORY if memory_ended(repr(error)) else 1
    for line in lines:
        print(line.rstrip("\n"), file=sys.stderr, flush=True)
    return status


def check_jobs(line: Line, name: str, schema: type) -> None:
    """Check everything that a command line asks for, each job of a sweep too, before Hydra starts.

    Raises:
        UserError: with all problems.
    """
    if line.informs:
        return
    jobs, problems = line.jobs(), list[str]()
    if len(jobs) > 1 and any(one.key_or_group == "run_dir" and not one.is_sweep_override() for one in line.parsed):
        problems.append(f"run_dir names one folder, and this sweep has {len(jobs)} jobs: set hydra.sweep.dir instead")
    if "hydra/launcher=slurm" in line.overrides and not shutil.which("sbatch"):
        problems.append("hydra/launcher=slurm: this machine has no sbatch; start it where SLURM's commands are")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for job in jobs:
            config, found = _compose(name, job)
            try:
                if schema is Config:
                    check(effective(config, job))
                else:
                    found += typed(begun_from_weights(config, job), schema)[0]
            except UserError as error:
                found += error.problems
            except OmegaConfBaseException as error:
                missing = isinstance(error, MissingMandatoryValue)
                found.append(f"{error.full_key}: {'write a value for it' if missing else str(error).splitlines()[0]}")
            problems += [problem for problem in found if problem not in problems]
    if problems:
        raise UserError(*problems)


def sweep_folder(line: Line, name: str) -> list[str]:
    """The folder of a sweep as an override, where somebody has not named it: it is made here, so that another sweep that begins
    in the same second gets another.

    Raises:
        UserError: somebody has named one that holds a sweep already.
    """
    job = line.jobs()[0]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(name, job, return_hydra_config=True)
    folder, as_written = Path(config.hydra.sweep.dir), OmegaConf.to_container(config.hydra.sweep, resolve=False)
    if words.NOW in as_written["dir"]:  # type: ignore[call-overload,index]
        return [] if rank() else [f"hydra.sweep.dir={words.quoted(str(claim(folder)))}"]
    if Run.jobs(folder) and not config.resume and "SLURM_RESTART_COUNT" not in os.environ:
        raise UserError(f"hydra.sweep.dir={folder} holds a sweep already, with {Run.jobs(folder)[-1].name}: name another")
    return []


def _compose(name: str, overrides: list[str]) -> tuple[DictConfig, list[str]]:
    """Compose a job; if Hydra refuses, find every override at fault, where Hydra itself names the first, and compose the
    others."""
    try:
        return compose(name, overrides=overrides), []
    except words.REFUSALS as error:
        first = error
    base = config = compose(name)
    problems: list[str] = []
    good: list[str] = []
    unknown: set[str] = set()
    for override in overrides:
        key = override.partition("=")[0]
        if key.partition(".")[0] in unknown:  # keys of a group that could not be chosen
            continue
        try:
            config = compose(name, overrides=[*good, override])
            good.append(override)
        except words.REFUSALS as error:
            problems.append(_explain(override, overrides, base, error))
            unknown.add(key)
    return config, problems or [str(first).splitlines()[0]]


def _explain(override: str, overrides: list[str], base: DictConfig, error: Exception) -> str:
    key, _, value = override.partition("=")
    if (read := words.parsed(override)) and read.is_sweep_override():
        return f"{override}: several values need -m, which makes a job of each"
    if options := words.options(key.lstrip("+~"), overrides):
        if value in options:  # but a part of it is not there: a plugin that is not installed
            return f"{override}: {str(error).splitlines()[0].rstrip('.')}; conf/{key}/{value}.yaml says what to install"
        near = difflib.get_close_matches(value, options, 1)
        return f"{override}: there is no {key} of that name; choose one of {', '.join(options)}" + (
            f" (did you mean {near[0]}?)" if near else ""
        )
    if key.lstrip("+~") in MOVED:
        return f"{override}: {moved(key.lstrip('+~'), value)}"
    if OmegaConf.select(base, key) is None:
        known = list(leaves(base)) + [folder.name for folder in Path(CONF).iterdir() if folder.is_dir()]
        near = difflib.get_close_matches(key, known, 1)
        return f"{override}: there is no key {key}" + (f"; did you mean {near[0]}?" if near else "; see --help for the keys")
    return f"{override}: {str(error).splitlines()[0]}"


def job(config: DictConfig) -> tuple[DictConfig, Path, bool, list[str] | None]:
    """Of a job of `leanlm.train`: its configuration with what it resumes, a path for its folder, whether it is one of a sweep,
    and the command line of a process that has no other job, as a person types it."""
    hydra = HydraConfig.get()
    given = list(hydra.overrides.task)
    config = effective(config, given)
    if hydra.mode != RunMode.MULTIRUN:
        name = "_".join(str(hydra.runtime.choices.get(group) or "no") for group in ("data", "model", "strategy"))
        return config, Run.new_path(name), False, words.typed(sys.argv[1:])
    name = f"{hydra.job.num}_{hydra.job.override_dirname}".rstrip("_")
    name = re.sub(r"[^\w.+-]+", "-", name).encode()[:120].decode(errors="ignore")  # which a shell takes without quotes
    path = Path(hydra.sweep.dir, name)
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) and (path / "config.yaml").is_file():
        config.resume = literal(str(path))  # SLURM has queued the job again
    say(f"\njob {hydra.job.num}: {shlex.join(words.typed(given))}")
    return config, path, True, None
