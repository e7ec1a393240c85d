"""A model in Hugging Face's layout: config.json of a family or with leanlm's own code, and the weights by their names there."""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from leanlm.common.errors import UserError
from leanlm.models.contract import Model
from leanlm.models.families import FAMILIES
from leanlm.models.family import Family
from leanlm.models.transformer import Transformer

PACKAGE, MODELS = Model.__module__.rpartition(".")[0], Path(__file__).parents[1] / "models"
IMPORT = re.compile(rf"^( *from ){re.escape(PACKAGE)}(?:(\.\w+)| import ([\w, ]+)$)", re.MULTILINE)
CODE = "modeling_leanlm"
NETWORK = f"{Transformer.__module__} import {Transformer.__name__} as"  # in hub_model.py, for which that of the run stands
TRAINING = ("dropout", "init", "zero_init")  # arguments that say how a model is trained, not what its weights mean

Source = Callable[[str], tuple[str, int, bool]]  # as Family.source


@dataclass(frozen=True)
class Layout:
    """Attributes:
    config: of config.json, without what the run's tokenizer and number type say.
    source: of a parameter's name, see Family.source.
    code: name -> content of the files that transformers has to run.
    """

    config: dict[str, Any]
    source: Source
    code: dict[str, str]


def layout(kind: type[Model], arguments: dict[str, Any], vocabulary: int, sequence: int) -> Layout:
    """How a model of a class, made with `arguments`, is exported: as the first family that has such models (a Mistral without a
    window is a Llama), else with its code.

    Raises:
        UserError: it is of no family, and its code cannot be copied.
    """
    sizes = {"vocabulary": vocabulary, "sequence": sequence, "places": sequence + arguments.get("position_offset", 0)}
    for family in FAMILIES.values() if kind is Transformer else ():
        if config := family_config(family, arguments | sizes):
            return Layout(config, family.source, {})
    auto = "AutoModelForCausalLM" if arguments.get("causal", True) else "AutoModelForMaskedLM"
    config = {
        "model_type": CODE.partition("_")[2],
        "architectures": ["ExportedModel"],
        "auto_map": {"AutoConfig": f"{CODE}.ExportedConfig", auto: f"{CODE}.ExportedModel"},
        "vocab_size": vocabulary,
        "max_position_embeddings": sequence,
        "tie_word_embeddings": bool(arguments.get("tied")),
        "use_cache": False,
        "network": arguments | ({"dropout": 0.0} if "dropout" in arguments else {}),  # its masks are leanlm's training's
    }
    return Layout(config, lambda name: (f"net.{name}", 0, False), code(kind))


def family_config(family: Family, given: dict[str, Any]) -> dict[str, Any] | None:
    """The config.json of a Transformer, or None if it is not of a family: if that would read other arguments from it."""
    arguments = whole(given)
    scaling, base = arguments["rope_scaling"], arguments["rope_base"]
    config = family.same | {key: arguments[name] for name, (key, _) in family.keys.items()}
    if family.scales_rope:
        kind = "linear" if scaling and len(scaling) == 1 else "llama3"
        config |= {"rope_theta": base, "rope_scaling": {"rope_type": kind, **scaling} if scaling else None}
    read, problems = family.arguments(config)
    back, same = whole(read), {key for key in arguments if key not in (*TRAINING, "vocabulary", "sequence", "places")}
    if problems or any(back[key] != arguments[key] for key in same):
        return None
    told = {key: arguments.get(value, value) for key, value in family.given.items()}
    return {"model_type": family.model_type, "architectures": [family.architecture], **config, **told}


def whole(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a Transformer with what those mean that are left out or None."""
    arguments = Transformer.given(given)
    width, heads, bias = arguments["width"], arguments["heads"], arguments["bias"]
    meant = {"kv_heads": heads, "head_size": width // heads, "mlp_width": 4 * width, "qkv_bias": bias}
    meant["local_rope_base"] = arguments["rope_base"]
    return arguments | {key: value for key, value in meant.items() if arguments[key] is None}


def code(kind: type[Model]) -> dict[str, str]:
    """The files with which transformers makes a model of a class, by name: imports among them are relative.

    Raises:
        UserError: the class is not of this package, so that it needs more than these files.
    """
    place, _, module = kind.__module__.rpartition(".")
    if place != PACKAGE:
        raise UserError(f"{kind.__module__}.{kind.__name__}: an export can copy files of {PACKAGE} alone; put the model there")
    template = Path(__file__).with_name("hub_model.py").read_text(encoding="utf-8")
    found = {CODE: template.replace(NETWORK, f"{PACKAGE}.{module} import {kind.__name__} as")}
    waiting = [CODE]
    while waiting:
        text = found[waiting.pop()]
        for match in IMPORT.finditer(text):
            for name in (match[3] or match[2].lstrip(".")).split(", "):
                if name not in found:
                    found[name] = (MODELS / f"{name}.py").read_text(encoding="utf-8")
                    waiting.append(name)
    # transformers copies only the files that it finds named as `from .file import`
    brought = "".join(f"from .{name} import __name__ as _\n" for name in sorted(found) if name != CODE)
    found = {name: IMPORT.sub(_relative, text) for name, text in found.items()}
    found[CODE] += f"\n\n# The loader of transformers brings the files that are named here.\n{brought}"
    return {f"{name}.py": text for name, text in found.items()}


def _relative(match: re.Match[str]) -> str:
    return match[1] + (match[2] or f". import {match[3]}")


def tensors(net: Model, source: Source) -> dict[str, tuple[list[Tensor], int]]:
    """Their name -> the parts that stand there behind each other, and along which dimension."""
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    along = {}
    for name, parameter in net.named_parameters():
        theirs, part, transposed = source(name)
        parts[theirs][part] = parameter.detach().t() if transposed else parameter.detach()
        along[theirs] = -1 if transposed else 0
    return {theirs: ([each for _, each in sorted(of_one.items())], along[theirs]) for theirs, of_one in parts.items()}
