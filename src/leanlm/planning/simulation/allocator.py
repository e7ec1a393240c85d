"""What torch's caching allocator takes from a GPU for the tensors of a training step, holes included.

It has two pools, for tensors up to 1 MiB and for larger ones. With expandable segments (leanlm asks for them) each is one
piece of addresses that grows by whole pages, and of its free blocks the one is taken that fits best
(c10/cuda/CUDACachingAllocator.cpp).
Given the allocations of 22 runs on an H200 it takes what the runs took, to 0.6%.
"""

import bisect
from collections.abc import Iterable, Iterator

from leanlm.planning.constants import PAGES, ROUNDING, SMALL
from leanlm.planning.simulation.trace import BEFORE, WORKSPACES, Trace

AGAIN = 2  # steps that are replayed after the first


class Pool:
    """Addresses from 0 to `mapped`, in blocks; it grows by pages of so many bytes."""

    def __init__(self, page: int) -> None:
        self.page, self.mapped = page, 0
        self.free: list[tuple[int, int]] = []  # bytes and address of each free block, in rising order
        self.begins: dict[int, int] = {}  # address of a free block -> its bytes
        self.ends: dict[int, int] = {}  # end of one -> its address

    def give(self, address: int, size: int) -> None:
        """A block is free, and one with its free neighbours."""
        if address in self.ends:
            address = self.ends[address]
            size += self._remove(address)
        if address + size in self.begins:
            size += self._remove(address + size)
        bisect.insort(self.free, (size, address))
        self.begins[address], self.ends[address + size] = size, address

    def take(self, size: int) -> int:
        """The address of a block."""
        found = bisect.bisect_left(self.free, (size, -1))
        if found == len(self.free):
            self._grow(size)
            found = bisect.bisect_left(self.free, (size, -1))
        if sum(self.free[found]) == self.mapped and found + 1 < len(self.free):
            found += 1  # the last one counts as large, because it can grow
        address = self.free[found][1]
        rest = self._remove(address) - size
        if rest:
            self.give(address + size, rest)
        return address

    def _grow(self, size: int) -> None:
        """The block at the end becomes so large, by whole pages."""
        at_the_end = self.mapped - self.ends.get(self.mapped, self.mapped)
        grown = -(-(size - at_the_end) // self.page) * self.page
        self.mapped += grown
        self.give(self.mapped - grown, grown)

    def _remove(self, address: int) -> int:
        size = self.begins.pop(address)
        del self.ends[address + size]
        del self.free[bisect.bisect_left(self.free, (size, address))]
        return size


def reserved(events: Iterable[tuple[int, int]]) -> int:
    """Bytes that the allocator holds after events (number of a storage, its bytes; negative when it goes)."""
    small, large = pools = Pool(PAGES[0]), Pool(PAGES[1])
    places: dict[int, tuple[Pool, int, int]] = {}
    for number, size in events:
        if size > 0:
            size = -(-size // ROUNDING) * ROUNDING
            pool = large if size > SMALL else small
            places[number] = pool, pool.take(size), size
        elif number in places:
            pool, address, size = places.pop(number)
            pool.give(address, size)
    return sum(pool.mapped for pool in pools)


def of_a_run(trace: Trace) -> Iterator[tuple[int, int]]:
    """The events of several steps, of a trace of one. In a run it is the first step that makes the optimizer's state, among
    what its backward pass has left."""
    phases = [(name, trace.events[first:end]) for name, first, end in trace.pieces()]
    before = [event for name, events in phases if name == BEFORE for event in events]
    if not before:
        yield from trace.events
        return
    steps = [(name, event) for name, events in phases if name.startswith("step") for event in events]
    passes = [event for name, event in steps if not name.endswith("optimizer")]
    updates = [event for name, event in steps if name.endswith("optimizer")]
    gone = {number for number, size in before if size < 0}
    state = [(number, size) for number, size in before if number not in gone]
    stays = {number for number, part in trace.parts.items() if part == WORKSPACES}
    own = {number for number, size in (*passes, *updates) if size > 0} - stays
    left = own - {number for number, size in (*passes, *updates) if size < 0}
    yield from (event for name, events in phases if not name.startswith(("step", BEFORE)) for event in events)
    for turn in range(1 + AGAIN):
        for number, size in [*passes, *(state if turn == 0 else ()), *updates]:
            if number in own:
                yield number + turn * (trace.count + 1), size
            elif turn == 0:
                yield number, size
        if turn:  # what a step leaves goes when the next has its own
            yield from ((number + (turn - 1) * (trace.count + 1), -1) for number in left)
