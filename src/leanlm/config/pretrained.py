"""A run that begins from weights: `init_from` names a folder in Hugging Face's layout, or a run's."""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from leanlm.common.errors import UserError, refuse
from leanlm.common.files import defaults, literal
from leanlm.common.run_folder import Run
from leanlm.config.arguments import made
from leanlm.config.of_model import model_without_storage
from leanlm.config.schema import Config
from leanlm.config.words import parsed
from leanlm.data import tokenizer as tokenizers
from leanlm.models.families import family_of
from leanlm.models.pretrained import CONFIG, POSITIONS, Weights, read_json
from leanlm.models.transformer import Transformer

OWN = {"model.dropout"}  # keys of the model that say how it is trained, not what its weights mean


def is_run(folder: str) -> bool:
    return (Path(folder) / "config.yaml").is_file()


def begun_from_weights(config: DictConfig, overrides: list[str]) -> DictConfig:
    """A composed configuration with the model and the tokenizer of `init_from`, if it names a folder.

    Raises:
        UserError: the folder is not understood, or overrides ask for another model.
    """
    if not config.get("init_from"):
        return config
    given = [override.key_or_group for override in map(parsed, overrides) if override]
    others = [key for key in given if (key.partition(".")[0] == "model" and key not in OWN) or key in
              ("data.tokenizer", "data.vocabulary")]  # fmt: skip
    problems = [f"{key}=...: init_from gives the model and the tokenizer: leave it out" for key in others]
    if "init_from" in given and not any(key.partition(".")[0] in ("optim", "experiment") for key in given):
        problems.append("init_from: the optimizer that is set is for weights that nothing has trained; choose one, such as "
                        "optim=adamw optim.lr=5e-5 (with adapter=lora optim.lr=1e-3)")  # fmt: skip
    refuse(problems)
    folder = str(Run.find("latest").path if config.init_from == "latest" else Path(os.path.expanduser(config.init_from)))
    if is_run(folder):
        model: Any = OmegaConf.to_container(Run.find(folder).config().model)
    else:
        path = Path(folder) / CONFIG
        model = {"_target_": f"{Transformer.__module__}.{Transformer.__name__}", **family_of(read_json(path), str(path))[1]}
    if "model.dropout" in given:
        model["dropout"] = config.model.dropout
    if model.get("causal") is False and "objective" not in given:
        OmegaConf.update(config, "objective", literal(defaults("objective/masked.yaml")), merge=False, force_add=True)
    for key, value in {"init_from": os.path.abspath(folder), "model": model, "data.tokenizer": os.path.abspath(folder)}.items():
        OmegaConf.update(config, key, literal(value), merge=False, force_add=True)
    return config


def weights_problems(config: Config) -> list[str]:
    """Why the weights of `init_from` do not fit the model, one line each; nothing of them is read but their names and sizes."""
    if not config.init_from:
        return []
    objective = made("objective", config.objective)
    if objective.chooses and objective.vocabulary(tokenizer := tokenizers.given(config.init_from)) is not tokenizer:
        return [f"init_from={config.init_from}: its weights have no row for a mask token, which objective=masked needs"]
    if is_run(config.init_from):
        run, length = Run(config.init_from), Run(config.init_from).config().sequence
        net = model_without_storage(config.model, 2, config.sequence)
        if POSITIONS in dict(net.named_parameters()) and length != config.sequence:
            return [f"sequence={config.sequence}: {run.path} has learned {length} positions; write sequence={length}"]
        return [] if any(run.checkpoints.glob("step-*")) else [f"init_from={run.path}: it has no checkpoint yet"]
    try:
        vocabulary = tokenizers.given(config.init_from).vocabulary
        return Weights(Path(config.init_from)).problems(model_without_storage(config.model, vocabulary, config.sequence))
    except UserError as error:
        return list(error.problems)
