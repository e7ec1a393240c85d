"""What a simulation does once for all that are alike, so that it is quick: one of many pieces, one tensor of each shape."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from leanlm.common.dtensors import local
from leanlm.memory import chunks
from leanlm.optimizers import adamw, low_bit
from leanlm.planning.simulation.patches import Patch
from leanlm.planning.simulation.trace import BEFORE, Trace


def few_pieces(trace: Trace) -> list[Patch]:
    """Of a head's chunks of tokens and an optimizer's pieces of a tensor those between the first and the last are alike: one is
    run, and its work counts for all. None is, where an optimizer only gets its state, unless a heap that never shrinks keeps
    what else it takes."""

    def few(every: Callable[..., Iterable[Any]]) -> Callable[..., Iterator[Any]]:
        def some(*args: Any) -> Iterator[Any]:
            pieces = [] if trace.phase == BEFORE and not trace.pinned else list(every(*args))
            for i, piece in enumerate(pieces[:2] + pieces[2:][-1:]):
                trace.times = max(1, len(pieces) - 2) if i == 1 else 1
                yield piece
            trace.times = 1

        return some

    return [(chunks, "chunks", few(chunks.chunks)), (low_bit, "pieces", few(low_bit.pieces))]


def alike_tensors(trace: Trace) -> list[Patch]:
    """AdamW in pieces does the same to each tensor of a shape: it is done to one, and what the trace saw of that counts again
    for all that are like it: storages that come, and offloaded ones, whose pages come back and leave."""
    update, known = adamw.AdamW._update, dict[Any, Any]()

    def update_once(self: adamw.AdamW, parameter: Tensor, group: dict[str, Any]) -> None:
        if parameter not in self.state or trace.phase == BEFORE:
            return update(self, parameter, group)
        mine = local(self.owned(parameter))
        key = mine.shape, mine.stride(), mine.dtype, parameter.shape, str(getattr(parameter, "placements", None))
        before = Counter(trace.work[trace.phase])
        if key not in known:
            first = len(trace.events)
            update(self, parameter, group)
            seen = trace.events[first:]
            places = {number: i for i, number in enumerate(dict.fromkeys(number for number, _ in seen), 1)}
            parts = {i: trace.parts[number] for number, i in places.items() if number in trace.parts}
            known[key] = [(places[number], size) for number, size in seen], parts, trace.work[trace.phase] - before
            return None
        events, parts, work = known[key]
        trace.events += [(trace.count + i, size) for i, size in events]
        trace.parts |= {trace.count + i: part for i, part in parts.items()}
        trace.count += max((i for i, _ in events), default=0)
        trace.work[trace.phase] = before + work
        return None

    return [(adamw.AdamW, "_update", update_once)]
