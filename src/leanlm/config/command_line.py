"""What all commands share: one check of the whole command line, Hydra, and one clear line for each mistake."""

import difflib
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from leanlm.common.errors import UserError
from leanlm.common.files import CONF, literal
from leanlm.common.run_folder import Run, claim
from leanlm.config import sweeps, words
from leanlm.config.arguments import MOVED, leaves, moved, typed
from leanlm.config.checks import check
from leanlm.config.help import help_text
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
            return function(config if schema is Config else typed(config, schema)[1])
        except Stopped as stopped:
            raise SystemExit(128 + stopped.signum) from None
        except Exception as error:
            if not HydraConfig.get().launcher._target_.endswith("BasicLauncher"):
                raise  # in a job of its own, whose launcher has to hear of it
            statuses.append(_complain(error))

    with ended_by_closed_pipes():
        try:
            asked = _arguments(sys.argv[1:])
            flags = [argument for argument in sys.argv[1:] if argument not in asked.overrides]
            overrides = words.read(asked.overrides, asked.multirun, asked.config_dir)
            if asked.help:
                print(help_text(name, overrides))
            else:
                sys.argv[1:] = [*flags, *overrides]
                sys.argv += command_line(sys.argv[1:], name, schema)
                if asked.multirun and schema is Config and rank() == 0:
                    sys.argv += _claim_sweep(name, overrides)
                hydra_job()
        except (UserError, KeyboardInterrupt) as error:
            statuses.append(_complain(error))
    if launched() and world_size() > 1:
        leave(max(statuses))
    if max(statuses):
        sys.exit(max(statuses))


def _arguments(given: list[str]) -> Namespace:
    """Hydra's flags and the overrides between them.

    Raises:
        UserError: there is no such flag.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}: overrides are written key=value; --help shows the keys, --hydra-help the flags")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(given)


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


def command_line(arguments: list[str], name: str, schema: type) -> list[str]:
    """Check everything that a command line asks for, each job of a sweep too, before Hydra starts.

    Returns:
        What to write behind it. Hydra's `override_dirname` of a job then names the keys alone that a sweep gives several
        values, wherever the job runs.

    Raises:
        UserError: with all problems.
    """
    asked = _arguments(arguments)
    if asked.help or asked.hydra_help or asked.info or asked.cfg or asked.shell_completion:
        return []
    parsed = _parsed(asked.overrides)
    try:
        jobs = sweeps.jobs(parsed) if asked.multirun else [asked.overrides]
    except HydraException as error:  # a kind of sweep that has to know Hydra's folders, as glob(*) has
        raise UserError(str(error).splitlines()[0]) from None
    problems: list[str] = []
    if len(jobs) > 1 and any(override.key_or_group == "run_dir" and not override.is_sweep_override() for override in parsed):
        problems.append(f"run_dir names one folder, and this sweep has {len(jobs)} jobs: set hydra.sweep.dir instead")
    if any(override.input_line == "hydra/launcher=slurm" for override in parsed) and not shutil.which("sbatch"):
        problems.append("hydra/launcher=slurm: this machine has no sbatch; start it where SLURM's commands are")
    resumed = True  # each job
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for job in jobs:
            config, found = _compose(name, job)
            try:
                if schema is Config:
                    resumed = resumed and bool(config.resume)
                    check(effective(config, job))
                else:
                    found += typed(config, schema)[0]
            except UserError as error:
                found += error.problems
            except OmegaConfBaseException as error:
                missing = isinstance(error, MissingMandatoryValue)
                found.append(f"{error.full_key}: {'write a value for it' if missing else str(error).splitlines()[0]}")
            problems += [problem for problem in found if problem not in problems]
    if asked.multirun and schema is Config and not problems and not resumed and "SLURM_RESTART_COUNT" not in os.environ:
        folder, named = _sweep_folder(name, jobs[0])
        if named and Run.jobs(folder):
            problems.append(f"hydra.sweep.dir={folder} holds a sweep already, with {Run.jobs(folder)[-1].name}: name another")
    if problems:
        raise UserError(*problems)
    fixed = [override.key_or_group for override in parsed if not override.is_sweep_override()]
    return [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]"] if asked.multirun else []


def _parsed(overrides: list[str]) -> list[Override]:
    """The overrides as Hydra's parser understands them.

    Raises:
        UserError: with all that it does not.
    """
    parser = OverridesParser.create()
    parsed, problems = [], []
    for override in overrides:
        try:
            found = parser.parse_override(override)
        except HydraException:
            found = None
        if found and found.key_or_group:
            parsed.append(found)
        else:
            problems.append(f"{override}: not of the form key=value")
    if problems:
        raise UserError(*problems)
    return parsed


def _sweep_folder(name: str, job: list[str]) -> tuple[Path, bool]:
    """The folder of a sweep, and whether somebody has named it; otherwise its name is made of the time."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        sweep = compose(name, job, return_hydra_config=True).hydra.sweep
    as_written: Any = OmegaConf.to_container(sweep, resolve=False)
    return Path(sweep.dir), words.NOW not in as_written["dir"]


def _claim_sweep(name: str, overrides: list[str]) -> list[str]:
    """Make the folder of a sweep, so that another that begins in the same second gets another; what to write behind the command
    line."""
    folder, named = _sweep_folder(name, sweeps.jobs(_parsed(overrides))[0])
    return [] if named else [f"hydra.sweep.dir={words.quoted(str(claim(folder)))}"]


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
    if OverridesParser.create().parse_override(override).is_sweep_override():
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
