"""Large modules that other libraries import for things that most runs never use: each is imported when it is used.

`torch._dynamo`, torch's compiler: Lightning and torch.optim import it, about 70 MiB, for the type of compiled modules and
to mark functions that a compiler should leave alone; torch.utils.checkpoint reads one setting. A stand-in does that; any
other use imports the real one.

What torchmetrics draws and tokenises with, about 45 MiB: while torchmetrics is imported, and only then, there are stand-ins.
"""

import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"
OF_TORCHMETRICS = ("matplotlib", "matplotlib.axes", "matplotlib.pyplot", "transformers")


class _Config:
    """The settings; the one that is here has the compiler's own default."""

    error_on_nested_fx_trace = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real().config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_real().config, name, value)


class _Dynamo(ModuleType):
    config = _Config()

    class OptimizedModule:
        """No module is one before the compiler is there."""

    @staticmethod
    def disable(function: Callable | None = None, *args: Any, **kwargs: Any) -> Any:
        if function is None:
            return lambda function: _Dynamo.disable(function, *args, **kwargs)
        marked: list[Callable] = []  # by the compiler, once it is there

        @functools.wraps(function)
        def run(*inputs: Any, **named: Any) -> Any:
            if not marked and not isinstance(sys.modules[NAME], _Dynamo):
                marked.append(_real().disable(function, *args, **kwargs))
            return (marked[0] if marked else function)(*inputs, **named)

        run._torchdynamo_disable = True  # type: ignore[attr-defined]
        return run

    @staticmethod
    def graph_break(*args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        # `from torch._dynamo import x` asks for __path__ too; it matters only to the import of a submodule
        importing = name == "__path__" and sys._getframe(1).f_code.co_name == "_find_and_load_unlocked"
        if name.startswith("__") and not importing:
            raise AttributeError(name)
        return getattr(_real(), name)


def _real() -> Any:
    if isinstance(sys.modules.get(NAME), _Dynamo):
        del sys.modules[NAME]
    return importlib.import_module(NAME)


class _Later:
    """A module, or a name in one, that is imported when it is called, derived from, or compared with a type."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Later(f"{self._path}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sys.modules.get(self._path.split(".")[0]), _Later):  # torchmetrics decorates its functions with it
            return lambda function: functools.wraps(function)(lambda *a, **k: self(*args, **kwargs)(function)(*a, **k))
        return pkgutil.resolve_name(self._path)(*args, **kwargs)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, pkgutil.resolve_name(self._path))

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (pkgutil.resolve_name(self._path),)


class _Torchmetrics(MetaPathFinder):
    """Finds torchmetrics, once, and gives it stand-ins of what is installed and not there yet."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torchmetrics":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(_with_stand_ins, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _with_stand_ins(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    absent = {name for name in OF_TORCHMETRICS if importlib.util.find_spec(name.split(".")[0])}
    added = {name: _Later(name) for name in absent if name.split(".")[0] not in sys.modules}
    sys.modules.update(added)  # type: ignore[arg-type]
    try:
        execute(module)
    finally:
        for name in added:
            del sys.modules[name]


def put_off_imports() -> None:
    if NAME not in sys.modules:
        sys.modules[NAME] = _Dynamo(NAME)
    if "torchmetrics" not in sys.modules:
        sys.meta_path.insert(0, _Torchmetrics())
