"""Batches that are on a GPU before they are asked for: a thread gathers, pins and copies them, on a stream of its own."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import torch

from leanlm.data.batches import Batch

AHEAD = 3  # micro-batches that are ready, beside the one at hand


def prefetched(batches: Iterable[Batch], device: torch.device) -> Generator[Batch]:
    """The same batches in the same order, with what the model reads on `device`; a CPU makes each when it is asked for."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    with closing(in_a_thread(_copied(batches, stream), AHEAD)) as ready:
        for batch, copied in ready:
            here = torch.cuda.current_stream(device)
            here.wait_event(copied)
            for part in (batch.input, batch.target, batch.positions):
                if part is not None:  # or the stream of copies would use its memory again before this one has read it
                    part.record_stream(here)
            yield batch


def _copied(batches: Iterable[Batch], stream: torch.cuda.Stream) -> Iterator[tuple[Batch, torch.cuda.Event]]:
    """Each batch with its copies begun on `stream`, and the event of their end."""
    for batch in batches:
        with torch.cuda.stream(stream):
            copy = batch.moved(lambda part: part.pin_memory().to(stream.device, non_blocking=True))
        yield copy, stream.record_event()


def in_a_thread(items: Iterable[Any], ahead: int) -> Generator[Any]:
    """The same items, up to `ahead` of them made by a thread before they are asked for.

    What the thread raises is raised here, after the items before it. The thread ends when this iterator is exhausted or closed.
    """
    source, end = iter(items), object()
    thread = ThreadPoolExecutor(1, "prefetch")
    ready = deque(thread.submit(next, source, end) for _ in range(ahead))
    try:
        while (item := ready.popleft().result()) is not end:
            ready.append(thread.submit(next, source, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
