"""Whether values are of their types, and whether what a `_target_` names takes its arguments."""

import difflib
import inspect
import re
import types
import typing
from pkgutil import resolve_name
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from leanlm.common.files import literal
from leanlm.config.schema import Config

MOVED = {"strategy.precision": "precision", "strategy.optimizer_state": "optim.state"}  # in runs of earlier versions, too

NEEDED = ("model", "data", "device")  # groups that are not complete without a choice


def leaves(config: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every value in a configuration."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, DictConfig) and value:
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
    needed = NEEDED if issubclass(schema_class, Config) else ()
    problems = [f"{group}=null: a run needs one; see --help for what there is" for group in needed if not config.get(group)]
    for key, value in leaves(config).items():
        try:
            OmegaConf.update(schema, key, literal(value))
        except OmegaConfBaseException as error:
            reason = re.sub(r"' not in '\w+'", "' is not known", str(error).splitlines()[0])
            problems.append(f"{key}={value}: {moved(key, value) if key in MOVED else reason}")
    return problems, None if problems else OmegaConf.to_object(schema)


def moved(key: str, value: Any) -> str:
    """What to write instead of a key that has moved."""
    return f"a plan does not change the curve, so it is {MOVED[key]}={value} now, a key of the run"


def argument_problems(group: str, node: dict, given: set[str], skip: set[str]) -> list[str]:
    """Problems of a config group whose `_target_` is called with its other keys.

    Args:
        group: its name.
        node: its keys and values.
        given: arguments that come from elsewhere.
        skip: keys that are no arguments.
    """
    try:
        made = resolve_name(node["_target_"])
    except (KeyError, ImportError, AttributeError, ValueError):
        return [f"{group}._target_={node.get('_target_')}: there is no such class or function"]
    hints = typing.get_type_hints(made.__init__ if inspect.isclass(made) else made)
    names = [name for name in inspect.signature(made).parameters if name not in given]
    problems = []
    for key, value in node.items():
        if key in skip:
            continue
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{group}.{key}={value}: {made.__name__} has no such argument{hint}")
        elif key in hints and not _matches(value, hints[key]):
            problems.append(f"{group}.{key}={value}: it must be {_say(hints[key])}")
    return problems


def _matches(value: Any, hint: Any) -> bool:
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in inner)
    if kind is typing.Literal:
        return value in inner
    if isinstance(value, bool) and kind in (int, float):
        return False
    like = {float: (int, float), tuple: (list, tuple), list: (list, tuple)}.get(kind, kind)  # YAML knows no tuples
    return not inspect.isclass(kind) or isinstance(value, like)


def _say(hint: Any) -> str:
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(map(_say, inner))
    if kind is typing.Literal:
        return "one of " + ", ".join(map(str, inner))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
