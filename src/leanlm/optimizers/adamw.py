"""AdamW whose two averages take fewer bytes, and whose step makes no copy of any tensor.

bf16: half the bytes. int8: blocks of 64 numbers share a scale, and codes are those of dynamic quantisation (Dettmers et al.
2022, arXiv 2110.02861). int4: as int8 with 16 codes, the second average's evenly spaced without zero (Li et al. 2023, arXiv
2309.01507). Blocks lie inside rows, and codes and scales are spread over devices as their parameter is, so that a checkpoint
goes on under another plan. torchao 0.18's AdamW8bit has blocks of the flattened tensor: state of 260 x 64 numbers that two
processes had saved under FSDP2 could not be loaded by one, and its first step on a CPU compiled for 20 s.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from leanlm.common.dtensors import dtensor_like, is_dtensor, local, with_layout
from leanlm.common.errors import UserError
from leanlm.memory.offload import StateStorage
from leanlm.models import kernels

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PIECE, PIECE_GPU = 1 << 18, 1 << 22  # numbers that are unpacked at a time; a whole number of blocks
BLOCK = 64
CPU = torch.device("cpu")
SMALLEST = 4096  # numbers in a tensor, below which scales and codes are not worth their trouble


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Args:
        groups: of parameters.
        kind: of `optim.STATES`; how the averages are kept.
        stochastic: round bf16 parameters up or down by chance, so that small updates are not lost.
        copies: devices that hold the same parameters, among which the averages and the work are divided by rows (ZeRO-1,
            Rajbhandari et al. 2020, arXiv 1910.02054); None: each does all of it.
        scratch: where the averages are between two steps; None: in memory.
        defaults: lr, betas, eps, weight_decay.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        kind: str = "fp32",
        stochastic: bool = False,
        copies: "DeviceMesh | None" = None,
        scratch: StateStorage | None = None,
        **defaults: Any,
    ) -> None:
        super().__init__(groups, defaults)
        self.kind, self.stochastic, self.copies, self.scratch = kind, stochastic, copies, scratch
        self.sent: list[Any] = []  # rows on their way to the other copies

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        for work in self.sent:
            work.wait()
        self.sent.clear()
        return loss

    def owned(self, parameter: Tensor) -> Tensor:
        return rows_of_copies(parameter, self.copies)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, owned = self.state[parameter], self.owned(parameter)
        averages = [_average(state, owned, name, self.kind) for name in ("exp_avg", "exp_avg_sq")]
        assert parameter.grad is not None
        weights, gradients = _flat(owned), _flat(self.owned(parameter.grad))
        step = state["step"] if "step" in state else torch.zeros((), device=weights.device)
        state["step"] = step = step.to(weights.device)  # not where a checkpoint may have left it: a copy waits for the device
        for piece in pieces(owned):
            weight, gradient = weights[piece], gradients[piece]
            wide = weight if weight.dtype != torch.bfloat16 else weight.float()
            first_average, second_average = (average.read(piece).to(wide) for average in averages)
            adamw(
                [wide], [gradient.to(wide.dtype)], [first_average], [second_average], [], [step.clone()],
                fused=True,
                amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], eps=group["eps"],
                weight_decay=group["weight_decay"], maximize=False,
            )  # fmt: skip
            averages[0].write(piece, first_average)
            averages[1].write(piece, second_average)
            if wide is not weight:
                weight.copy_(rounded(wide) if self.stochastic else wide)
        step += 1
        if owned is not parameter and self.copies is not None:
            group_of_copies, parts = self.copies.get_group(), parameter.detach().chunk(self.copies.size())
            self.sent += [
                dist.broadcast(rows, group=group_of_copies, group_src=rank, async_op=True) for rank, rows in enumerate(parts)
            ]
        if self.scratch is not None:
            put_away(state, self.scratch)


def rows_of_copies(tensor: Tensor, copies: "DeviceMesh | None") -> Tensor:
    """Of a tensor that all devices of `copies` hold, the rows whose optimizer state this one keeps, sharing its storage."""
    if copies is None or is_dtensor(tensor) or tensor.numel() < SMALLEST:
        return tensor
    parts = tensor.detach().chunk(copies.size())
    if len(parts) < copies.size():
        return tensor
    from torch.distributed.tensor import Shard

    return with_layout(parts[copies.get_local_rank()], (copies, [Shard(0)], tensor.shape, tensor.stride()))


class _Plain:
    """Numbers as they are, or in bf16."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = _flat(numbers)

    def read(self, piece: slice) -> Tensor:
        return self.numbers[piece].to(torch.promote_types(self.numbers.dtype, torch.float32))

    def write(self, piece: slice, values: Tensor) -> None:
        if values.data_ptr() != self.numbers[piece].data_ptr():
            self.numbers[piece] = values


class _Blocks:
    """Codes of 8 or 4 bits and a scale for each block."""

    def __init__(self, codes: Tensor, scales: Tensor, bits: int, signed: bool) -> None:
        self.codes, self.scales, self.bits = _flat(codes), _flat(scales), bits
        self.values, self.nearest = (table(bits, signed, codes.device) for table in (code_values, nearest))

    def read(self, piece: slice) -> Tensor:
        codes = self.codes[self._place(piece)]
        if self.bits == 4:
            codes = torch.stack((codes >> 4, codes & 15), 1).flatten()
        numbers = self.values.index_select(0, codes.int()).view(-1, BLOCK)
        return numbers.mul_(self.scales[piece.start // BLOCK :][: len(numbers), None]).flatten()

    def write(self, piece: slice, values: Tensor) -> None:
        blocks = values.to(self.codes.device).view(-1, BLOCK)
        scales = blocks.abs().amax(1).clamp_(min=1e-30)
        half = (blocks / scales[:, None]).bfloat16().view(torch.int16).int().add_(1 << 15)
        codes = self.nearest.index_select(0, half.flatten())
        if self.bits == 4:
            codes = codes[::2] << 4 | codes[1::2]
        self.codes[self._place(piece)] = codes
        self.scales[piece.start // BLOCK :][: len(scales)] = scales

    def _place(self, piece: slice) -> slice:
        return slice(piece.start * self.bits // 8, piece.stop * self.bits // 8)


@cache
def code_values(bits: int, signed: bool, device: torch.device = CPU) -> Tensor:
    """What the codes of dynamic quantisation stand for, from -1 or 0 to 1, in rising order.

    Each power of ten is divided as finely as the bits that its exponent leaves over allow. Four bits without a sign: 1/16, 2/16
    to 1.
    """
    if bits == 4 and not signed:
        return (torch.arange(1, 17) / 16).to(device)
    exponents = bits - 1
    values = [0.0, 1.0]
    for i in range(exponents):
        edges = torch.linspace(0.1, 1, 2**i + 1 if signed else 2 ** (i + 1) + 1, dtype=torch.float64)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - exponents + 1)
        values += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def nearest(bits: int, signed: bool, device: torch.device = CPU) -> Tensor:
    """The code nearest to every number that bf16 can write, by its 16 bits: a search takes several times as long."""
    values = code_values(bits, signed, CPU)
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16).float().nan_to_num()
    return torch.bucketize(numbers, (values[1:] + values[:-1]) / 2).to(device, torch.uint8)


def convert(state: dict[str, Tensor], parameter: Tensor, kind: str | None) -> None:
    """Bring the averages in a parameter's state, if there are any, to a kind: a checkpoint may have held them otherwise.

    None: to the type of the parameter, which torch's AdamW wants.
    """
    for name in ("exp_avg", "exp_avg_sq"):
        if name in state or f"{name}_codes" in state:
            _average(state, parameter, name, kind or "fp32")
            if kind is None:
                state[name] = state[name].to(parameter.dtype)


def owned(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """What this device keeps optimizer state of."""
    return optimizer.owned(parameter) if hasattr(optimizer, "owned") else parameter


def empty_like(parameter: Tensor, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty tensor that differs from a parameter in the last dimension at most, spread over devices as it is.

    Raises:
        UserError: the last dimension cannot be spread in the same way.
    """
    if not is_dtensor(parameter):
        return torch.empty(size, dtype=dtype, device=parameter.device)
    mine = local(parameter)
    last, rest = divmod(mine.shape[-1] * size[-1], parameter.shape[-1])
    if rest:
        raise UserError(
            f"optimizer state in blocks of {BLOCK} numbers does not fit a part of {mine.shape[-1]} of {parameter.shape[-1]} "
            "columns: write optim.state=bf16, or a smaller tensor axis"
        )
    return dtensor_like(torch.empty(*mine.shape[:-1], last, dtype=dtype, device=mine.device), parameter, size)


def _average(state: dict[str, Tensor], parameter: Tensor, name: str, kind: str) -> "_Plain | _Blocks":
    """One average of a parameter, made if it is not there yet, converted if it is of another kind."""
    signed, columns = name == "exp_avg", parameter.shape[-1] if parameter.dim() else 1
    if parameter.numel() < SMALLEST or (kind.startswith("int") and columns % BLOCK):
        kind = "fp32"
    bits = {"int8": 8, "int4": 4}.get(kind, 0)
    wide = torch.promote_types(parameter.dtype, torch.float32)
    codes, scales = f"{name}_codes", f"{name}_scales"

    def known() -> "tuple[int, _Plain | _Blocks] | None":
        if name in state:
            return (16 if state[name].dtype == torch.bfloat16 else 32), _Plain(state[name])
        if codes not in state:
            return None
        found = 8 * state[codes].shape[-1] // columns
        return found, _Blocks(state[codes], state[scales], found, signed)

    before = known()
    if before is not None and before[0] == (bits or (16 if kind == "bf16" else 32)):
        return before[1]
    for key in (name, codes, scales):
        state.pop(key, None)
    if bits:
        shape = parameter.shape[:-1]
        state[codes] = empty_like(parameter, torch.Size([*shape, columns * bits // 8]), torch.uint8).zero_()
        state[scales] = empty_like(parameter, torch.Size([*shape, columns // BLOCK]), torch.float32).zero_()
    else:
        state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16 if kind == "bf16" else wide).detach()
    made = known()
    assert made is not None
    if before is not None:
        for piece in pieces(parameter):
            made[1].write(piece, before[1].read(piece))
    return made[1]


def put_away(state: dict[str, Tensor], scratch: StateStorage) -> None:
    """Move the tensors of a parameter's state away, and let what they took leave memory."""
    for key, value in state.items():
        mine = local(value)
        if mine.numel() * mine.element_size() < SMALLEST:
            continue
        if not scratch.holds(mine):
            moved = scratch.empty(mine.shape, mine.dtype).copy_(mine)
            state[key] = dtensor_like(moved, value, value.shape) if is_dtensor(value) else moved
            mine = moved
        scratch.release(mine)


def pieces(parameter: Tensor) -> list[slice]:
    flat = _flat(parameter)
    size, piece = len(flat), PIECE_GPU if kernels.on_gpu(flat) else PIECE
    return [slice(first, min(first + piece, size)) for first in range(0, size, piece)]


def _flat(tensor: Any) -> Tensor:
    return local(tensor).detach().reshape(-1)


def rounded(numbers: Tensor) -> Tensor:
    """float32 to bf16, up with the probability of the part that is cut off."""
    bits = numbers.view(torch.int32)
    return ((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32).bfloat16()
