"""What the benchmarks look at from inside of a run: time, bytes by kind, traffic, loss."""

import statistics
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def composed(overrides: list[str]) -> Any:
    from hydra import compose, initialize_config_dir

    from leanlm.common.files import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=overrides)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(overrides: list[str], steps: int, vocabulary: int | None = None) -> dict[str, Any]:
    """On each rank: time the steps, then look at one more from inside. `vocabulary`: another than that of the text."""
    import lightning.pytorch as pl

    from leanlm.common.machine import peak_memory
    from leanlm.config.checks import check
    from leanlm.launch.ranks import of_ranks, process_group
    from leanlm.models.head import IGNORE
    from leanlm.strategies.relay import relay
    from leanlm.training import build
    from leanlm.training.data import tokens, training_batches, whole_split

    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.begin, self.times, self.look = 0.0, [], ExitStack()

        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            if batch.micro == 0:
                if trainer.global_step == steps:
                    self.peak = peak_memory()
                    self.traffic = self.look.enter_context(Communication())
                    parameters, optimizer = list(module.net.parameters()), trainer.optimizers[0]
                    self.held = self.look.enter_context(watched(parameters, optimizer, parallel.vocabulary))
                self.begin = time.perf_counter()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if batch.micro == module.plan.batches_per_step - 1:
                self.times.append(time.perf_counter() - self.begin)
                if trainer.global_step > steps:
                    self.look.close()

    settings = check(composed(overrides))
    with process_group("cpu"):
        prepared = tokens(settings)
        parallel = build.parallel_model(settings.config, settings.plan, vocabulary or prepared.tokenizer.vocabulary)
        module, watch = build.module(settings, parallel), Watch()
        base = resident()
        trainer = build.trainer(settings, [watch], [], steps + 1)
        trainer.fit(module, training_batches(settings, prepared, parallel.net))
        with torch.no_grad():
            module.eval()
            batches = iter(whole_split(settings, prepared.tokenizer, parallel.net, prepared.splits["validation"]))
            nats, counted = 0.0, 0
            for batch in islice(batches, settings.plan.accumulate_grad_batches):  # together the rows of a global batch
                for stage in parallel.stages.values():
                    stage.begin(batch.step, batch.fresh)
                found = relay(parallel, batch.input, batch.rows, batch.target)
                if found is not None and parallel.counts_loss:
                    nats, counted = nats + float(found), counted + int((batch.target != IGNORE).sum())
        return {
            "milliseconds": 1000 * statistics.median(watch.times[1:steps]),
            "peak": of_ranks(watch.peak),
            "base": of_ranks(base),
            "held": of_ranks(module.held_bytes(trainer.optimizers[0])),
            "activations": of_ranks(watch.held.saved.largest),
            "at_peak": of_ranks(watch.held.at_peak),
            "val_loss": sum(of_ranks(nats)) / sum(of_ranks(counted)),
            "traffic": of_ranks({kind: [watch.traffic.calls[kind], watch.traffic.bytes[kind]] for kind in watch.traffic.calls}),
            "describe": settings.describe(),
            "exactness": settings.exactness,
            "parameters": parallel.parameters,
            "stages": module.pipeline.describe() if module.pipeline else None,
            "torch": torch.__version__,
        }


@contextmanager
def watched(parameters: list[Tensor], optimizer: torch.optim.Optimizer, vocabulary: int) -> Iterator["Held"]:
    """Within it, what the process holds at its largest is counted by kind: `at_peak`, when it is left."""
    held = Held(parameters, optimizer, vocabulary)
    with held.saved, held.logits:
        held.thread.start()
        try:
            yield held
        finally:
            held.done.set()
            held.thread.join()


class Held:
    """Bytes of weights, gradients, optimizer state, activations and logits when most was held while the process was within 2%
    of its largest; `rest` is what it had beside them: Python and the libraries, buffers, freed memory that it kept."""

    def __init__(self, parameters: list[Tensor], optimizer: torch.optim.Optimizer, vocabulary: int) -> None:
        self.parameters, self.optimizer = parameters, optimizer
        shapes = {tuple(shape) for parameter in parameters for shape in (parameter.shape, _local(parameter).shape)}
        self.logits = Logits(vocabulary, shapes)
        self.saved = Saved(self.logits)
        self.largest, self.at_peak = 0, {}
        self.done, self.thread = threading.Event(), threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        fullest = 0, 0  # what was counted, and the size of the process then
        while not self.done.wait(0.002):
            now = resident()
            self.largest = max(self.largest, now)
            near = 0.98 * self.largest  # an allocator that keeps what was freed stays at its largest when it holds little
            if now >= near:
                kinds = {
                    "weights": sum(_bytes(part) for part in self.parameters),
                    "gradients": sum(_bytes(part.grad) for part in self.parameters) + self.saved.now["gradients"],
                    "state": self._state(),
                    "activations": self.saved.now["activations"],
                    "logits": self.logits.now,
                }
                counted = sum(kinds.values())
                if counted > fullest[0] or fullest[1] < near:
                    fullest, self.at_peak = (counted, now), kinds
        self.at_peak |= {"rest": self.largest - fullest[0], "all": self.largest}

    def _state(self) -> int:
        """Of the optimizer, in memory: what is mapped from a file counts only while it is there, and then as `rest`."""
        from leanlm.memory.offload import scratch

        parts = [part for values in list(self.optimizer.state.values()) for part in list(values.values())]
        tensors = [_local(part) for part in parts if isinstance(part, Tensor)]
        away = scratch().holds if scratch.cache_info().currsize else lambda tensor: False
        return sum(tensor.nbytes for tensor in tensors if not away(tensor))


class Saved:
    """Bytes that autograd keeps for the backward pass, and the most at a time; each storage once, parameters not counted.

    What has the shape of a parameter is a gradient that was made early (of the head, with the loss).
    """

    def __init__(self, logits: "Logits") -> None:
        self.now, self.largest, self.live, self.kinds = Counter(), 0, Counter(), logits
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor)

    def __enter__(self) -> "Saved":
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def add(self, kind: str, size: int) -> None:
        self.now[kind] += size
        self.largest = max(self.largest, self.now.total())


class _Kept:
    """A saved tensor that says when it is let go."""

    def __init__(self, watch: Saved, tensor: Any) -> None:
        self.watch, self.tensor = watch, tensor
        owner = tensor._base if tensor._is_view() else tensor
        storage = _local(tensor.detach()).untyped_storage()
        self.key, self.size = None if owner.is_leaf and owner.requires_grad else storage.data_ptr(), storage.nbytes()
        own = tuple(_local(tensor).shape) in watch.kinds.shapes and tensor.dim() > 1
        self.kind = "gradients" if own else "logits" if watch.kinds.are(tensor) else "activations"
        if self.key is not None:
            watch.live[self.key] += 1
            if watch.live[self.key] == 1:
                watch.add(self.kind, self.size)

    def __del__(self) -> None:
        if self.key is not None:
            self.watch.live[self.key] -= 1
            if self.watch.live[self.key] == 0:
                self.watch.add(self.kind, -self.size)


class Logits(TorchDispatchMode):
    """Bytes of the tensors that have a number for each type of token, and are no parameter's and no gradient's."""

    def __init__(self, vocabulary: int, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.vocabulary, self.shapes, self.now, self.known = vocabulary, shapes, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in tree_leaves(out):
            if isinstance(part, Tensor) and not hasattr(part, "to_local") and self.are(part):
                storage = part.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def are(self, tensor: Tensor) -> bool:
        ends = tensor.shape[:1] + tensor.shape[-1:]
        known = {tuple(tensor.shape), tuple(tensor.shape)[::-1]} & self.shapes  # of a parameter, or of it on its side
        return tensor.dim() > 1 and self.vocabulary in ends and not known

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Communication(TorchDispatchMode):
    """Counts calls and payload bytes (the larger of what goes in and what comes out) of each kind of communication."""

    KINDS = {"allreduce": "all-reduce", "all_reduce": "all-reduce", "allgather": "all-gather", "all_gather": "all-gather",
             "reduce_scatter": "reduce-scatter", "send": "send", "broadcast": "broadcast"}  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        kind = next((kind for key, kind in self.KINDS.items() if key in name), None)
        if space in ("c10d", "_c10d_functional") and kind:
            groups = [args[0], args[1] if len(args) > 1 else (), out]
            self.calls[kind] += 1
            self.bytes[kind] += max(sum(t.nbytes for t in tree_leaves(g) if isinstance(t, Tensor)) for g in groups)
        return out


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else _local(tensor).nbytes
