"""What a plan and a model say to each other, found on a model without storage."""

import importlib.util
import json
from dataclasses import replace
from functools import cache
from pkgutil import resolve_name
from typing import Any

import torch

from leanlm.config.schema import Config
from leanlm.models.contract import Model, without_storage
from leanlm.models.head import AdaptiveHead
from leanlm.strategies.balance import costs
from leanlm.strategies.checks import earns_compiling, of_model, resolve
from leanlm.strategies.plan import Plan

MANY = 1 << 20  # token types, more than any cutoff: how many there are is not known before the text has been read


def settle_compile(config: Config, plan: Plan) -> Any:
    """What `strategy.compile=auto` becomes once it is known where the run will be: true, or auto, which does not compile."""
    on_gpu = config.device["accelerator"] != "cpu" and torch.cuda.is_available() and importlib.util.find_spec("triton")
    if plan.compile != "auto" or plan.auto or not on_gpu or not can_compile(config, plan):
        return plan.compile
    return True if worth_compiling(config, plan) else "auto"


def can_compile(config: Config, plan: Plan) -> bool:
    """Whether nothing stands against compiling a model under a plan on a GPU."""
    asked = replace(plan, compile=True)
    able = resolve_name(config.model["_target_"]).compiles and plan.tensor == 1
    return able and not resolve(asked, plan.world, config.global_batch)[1] and not model_problems(config, asked)


def worth_compiling(config: Config, plan: Plan) -> bool:
    """Whether a run on a GPU is long enough for compiling to be earned back."""
    net = _model(config.model, 256, config.sequence)
    operations = 3 * sum(costs(net).values()) * config.global_batch / plan.world
    blocks = -(-len(net.blocks) // plan.pipeline)
    return earns_compiling(operations, plan.accumulate_grad_batches, blocks, config.max_steps)


def model_problems(config: Config, plan: Plan) -> list[str]:
    """Problems of a plan with this model."""
    if plan.pipeline * plan.tensor == 1 and not plan.recompute_window and not plan.compiled:
        return []
    return of_model(plan, *_facts(json.dumps(config.model), config.sequence))


@cache
def _facts(model: str, sequence: int) -> tuple[int, dict[str, int], bool, bool, bool]:
    """What `of_model` asks of a model, given as its config group in JSON: the planner asks for hundreds of plans."""
    net = _model(json.loads(model), MANY, sequence)
    adaptive = isinstance(net.head, AdaptiveHead)
    return len(net.blocks), net.tensor_units(), bool(net.tensor_split), net.carries_state, adaptive


def _model(node: dict[str, Any], vocabulary: int, sequence: int) -> Model:
    """The model of a config group, without storage."""
    arguments = dict(node)
    kind = resolve_name(arguments.pop("_target_"))
    with without_storage():
        return kind(vocabulary=vocabulary, sequence=sequence, **arguments)
