"""An adapter in peft's layout: adapter_config.json and adapter_model.safetensors, by the names of transformers."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from leanlm.common.files import write_json
from leanlm.inference.exported_model import Source
from leanlm.models.contract import Model
from leanlm.models.lora import Adapted, Correction, Lora, layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(folder: Path, net: Model, lora: Lora, source: Source, base: str, dtype: torch.dtype) -> None:
    """Write the corrections of a model. `base`: the folder that holds its own weights.

    Where a matrix of theirs is several of ours, their correction has the ranks of all of them together.
    """
    groups: dict[str, dict[int, Any]] = defaultdict(dict)  # name of theirs -> our layers, in order
    transposed = False
    for name, layer in layers(net):
        theirs, part, turned = source(f"{name}.weight")
        groups[theirs.removesuffix(".weight")][part] = layer
        transposed |= turned
    tensors, ranks = dict[str, Tensor](), dict[str, int]()
    for theirs, parts in groups.items():
        if any(isinstance(layer, Adapted) for layer in parts.values()):
            a, b = _together([parts[part] for part in sorted(parts)])
            ranks[theirs] = len(a)
            tensors |= {f"base_model.model.{theirs}.lora_{key}.weight": each.to(dtype) for key, each in (("A", a), ("B", b))}
    several = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    told = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "bias": "none",
        "r": lora.rank, "lora_alpha": lora.scale * lora.rank, "lora_dropout": lora.dropout, "fan_in_fan_out": transposed,
        "target_modules": sorted({re.split(r"\.\d+\.", name)[1] for name in ranks}),
        "rank_pattern": several, "alpha_pattern": {name: lora.scale * rank for name, rank in several.items()},
    }  # fmt: skip
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / CONFIG, told)


def _together(parts: list[Any]) -> tuple[Tensor, Tensor]:
    """A and B of layers whose outputs stand one behind the other, each corrected by its own part of the rank."""
    own: list[Correction | None] = [part.adapter if isinstance(part, Adapted) else None for part in parts]
    a = torch.cat([each.a.detach() for each in own if each is not None])
    b, row, column = a.new_zeros(sum(part.out_features for part in parts), len(a)), 0, 0
    for part, each in zip(parts, own, strict=True):
        if each is not None:
            b[row : row + part.out_features, column : column + len(each.a)] = each.b.detach()
            column += len(each.a)
        row += part.out_features
    return a, b
