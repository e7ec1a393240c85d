"""Whether values are of their types, and whether what a `_target_` names takes its arguments."""

import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterable
from pkgutil import resolve_name
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from leanlm.common.errors import UserError
from leanlm.common.files import literal
from leanlm.config.schema import Config
from leanlm.data.corpus import Corpus

MOVED = {"strategy.precision": "precision", "strategy.optimizer_state": "optim.state"}  # in runs of earlier versions, too

NEEDED = ("model", "data", "device")  # groups that are not complete without a choice
BASES = {  # group -> the class from which what it names is derived
    "model": "leanlm.models.contract.Model",
    "adapter": "leanlm.models.lora.Lora",
    "objective": "leanlm.data.objectives.Causal",
    "callbacks": "lightning.pytorch.callbacks.Callback",
    "logger": "lightning.pytorch.loggers.Logger",
}


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


def nearest(word: str, known: Iterable[str]) -> str:
    """What may have been meant instead, in brackets; empty: nothing that is known is like it."""
    return "".join(f" (did you mean {each}?)" for each in difflib.get_close_matches(word, list(known), 1))


def moved(key: str, value: Any) -> str:
    """What to write instead of a key that has moved."""
    return f"a plan does not change the curve, so it is {MOVED[key]}={value} now, a key of the run"


def target(group: str, node: dict[str, Any]) -> Any:
    """What `_target_` names in a node of a config group.

    A run, and its configuration, may come from a stranger: only what the group is for is ever called.

    Raises:
        UserError: there is no such thing, or it is of another kind.
    """
    name = str(node.get("_target_"))
    try:
        found = resolve_name(name)
    except (ImportError, AttributeError, ValueError, TypeError):
        raise UserError(f"{group}._target_={name}: there is no such class or function") from None
    if base := BASES.get(group.partition(".")[0]):
        fits, kind = inspect.isclass(found) and issubclass(found, resolve_name(base)), f"a class derived from {base}"
    else:
        fits = inspect.isfunction(inspect.unwrap(found)) and typing.get_type_hints(found).get("return") is Corpus
        kind = "a function that is declared to return a leanlm.data.corpus.Corpus (`-> Corpus`)"
    if not fits:
        raise UserError(f"{group}._target_={name}: it must be {kind}")
    return found


def made(group: str, node: dict[str, Any], skip: Iterable[str] = (), **given: Any) -> Any:
    """What the `_target_` of a node makes of its other keys, but for those to `skip`, and of the arguments `given`."""
    arguments = {key: value for key, value in node.items() if key != "_target_" and key not in skip}
    return target(group, node)(**given, **arguments)


def argument_problems(group: str, node: dict, given: set[str], skip: set[str]) -> list[str]:
    """Problems of a config group whose `_target_` is called with its other keys.

    Args:
        group: its name.
        node: its keys and values.
        given: arguments that come from elsewhere.
        skip: keys that are no arguments.
    """
    try:
        called = target(group, node)
    except UserError as error:
        return list(error.problems)
    hints = typing.get_type_hints(called.__init__ if inspect.isclass(called) else called)
    names = [name for name in inspect.signature(called).parameters if name not in given]
    problems = []
    for key, value in node.items():
        if key in skip:
            continue
        if key not in names:
            problems.append(f"{group}.{key}={value}: {called.__name__} has no such argument{nearest(key, names)}")
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
