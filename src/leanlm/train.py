"""Train a language model: `python -m leanlm.train model=lstm strategy=ddp`. See README.md."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from leanlm import cli
from leanlm.cli import effective, swept_keys
from leanlm.config import Config, Settings, check
from leanlm.launch import WorkerFailed, launch, launched, process_group, rank, restarted, say
from leanlm.plan import choose
from leanlm.prepare import tokens
from leanlm.runs import Run

SCALES = (
    1.0,
    0.85,
    0.7,
    0.55,
)  # of the memory that a plan is chosen for: the first, then after each time that it was not enough


def train(config: DictConfig, path: Path | None = None, isolate: bool = False) -> dict[str, Any]:
    """Run a composed configuration from beginning to end and return what its `result.json` holds.

    Args:
        config: as `conf/train.yaml` composes it.
        path: folder of the run; None: `run_dir`, or a new one in `runs/`.
        isolate: train in a process of its own, as each job of a sweep does.

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
    if not settings.plan.auto or launched():
        return launch(work, (settings, plain, path), settings.plan.world, isolate, config.restarts)
    return _train_within_memory(settings, plain, path)


def _train_within_memory(settings: Settings, plain: dict[str, Any], path: Path) -> dict[str, Any]:
    """Let the planner choose; should memory end all the same, go on from the last checkpoint with a plan for less."""
    for scale in SCALES:
        chosen, lines, alone = choose(settings, scale)
        say("\n".join(lines))
        config = plain | {"strategy": chosen.plan.asdict()}
        try:  # in a process of its own, so that this one can begin again
            return launch(work, (chosen, config, path), chosen.plan.world, not alone, settings.config.restarts)
        except WorkerFailed as failure:
            if scale == SCALES[-1] or not failure.out_of_memory:
                raise
            say(f"memory ended: {str(failure).splitlines()[-1]}\nplanning for less; the curve goes on from the last checkpoint")
        if (path / "config.yaml").is_file():
            settings = replace(settings, config=replace(settings.config, resume=str(path)))
    raise AssertionError


def work(settings: Settings, config: dict[str, Any], path: Path) -> dict[str, Any]:
    """What each rank does."""
    from leanlm.fit import fit

    if restarted() and any(Run(path).checkpoints.glob("step-*")):  # else begin where this run was told to
        say(f"begun again after a failure, {restarted()} of at most {settings.config.restarts} times")
        settings = replace(settings, config=replace(settings.config, resume=str(path)))
    with process_group(settings.config.device["accelerator"]):
        if settings.plan.auto:  # under torchrun: one rank chooses for all
            settings = agreed(lambda: choose(settings).settings)
            config = {**config, "strategy": settings.plan.asdict()}
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
    train(config, path, isolate=sweep)


def main() -> None:
    os.environ["LEANLM_SWEPT"] = ",".join(swept_keys(sys.argv[1:]))
    cli.run("train", Config, job)


if __name__ == "__main__":
    from leanlm import train as importable  # where other processes find it: their own __main__ is another

    importable.main()
