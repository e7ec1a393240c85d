"""A stage: consecutive parts of a model that one device computes; the whole model where there is no pipeline."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from leanlm.memory.loss import token_loss
from leanlm.memory.offload import activations
from leanlm.memory.recompute import levels, recomputed
from leanlm.models import kernels
from leanlm.models.borders import Borders
from leanlm.models.contract import Model
from leanlm.models.dropout import draw, row_keys, sites
from leanlm.strategies.plan import Plan

States = list[Any]  # of each block: tensors [b, h] of a recurrent layer, a Borders, else None


class Stage(nn.Module):
    """[embed,] blocks [, head and loss] of a model, with the recurrent state of its blocks.

    New states become the carried ones only when the step is done (`advance`), so that a checkpoint taken in the middle of
    an accumulation is the state after the last whole step.

    It shares the modules of `net`: the blocks of these names, the embedding if it is the first and the head with the loss if it
    is the last. `seed`: of the dropout masks. `autocast`: type in which products are computed; None: that of the weights.
    """

    def __init__(self, net: Model, blocks: list[str], first: bool, last: bool, seed: int, plan: Plan,
                 autocast: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__()
        self.embed = net.embed if first else None
        self.blocks = nn.ModuleDict({name: net.blocks[name] for name in blocks})
        self.head = net.head if last else None
        self.carries_state, self.causal = net.carries_state, net.causal
        self.seed, self.plan, self.autocast = seed, plan, autocast
        self.levels = levels(plan.recompute, list(self.blocks.values()), plan.compiled)
        self.dropouts = sites(self)
        self.dropouts_of = {part: sites(part) for part in (self.embed, *self.blocks.values()) if part}
        self.loss: Callable[[Tensor, Tensor], Tensor] = partial(token_loss, net.head)
        self.score = self.loss  # of evaluation; another may return more than the loss, `[n]`
        self.graph: Callable[..., tuple[Tensor, States]] | None = None  # of the whole stage, compiled
        if plan.compiled:
            self._compile()
        self.step, self.fresh = 0, True
        self.before: dict[int, States] = {}  # first row of a micro-batch -> the states of its blocks after the last step
        self.after: dict[int, States] = {}
        self.evaluation: States | None = None

    def begin(self, step: int, fresh: bool) -> None:
        """Say which step the next forward passes belong to, and whether carried state starts anew with it."""
        self.step, self.fresh = step, fresh

    def forward(self, x: Tensor, rows: Tensor, targets: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """One micro-batch.

        Args:
            x: tokens `[b, s]` in the first stage, else hidden `[b, s, h]`.
            rows: their row numbers in the global batch, `[b]`, on the CPU.
            targets: `[b, s]`; only the last stage reads it. None: only the next token of one row is asked for.
            positions: of the tokens in their documents, `[b, s]`, if those of a row do not see each other.

        Returns:
            hidden `[b, s, h]`; in the last stage the summed loss in nats, or without targets logits `[v]`.
        """
        x = x if self.embed is not None else _Received.apply(x)
        states = self._states(rows) if positions is None else [Borders.of(positions, self.causal)] * len(self.blocks)
        keys = None  # of the dropout masks, [b, dropouts]
        if self.training and self.dropouts:
            keys = kernels.to_device(row_keys(self.seed, self.step, rows, self.dropouts), x.device)
        with (
            torch.autocast(x.device.type, self.autocast) if self.autocast else nullcontext(),
            activations(self) if self.training and self.plan.offloads("activations") else nullcontext(),
        ):
            out, after = self._read_as_planned(x, targets, states, keys)
        if self.carries_state and positions is not None:
            pass  # it begins anew with each document
        elif self.carries_state and self.training:
            self.after[int(rows[0])] = [tuple(part.detach() for part in state) for state in after]
        elif self.carries_state:
            self.evaluation = after
        if self.head is not None:
            return out
        out = out.contiguous()
        # Of one row it may be a view, which zero-bubble cannot detach in place; torch 2.11 compares strides that mean nothing.
        odd = out._is_view() or (len(out) == 1 and torch.__version__ < "2.13")
        return out.clone(memory_format=torch.contiguous_format) if odd else out

    def read(
        self, x: Tensor, targets: Tensor | None, states: States | None = None, keys: Tensor | None = None, first: int = 0
    ) -> tuple[Tensor, States]:
        """What `forward` returns and the states after it, of tokens from position `first` on.

        `keys [b, dropouts]`: of the rows' masks; None: they have been drawn, or none are wanted.
        """
        place = states[0].positions if states and isinstance(states[0], Borders) else first
        hidden = x if self.embed is None else self._masked(self.embed, keys, first, x, place)  # [b, s] -> [b, s, h]
        sent = hidden.dtype  # a recurrence may leave bf16 under autocast; the next stage expects what it was promised
        after = []
        for i, (block, level) in enumerate(zip(self.blocks.values(), self.levels, strict=True)):
            run = partial(self._masked, block, keys, first)
            hidden, state = recomputed(run, hidden, states[i] if states else None, level=level)
            after.append(state)
        if self.head is None:
            return hidden.to(sent), after
        if targets is None:
            return self.head(hidden[:, -1:])[0, 0], after
        return (self.loss if self.training else self.score)(hidden, targets), after

    def _masked(self, part: nn.Module, keys: Tensor | None, first: int, *inputs: Any) -> Any:
        """A part with its own rows' masks, which are drawn here: when backward computes it again, others have been drawn."""
        if keys is not None and (mine := self.dropouts_of[part]):
            place = self.dropouts.index(mine[0])
            draw(mine, keys[:, place : place + len(mine)], first)
        return part(*inputs)

    def _read_as_planned(self, x: Tensor, targets: Tensor | None, states: Any, keys: Tensor | None) -> tuple[Tensor, States]:
        """`read`, or what the plan puts in its place in training."""
        if self.training and self.graph is not None:
            if keys is not None:
                draw(self.dropouts, keys)
            return self.graph(x, targets, states)
        read = self._read_in_windows if self.training and self.plan.recompute_window else self.read
        return read(x, targets, states, keys)

    def _read_in_windows(self, x: Tensor, targets: Tensor | None, states: Any, keys: Tensor | None) -> tuple[Tensor, States]:
        """As `read`, a piece of the sequence at a time, each computed again in backward from the states before it."""
        window = self.plan.recompute_window if self.plan.recompute_window > 0 else 4 * isqrt(x.shape[1])
        outs = []
        for first in range(0, x.shape[1], window):
            piece = slice(first, first + window)
            mine = None if targets is None else targets[:, piece]
            out, states = recomputed(self.read, x[:, piece], mine, states, keys, first)
            outs.append(out)
        return (torch.cat(outs, 1) if self.head is None else torch.stack(outs).sum()), states

    def _compile(self) -> None:
        """One graph of the stage; where gradients are sent while backward goes on, or weights come and go, one of each part.

        Evaluation and generation, whose lengths change, are not compiled.
        """
        if self.plan.data_parallel_size == self.plan.tensor == 1:
            self.graph = torch.compile(self.read, fullgraph=True, dynamic=False)
            return
        whole = self.plan.tensor == 1  # torch's split matrices break graphs

        def in_training(part: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
            compiled = torch.compile(function, fullgraph=whole, dynamic=False)
            return lambda *inputs: (compiled if part.training else function)(*inputs)

        for part in ([] if self.embed is None else [self.embed]) + list(self.blocks.values()):
            part.forward = in_training(part, part.forward)  # within the hooks of FSDP2, which are not compiled
        if whole:
            self.loss = in_training(self, self.loss)

    def _states(self, rows: Tensor) -> States | None:
        if not self.carries_state or self.fresh:
            return None
        return self.before.get(int(rows[0])) if self.training else self.evaluation

    def advance(self) -> None:
        """The step is done: its last states are where the next one begins."""
        self.before, self.after = self.after, {}

    def carried(self) -> dict[str, Tensor]:
        """State of this device's rows by `<block>.<part>`, `[rows, ...]` each; empty before the first step."""
        micros = [self.before[row] for row in sorted(self.before)]
        return {
            f"{name}.{part}": torch.cat([states[i][part] for states in micros])
            for i, name in enumerate(self.blocks)
            for part in range(len(micros[0][i]) if micros else 0)
        }

    def carry(self, state: dict[str, Tensor], first_row: int, micro_batches: int) -> None:
        """Take up the state of this device's rows, which begin at `first_row` and are read in `micro_batches`."""
        mine = {key: part for key, part in state.items() if key.rpartition(".")[0] in self.blocks}
        if not mine:
            return
        size = len(next(iter(mine.values()))) // micro_batches
        for micro in range(micro_batches):
            rows = slice(micro * size, (micro + 1) * size)
            self.before[first_row + micro * size] = [
                tuple(mine[key][rows] for key in sorted(mine) if key.rpartition(".")[0] == name) for name in self.blocks
            ]


class _Received(torch.autograd.Function):
    """What came from the stage before; its gradient goes back there, and only dense memory can be sent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
