"""A plan applied to a model: what this rank keeps of it, and how its parts are divided over the device mesh.

The order is fixed (as in torchtitan's parallelize.py): stages, then the tensor axis, then initial values, then shards.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanlm.common.errors import UserError
from leanlm.launch.ranks import rank
from leanlm.memory import malloc
from leanlm.memory.tied import add_rows
from leanlm.models.contract import Model, initial, ties
from leanlm.strategies import balance, placing
from leanlm.strategies.plan import AXES, Plan
from leanlm.strategies.stage import Stage

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ParallelModel:
    """What one rank holds of a model: `net`, without the parts that other ranks hold, and its stages."""

    def __init__(self, net: Model, plan: Plan, seed: int, device: torch.device, cost: dict[str, float] | None = None,
                 autocast: torch.dtype | None = None, value_of: placing.Values | None = None) -> None:  # fmt: skip
        """`net` has no storage yet if the plan cuts it; what is kept goes to `device`. `cost`: of the parts, for a pipeline.
        `autocast`: see `Stage`. `value_of`: where initial values come from; None: from the name and `seed`."""
        self.net, self.plan, self.device = net, plan, device
        self.ties, self.width, self.vocabulary, self.dtype = ties(net), net.width, net.vocabulary, next(net.parameters()).dtype
        self.parameters = sum(parameter.numel() for parameter in net.parameters())  # of the whole model, tied ones once
        self.trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
        if plan.return_freed_memory:
            malloc.return_freed_memory(malloc.own_pages(self.parameters))
        cost = cost or dict.fromkeys(["embed", *net.blocks, "head"], 0.0)
        self.split = split = balance.split(cost, plan)  # blocks of every stage of the pipeline, in order
        self.costs, self.last = balance.stage_costs(cost, split), len(split) - 1  # floating-point operations of each for a row
        self.shared = _shared_by_stages(self.ties, split)
        self.mesh: DeviceMesh | None = None  # of all ranks, with AXES as its dimensions
        if plan.world > 1:
            from torch.distributed.device_mesh import init_device_mesh

            self.mesh = init_device_mesh(device.type, (*plan.sizes.values(),), mesh_dim_names=AXES)
        numbers = plan.stages_on(self.coordinate("pipeline"))
        self._drop_other_stages(numbers)
        if device.type != "cpu":  # what has no storage yet gets it there
            net._apply(lambda part: part if part.is_meta else part.to(device))
        self.stages = {n: Stage(net, split[n], n == 0, n == len(split) - 1, seed, plan, autocast) for n in numbers}
        if self.mesh is not None and plan.tensor > 1:
            from leanlm.strategies.tensor import split_matrices

            split_matrices(net, self.mesh["tensor"])
        self._fill_and_shard(value_of or partial(initial, net, seed))
        if net.head is not None and plan.tensor == 1 and not plan.compiled:  # a compiler sums these gradients itself
            add_rows(net, net.head)
        # found once: to look through all modules takes as long as some layers
        self._parameters = [(name, each) for name, each in net.named_parameters() if each.requires_grad]

    def coordinate(self, axis: str) -> int:
        """This rank's place along an axis of the mesh."""
        return self.mesh.get_local_rank(axis) if self.mesh is not None else 0

    def group(self, axis: str) -> dist.ProcessGroup:
        assert self.mesh is not None
        return self.mesh.get_group(axis)

    def owner(self, stage: int) -> int:
        """The pipeline rank that holds a stage."""
        return next(place for place in range(self.plan.pipeline) if stage in self.plan.stages_on(place))

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's loss counts: several ranks may compute the same."""
        return self.last in self.stages and self.coordinate("tensor") == 0

    def gather_rows(self, part: Tensor) -> Tensor:
        """`[rows of this rank, ...]` -> `[global batch, ...]`."""
        if self.mesh is None or self.plan.data_parallel_size == 1:
            return part
        from torch.distributed.tensor import DTensor, Shard

        for axis in ("shard", "replicate"):  # ranks along the inner axis read rows that follow each other
            part = DTensor.from_local(part, self.mesh[axis], [Shard(0)], run_check=False).full_tensor()
        return part

    @property
    def stage(self) -> Stage:
        """The only stage, of a rank that holds all blocks or a part of each."""
        (stage,) = self.stages.values()
        return stage

    def begin(self, step: int, fresh: bool) -> None:
        """Say which step the next forward passes belong to, and whether carried state starts anew with it."""
        for stage in self.stages.values():
            stage.begin(step, fresh)

    def advance(self) -> None:
        """The step is done: the states after it are where the next one begins (truncated back-propagation through time)."""
        for stage in self.stages.values():
            stage.advance()

    @contextmanager
    def gradient_sync(self, micro: int, strategy: Any) -> Iterator[None]:
        """For forward and backward of a micro-batch: gradients are summed over the data-parallel ranks with the last one of a
        step, by FSDP2 with each if the plan says so. `strategy`: Lightning's."""
        last = micro == self.plan.batches_per_step - 1
        for stage in self.stages.values() if self.plan.shard > 1 else ():
            sharded: Any = stage
            sharded.set_is_last_backward(last)
            sharded.set_requires_gradient_sync(last or self.plan.reduce_every_micro_batch)
            sharded.set_requires_all_reduce(last)
        ddp = self.plan.replicate > 1 and not self.plan.splits_model
        with strategy.block_backward_sync() if ddp and not last else nullcontext():
            yield

    def carried(self) -> dict[str, Tensor]:
        """Recurrent state of the global batch by global name, `[global batch, ...]` each. All ranks must call it."""
        parts = {name: part for stage in self.stages.values() for name, part in stage.carried().items()}
        return {name: self.gather_rows(part) for name, part in parts.items()}

    def carry(self, state: dict[str, Tensor], global_batch: int) -> None:
        """Take up what `carried` returned, perhaps under another plan."""
        rows = global_batch // self.plan.data_parallel_size
        first = self.plan.data_parallel_rank(rank()) * rows
        mine = {name: part[first : first + rows].to(self.device) for name, part in state.items()}
        for stage in self.stages.values():
            stage.carry(mine, first, self.plan.accumulate_grad_batches)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters that are trained, by their global names; twice, if this rank holds both copies of one."""
        return [(self.ties.get(name, name), parameter) for name, parameter in self._parameters]

    def frozen_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters that are not trained, as `named_parameters`."""
        return [(self.ties.get(name, name), each) for name, each in self.net.named_parameters() if not each.requires_grad]

    def owned_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """`named_parameters` without `copies`."""
        return [(name, parameter) for name, parameter in self._parameters if name not in self.ties]

    def copies(self) -> list[tuple[str, nn.Parameter]]:
        """Those of `named_parameters` whose owner is in another stage."""
        return [(self.ties[name], parameter) for name, parameter in self._parameters if name in self.ties]

    def _drop_other_stages(self, numbers: list[int]) -> None:
        for stage, blocks in enumerate(self.split):
            for name in blocks if stage not in numbers else ():
                del self.net.blocks[name]
        if 0 not in numbers:
            self.net.embed = None  # type: ignore[assignment]
        if self.last not in numbers:
            self.net.head = None  # type: ignore[assignment]

    def _fill_and_shard(self, value_of: placing.Values) -> None:
        for stage in self.stages.values():
            for part in (*stage.blocks.values(), stage):
                placing.fill(part, self.net, self.ties, value_of, self.device)
                if self.mesh is not None and self.plan.shard > 1:
                    placing.shard(part, self.mesh, self.plan)
                    malloc.trim()  # or memory would come to that of the whole model, although no rank ever holds it


def _shared_by_stages(ties: dict[str, str], split: list[list[str]]) -> list[str]:
    """Global names of tied weights whose stages differ.

    Raises:
        UserError: they are not the first and the last.
    """
    last, found = len(split) - 1, set()
    stage = {f"blocks.{block}": number for number, blocks in enumerate(split) for block in blocks} | {"embed": 0, "head": last}
    for ends in ties.items():
        numbers = [next(number for part, number in stage.items() if name.startswith(f"{part}.")) for name in ends]
        if numbers[0] == numbers[1]:
            continue
        if sorted(numbers) != [0, last]:
            raise UserError(
                f"{ends[0]} and {ends[1]} are one, but a pipeline puts them in stages {numbers}: only the first and the last "
                "can share weights"
            )
        found.add(ends[1])
    return sorted(found)
