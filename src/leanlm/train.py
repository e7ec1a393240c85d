"""Train a language model: `python -m leanlm.train model=lstm strategy=ddp`. See README.md."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from leanlm.common.errors import refuse
from leanlm.common.run_folder import Run, full_disk
from leanlm.config import command_line
from leanlm.config.checks import check, folder_problems
from leanlm.config.resume import goes_on
from leanlm.config.schema import Config, Settings
from leanlm.launch.processes import launch
from leanlm.launch.ranks import launched, process_group, rank
from leanlm.launch.supervisor import prediction
from leanlm.training.data import tokens


def train(config: DictConfig, path: Path | None = None, isolate: bool = False, command: Any = None) -> dict[str, Any]:
    """Run a composed configuration to its end, in a folder that it makes, such as `path`; what `result.json` holds.

    `isolate`: in a process of its own, as each job of a sweep. `command`: see `planning.auto.train`. Raises UserError with
    every problem found, before any work starts; Stopped where a signal ended the run, which has then saved a checkpoint.
    """
    settings = check(config)
    if not launched():
        tokens(settings)  # The text is prepared once, before there are several processes.
    with Run.folder(config.run_dir or config.resume, path or Run.new_path("run"), rank()) as folder:
        refuse(folder_problems(settings.config))  # again: another run may have been quicker
        if settings.plan.auto and not launched():
            from leanlm.planning import auto

            return auto.train(work, settings, folder, command)
        return launch(work, (replace(settings, predicted=prediction()), folder), settings.plan.world, isolate, config.restarts)


def work(settings: Settings, path: Path) -> dict[str, Any]:
    """What each rank does: the model as the plan cuts it, the step, Lightning's trainer. See `training/fit.py`."""
    from leanlm.training.fit import fit  # It imports Lightning, which a mistake on the command line need not wait for.

    with process_group(settings.config.device["accelerator"]), full_disk(path):
        settings = goes_on(settings, Run(path))
        if settings.plan.auto:  # Under torchrun the ranks are there already: one chooses for all.
            from leanlm.planning import auto

            settings = auto.agreed(settings)
        return fit(settings, path)


def job(config: DictConfig) -> float:
    """One job of a command line; its validation loss is what a sweeper of Hydra's may minimise."""
    return train(*command_line.job(config))["loss"]


if __name__ == "__main__":
    from leanlm import train as importable  # where other processes find it: their own __main__ is another

    command_line.run("train", Config, importable.job)
