"""Every check of a configuration that can be made before any work starts.

All problems of a command line are reported together, each with its arithmetic and what to write instead.
"""

import os
import shlex
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from omegaconf import DictConfig

from leanlm.common.errors import UserError, refuse
from leanlm.common.files import CONF, defaults
from leanlm.common.precision import PRECISIONS, automatic
from leanlm.config.adapters import adapter_problems
from leanlm.config.arguments import argument_problems, made, target, typed
from leanlm.config.callbacks import callback_problems, missing_packages
from leanlm.config.objectives import objective_problems
from leanlm.config.of_model import model_problems, settle_compile
from leanlm.config.pretrained import weights_problems
from leanlm.config.schema import ALLOWED, Config, Settings
from leanlm.data import tokenizer as tokenizers
from leanlm.data.corpus import Corpus
from leanlm.data.mixture import mixture
from leanlm.launch.ranks import launched, world_size
from leanlm.launch.supervisor import ATTEMPT, PREDICTED
from leanlm.strategies.checks import of_run, on_gpus, resolve

PLANNER, WHERE = "leanlm.planning", "src/leanlm/planning"
AT_LEAST = dict.fromkeys(("seed", "clip", "val_overlap", "sample_tokens", "restarts"), 0) | dict.fromkeys(
    ("max_steps", "global_batch", "sequence", "log_every", "val_every", "val_lanes", "checkpoint_every", "keep_checkpoints"), 1
)
DATA = {"tokenizer": "byte", "vocabulary": 8192, "ignore": []}  # what a data set may leave out
DATA_KEYS = {"_target_", *DATA}  # the rest of the group goes to the corpus function
OF_ALL = (*DATA, "isolate")  # keys that a mixture has for all of its sources


def check(config: DictConfig, needs_text: bool = True, needs_tokenizer: bool = True, needs_weights: bool = True) -> Settings:
    """Raise UserError with every problem of a configuration, or return it ready for use.

    `needs_text`: whether its corpus has to be there. `needs_tokenizer`: and what it is read with, which a run holds itself.
    `needs_weights`: whether those of `init_from` have to be.
    """
    problems, checked = typed(config)
    refuse(problems)
    if checked.precision == "auto":
        checked.precision = automatic(checked.device)
    wrong = objective_problems(checked)
    devices = world_size() if launched() else checked.devices
    auto = checked.strategy.auto  # axes and micro-batches are chosen later, so that they work
    plan, found = resolve(checked.strategy, None if auto else devices, checked.global_batch)
    problems = wrong + _values(checked, devices) + found + checked.optim.problems() + _device(checked.device)
    problems += without_planner(checked.device, checked.strategy.auto) + _model(checked)
    problems += missing_packages(checked.logger) + callback_problems(checked)
    problems += of_run(plan, checked.optim, checked.precision, checked.clip)
    if not problems:
        problems += adapter_problems(checked, plan)
        problems += model_problems(checked, plan) + on_gpus(plan, checked.device["accelerator"])
    corpus, found = _corpus(checked, needs_tokenizer) if needs_text else (Corpus({}), [])
    problems += folder_problems(checked) + found
    if needs_weights and not problems and not checked.resume:
        problems += weights_problems(checked)
    for name, source in (corpus.sources or {"": corpus}).items() if needs_text and not problems else ():
        if source.form is None:  # a document may be short
            problems += fits(checked, source.size("train"), name, at_most=True)
    refuse(problems)
    return Settings(checked, replace(plan, compile=settle_compile(checked, plan)), corpus, devices)


def fits(config: Config, have: int, source: str = "", at_most: bool = False) -> list[str]:
    """Whether the text is long enough for the batches. `have`: its tokens (`at_most`: bytes, which no tokenizer here exceeds).
    `source`: of a mixture, of which a row is a window."""
    what, text = "bytes" if at_most else "tokens", "the training text" + (f" of data.sources.{source}" if source else "")
    recurrent = not source and resolve_name(config.model["_target_"]).carries_state
    rows = config.global_batch if recurrent else 1  # each lane must hold a sequence
    if have - 1 >= rows * config.sequence:
        return []
    need = f"{rows} lanes x sequence={config.sequence}" if recurrent else f"sequence={config.sequence}"
    longest, most = (have - 1) // rows, max(1, (have - 1) // config.sequence)
    instead = f"write sequence={longest} or less" if longest > 0 else f"write global_batch={most} or less"
    return [f"{text} has {have:,} {what}, fewer than {need} + 1 = {rows * config.sequence + 1:,}: {instead}"]


def _values(config: Config, devices: int | None) -> list[str]:
    """Problems of the keys that belong to no group. `devices`: as many as there are processes, or as asked for."""
    low = {key: least for key, least in AT_LEAST.items() if getattr(config, key) < least}
    problems = [f"{key}={getattr(config, key)}: it must be at least {least}" for key, least in low.items()]
    if config.devices is not None and config.devices < 1:
        problems.append(f"devices={config.devices}: at least 1, or null for as many as the plan uses")
    if config.devices not in (None, devices):
        problems.append(f"devices={config.devices}, but {devices} processes were started: leave devices out under torchrun")
    if config.precision not in PRECISIONS:
        problems.append(f"precision={config.precision}: choose one of auto, {', '.join(PRECISIONS)}")
    levers = [lever for lever in config.allow if lever not in ALLOWED]
    return problems + [
        f"allow: {lever} is not a lever that changes the curve; choose of {', '.join(ALLOWED)}" for lever in levers
    ]


def folder_problems(config: Config) -> list[str]:
    """What is in the way of a run in its `run_dir`."""
    path, resumed = config.run_dir, config.resume
    chosen = {ATTEMPT, PREDICTED} & os.environ.keys()  # by the planner, perhaps once more after memory has ended
    if not path or chosen or (resumed and Path(path).resolve() == Path(resumed).resolve()):
        return []
    if Path(path, "config.yaml").is_file():
        resume = shlex.quote(f"resume={path}")
        return [f"run_dir={path} holds a run already: write {resume} to continue it, or another run_dir"]
    above = next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())
    if above.is_dir() and os.access(above, os.W_OK):
        return []
    return [f"run_dir={path}: {above} is " + ("read-only" if above.is_dir() else "no folder") + ", choose another run_dir"]


def _model(config: Config) -> list[str]:
    problems = argument_problems("model", config.model, {"vocabulary", "sequence"}, {"_target_"})
    if problems:
        return problems
    arguments = dict(config.model)
    kind = resolve_name(arguments.pop("_target_"))
    problems = [f"model: {problem}" for problem in kind.problems(**arguments)]
    overlap, window = config.val_overlap, config.sequence
    if not kind.carries_state and overlap >= window:
        problems.append(f"val_overlap={overlap}: of windows of sequence={window} tokens none would be counted; write less")
    return problems


def _corpus(config: Config, needs_tokenizer: bool) -> tuple[Corpus, list[str]]:
    data = config.data = DATA | config.data
    problems = argument_problems("data", data, set(), DATA_KEYS) + (_tokenizer(data) if needs_tokenizer else [])
    if _is_mixture("data", data) and isinstance(data.get("sources") or {}, dict):
        found = {name: _source(f"data.sources.{name}", node) for name, node in (data.get("sources") or {}).items()}
        problems += [line for *_, lines in found.values() for line in lines]
        data = data | {"sources": {name: (weight, corpus) for name, (weight, corpus, _) in found.items()}}
    return (Corpus({}), problems) if problems else _made("data", data, DATA_KEYS)


def _source(group: str, node: Any) -> tuple[float, Corpus, list[str]]:
    """Weight and corpus of a source of a mixture, and every problem of it. `group`: its key."""
    if not isinstance(node, dict):
        return 0, Corpus({}), [f"{group}={node}: write {{data: text, path: FILE_OR_FOLDER, weight: 1}}"]
    node, weight = {"weight": 1, **node}, node.get("weight", 1)
    problems = [f"{group}.{key}: it is the same for all sources, so write data.{key}" for key in OF_ALL if key in node]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < inf:
        problems.append(f"{group}.weight={weight}: it must be a number above 0")
    options = sorted(file.stem for file in (CONF / "data").glob("*.yaml") if file.stem != "mixture")
    if "_target_" not in node and node.get("data") not in options:
        return 0, Corpus({}), [*problems, f"{group}.data={node.get('data')}: choose one of {', '.join(options)}"]
    if "_target_" not in node:
        node["_target_"] = defaults(f"data/{node['data']}.yaml")["_target_"]
    in_the_way = argument_problems(group, node, set(), skip := {"_target_", "data", "weight", *OF_ALL})
    if _is_mixture(group, node):
        in_the_way.append(f"{group}: a mixture has no mixtures: name the sources of this one")
    corpus, found = (Corpus({}), list[str]()) if in_the_way else _made(group, node, skip)
    return weight, corpus, [*problems, *in_the_way, *(f"{group}: {line}" for line in found)]


def _is_mixture(group: str, node: dict[str, Any]) -> bool:
    with suppress(UserError):
        return target(group, node) is mixture
    return False


def _made(group: str, node: dict[str, Any], skip: set[str]) -> tuple[Corpus, list[str]]:
    """The corpus of a data set, and what is wrong with it. `skip`: keys that are no arguments of its function."""
    try:
        corpus = made(group, node, skip)
    except UserError as error:
        return Corpus({}), list(error.problems)
    missing = [split for split in ("train", "validation") if split not in corpus.splits]
    if missing:
        lacking = " and no ".join(missing)
        return corpus, [f"{node['_target_']}: the corpus has {', '.join(corpus.splits)}, but no split {lacking}"]
    empty = [split for split in corpus.splits if not corpus.size(split)]
    files = {split: ", ".join(str(piece.path) for piece in corpus.splits[split][:3]) or "its folder" for split in empty}
    return corpus, [f"the {split} split is empty: put text into {files[split]}, or remove it" for split in empty]


def _tokenizer(data: dict[str, Any]) -> list[str]:
    problems: list[str] = []
    name, vocabulary = data.get("tokenizer"), data.get("vocabulary")
    if name not in tokenizers.NAMES:
        try:
            tokenizers.given(str(name))
        except UserError as error:
            problems += error.problems
    if not isinstance(vocabulary, int) or (name == "bpe" and vocabulary < 257):
        problems.append(f"data.vocabulary={vocabulary}: a whole number, at least 257 (256 bytes and a mark) for bpe")
    return problems


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
    if accelerator == "cuda" and not torch.cuda.is_available():
        return ["device.accelerator=cuda: this machine has no CUDA device that torch can use; write device=cpu"]
    return []
