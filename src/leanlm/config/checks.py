"""The typed schema of a run, and every check that can be made before any work starts.

All problems of a command line are reported together, each with its arithmetic and what to write instead.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from leanlm.common.errors import UserError
from leanlm.common.precision import PRECISIONS, automatic
from leanlm.config.arguments import argument_problems, target, typed
from leanlm.config.callbacks import callback_problems, missing_packages
from leanlm.config.of_model import model_problems, settle_compile
from leanlm.config.schema import ALLOWED, Config, Settings
from leanlm.data import tokenizer as tokenizers
from leanlm.data.corpus import Corpus
from leanlm.launch.ranks import launched, world_size
from leanlm.strategies.checks import of_run, on_gpus, resolve

PLANNER, WHERE = "leanlm.planning", "src/leanlm/planning"
DATA_KEYS = {"_target_", "tokenizer", "vocabulary", "ignore"}  # the rest of the group goes to the corpus function


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
    problems += (
        found
        + checked.optim.problems()
        + _device(checked.device)
        + without_planner(checked.device, checked.strategy.auto)
        + missing_packages(checked.logger)
        + callback_problems(checked)
        + _model(checked)
    )
    problems += of_run(plan, checked.optim, checked.precision, checked.clip)
    if not problems:
        problems += model_problems(checked, plan) + on_gpus(plan, checked.device["accelerator"])
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
    return Settings(checked, replace(plan, compile=settle_compile(checked, plan)), corpus, devices)


def fits(config: Config, sizes: dict[str, int], at_most: bool = False) -> list[str]:
    """Whether the text is long enough for the batches. `sizes`: split -> tokens (`at_most`: bytes, which no tokenizer
    here exceeds)."""
    what = "bytes" if at_most else "tokens"
    have, recurrent = sizes["train"], target(config.model["_target_"]).carries_state
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


def _model(config: Config) -> list[str]:
    problems = argument_problems("model", config.model, {"vocabulary", "sequence"}, {"_target_"})
    if problems:
        return problems
    arguments = {key: value for key, value in config.model.items() if key != "_target_"}
    return [f"model: {problem}" for problem in target(config.model["_target_"]).problems(**arguments)]


def _corpus(config: Config) -> tuple[Corpus | None, list[str]]:
    data = config.data
    problems = argument_problems("data", data, set(), DATA_KEYS)
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
        return target(data["_target_"])(**{key: value for key, value in data.items() if key not in DATA_KEYS}), []
    except UserError as error:
        return None, list(error.problems)


def without_planner(device: dict[str, Any], auto: bool = False) -> list[str]:
    """What asks for a planner that somebody has deleted."""
    if find_spec(PLANNER) is not None:
        return []
    memory = device.get("memory")
    found = [f"strategy.auto=true: there is no planner here ({WHERE}); write the plan that you want"] if auto else []
    return found + ([f"device.memory={memory}: there is no planner here ({WHERE}) to keep to it"] if memory else [])


def _device(device: dict) -> list[str]:
    accelerator = device.get("accelerator")
    if accelerator not in ("auto", "cpu", "cuda"):
        return [f"device.accelerator={accelerator}: choose one of auto, cpu, cuda"]
    if accelerator == "cuda":
        import torch

        if not torch.cuda.is_available():
            return ["device.accelerator=cuda: this machine has no CUDA device that torch can use; write device=cpu"]
    return []
