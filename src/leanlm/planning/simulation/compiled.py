"""What torch's compiler makes of a stage, without compiling it: what is kept for backward, kernels, and what they move.

The graphs are those that the compiler gets: AOTAutograd's, cut in two where backward needs the fewest bytes. No code is
generated for them. Which operations share a kernel follows the main rules of torch's code generation (torch._inductor):
- matrix products, attention and operations of our own stand alone;
- of the others only those results come to memory that such an operation reads, that leave the graph, that sum up rows, or that
  several need and are dearer to make again than to read;
- those between the same two matrix products that read each other, or the same, share a kernel; sums over rows take two more.
"""

import operator
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import active_fake_mode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from leanlm.memory import loss
from leanlm.models.dropout import draw, sites
from leanlm.planning.constants import DEAR, MANY, SHARED
from leanlm.planning.simulation.patches import Patch, as_a_compiler
from leanlm.planning.simulation.trace import Trace, Work
from leanlm.strategies.stage import Stage

ALONE = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product", "index_put", "scatter_add", "index_add", "sort",
         "nonzero", "_cudnn")  # fmt: skip
SUMS = ("sum", "mean", "amax", "amin", "prod", "var_mean")


def compiler_of(trace: Trace) -> Patch:
    """`torch.compile` makes of a stage's method one that does what its graphs would do."""
    return torch, "compile", lambda function, **settings: _Compiled(trace, function)


class _Compiled:
    """A method of a stage, as graphs whose inputs are its parameters, its dropouts' keys, and what it is given."""

    def __init__(self, trace: Trace, function: Any) -> None:
        self.trace, self.function = trace, function
        self.graphs: Callable[..., Any] | None = None

    def __call__(self, *inputs: Any) -> Any:
        module = getattr(self.function, "__self__", None)
        if not isinstance(module, Stage):  # of a part; what that keeps is counted operation by operation
            return self.function(*inputs)
        own, keys = dict(module.named_parameters()), [dropout.keys for dropout in sites(module)]
        if self.graphs is None:
            self.graphs = self._made(module, list(own))
            mode = active_fake_mode()
            with _disable_current_modes(), mode or ExitStack(), self.trace.uncounted():
                self.graphs([*own.values()], keys, *inputs)
        return self.graphs([*own.values()], keys, *inputs), [None] * len(module.blocks)

    def _made(self, module: nn.Module, names: list[str]) -> Callable[..., Any]:
        from torch._decomp import core_aten_decompositions
        from torch._functorch.aot_autograd import aot_function
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        def flat(parameters: list[Tensor], keys: list[Tensor], *inputs: Any) -> Tensor:
            named = dict(zip(names, parameters, strict=True))
            with _reparametrize_module(module, named, tie_weights=True), as_a_compiler():
                for dropout, key in zip(sites(module), keys, strict=True):
                    draw([dropout], key[:, None])
                return self.function(*inputs)[0]

        def generated(graph: fx.GraphModule, example: Any, backward: bool = False) -> Callable[..., Any]:
            kernels = _Kernels(graph)

            def run(inputs: list[Any]) -> list[Any]:
                if backward:
                    self.trace.enter(f"{self.trace.phase.rpartition(',')[0]}, backward")
                return kernels.run(inputs, self.trace)

            run._boxed_call = True  # type: ignore[attr-defined]  # it lets go of its inputs as they are done with
            return run

        graphs: Any = aot_function  # its annotations want more than it does
        backward, parallel = partial(generated, backward=True), min_cut_rematerialization_partition
        return graphs(flat, generated, backward, parallel, core_aten_decompositions())


class _Kernels:
    """A graph's kernels, in the order in which they run."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.place = {node: i for i, node in enumerate(graph.graph.nodes)}
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        self.inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.results = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        self.constants = {node: getattr(graph, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"}
        self.views = {node for node in nodes if _is_view(node)}
        self.nodes = [node for node in nodes if node not in self.views]
        self.alone = {node for node in self.nodes if _stands_alone(node)}
        self.bare = {node for node in self.alone if _name(node) == "addmm" and self._others_add_the_bias(node)}
        self.reads: dict[fx.Node, set[fx.Node]] = {}  # what each needs in memory
        self.stored = self._stored()
        self.group = self._groups()
        self.members: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, root in self.group.items():
            self.members[root].append(node)
        self.order = self._order()
        self.last = {part: i for i, kernel in enumerate(self.order) for part in self._needs(kernel)}

    def _base(self, node: fx.Node) -> fx.Node:
        """What a view, or one of several results, is a part of."""
        while node in self.views:
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _others_add_the_bias(self, product: fx.Node) -> bool:
        """Whether all that reads a product works element by element: torch 2.11 then lets it add the bias, of which so no copy
        is made in the product's type."""
        readers = [reader for node in (product, *self.views) if self._base(node) is product for reader in node.users]
        return all(
            reader in self.views or (reader.op == "call_function" and reader not in self.alone and not _sums(reader))
            for reader in readers
        )

    def _arguments(self, node: fx.Node) -> Any:
        """What an operation that stands alone, or one that shares a kernel, is called with."""
        return (node.args[1:], node.kwargs) if node in self.bare else (node.args, node.kwargs)

    def _bases(self, parts: Any) -> list[fx.Node]:
        return [self._base(part) for part in tree_leaves(parts) if isinstance(part, fx.Node)]

    def _stored(self) -> set[fx.Node]:
        """The results of operations that share kernels which come to memory."""
        wanted = {*self._bases(self.results), *(part for node in self.alone for part in self._bases(self._arguments(node)))}
        users: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        for node in self.nodes:
            for part in self._bases(self._arguments(node)):
                users[part].add(node)
        found: set[fx.Node] = set()
        for node in self.nodes:
            reads: set[fx.Node] = set()
            for part in self._bases(self._arguments(node)):
                fused = part.op == "call_function" and part not in self.alone and part not in found
                reads |= self.reads[part] if fused else {part} - self.constants.keys()
            self.reads[node] = reads
            if node in self.alone or not isinstance(node.meta.get("val"), Tensor):
                continue
            dear = len(users[node]) > 1 and sum(map(_bytes, reads)) > DEAR * _bytes(node)
            if node in wanted or _sums(node) or dear or len(reads) > MANY:
                found.add(node)
        return found

    def _groups(self) -> dict[fx.Node, fx.Node]:
        """Each stored result -> one of those whose kernel it shares."""
        depth: dict[fx.Node, int] = {}
        first: dict[fx.Node, fx.Node] = {}
        readers: dict[tuple[fx.Node, int], fx.Node] = {}

        def find(node: fx.Node) -> fx.Node:
            while first[node] is not node:
                node = first[node]
            return node

        for node in self.nodes:
            below = max((depth.get(part, 0) for part in self.reads[node]), default=0)
            depth[node] = below + (node in self.alone)
            if node not in self.stored:
                continue
            first[node] = node
            for part in self.reads[node]:
                if part in self.stored and depth[part] == depth[node]:
                    first[find(part)] = find(node)
                other = readers.setdefault((part, depth[node]), node)
                if _bytes(part) * SHARED >= _bytes(node) and other is not node:  # what both read is worth reading once
                    first[find(other)] = find(node)
        return {node: find(node) for node in first}

    def _order(self) -> list[fx.Node]:
        """Operations that stand alone, and one member of each group, each as soon as it can run or is needed."""
        order: dict[fx.Node, None] = {}

        def need(kernel: fx.Node) -> None:
            if kernel in order:
                return
            for part in self._needs(kernel):
                if part.op == "call_function":
                    need(self.group.get(part, part))
            order[kernel] = None

        for node in self.nodes:
            if node in self.alone:
                need(node)
            elif node in self.group and node is self.members[self.group[node]][-1]:
                need(self.group[node])
        return list(order)

    def _needs(self, kernel: fx.Node) -> list[fx.Node]:
        """What a kernel reads from memory."""
        mine = self.members.get(kernel, [])
        found = {part for node in mine for part in self.reads[node]} if mine else {*self._bases(self._arguments(kernel))}
        return sorted(found - self.constants.keys() - {*mine}, key=self.place.__getitem__)

    def run(self, inputs: list[Any], trace: Trace) -> list[Any]:
        """The graph's results, with memory and work as its kernels take them. Empties the list of inputs."""
        here: dict[fx.Node, Any] = dict(zip(self.inputs, inputs, strict=True)) | self.constants
        inputs.clear()
        kept = {*self._bases(self.results)}

        for i, kernel in enumerate(self.order):
            done = [part for part in self._needs(kernel) if self.last[part] == i and part not in kept]
            if kernel in self.alone:
                args, kwargs = self._values(self._arguments(kernel), here, trace)
                function: Any = torch.mm if kernel in self.bare else kernel.target
                if "chunked_loss" in str(function):  # chunk by chunk, as it runs
                    function = loss.chunked_loss
                here[kernel] = function(*args, **kwargs)
            else:
                self._run_together(kernel, here, done, trace)
            for part in done:
                here.pop(part, None)
        return self._values(list(self.results), here, trace)

    def _values(self, parts: Any, here: dict[fx.Node, Any], trace: Trace) -> Any:
        """What stands for nodes; views are made of what is in memory."""
        if isinstance(parts, list | tuple):
            return type(parts)(self._values(part, here, trace) for part in parts)
        if isinstance(parts, dict):
            return {key: self._values(part, here, trace) for key, part in parts.items()}
        if not isinstance(parts, fx.Node):
            return parts
        if parts not in self.views:
            return here[parts]
        with trace.uncounted():
            function: Any = parts.target
            return function(*self._values(parts.args, here, trace), **self._values(parts.kwargs, here, trace))

    def _run_together(self, kernel: fx.Node, here: dict[fx.Node, Any], done: list[fx.Node], trace: Trace) -> None:
        mine = self.members[kernel]
        outside = [node for node in mine if node in self.last or node in self._bases(self.results)]  # which others read
        columns = [node for node in outside if _sums_all_rows(node)]
        others = len(columns) < len(outside)
        moved = sum(map(_bytes, [*self._needs(kernel), *outside]))
        if others:  # sums of all rows read the same once more
            moved += sum(map(_bytes, {part for node in columns for part in self.reads[node]}))
        # what a graph is given from outside, such as weights, is not its own to write over
        free = [part for part in done if isinstance(here.get(part), Tensor) and not part.name.startswith("primals")]
        for node in outside:
            like = node.meta["val"]
            reused = next((part for part in free if _bytes(part) == _bytes(node) and here[part].dtype == like.dtype), None)
            with trace.uncounted():
                if reused is None:
                    here[node] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
                else:  # written over what is read for the last time
                    free.remove(reused)
                    here[node] = here[reused].as_strided(like.shape, like.stride())
        kind = str(mine[-1].meta["val"].dtype).removeprefix("torch.")
        if trace.counting:
            trace.did(Work(0, moved, dtype=kind, launches=max(1, others + 2 * bool(columns))))


def _name(node: fx.Node) -> str:
    return str(node.target._schema.name).partition("::")[2] if hasattr(node.target, "_schema") else ""


def _stands_alone(node: fx.Node) -> bool:
    return hasattr(node.target, "_schema") and (
        not str(node.target._schema.name).startswith(("aten::", "prims::")) or _name(node).startswith(ALONE)
    )


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and (_stands_alone(source) or _is_view(source))
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(part.alias_info and not part.alias_info.is_write for part in schema.returns)


def _sums(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, fx.Node) and _name(source).startswith(SUMS)


def _sums_all_rows(node: fx.Node) -> bool:
    """Whether numbers far from each other in memory are summed, as for the gradient of a bias."""
    dims = node.args[1] if _name(node) == "sum" and len(node.args) > 1 else None
    return bool(dims) and 0 in [dim % node.args[0].meta["val"].dim() for dim in dims]  # type: ignore


def _bytes(node: fx.Node) -> int:
    return sum(part.numel() * part.element_size() for part in tree_leaves(node.meta.get("val")) if isinstance(part, Tensor))
