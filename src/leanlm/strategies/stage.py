"""A stage: consecutive parts of a model that one device computes; the whole model where there is no pipeline."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from leanlm.memory.loss import token_loss
from leanlm.memory.offload import activations
from leanlm.memory.recompute import again, levels
from leanlm.models.contract import Model
from leanlm.models.dropout import rows_of_step
from leanlm.strategies.plan import Plan

Draws = Callable[[int], AbstractContextManager[None]]  # position of the first token -> where dropout draws for it


class Stage(nn.Module):
    """[embed,] blocks [, head and loss] of a model, with the recurrent state of its blocks.

    New states become the carried ones only when the step is done (`advance`), so that a checkpoint taken in the middle of
    an accumulation is the state after the last whole step.

    Args:
        net: the model; the stage shares its modules.
        blocks: names of the stage's blocks.
        first: whether it reads tokens, with the embedding.
        last: whether it ends with the head and the loss.
        seed: of the dropout masks.
        plan: what it keeps for backward.

    Attributes:
        before: first row of a micro-batch -> the states of its blocks after the last step.
    """

    def __init__(self, net: Model, blocks: list[str], first: bool, last: bool, seed: int, plan: Plan) -> None:
        super().__init__()
        self.embed = net.embed if first else None
        self.blocks = nn.ModuleDict({name: net.blocks[name] for name in blocks})
        self.head = net.head if last else None
        self.carries_state, self.seed = net.carries_state, seed
        self.levels = levels(plan.recompute, list(self.blocks.values()), plan.compile)
        self.window = plan.recompute_window
        # for training only: generation, with a new length at each token, would compile again and again
        self.compiled = {name: torch.compile(block) for name, block in self.blocks.items() if plan.compile}
        self.offloads = plan.offload in ("activations", "all")
        self.step, self.fresh = 0, True
        self.before: dict[int, list[Any]] = {}
        self.after: dict[int, list[Any]] = {}
        self.evaluation: list[Any] | None = None

    def begin(self, step: int, fresh: bool) -> None:
        """Say which step the next forward passes belong to, and whether carried state starts anew with it."""
        self.step, self.fresh = step, fresh

    def forward(self, x: Tensor, rows: Tensor, targets: Tensor | None) -> Tensor:
        """One micro-batch.

        Args:
            x: tokens `[b, s]` in the first stage, else hidden `[b, s, h]`.
            rows: their row numbers in the global batch, `[b]`.
            targets: `[b, s]`; only the last stage reads it. None: only the next token of one row is asked for.

        Returns:
            hidden `[b, s, h]`; in the last stage the summed loss in nats, or without targets logits `[v]`.
        """
        if not self.training:
            out, after = self._read(x, targets, self._states(rows), lambda first: nullcontext())
            self.evaluation = after if self.carries_state else None
            return out
        read = self._read_in_windows if self.window else self._read
        draws = partial(rows_of_step, self.seed, self.step, rows.to(x.device))
        with activations(self) if self.offloads else nullcontext():
            out, after = read(x, targets, self._states(rows), draws)
        if self.carries_state:
            self.after[int(rows[0])] = [tuple(part.detach() for part in state) for state in after]
        return out

    def _read_in_windows(self, x: Tensor, targets: Tensor | None, states: Any, draws: Draws) -> tuple[Tensor, list[Any]]:
        """As `_read`, a piece of the sequence at a time, each computed again in backward from the states before it."""
        window = self.window if self.window > 0 else 4 * isqrt(x.shape[1])
        outs = []
        for first in range(0, x.shape[1], window):
            piece = slice(first, first + window)
            mine = None if targets is None else targets[:, piece]
            out, states = again(self._read, x[:, piece], mine, states, draws, first)
            outs.append(out)
        return (torch.cat(outs, 1) if self.head is None else torch.stack(outs).sum()), states

    def _read(
        self, x: Tensor, targets: Tensor | None, states: list[Any] | None, draws: Draws, first: int = 0
    ) -> tuple[Tensor, list[Any]]:
        """What `forward` returns and the states after it, of tokens from position `first` on."""
        with draws(first):
            hidden = _Received.apply(x) if self.embed is None else self.embed(x, first)
        sent = hidden.dtype  # a recurrence may leave bf16 under autocast; the next stage expects what it was promised
        after = []
        for i, ((name, block), level) in enumerate(zip(self.blocks.items(), self.levels, strict=True)):
            run = self.compiled.get(name, block) if self.training else block
            hidden, state = again(_drawing(draws, first, run), hidden, states[i] if states else None, level=level)
            after.append(state)
        if self.head is None:
            out = hidden.to(sent).contiguous()
            return out.clone() if out._is_view() else out, after  # of one row it may be; zero-bubble detaches it in place
        return (self.head(hidden[:, -1:])[0, 0] if targets is None else token_loss(self.head, hidden, targets)), after

    def _states(self, rows: Tensor) -> list[Any] | None:
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


def _drawing(draws: Draws, first: int, block: Callable[..., Any]) -> Callable[..., Any]:
    """The block, which draws the same dropout masks whenever it is called."""

    def run(hidden: Tensor, state: Any) -> Any:
        with draws(first):
            return block(hidden, state)

    return run


class _Received(torch.autograd.Function):
    """What came from the stage before; its gradient goes back there, and only dense memory can be sent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
