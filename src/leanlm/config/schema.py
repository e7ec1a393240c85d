"""The typed schema of a run."""

import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from leanlm.common.files import defaults
from leanlm.data.corpus import Corpus
from leanlm.data.tokenizer import NAMES
from leanlm.optimizers.settings import Optim
from leanlm.strategies.plan import Plan

SHIPPED = defaults("train.yaml")


@dataclass
class Config:
    """What `conf/train.yaml` composes. Sizes count rows and tokens; every interval counts optimizer steps."""

    seed: int = SHIPPED["seed"]
    devices: int | None = SHIPPED["devices"]
    max_steps: int = SHIPPED["max_steps"]
    global_batch: int = SHIPPED["global_batch"]
    sequence: int = SHIPPED["sequence"]
    clip: float = SHIPPED["clip"]
    log_every: int = SHIPPED["log_every"]
    val_every: int = SHIPPED["val_every"]
    val_lanes: int = SHIPPED["val_lanes"]
    val_overlap: int = SHIPPED["val_overlap"]
    checkpoint_every: int = SHIPPED["checkpoint_every"]
    keep_checkpoints: int = SHIPPED["keep_checkpoints"]
    resume: str | None = SHIPPED["resume"]
    init_from: str | None = SHIPPED["init_from"]
    restarts: int = SHIPPED["restarts"]
    run_dir: str | None = SHIPPED["run_dir"]
    precision: str = SHIPPED["precision"]
    sample: str = SHIPPED["sample"]
    sample_tokens: int = SHIPPED["sample_tokens"]
    model: Any = None
    data: Any = None
    objective: Any = None
    allow: list[str] = field(default_factory=SHIPPED["allow"].copy)
    adapter: Any = None
    strategy: Plan = field(default_factory=Plan)
    optim: Optim = field(default_factory=Optim)
    logger: Any = None
    callbacks: Any = None
    device: Any = None


ALLOWED = ("precision", "optim.state")


@dataclass(frozen=True)
class Settings:
    """A configuration found good: `config` with its types, `plan` with its numbers, `corpus` found on disk."""

    config: Config
    plan: Plan
    corpus: Corpus
    devices: int | None = None  # as asked for, or as many as processes were started
    predicted: dict[str, Any] | None = None  # by the planner: `peak_memory_bytes` of each rank, `seconds_per_step`

    @property
    def exactness(self) -> str:
        """The run's label, see `exactness`."""
        return exactness(self.plan, self.config.precision, self.config.optim.state)

    def as_run(self) -> dict[str, Any]:
        """The configuration as the run's folder keeps it: what has become of `auto` holds wherever the run is resumed."""
        chosen = self.config.strategy.auto and not self.plan.auto
        data = _with_whole_paths(self.config.data)
        if isinstance(data.get("sources"), dict):
            data["sources"] = {name: _with_whole_paths(source, but="data") for name, source in data["sources"].items()}
        return asdict(replace(self.config, data=data, strategy=self.plan if chosen else self.config.strategy))

    def describe(self) -> str:
        """One line: the plan, the number types, the exactness."""
        state = [] if self.config.optim.state == "fp32" else [f"optim.state={self.config.optim.state}"]
        return ", ".join([self.plan.describe(), *state, self.config.precision]) + f" ({self.exactness})"


def _with_whole_paths(data: dict[str, Any], but: str | None = None) -> dict[str, Any]:
    """The keys of a data set, see `absolute`. `but`: one that is no path."""
    return {key: value if key == but else absolute(value) for key, value in data.items()}


def absolute(value: Any) -> Any:
    """The whole path of a file or folder that is there, so that a run can be used from elsewhere; any other value as it is."""
    if not isinstance(value, str) or value in NAMES:
        return value
    path = os.path.expanduser(value)
    return os.path.abspath(path) if os.path.exists(path) else value


def exactness(plan: Plan, precision: str, state: str) -> str:
    """How a run's curve keeps to that of one device in fp32: `changes` where number types or the optimizer's state may move it,
    else as the plan's order of summation does, `bitwise` or `rounding`."""
    return "changes" if precision.startswith("bf16") or state != "fp32" else plan.order
