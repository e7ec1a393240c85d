"""What every language model here is made of.

A model is `embed`, `blocks` and `head`. Each block maps `(hidden [b, s, h], state) -> (hidden [b, s, h], state)`, so
that whatever cuts a model (stages, shards, recomputation) can work block by block. Where documents of a row do not see each
other, the state is a `Borders` in training. Parameter names are global:
`blocks.7.attention.query.weight` names the same weights however the model is cut.
"""

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from leanlm.models.dropout import RowDropout
from leanlm.models.head import Head, head_problems

SIZES = ("width", "depth", "heads", "embedding", "head_size", "window", "global_every")  # arguments that count


class Model(nn.Module):
    """Base of all language models.

    A subclass sets `embed`, `blocks` and `head`, and fills one parameter by name in `initialize`.
    """

    carries_state: ClassVar[bool] = False  # True: the state after step s is the state before step s + 1
    compiles: ClassVar[bool] = False  # True: torch's compiler makes one graph of it, and strategy.compile=auto may ask for it

    causal: bool = True  # False: a token's hidden state depends on tokens after it, so that the model cannot go on from a text
    isolates: ClassVar[bool] = False  # True: its blocks take a `Borders` as their state, and its embedding positions [b, s]

    # What a tensor axis may split: name of a submodule, `*` for any block -> "vocabulary" (an embedding, or the head's
    # projection, by token types), "colwise" (a linear layer by outputs), "rowwise" (by inputs, which a colwise layer made),
    # "input" (a module whose input only colwise layers read: its gradient is then summed once for all of them), "partial" (an
    # RMSNorm that each device applies to outputs of a colwise layer: the gradient of its scale is summed).
    tensor_split: ClassVar[dict[str, str]] = {}

    embed: nn.Module  # (tokens [b, s], position of the first token, or positions [b, s]) -> hidden [b, s, h]
    blocks: nn.ModuleDict  # "0", "1", ...: (hidden, state) -> (hidden, state)
    head: Head

    def __init__(self, vocabulary: int, sequence: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.sequence = sequence

    @property
    def width(self) -> int:
        """h: size of the hidden state between blocks."""
        return self.head.projection.in_features

    @classmethod
    def problems(cls, **arguments: Any) -> list[str]:
        """What cannot work about constructor arguments that are of the right types, one line each."""
        given = cls.given(arguments)
        sizes = {key: given[key] for key in SIZES if given.get(key) is not None}
        found = [f"{key}={size}: it must be at least 1" for key, size in sizes.items() if size < 1]
        if not 0 <= given.get("dropout", 0) < 1:
            found.append(f"dropout={given['dropout']}: a share of at least 0 and below 1")
        wide = given.get("embedding") or given.get("width", 1)
        return found + head_problems(given.get("cutoffs"), given.get("tied", False), wide)

    @classmethod
    def given(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments and, where one is left out, its default."""
        known = inspect.signature(cls).parameters.items()
        return {name: each.default for name, each in known if each.default is not each.empty} | arguments

    def tensor_units(self) -> dict[str, int]:
        """Constructor argument -> count that a tensor axis must divide, such as attention heads."""
        return {}

    def hidden(self, tokens: Tensor, states: list[Any] | None = None, position: int = 0) -> tuple[Tensor, list[Any]]:
        """`tokens [b, s]` -> `hidden [b, s, h]` before the head, and the state of each block after the last token."""
        hidden = self.embed(tokens, position)
        after = []
        for i, block in enumerate(self.blocks.values()):
            hidden, state = block(hidden, states[i] if states else None)
            after.append(state)
        return hidden, after

    def forward(self, tokens: Tensor, states: list[Any] | None = None, position: int = 0) -> tuple[Tensor, list[Any]]:
        """`tokens [b, s]` -> `logits [b, s, v]` and the states after the last token."""
        hidden, states = self.hidden(tokens, states, position)
        return self.head(hidden), states

    def start(self, batch: int) -> list[Any]:
        """States from which to read `batch` sequences token by token, as generation does."""
        return [None] * len(self.blocks)

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Fill `parameter` of the global name `name` in place, drawing only from `generator`. Every model must define it."""
        raise NotImplementedError(f"{type(self).__name__} must define initialize(name, parameter, generator), here for {name}")

    def name_sites(self) -> None:
        """Give each dropout its site: a number made of its global name, so that a mask depends on nothing else."""
        for name, module in self.named_modules():
            if isinstance(module, RowDropout):
                module.site = stable_hash(name)


def stable_hash(*parts: object) -> int:
    """A 63-bit number that is the same in every process (Python's own `hash` is salted)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def ties(model: nn.Module) -> dict[str, str]:
    """Every parameter name that shares its weights with an earlier one -> the earlier, which is the global name."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    found = {name: first.setdefault(id(parameter), name) for name, parameter in named}
    return {name: owner for name, owner in found.items() if name != owner}


@torch.no_grad()
def initialize(model: Model, seed: int) -> None:
    """Fill every parameter from (seed, name) alone: the same bits whichever process fills it, in whatever order."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "cpu":
            _fill(model, seed, name, parameter)
        else:
            parameter.copy_(initial(model, seed, name, parameter))


@torch.no_grad()
def initial(model: Model, seed: int, name: str, like: Tensor) -> Tensor:
    """The initial value of one parameter with the shape and type of `like`, drawn on the CPU: devices draw
    differently."""
    value = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    _fill(model, seed, name, value)
    return value


def _fill(model: Model, seed: int, name: str, parameter: Tensor) -> None:
    """By the model, or by the part of it that the parameter belongs to, if that says how."""
    *path, key = name.split(".")
    part: Any = model
    for step in path:  # of a tied weight another rank may hold the part of this name
        part = part and part._modules.get(step)
    chance = torch.Generator().manual_seed(stable_hash(seed, name))
    if part is not model and hasattr(part, "initialize"):
        part.initialize(key, parameter, chance)
    else:
        model.initialize(name, parameter, chance)


@contextmanager
def without_storage() -> Iterator[None]:
    """Within it, parameters are made on the meta device; buffers are made as always, since nothing could fill them later."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # one that is already may be tied to another
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore
    try:
        with _WithoutFilling():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _WithoutFilling(TorchFunctionMode):
    """Modules fill their parameters when they are made; on the meta device that does nothing, but brings sympy (40 MiB)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in ("normal_", "uniform_") and isinstance(target, Tensor) and target.is_meta:
            return target
        return func(*args, **kwargs)
