"""Stands in for `torch._dynamo`, torch's compiler, until something needs more of it than Lightning and torch.optim do.

They import it, about 70 MiB, for the type of compiled modules and to mark functions that a compiler should leave
alone; torch.utils.checkpoint reads one setting. Any other use of it imports the real one.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"


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


def put_off_import() -> None:
    if NAME not in sys.modules:
        sys.modules[NAME] = _Dynamo(NAME)
