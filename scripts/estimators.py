"""What other projects' estimators say a plan needs, from their published formulas: bytes on the fullest device.

Each is given the part of the model that a device holds, though only Megatron's asks for it.

- accelerate (`estimate-memory`): of weights of 4 bytes, four times as many for Adam; under mixed precision the largest of its
  terms, the optimizer's, twice as many. Nothing for activations.
- DeepSpeed (`estimate_zero2_model_states_mem_needs`, `estimate_zero3_model_states_mem_needs`, no offload): 4 bytes of a
  parameter and 16 divided; stage 3: 18 divided, and 4 of the largest layer. Nothing for activations.
- Megatron-LM (`theoretical_memory_usage`): 18 bytes of a parameter, or 6 and 12 divided; activations of a transformer in half
  precision without sequence parallelism. It knows no recurrent models.
"""

from leanlm.config.schema import Settings
from leanlm.models.contract import without_storage
from leanlm.planning.simulation.step import stages
from leanlm.training import build


def accelerate(settings: Settings, vocabulary: int) -> float:
    weights = 4 * _parameters(settings, vocabulary)
    return weights * (4 if settings.config.precision == "fp32" else 2)


def deepspeed(settings: Settings, vocabulary: int) -> float:
    plan, parameters = settings.plan, _parameters(settings, vocabulary)
    if plan.shard == 1:
        return 4 * parameters + 16 * parameters / (plan.replicate if plan.zero1 else 1)
    with without_storage():
        net = build.model(settings.config, plan, vocabulary)
    largest = max(sum(part.numel() for part in module.parameters(recurse=False)) for module in net.modules())
    return 4 * largest + 18 * parameters / plan.shard


def megatron(settings: Settings, vocabulary: int) -> float | None:
    """None: not a transformer."""
    config, plan = settings.config, settings.plan
    whole = stages(config, plan, vocabulary)
    if whole.recurrent:
        return None
    ends, micros = whole.elements["embed"] + whole.elements["head"], plan.accumulate_grad_batches
    blocks = sum(count for name, count in whole.elements.items() if name not in ("embed", "head"))
    table = ends if plan.pipeline == 1 else whole.elements["embed"]
    held = (blocks / plan.pipeline + table) / plan.tensor
    divided = plan.shard * (plan.replicate if plan.zero1 else 1)
    states = held * (18 if divided == 1 else 6 + 12 / divided)
    tokens = plan.micro_batch(config.global_batch) * config.sequence
    kept = tokens * whole.width * (10 + 24 / plan.tensor) * len(whole.cost.keys() - {"embed", "head"})
    kept += (8 + whole.width) * tokens * plan.pipeline
    if plan.schedule == "interleaved" and plan.pipeline > 1:
        kept *= 1 + (plan.pipeline - 1) / plan.stages
    elif plan.pipeline > 1:
        kept *= min(1, micros / plan.pipeline)
    else:
        kept += 2 * tokens * (vocabulary / plan.tensor + whole.width)
    return states + 1.05 * kept


def _parameters(settings: Settings, vocabulary: int) -> float:
    plan = settings.plan
    return stages(settings.config, plan, vocabulary).parameters / (plan.pipeline * plan.tensor)


ALL = {"accelerate": accelerate, "DeepSpeed": deepspeed, "Megatron-LM": megatron}
