"""AdamW's two averages in fewer bytes.

bf16: half the bytes. int8: blocks of 64 numbers share a scale, and codes are those of dynamic quantisation (Dettmers et al.
2022, arXiv 2110.02861). int4: as int8 with 16 codes, the second average's evenly spaced without zero (Li et al. 2023, arXiv
2309.01507). Blocks lie inside rows, and codes and scales are distributed as their parameter is, so that a checkpoint
goes on under another plan. torchao 0.18's AdamW8bit has blocks of the flattened tensor: state of 260 x 64 numbers that two
processes had saved under FSDP2 could not be loaded by one, and its first step on a CPU compiled for 20 s.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from leanlm.common.dtensors import dtensor_like, is_dtensor, local
from leanlm.common.errors import UserError
from leanlm.models import kernels
from leanlm.optimizers import base

BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
BLOCK = 64  # numbers that share a scale
PIECE, PIECE_GPU = 1 << 18, 1 << 22  # numbers that are unpacked at a time; a whole number of blocks
CPU = torch.device("cpu")


class Plain:
    """Numbers as they are, or in bf16."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.bits = flat(numbers), 16 if numbers.dtype == torch.bfloat16 else 32

    def read(self, piece: slice) -> Tensor:
        return self.numbers[piece].to(torch.promote_types(self.numbers.dtype, torch.float32))

    def write(self, piece: slice, values: Tensor) -> None:
        if values.data_ptr() != self.numbers[piece].data_ptr():
            self.numbers[piece] = values


class Blocks:
    """Codes of 8 or 4 bits and a scale for each block."""

    def __init__(self, codes: Tensor, scales: Tensor, bits: int, signed: bool) -> None:
        self.codes, self.scales, self.bits = flat(codes), flat(scales), bits
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


def average(state: dict[str, Tensor], parameter: Tensor, name: str, kind: str) -> Plain | Blocks:
    """One average of a parameter, made if it is not there yet, converted if it is of another kind.

    `state` holds `<name>`, which is `exp_avg` or `exp_avg_sq`, or else `<name>_codes` and `<name>_scales`; of `parameter` the
    part is enough whose state this device keeps. Of whatever `kind` (of BITS), what is small, or has rows that are not whole
    blocks, stays in float32.
    """
    columns, wide = _columns(parameter), torch.promote_types(parameter.dtype, torch.float32)
    bits = 32 if parameter.numel() < base.SMALLEST else BITS[kind]
    bits = 32 if bits < 16 and columns % BLOCK else bits
    before = _stored(state, parameter, name)
    if before is not None and before.bits == bits:
        return before
    for key in (name, f"{name}_codes", f"{name}_scales"):
        state.pop(key, None)
    if bits < 16:
        shape = parameter.shape[:-1]
        state[f"{name}_codes"] = empty_like(parameter, torch.Size([*shape, columns * bits // 8]), torch.uint8).zero_()
        state[f"{name}_scales"] = empty_like(parameter, torch.Size([*shape, columns // BLOCK]), torch.float32).zero_()
    else:
        state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16 if bits == 16 else wide).detach()
    made = _stored(state, parameter, name)
    assert made is not None
    if before is not None:
        for piece in pieces(parameter):
            made.write(piece, before.read(piece))
    return made


def _stored(state: dict[str, Tensor], parameter: Tensor, name: str) -> Plain | Blocks | None:
    if name in state:
        return Plain(state[name])
    if (codes := state.get(f"{name}_codes")) is None:
        return None
    return Blocks(codes, state[f"{name}_scales"], 8 * codes.shape[-1] // _columns(parameter), signed=name == "exp_avg")


def convert(state: dict[str, Tensor], parameter: Tensor, kind: str | None) -> None:
    """Bring the averages in a parameter's state, if there are any, to a kind: a checkpoint may have held them otherwise.

    None: to the type of the parameter, which torch's AdamW wants.
    """
    for name in ("exp_avg", "exp_avg_sq"):
        if name in state or f"{name}_codes" in state:
            average(state, parameter, name, kind or "fp32")
            if kind is None:
                state[name] = state[name].to(parameter.dtype)


def empty_like(parameter: Tensor, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty tensor that differs from a parameter in the last dimension at most, distributed as it is.

    Raises:
        UserError: the last dimension cannot be divided in the same way.
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


def pieces(parameter: Tensor) -> list[slice]:
    """Of the numbers that this device has of a parameter, those that are updated at a time."""
    numbers = flat(parameter)
    size, piece = len(numbers), PIECE_GPU if kernels.on_gpu(numbers) else PIECE
    return [slice(first, min(first + piece, size)) for first in range(0, size, piece)]


def flat(tensor: Any) -> Tensor:
    """The numbers that this device has of a tensor, in one row."""
    return local(tensor).detach().reshape(-1)


def _columns(parameter: Tensor) -> int:
    return parameter.shape[-1] if parameter.dim() else 1
