"""Attention, with what a configuration may add to it: rotary positions, a window, normalised queries and keys, a cache.

Shapes: b rows, s positions, h width, n query heads, g key-value heads, d numbers of a head.
"""

from dataclasses import dataclass
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlm.models import kernels
from leanlm.models.borders import Borders
from leanlm.models.linear import together

LONG = 256  # positions from which on a CPU's attention is as fast in bf16 as in float32


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (RoPE, Su et al. 2021): pairs (i, i + d/2) of a head are turned, as Llama's code has it.

    With all four other numbers only wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched by
    `factor`, those below `original_max_position_embeddings / high_freq_factor` are left, and it blends between (Llama 3.1).

    Attributes:
        base: of the wavelengths `2 pi base**(2i / d)`.
        factor: stretches wavelengths, so that a longer context is told by the same angles.
    """

    base: float
    factor: float = 1.0
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: float | None = None

    @classmethod
    def problems(cls, scaling: dict[str, float]) -> list[str]:
        """What cannot work about its arguments but the base, one line each."""
        some = {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        if not scaling or scaling.keys() in ({"factor"}, {"factor", *some}):
            return []
        return [f"rope_scaling={scaling}: factor, and with it either none or all of {', '.join(sorted(some))}"]

    def __call__(self, parts: tuple[Tensor, ...], start: int | Tensor) -> list[Tensor]:
        """Each part `x [b, n, s, d]`, turned; it begins at position `start`, or has positions `[b, s]`."""
        x = parts[0]
        half = x.shape[-1] // 2
        compute = torch.promote_types(x.dtype, torch.float32)  # angles lose positions in bf16
        frequency = self.stretched(self.base ** (-torch.arange(half, device=x.device, dtype=compute) / half))
        if isinstance(start, Tensor):
            position = start[:, None, :, None].to(compute)
        else:
            position = torch.arange(start, start + x.shape[2], device=x.device, dtype=compute)[:, None]
        angle = position * frequency  # [s, d/2] or [b, 1, s, d/2]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)

        def turned(first: Tensor, second: Tensor) -> Tensor:
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

        return [turned(part[..., :half], part[..., half:]) for part in parts]

    def stretched(self, frequency: Tensor) -> Tensor:
        """Angles `[d/2]` from one position to the next, in which `frequency` is what they are without scaling."""
        if self.factor == 1:
            return frequency
        kept: Tensor | float = 0.0
        if self.original_max_position_embeddings and self.low_freq_factor and self.high_freq_factor:
            turns = frequency * (self.original_max_position_embeddings / (2 * pi))  # in the context of the first training
            kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


class KVCache:
    """Keys and values of the tokens read so far, `[b, g, capacity, d]` each, filled up to `length`."""

    def __init__(self, keys: Tensor) -> None:
        self.keys, self.values, self.length = keys, torch.zeros_like(keys), 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + key.shape[2]
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Self-attention.

    Args:
        sizes: h, n, g, d.
        capacity: longest context in tokens.
        causal: a position attends to none after it.
        bias: in the layer that writes back.
        qkv_bias: in the layers of queries, keys and values.
        rotary: turns queries and keys; None: positions are told elsewhere.
        window: tokens up to itself that a position attends to, or without `causal`, half as many to each side; None: all.
        qk_norm: RMS-normalise queries and keys.
        norm_eps: with a learned scale, and this added to the mean square; None: neither.
    """

    def __init__(
        self,
        sizes: tuple[int, int, int, int],
        capacity: int,
        *,
        causal: bool,
        bias: bool,
        qkv_bias: bool,
        rotary: Rotary | None,
        window: int | None,
        qk_norm: bool,
        norm_eps: float | None,
    ) -> None:
        super().__init__()
        width, heads, self.kv_heads, self.size = sizes
        self.capacity, self.causal, self.rotary, self.window = capacity, causal, rotary, window
        self.query = nn.Linear(width, heads * self.size, bias=qkv_bias)
        self.key = nn.Linear(width, self.kv_heads * self.size, bias=qkv_bias)
        self.value = nn.Linear(width, self.kv_heads * self.size, bias=qkv_bias)
        self.query_norm, self.key_norm = (
            nn.RMSNorm(self.size, norm_eps, elementwise_affine=norm_eps is not None) if qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.out = nn.Linear(heads * self.size, width, bias=bias)

    def forward(self, hidden: Tensor, state: KVCache | Borders | None = None) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.size)).transpose(1, 2)  # [b, s, n*d] -> [b, n, s, d]

        query, key, value = map(split, together(hidden, self.query, self.key, self.value))
        query, key = self.query_norm(query), self.key_norm(key)
        cache, borders = (state, None) if isinstance(state, KVCache) else (None, state)
        start = cache.length if cache else 0
        if self.rotary:
            query, key = self.rotary((query, key), borders.positions if borders else start)
        if cache:
            key, value = cache.append(key, value)
        mask = self.mask(start, query.shape[2], query.device) if cache or self.window else None
        if borders:
            mask = borders.attends if mask is None else borders.attends & mask
        out = attend(query, key, value, mask, self.causal)
        return self.out(out.transpose(1, 2).flatten(2))  # [b, n, s, d] -> [b, s, h]

    def mask(self, start: int, length: int, device: torch.device) -> Tensor | None:
        """Which of all tokens up to the last `[start + length]` each of the last `length` attends to; None: see `attend`."""
        window = self.window or self.capacity
        behind, ahead = (window - 1, 0) if self.causal else (window // 2, window // 2)
        if start == 0 and length <= behind + 1:
            return None
        near = torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start + ahead)
        return near.triu(start - behind) if start + length > behind + 1 else near

    def cache(self, batch: int) -> KVCache:
        weight = self.key.weight
        return KVCache(weight.new_zeros(batch, self.kv_heads, self.capacity, self.size))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = True) -> Tensor:
    """Softmax attention over what a mask allows; without one over all, if `causal` all up to the query.

    query `[b, n, s, d]`, key and value `[b, g, t, d]`.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal and mask is None, enable_gqa=grouped)

    low = kernels.low_precision(query)
    if kernels.on_gpu(query):
        if (low == torch.float32 or mask is not None) and key.shape[1] != query.shape[1]:
            # its kernel for float32 and for masks knows no groups: torch would keep the probabilities of all pairs of positions
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        return attention(query, key, value)
    if low != torch.float32 and query.dtype != torch.float64 and query.shape[2] < LONG:
        # the CPU's flash kernel takes 3 times as long in bf16 as in fp32 at 64 positions, 2 times at 128, as long at 256
        with torch.autocast("cpu", enabled=False):
            return attention(query.float(), key.float(), value.float()).to(low)
    return attention(query, key, value)
