"""What a plan and a model say to each other, found on a model without storage."""

import importlib.util
import json
from dataclasses import replace
from functools import cache
from pkgutil import resolve_name
from typing import Any

import torch

from leanlm.config.arguments import made
from leanlm.config.schema import Config
from leanlm.models.contract import Model, without_storage
from leanlm.models.head import AdaptiveHead
from leanlm.strategies.balance import costs
from leanlm.strategies.checks import of_model, resolve
from leanlm.strategies.plan import Plan

COMPILING = (10.0, 3.0)  # seconds until a graph is compiled, and for each of its blocks (of GPT-2 small some 45)
SAVED = 0.3  # share of a step on a GPU that compiling saves (GPT-2 small on an H100: nanoGPT's 38.2 ms become 29.4)
RATE, EACH = 2.5e14, 1.5e-3  # operations a second of a GPU in bf16, and seconds of a block whose operations are all small
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
    """Whether a run on a GPU is long enough for compiling to be earned back, roughly."""
    net = model_without_storage(config.model, 256, config.sequence)
    operations = 3 * sum(costs(net).values()) * config.global_batch / plan.world  # of a step, on each device
    blocks = -(-len(net.blocks) // plan.pipeline)
    step = max(operations / RATE, EACH * blocks * plan.accumulate_grad_batches)
    return config.max_steps * step * SAVED > COMPILING[0] + COMPILING[1] * blocks


def model_problems(config: Config, plan: Plan) -> list[str]:
    """Problems of a plan with this model, and of documents that are isolated."""
    if config.data and config.data.get("isolate") and (problem := _isolation(config, plan)):
        return [problem]
    if plan.pipeline * plan.tensor == 1 and not plan.recompute_window and not plan.compiled:
        return []
    return of_model(plan, *_facts(json.dumps(config.model), config.sequence))


def _isolation(config: Config, plan: Plan) -> str | None:
    """Why documents of a row cannot be kept apart."""
    kind = resolve_name(config.model["_target_"])
    if not kind.isolates:
        return f"data.isolate=true: {kind.__name__} cannot keep documents apart (Model.isolates); leave it out"
    if plan.recompute_window:
        return "data.isolate=true: strategy.recompute_window reads a row in pieces, over its documents; leave one of both out"
    return None


@cache
def _facts(model: str, sequence: int) -> tuple[int, dict[str, int], bool, bool, bool]:
    """What `of_model` asks of a model, given as its config group in JSON: the planner asks for hundreds of plans."""
    net = model_without_storage(json.loads(model), MANY, sequence)
    adaptive = isinstance(net.head, AdaptiveHead)
    return len(net.blocks), net.tensor_units(), bool(net.tensor_split), net.carries_state, adaptive


def model_without_storage(node: dict[str, Any], vocabulary: int, sequence: int) -> Model:
    """The model of a config group, without storage."""
    with without_storage():
        return made("model", node, vocabulary=vocabulary, sequence=sequence)
