"""What a simulation does once for all that are alike, so that it is quick: one of many pieces, one tensor of each shape."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from leanlm.common.dtensors import local, place
from leanlm.memory import chunks
from leanlm.optimizers import adamw, low_bit, muon
from leanlm.planning.simulation.patches import Patch
from leanlm.planning.simulation.trace import BEFORE, Trace


def few_pieces(trace: Trace) -> list[Patch]:
    """Of a head's chunks of tokens and an optimizer's pieces of a tensor those between the first and the last are alike: one is
    run, and its work counts for all. None is, where an optimizer only gets its state."""

    def few(every: Callable[..., Iterable[Any]]) -> Callable[..., Iterator[Any]]:
        def some(*args: Any) -> Iterator[Any]:
            pieces = [] if trace.gets_state else list(every(*args))
            for i, piece in enumerate(pieces[:2] + pieces[2:][-1:]):
                trace.times = max(1, len(pieces) - 2) if i == 1 else 1
                yield piece
            trace.times = 1

        return some

    return [(chunks, "chunks", few(chunks.chunks)), (low_bit, "pieces", few(low_bit.pieces))]


def alike_tensors(trace: Trace) -> list[Patch]:
    """Muon does the same to each stack of a shape, and AdamW in pieces to each tensor: it is done to one. Where an optimizer
    only gets its state, Muon's products are not taken."""
    products, update = muon.orthogonal, adamw.AdamW._update
    stacks, tensors = _Repeated(trace), _Repeated(trace)

    def once(stack: Tensor, *settings: Any) -> Tensor:
        if trace.gets_state:
            return stack
        return stacks((stack.shape, settings), lambda: products(stack, *settings))

    def update_once(self: adamw.AdamW, parameter: Tensor, group: dict[str, Any]) -> None:
        if parameter not in self.state or trace.phase == BEFORE:
            return update(self, parameter, group)
        mine = local(self.owned(parameter))
        key = mine.shape, mine.stride(), mine.dtype, parameter.shape, str(getattr(parameter, "placements", None))
        return tensors(key, lambda: update(self, parameter, group))

    return [(muon, "orthogonal", once), (adamw.AdamW, "_update", update_once)]


class _Repeated:
    """What a trace sees of something that is done once, and counts again for all that is like it."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.seen: dict[Any, Any] = {}

    def __call__(self, key: Any, run: Callable[[], Any]) -> Any:
        """What `run` returns: a new tensor, of which others with this key get one as large, or nothing."""
        trace, before = self.trace, Counter(self.trace.work[self.trace.phase])
        if key not in self.seen:
            first, made, result = len(trace.events), run(), None
            seen = trace.events[first:]  # of storages that come, and of offloaded ones, whose pages come back and leave
            places = {number: i for i, number in enumerate(dict.fromkeys(number for number, _ in seen), 1)}
            if made is not None:
                result = places[trace.known[place(made)]], made.shape, made.stride(), made.dtype
            events = [(places[number], size) for number, size in seen]
            parts = {i: trace.parts[number] for number, i in places.items() if number in trace.parts}
            self.seen[key] = events, parts, len(places), result, trace.work[trace.phase] - before
            return made
        events, parts, count, result, work = self.seen[key]
        start, made = trace.count, None
        trace.count += count
        trace.parts |= {start + i: part for i, part in parts.items()}
        for i, size in events:
            if result is not None and i == result[0]:
                made = torch.empty_strided(*result[1:3], dtype=result[3])
                if i in parts:
                    trace.mark(parts[i], [made])
            else:
                trace.events.append((start + i, size))
        trace.work[trace.phase] = before + work
        return made
