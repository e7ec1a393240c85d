"""Whether values are of their types, and whether what a `_target_` names takes its arguments."""

import difflib
import importlib.util
import inspect
import types
import typing
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from leanlm.config.schema import Config

MOVED = {"strategy.precision": "precision", "strategy.optimizer_state": "optim.state"}  # in runs of earlier versions, too


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


def target(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def argument_problems(group: str, node: dict, given: set[str], skip: set[str]) -> list[str]:
    """Problems of a config group whose `_target_` is called with its other keys."""
    try:
        made = target(node["_target_"])
    except (KeyError, ImportError, AttributeError, ValueError):
        return [f"{group}._target_={node.get('_target_')}: there is no such class or function"]
    parameters = dict(inspect.signature(made).parameters)
    hints = typing.get_type_hints(made.__init__ if inspect.isclass(made) else made)
    problems = []
    for key, value in node.items():
        if key in skip:
            continue
        if key not in parameters or key in given:
            near = difflib.get_close_matches(key, [name for name in parameters if name not in given], 1)
            problems.append(
                f"{group}.{key}={value}: {made.__name__} has no such argument" + (f"; did you mean {near[0]}?" if near else "")
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
