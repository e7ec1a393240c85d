"""A plan applied to a model: what this rank keeps of it, and how its parts are spread over the device mesh.

The order is fixed (as in torchtitan's parallelize.py): stages, then the tensor axis, then initial values, then shards. The
model is built without storage; each part is filled, one parameter at a time, just before it is sharded, so that no rank
ever holds more than its share and one part.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanlm.common.dtensors import dtensor_like, is_dtensor, local_part
from leanlm.common.errors import UserError
from leanlm.memory import malloc
from leanlm.memory.tied import add_rows
from leanlm.models.contract import Model, initial, ties
from leanlm.strategies import balance
from leanlm.strategies.plan import AXES, Plan
from leanlm.strategies.schedules import SCHEDULES, stages_of
from leanlm.strategies.stage import Stage

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ParallelModel:
    """What one rank holds of a model.

    Attributes:
        net: the model without the parts that other ranks hold.
        stages: this rank's stages by number, in the order of the data; all of the model is the only one without a pipeline.
        mesh: of all ranks, with AXES as its dimensions; None where there is one.
        ties: parameter names that share weights -> the global name.
        shared: global names of weights that the first and the last stage share; each has a copy.
        parameters: how many the whole model has, tied ones counted once.
        split: blocks of every stage of the pipeline, in order.
        costs: floating-point operations of every stage for one row, in a pipeline.
        width: of the hidden state between stages.
    """

    def __init__(self, net: Model, plan: Plan, seed: int, device: torch.device, cost: dict[str, float] | None = None,
                 autocast: torch.dtype | None = None) -> None:  # fmt: skip
        """`net` has no storage yet if the plan cuts it; what is kept goes to `device`. `cost`: of the parts, for a pipeline.
        `autocast`: see `Stage`."""
        self.net, self.plan, self.device = net, plan, device
        cost = cost or dict.fromkeys(["embed", *net.blocks, "head"], 0.0)
        self.split = split = balance.split(cost, plan)
        self.costs = balance.stage_costs(cost, split)
        self.parameters = sum(parameter.numel() for parameter in net.parameters())
        if plan.return_freed_memory:
            malloc.return_freed_memory(malloc.own_pages(self.parameters))
        self.ties, self.width = ties(net), net.width
        self.vocabulary, self.dtype = net.vocabulary, next(net.parameters()).dtype
        self.mesh: DeviceMesh | None = None
        self.data_parallel_mesh: DeviceMesh | None = None  # ranks that hold the same part of the model and read other rows
        if plan.world > 1:
            from torch.distributed.device_mesh import init_device_mesh

            self.mesh = init_device_mesh(device.type, plan.sizes, mesh_dim_names=AXES)
            both = self.mesh["replicate", "shard"]
            self.data_parallel_mesh = both._flatten("data_parallel") if plan.data_parallel_size > 1 else None
        self.shared = self._shared_by_stages()
        numbers = stages_of(self.coordinate("pipeline"), plan.pipeline, len(split), SCHEDULES[plan.schedule].v_shape)
        self._drop([name for number in numbers for name in split[number]], 0 in numbers, len(split) - 1 in numbers)
        if device.type != "cpu":  # what has no storage yet gets it there
            net._apply(lambda part: part if part.is_meta else part.to(device))
        self.stages = {n: Stage(net, split[n], n == 0, n == len(split) - 1, seed, plan, autocast) for n in numbers}
        if self.mesh is not None and plan.tensor > 1:
            from leanlm.strategies.tensor import split_matrices

            split_matrices(net, self.mesh["tensor"])
        self._fill_and_shard(seed)
        if net.head is not None and plan.tensor == 1 and not plan.compiled:  # a compiler sums these gradients itself
            add_rows(net, net.head)
        self._parameters = list(net.named_parameters())  # found once: to look through all modules takes as long as some layers

    def coordinate(self, axis: str) -> int:
        """This rank's place along an axis of the mesh."""
        return self.mesh.get_local_rank(axis) if self.mesh is not None else 0

    def group(self, axis: str) -> dist.ProcessGroup:
        assert self.mesh is not None
        return self.mesh.get_group(axis)

    def owner(self, stage: int) -> int:
        """The pipeline rank that holds a stage."""
        plan = self.plan
        v_shape = SCHEDULES[plan.schedule].v_shape
        holds = [rank for rank in range(plan.pipeline) if stage in stages_of(rank, plan.pipeline, len(self.split), v_shape)]
        return holds[0]

    @property
    def data_parallel_rank(self) -> int:
        """Which of the groups that read different rows this rank belongs to."""
        return self.coordinate("replicate") * self.plan.shard + self.coordinate("shard")

    def gather_rows(self, part: Tensor) -> Tensor:
        """`[rows of this rank, ...]` -> `[global batch, ...]`."""
        if self.data_parallel_mesh is None:
            return part
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(part, self.data_parallel_mesh, [Shard(0)], run_check=False).full_tensor()

    def relay(self, tokens: Tensor, rows: Tensor, targets: Tensor | None) -> Tensor | None:
        """A forward pass through the stages of all ranks, which hand the hidden state on; successive passes overlap.

        Args:
            tokens: `[b, s]`, the same on every rank of a pipeline.
            rows, targets: as `Stage.forward` takes them.

        Returns:
            what the last stage returns, on the rank that holds it; None on the others.
        """
        here, hidden = self.coordinate("pipeline"), tokens
        for number, stage in self.stages.items():
            if number > 0 and self.owner(number - 1) != here:
                hidden = torch.empty(*tokens.shape, self.width, dtype=self.dtype, device=self.device)
                dist.recv(hidden, group=self.group("pipeline"), group_src=self.owner(number - 1))
            hidden = stage(hidden, rows, targets)
            if number < len(self.split) - 1 and self.owner(number + 1) != here:
                dist.send(hidden, group=self.group("pipeline"), group_dst=self.owner(number + 1))
        return hidden if len(self.split) - 1 in self.stages else None

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, fresh: bool) -> Tensor:
        """Logits `[v]` of the token after `tokens [1, s]`. All ranks must call it.

        A model that carries state goes on from the call before unless `fresh`; others read only `tokens`.
        """
        for stage in self.stages.values():
            stage.begin(0, fresh)
        logits = self.relay(tokens, torch.zeros(1, dtype=torch.long), None)
        if self.plan.pipeline > 1:
            logits = torch.empty(self.vocabulary, dtype=self.dtype, device=self.device) if logits is None else logits
            dist.broadcast(logits, group=self.group("pipeline"), group_src=self.owner(len(self.split) - 1))
        assert logits is not None
        return logits

    def logits_after(self) -> Callable[[list[int]], Tensor]:
        """History of tokens -> logits `[v]` of the next, for `generate`. All ranks must make the same calls.

        A model that carries state goes on from it; others read their last `sequence` tokens anew for each token.
        """
        for stage in self.stages.values():
            stage.eval()
        read = 0

        def logits(history: list[int]) -> Tensor:
            nonlocal read
            first = read if self.net.carries_state else max(0, len(history) - self.net.sequence)
            fresh, read = read == 0, len(history)
            return self.next_logits(torch.tensor([history[first:]], device=self.device), fresh)

        return logits

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
        first = self.data_parallel_rank * rows
        mine = {name: part[first : first + rows].to(self.device) for name, part in state.items()}
        for stage in self.stages.values():
            stage.carry(mine, first, self.plan.accumulate_grad_batches)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters by their global names. A name is there twice if this rank holds both copies of it."""
        return [(self.ties.get(name, name), parameter) for name, parameter in self._parameters]

    def owned_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """`named_parameters` without `copies`."""
        copies = {id(parameter) for _, parameter in self.copies()}
        return [(name, parameter) for name, parameter in self.named_parameters() if id(parameter) not in copies]

    def copies(self) -> list[tuple[str, nn.Parameter]]:
        """Those of `named_parameters` whose owner is in another stage."""
        return [(self.ties[name], parameter) for name, parameter in self._parameters if name in self.ties]

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's loss counts: several ranks may compute the same."""
        return len(self.split) - 1 in self.stages and self.coordinate("tensor") == 0

    def _shared_by_stages(self) -> list[str]:
        """Global names of tied weights whose stages differ.

        Raises:
            UserError: they are not the first and the last.
        """
        stage = {f"blocks.{block}": number for number, blocks in enumerate(self.split) for block in blocks}
        stage |= {"embed": 0, "head": len(self.split) - 1}
        found = set()
        for ends in self.ties.items():
            numbers = [next(number for part, number in stage.items() if name.startswith(f"{part}.")) for name in ends]
            if numbers[0] != numbers[1] and sorted(numbers) != [0, len(self.split) - 1]:
                raise UserError(
                    f"{ends[0]} and {ends[1]} are one, but a pipeline puts them in stages {numbers}: only the first and the "
                    "last can share weights"
                )
            if numbers[0] != numbers[1]:
                found.add(ends[1])
        return sorted(found)

    def _drop(self, blocks: list[str], first: bool, last: bool) -> None:
        for name in set(self.net.blocks) - set(blocks):
            del self.net.blocks[name]
        if not first:
            self.net.embed = None  # type: ignore[assignment]
        if not last:
            self.net.head = None  # type: ignore[assignment]

    def _fill_and_shard(self, seed: int) -> None:
        sharded = self.plan.shard > 1
        for stage in self.stages.values():
            for block in stage.blocks.values():
                self._fill(block, seed)
                if sharded:
                    self._shard(block)
                    malloc.trim()  # or memory would come to that of the whole model, although no rank ever holds it
            self._fill(stage, seed)
            if sharded:
                self._shard(stage)

    def _shard(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        assert self.mesh is not None
        mesh = self.mesh["replicate", "shard"] if self.plan.replicate > 1 else self.mesh["shard"]
        # torch's schedules keep the parameters of a stage whole during a step; one that was resharded loses its gradients
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # the view it returns is a state, never written to
        reshard = self.plan.reshard_after_forward and self.plan.pipeline == 1
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)

    @torch.no_grad()
    def _fill(self, part: nn.Module, seed: int) -> None:
        """Give storage and initial values to the parameters of a part that have none; tied ones of a part become one."""
        inside = set(part.modules())
        filled: dict[str, nn.Parameter] = {}
        for prefix, module in self.net.named_modules():
            if module not in inside:
                continue
            for key, parameter in list(module.named_parameters(recurse=False)):
                name = f"{prefix}.{key}"
                name = self.ties.get(name, name)
                if name in filled:
                    setattr(module, key, filled[name])
                elif parameter.is_meta:
                    value = initial(self.net, seed, name, parameter).to(self.device)
                    if is_dtensor(parameter):
                        value = dtensor_like(local_part(value, parameter).clone(), parameter, value.shape)
                    filled[name] = nn.Parameter(value)
                    setattr(module, key, filled[name])
