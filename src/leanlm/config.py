"""The typed schema of a run, and every check that can be made before any work starts.

All problems of a command line are reported together, each with its arithmetic and what to write instead.
"""

import difflib
import importlib.util
import inspect
import json
import types
import typing
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from leanlm.data import tokenizer as tokenizers
from leanlm.data.corpus import Corpus
from leanlm.errors import UserError
from leanlm.launch import launched, world_size
from leanlm.optim import Optim
from leanlm.precision import PRECISIONS, automatic
from leanlm.strategies.plan import Plan
from leanlm.strategies.resolve import cuts_of_model, earns_compiling, of_run, on_gpus, resolve

FOLDER = str(Path(__file__).resolve().parents[2] / "conf")


@dataclass
class Config:
    """What `conf/train.yaml` composes. Sizes count rows and tokens; every interval counts optimizer steps."""

    seed: int = 1
    devices: int | None = None
    max_steps: int = 1000
    global_batch: int = 32
    sequence: int = 128
    clip: float = 1.0
    log_every: int = 10
    val_every: int = 250
    val_lanes: int = 32
    val_overlap: int = 0
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    resume: str | None = None
    restarts: int = 0
    run_dir: str | None = None
    precision: str = "auto"
    sample: str = "\n"
    sample_tokens: int = 200
    model: Any = None
    data: Any = None
    allow: list[str] = field(default_factory=list)
    strategy: Plan = field(default_factory=Plan)
    optim: Optim = field(default_factory=Optim)
    logger: Any = None
    device: Any = None


MANY = 1 << 20  # token types, more than any cutoff: how many there are is not known before the text has been read
MOVED = {"strategy.precision": "precision", "strategy.optimizer_state": "optim.state"}  # in runs of earlier versions, too
ALLOWED = ("precision", "optim.state")
DATA_KEYS = {"_target_", "tokenizer", "vocabulary", "ignore"}  # the rest of the group goes to the corpus function


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

    def describe(self) -> str:
        """One line: the plan, the number types, the exactness."""
        state = [] if self.config.optim.state == "fp32" else [f"optim.state={self.config.optim.state}"]
        return ", ".join([self.plan.describe(), *state, self.config.precision]) + f" ({self.exactness})"


def exactness(plan: Plan, precision: str, state: str) -> str:
    """How a run's curve keeps to that of one device in fp32: `changes` where number types or the optimizer's state may move it,
    else as the plan's order of summation does, `bitwise` or `rounding`."""
    return "changes" if precision.startswith("bf16") or state != "fp32" else plan.order


def check(config: DictConfig) -> Settings:
    """Raise UserError with every problem of a configuration, or return it ready for use."""
    problems, checked = typed(config)
    if checked is None:
        raise UserError(*problems)
    positive = (
        "max_steps",
        "global_batch",
        "sequence",
        "log_every",
        "val_every",
        "checkpoint_every",
        "keep_checkpoints",
        "val_lanes",
    )
    problems += [f"{key}={getattr(checked, key)}: it must be at least 1" for key in positive if getattr(checked, key) < 1]
    problems += [
        f"{key}={getattr(checked, key)}: it must not be negative"
        for key in ("seed", "clip", "val_overlap", "sample_tokens", "restarts")
        if getattr(checked, key) < 0
    ]
    if checked.devices is not None and checked.devices < 1:
        problems.append(f"devices={checked.devices}: at least 1, or null for as many as the plan uses")
    devices = world_size() if launched() else checked.devices
    if launched() and checked.devices not in (None, devices):
        problems.append(f"devices={checked.devices}, but {devices} processes were started: leave devices out under torchrun")
    problems += [f"allow: {lever} is not a lever that changes the curve; choose of {', '.join(ALLOWED)}"
                 for lever in checked.allow if lever not in ALLOWED]  # fmt: skip
    if checked.precision == "auto":
        checked.precision = automatic(checked.device)
    if checked.precision not in PRECISIONS:
        problems.append(f"precision={checked.precision}: choose one of auto, {', '.join(PRECISIONS)}")
    auto = checked.strategy.auto  # axes and micro-batches are chosen later, so that they work
    plan, found = resolve(checked.strategy, None if auto else devices, checked.global_batch)
    problems += found + checked.optim.problems() + _device(checked.device) + _loggers(checked.logger) + _model(checked)
    problems += of_run(plan, checked.optim, checked.precision, checked.clip)
    if not problems:
        problems += cuts(checked, plan) + on_gpus(plan, checked.device["accelerator"])
    occupied = checked.run_dir and Path(checked.run_dir, "config.yaml").is_file()
    if occupied and not (checked.resume and Path(checked.run_dir).resolve() == Path(checked.resume).resolve()):
        problems.append(
            f"run_dir={checked.run_dir} holds a run already: write resume={checked.run_dir} to continue it, or another run_dir"
        )
    corpus, found = _corpus(checked)
    problems += found
    if corpus is not None and not problems:
        problems += fits(checked, {split: corpus.size(split) for split in corpus.splits}, at_most=True)
    if problems or corpus is None:
        raise UserError(*problems)
    return Settings(checked, replace(plan, compile=_compile(checked, plan)), corpus, devices)


def fits(config: Config, sizes: dict[str, int], at_most: bool = False) -> list[str]:
    """Whether the text is long enough for the batches. `sizes`: split -> tokens (`at_most`: bytes, which no tokenizer
    here exceeds)."""
    what = "bytes" if at_most else "tokens"
    have, recurrent = sizes["train"], _target(config.model["_target_"]).carries_state
    rows = config.global_batch if recurrent else 1  # each lane must hold a sequence
    if have - 1 >= rows * config.sequence:
        return []
    need = f"{rows} lanes x sequence={config.sequence}" if recurrent else f"sequence={config.sequence}"
    longest = (have - 1) // rows
    instead = (
        f"write sequence={longest} or less"
        if longest > 0
        else f"write global_batch={max(1, (have - 1) // config.sequence)} or less"
    )
    return [f"the training text has {have:,} {what}, fewer than {need} + 1 = {rows * config.sequence + 1:,}: {instead}"]


def leaves(config: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every value in a configuration."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, DictConfig):
            found |= leaves(value, f"{prefix}{key!s}.")
        else:
            found[f"{prefix}{key!s}"] = value
    return found


def typed(config: DictConfig, schema_class: type = Config) -> tuple[list[str], Any]:
    """Every value that is not of its type, and the configuration as an object of the schema (None if there are any)."""
    schema = OmegaConf.structured(schema_class)
    for node in schema.values():
        if isinstance(node, DictConfig):
            OmegaConf.set_readonly(node, False)  # a frozen dataclass is marked so
    try:
        return [], OmegaConf.to_object(OmegaConf.merge(schema, config))
    except OmegaConfBaseException as first:  # one of them, perhaps, of several
        problems = [str(first).splitlines()[0]]
    found = []
    for key, value in leaves(config).items():
        one = OmegaConf.create({})
        OmegaConf.update(one, key, value, force_add=True)
        try:
            OmegaConf.merge(schema, one)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0].replace("' not in 'Config'", "' is not known")
            found.append(f"{key}={value}: {moved(key, value) if key in MOVED else reason}")
    return found or problems, None


def moved(key: str, value: Any) -> str:
    """What to write instead of a key that has moved."""
    return f"a plan does not change the curve, so it is {MOVED[key]}={value} now, a key of the run"


def _target(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _arguments(group: str, node: dict, given: set[str], skip: set[str]) -> list[str]:
    """Problems of a config group whose `_target_` is called with its other keys."""
    try:
        target = _target(node["_target_"])
    except (KeyError, ImportError, AttributeError, ValueError):
        return [f"{group}._target_={node.get('_target_')}: there is no such class or function"]
    parameters = dict(inspect.signature(target).parameters)
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    problems = []
    for key, value in node.items():
        if key in skip:
            continue
        if key not in parameters or key in given:
            near = difflib.get_close_matches(key, [name for name in parameters if name not in given], 1)
            problems.append(
                f"{group}.{key}={value}: {target.__name__} has no such argument"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        elif key in hints and not _matches(value, hints[key]):
            problems.append(f"{group}.{key}={value}: it must be {_say(hints[key])}")
    return problems


def _matches(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (list, tuple):
        return isinstance(value, (list, tuple))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is type(None):
        return value is None
    return isinstance(value, hint) if inspect.isclass(hint) else True


def _say(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_say, inner))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, inner))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _model(config: Config) -> list[str]:
    problems = _arguments("model", config.model, {"vocabulary", "sequence"}, {"_target_"})
    if problems:
        return problems
    arguments = {key: value for key, value in config.model.items() if key != "_target_"}
    return [f"model: {problem}" for problem in _target(config.model["_target_"]).problems(**arguments)]


def _compile(config: Config, plan: Plan) -> Any:
    """What `strategy.compile=auto` becomes once it is known where the run will be: true, or auto, which does not compile."""
    import torch

    on_gpu = config.device["accelerator"] != "cpu" and torch.cuda.is_available() and importlib.util.find_spec("triton")
    if plan.compile != "auto" or plan.auto or not on_gpu or not can_compile(config, plan):
        return plan.compile
    return True if worth_compiling(config, plan) else "auto"


def can_compile(config: Config, plan: Plan) -> bool:
    """Whether nothing stands against compiling a model under a plan on a GPU."""
    asked = replace(plan, compile=True)
    able = _target(config.model["_target_"]).compiles and plan.tensor == 1
    return able and not resolve(asked, plan.world, config.global_batch)[1] and not cuts(config, asked)


def worth_compiling(config: Config, plan: Plan) -> bool:
    """Whether a run on a GPU is long enough for compiling to be earned back."""
    from leanlm.models.contract import without_storage
    from leanlm.strategies.balance import costs

    arguments = {key: value for key, value in config.model.items() if key != "_target_"}
    with without_storage():
        net = _target(config.model["_target_"])(vocabulary=256, sequence=config.sequence, **arguments)
    operations = 3 * sum(costs(net).values()) * config.global_batch / plan.world
    blocks = -(-len(net.blocks) // plan.pipeline)
    return earns_compiling(operations, plan.accumulate_grad_batches, blocks, config.max_steps)


def cuts(config: Config, plan: Plan) -> list[str]:
    """Problems of a plan with this model, found on one that has no storage."""
    if plan.pipeline * plan.tensor == 1 and not plan.recompute_window and not plan.compiled:
        return []
    return cuts_of_model(plan, *_facts(json.dumps(config.model), config.sequence))


@cache
def _facts(model: str, sequence: int) -> tuple[int, dict[str, int], bool, bool, bool]:
    """What `cuts_of_model` asks of a model, given as its config group in JSON: the planner asks for hundreds of plans."""
    from leanlm.models.contract import Model, without_storage
    from leanlm.models.head import AdaptiveHead

    arguments = json.loads(model)
    kind = _target(arguments.pop("_target_"))
    with without_storage():
        net: Model = kind(vocabulary=MANY, sequence=sequence, **arguments)
    adaptive = isinstance(net.head, AdaptiveHead)
    return len(net.blocks), net.tensor_units(), bool(net.tensor_split), net.carries_state, adaptive


def _corpus(config: Config) -> tuple[Corpus | None, list[str]]:
    data = config.data
    problems = _arguments("data", data, set(), DATA_KEYS)
    name = data.get("tokenizer")
    if not isinstance(name, str) or (name not in tokenizers.NAMES and not Path(name).expanduser().is_file()):
        problems.append(
            f"data.tokenizer={name}: one of {', '.join(tokenizers.NAMES)}, or the path of a tokenizer.json (no such file)"
        )
    if not isinstance(data.get("vocabulary"), int) or (name == "bpe" and data["vocabulary"] < 257):
        problems.append(
            f"data.vocabulary={data.get('vocabulary')}: a whole number, at least 257 (256 bytes and a mark) for bpe"
        )
    if problems:
        return None, problems
    try:
        return _target(data["_target_"])(**{key: value for key, value in data.items() if key not in DATA_KEYS}), []
    except UserError as error:
        return None, list(error.problems)


def _loggers(loggers: dict | None) -> list[str]:
    missing = [node["needs"] for node in (loggers or {}).values() if importlib.util.find_spec(node["needs"]) is None]
    return [f"this logger needs a package that is not installed: pip install {name}" for name in missing]


def _device(device: dict) -> list[str]:
    accelerator = device.get("accelerator")
    if accelerator not in ("auto", "cpu", "cuda"):
        return [f"device.accelerator={accelerator}: choose one of auto, cpu, cuda"]
    if accelerator == "cuda":
        import torch

        if not torch.cuda.is_available():
            return ["device.accelerator=cuda: this machine has no CUDA device that torch can use; write device=cpu"]
    return []
