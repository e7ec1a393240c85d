"""Runs many configurations in one group of processes: starting processes costs more than these runs."""

import importlib
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import composed

from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.config.schema import Settings
from leanlm.launch.processes import launch
from leanlm.launch.ranks import process_group, rank
from leanlm.training import build
from leanlm.training.checkpoint import checkpoints, load
from leanlm.training.data import tokens
from leanlm.training.fit import fit

MANY = 20  # jobs in one group of processes: each leaves threads of gloo behind, which end with the process


def run_all(jobs: dict[Path, list[str]], processes: int = 1, compiler: str = "inductor") -> None:
    """Train each job (folder -> overrides) under its plan, all with the same number of processes.

    `compiler` is torch's name of what
    `strategy.compile` makes graphs for; a graph that is made anew after the first step is an error.
    """
    for first in range(0, len(jobs), MANY):
        launch(_work, (dict(list(jobs.items())[first : first + MANY]), compiler), processes)


def _work(jobs: dict[Path, list[str]], compiler: str) -> None:
    with process_group("cpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.compile", partial(torch.compile, backend=compiler))
        importlib.import_module("torch._dynamo.eval_frame")  # the compiler itself, not what stands for it
        dynamo = importlib.import_module("torch._dynamo.config")
        patch.setattr(
            "leanlm.training.fit.loss_curve", lambda *_: None
        )  # takes as long as the training; test_commands looks at it
        for name, small in (
            ("memory.offload.SMALLEST", 0),
            ("optimizers.base.SMALLEST", 64),
            ("optimizers.low_bit.PIECE", 1024),
        ):
            patch.setattr(f"leanlm.{name}", small)  # so that what they bound is met with here
        for path, overrides in jobs.items():
            torch.compiler.reset()
            config = composed(*overrides)
            checked = check(config)
            # torch keeps graphs by code: those of two stages count as one made anew
            with dynamo.patch(error_on_recompile=checked.plan.stages == checked.plan.pipeline):
                fit(checked, path)


def losses(path: Path) -> list[float]:
    return [row["train_loss"] for row in Run(path).rows() if "train_loss" in row]


def final_weights(path: Path, settings: Settings) -> dict[str, torch.Tensor]:
    """The weights in the last checkpoint of a run."""
    parallel = build.parallel_model(settings.config, settings.plan, tokens(settings).tokenizer.vocabulary)
    load(checkpoints(Run(path).checkpoints)[-1], parallel.named_parameters(), None)
    return {name: parameter.detach() for name, parameter in parallel.net.named_parameters()}


__all__ = ["rank"]
