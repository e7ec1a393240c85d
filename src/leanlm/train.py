"""Train a language model: `python -m leanlm.train model=lstm strategy=ddp`. See README.md."""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from leanlm import cli, supervise
from leanlm.cli import effective, quoted, swept_keys
from leanlm.config import Config, Settings, check
from leanlm.launch import WorkerFailed, launch, launched, process_group, rank, restarted, say
from leanlm.plan import choose
from leanlm.planning.choice import Choice
from leanlm.planning.report import arguments
from leanlm.prepare import tokens
from leanlm.runs import Run

SCALES = (1.0, 0.85, 0.7, 0.55)  # of the memory that a plan is chosen for: first, and after each time that it was not enough


def train(
    config: DictConfig, path: Path | None = None, isolate: bool = False, command: list[str] | None = None
) -> dict[str, Any]:
    """Run a composed configuration from beginning to end and return what its `result.json` holds.

    Args:
        config: as `conf/train.yaml` composes it.
        path: folder of the run; None: `run_dir`, or a new one in `runs/`.
        isolate: train in a process of its own, as each job of a sweep does.
        command: overrides that compose this configuration, of a process that has nothing else to do: with `strategy=auto` it
            is replaced by one that waits for the run, and does not return.

    Raises:
        UserError: with every problem found, before any work starts.
        Stopped: a signal ended the run, and it has saved a checkpoint.
    """
    if restarted() and config.run_dir and Path(config.run_dir, "config.yaml").is_file():  # under torchrun --max-restarts
        config.resume = config.run_dir
    settings = check(config)
    if not launched():
        tokens(settings)  # prepared once, before there are several processes
    path = Path(config.run_dir or config.resume or path or Run.new_path("run"))
    plain: Any = OmegaConf.to_container(config, resolve=True)
    plain["precision"] = settings.config.precision  # what `auto` has become: the run keeps it wherever it is resumed
    if settings.plan.auto and not launched():
        if command is not None:
            _hand_over(settings, command, path)
        return _train_within_memory(settings, plain, path)
    settings = replace(settings, predicted=json.loads(os.environ.pop(supervise.PREDICTED, "null")))
    return launch(work, (settings, plain, path), settings.plan.world, isolate, config.restarts)


def _hand_over(settings: Settings, command: list[str], path: Path) -> NoReturn:
    """Let the planner choose, and go on as a process that waits for the run of its choice."""
    attempt = int(os.environ.pop(supervise.ATTEMPT, 0))
    chosen, lines = choose(settings, SCALES[attempt], beside=supervise.SIZE)
    say("\n".join(lines))
    assert chosen.predicted is not None
    asked = [part for part in command if part.lstrip("+~").partition("=")[0] != "run_dir"]
    here = f"run_dir={quoted(str(path))}"
    wanted, given = (
        (f"precision={one.config.precision}", f"optim.state={one.config.optim.state}") for one in (chosen, settings)
    )
    changed = [after for after, before in zip(wanted, given, strict=True) if after != before]
    named = [part for part in asked if not re.match(r"[+~]*strategy[.=]", part)]
    supervise.instead(
        run=[*named, "strategy=single", *arguments(Choice.of(chosen)).split(), *changed, here],
        again=[*asked, here] if attempt + 1 < len(SCALES) else None,
        resume=[f"resume={quoted(str(path))}", "strategy=auto"],
        checkpoints=Run(path).checkpoints,
        environment={supervise.PREDICTED: json.dumps(chosen.predicted), supervise.ATTEMPT: str(attempt + 1)},
    )


def _train_within_memory(settings: Settings, plain: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same from within a process that goes on: a job of a sweep."""
    for scale in SCALES:
        chosen, lines = choose(settings, scale)
        say("\n".join(lines))
        config = written(plain, chosen)
        try:
            return launch(work, (chosen, config, path), chosen.plan.world, True, settings.config.restarts)
        except WorkerFailed as failure:
            if scale == SCALES[-1] or not failure.out_of_memory:
                raise
            say(f"memory ended: {str(failure).splitlines()[-1]}\nplanning for less; the curve goes on from the last checkpoint")
        if any(Run(path).checkpoints.glob("step-*")):
            settings = replace(settings, config=replace(settings.config, resume=str(path)))
    raise AssertionError


def written(config: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """A configuration with what the planner has chosen."""
    optim = config["optim"] | {"state": settings.config.optim.state}
    return config | {"strategy": settings.plan.asdict(), "precision": settings.config.precision, "optim": optim}


def work(settings: Settings, config: dict[str, Any], path: Path) -> dict[str, Any]:
    """What each rank does."""
    from leanlm.fit import fit

    if restarted() and any(Run(path).checkpoints.glob("step-*")):  # else begin where this run was told to
        say(f"begun again after a failure, {restarted()} of at most {settings.config.restarts} times")
        settings = replace(settings, config=replace(settings.config, resume=str(path)))
    with process_group(settings.config.device["accelerator"]):
        if settings.plan.auto:  # under torchrun: one rank chooses for all
            settings = agreed(lambda: choose(settings)[0])
            config = written(config, settings)
        return fit(settings, config, path)


def agreed(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on all ranks."""
    import torch.distributed as dist

    made = [make() if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(made)
    return made[0]


def job(config: DictConfig) -> None:
    """One job of a command line."""
    hydra = HydraConfig.get()
    config = effective(config, list(hydra.overrides.task))
    sweep = hydra.mode == RunMode.MULTIRUN
    if sweep:
        swept = os.environ.get("LEANLM_SWEPT", "").split(",")  # SLURM and submitit run jobs elsewhere, with this environment
        given = [override for override in hydra.overrides.task if override.partition("=")[0] in swept] or hydra.overrides.task
        path = Path(hydra.sweep.dir, f"{hydra.job.num}_{','.join(given)}".replace(os.sep, "-")[:120])
        if int(os.environ.get("SLURM_RESTART_COUNT", 0)) and (path / "config.yaml").is_file():
            config.resume = str(path)  # SLURM has queued the job again
        say(f"\njob {hydra.job.num}: {' '.join(hydra.overrides.task)}")
    else:
        path = Run.new_path("_".join(hydra.runtime.choices[group] for group in ("data", "model", "strategy")))
    train(config, path, isolate=sweep, command=None if sweep else sys.argv[1:])


def main() -> None:
    os.environ["LEANLM_SWEPT"] = ",".join(swept_keys(sys.argv[1:]))
    cli.run("train", Config, job)


if __name__ == "__main__":
    from leanlm import train as importable  # where other processes find it: their own __main__ is another

    importable.main()
