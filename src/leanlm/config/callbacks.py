"""Checks of `conf/callbacks` and `conf/logger`: packages that are not installed, arguments, what cannot work."""

from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any

from leanlm.config.arguments import argument_problems
from leanlm.config.schema import Config

OURS = {"_target_", "needs"}  # keys that are not arguments
FIRST_RANK = {"DeviceStatsMonitor", "LearningRateMonitor"}  # of Lightning: they write to the loggers, which only rank 0 has
REFUSED = {  # Lightning's callback -> what to write instead
    "ModelCheckpoint": "checkpoints are written already; callbacks=best keeps the best",
    "WeightAveraging": "it copies the whole model; write callbacks=ema, which works under every plan",
    "EMAWeightAveraging": "it copies the whole model; write callbacks=ema, which works under every plan",
    "StochasticWeightAveraging": "it copies the whole model; write callbacks=ema, which works under every plan",
    "GradientAccumulationScheduler": "micro-batches are the plan's: strategy.accumulate_grad_batches",
    "BatchSizeFinder": "the global batch is the run's; python -m leanlm.plan says what fits",
    "LearningRateFinder": "it trains beside the run; sweep optim.lr instead, see hydra/sweeper=optimize",
    "OnExceptionCheckpoint": "the last checkpoint is there already",
}


def callback_problems(config: Config) -> list[str]:
    """What cannot work about the callbacks of a run, one line each."""
    found = []
    for name, node in (config.callbacks or {}).items():
        where = f"callbacks.{name}"
        if not isinstance(node, dict) or "_target_" not in node:
            found.append(f"{where}: a name, and below it `_target_`, the path of a class, as in conf/callbacks/best.yaml")
            continue
        kind = class_name(node)
        if kind in REFUSED:
            found.append(f"{where}: {kind}: {REFUSED[kind]}")
        elif kind in FIRST_RANK and not config.logger:
            found.append(f"{where}: {kind} writes to a logger, and logger=csv has none; write logger=tensorboard")
        elif problems := missing_packages({name: node}) or argument_problems(where, node, set(), OURS):
            found += problems
        elif own := getattr(resolve_name(node["_target_"]), "problems", None):
            arguments = {key: value for key, value in node.items() if key not in OURS}
            of_run = {"max_steps": config.max_steps, "accelerator": config.device["accelerator"], "precision": config.precision}
            found += [f"{where}: {problem}" for problem in own(**of_run, **arguments)]
    return found


def class_name(node: dict[str, Any]) -> str:
    """Of what a node's `_target_` names."""
    return str(node["_target_"]).rpartition(".")[2]


def missing_packages(nodes: dict[str, Any] | None) -> list[str]:
    """Packages that these loggers or callbacks need and that are not installed."""
    return [
        f"{name} needs a package that is not installed: pip install {package}"
        for name, node in (nodes or {}).items()  # `find_spec` of a package inside another would import the outer
        if (package := node.get("needs")) and find_spec(str(package).partition(".")[0]) is None
    ]
