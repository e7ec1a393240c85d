"""A decoder-only Transformer: GPT-2's block and the modern one (Llama, modded-nanoGPT) by configuration.

Shapes: b rows, s positions, h width, n heads, g key-value heads, d = h / n.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlm.models import kernels
from leanlm.models.contract import Model
from leanlm.models.dropout import RowDropout
from leanlm.models.head import make_head
from leanlm.models.linear import together

Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "gelu_tanh", "relu2", "swiglu"]


class Transformer(Model):
    """GPT-2 with the defaults; each modern change is an argument.

    Args:
        vocabulary: number of token types.
        sequence: longest context in tokens.
        width: size of the residual stream.
        depth: number of blocks.
        heads: query heads per block.
        kv_heads: key-value heads, shared by groups of query heads (GQA, Ainslie et al. 2023); None: as many as heads.
        mlp_width: inner size of the MLP; None: 4 * width.
        positions: learned table (GPT-2) or rotary (RoPE, Su et al. 2021).
        rope_base: wavelength base of the rotary positions.
        norm: LayerNorm or RMSNorm, before each sublayer and before the head.
        norm_eps: added to the variance.
        norm_weight: whether norms have a learned scale.
        qk_norm: RMS-normalise queries and keys per head (Dehghani et al. 2023).
        activation: gelu, gelu_tanh (GPT-2's approximation), relu2 (So et al. 2021), swiglu (Shazeer 2020).
        bias: biases in linear layers and LayerNorms.
        tied: share the embedding's weights with the head's.
        cutoffs: numbers of the types at which the bands of an adaptive softmax begin; None: a plain one.
        zero_init: start the projections back to the residual stream at zero.
        init: standard deviation of the other matrices.
        dropout: rate on the embedding and on what each sublayer adds (none inside attention: it would leave the fused
            kernel).
    """

    compiles = True
    tensor_split = {
        "embed.tokens": "vocabulary",
        "blocks.*.attention": "input",
        "blocks.*.attention.query": "colwise",
        "blocks.*.attention.key": "colwise",
        "blocks.*.attention.value": "colwise",
        "blocks.*.attention.out": "rowwise",
        "blocks.*.mlp": "input",
        "blocks.*.mlp.up": "colwise",
        "blocks.*.mlp.gate": "colwise",
        "blocks.*.mlp.down": "rowwise",
        "head.projection": "vocabulary",
    }

    def __init__(
        self,
        vocabulary: int,
        sequence: int,
        *,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        kv_heads: int | None = None,
        mlp_width: int | None = None,
        positions: Literal["learned", "rope"] = "learned",
        rope_base: float = 10000.0,
        norm: Norm = "layernorm",
        norm_eps: float = 1e-5,
        norm_weight: bool = True,
        qk_norm: bool = False,
        activation: Activation = "gelu_tanh",
        bias: bool = True,
        tied: bool = True,
        cutoffs: list[int] | None = None,
        zero_init: bool = False,
        init: float = 0.02,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(vocabulary, sequence)
        self.depth, self.init, self.zero_init = depth, init, zero_init
        self.units = {"heads": heads, "kv_heads": kv_heads or heads, "mlp_width": mlp_width or 4 * width}

        def make_norm() -> nn.Module:
            if norm == "rmsnorm":
                return nn.RMSNorm(width, norm_eps, norm_weight)
            return nn.LayerNorm(width, norm_eps, norm_weight, bias)

        def make_block() -> nn.Module:
            base = rope_base if positions == "rope" else None
            attention = Attention(width, heads, self.units["kv_heads"], bias, qk_norm, base, sequence)
            mlp = MLP(width, self.units["mlp_width"], activation, bias)
            return Block(make_norm(), attention, make_norm(), mlp, dropout)

        self.embed = Embedding(vocabulary, width, sequence if positions == "learned" else None, dropout)
        self.blocks = nn.ModuleDict({str(i): make_block() for i in range(depth)})
        self.head = make_head(width, vocabulary, make_norm(), False, cutoffs)
        if tied:
            self.head.projection.weight = self.embed.tokens.weight
        self.name_sites()

    @classmethod
    def problems(cls, **arguments: Any) -> list[str]:
        given, found = cls.given(arguments), super().problems(**arguments)
        width, heads = given["width"], given["heads"]
        groups = given["kv_heads"] or heads
        if width < 1 or heads < 1:
            return found
        if width % heads:
            near = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - heads))
            found.append(f"width={width} does not divide by heads={heads}: write heads={near}")
        elif given["positions"] == "rope" and width // heads % 2:
            found.append(f"rope turns pairs, but width={width} / heads={heads} = {width // heads} is odd")
        if heads % groups:
            found.append(f"heads={heads} does not divide by kv_heads={groups}")
        return found

    def tensor_units(self) -> dict[str, int]:
        return self.units

    def start(self, batch: int) -> list["KVCache"]:
        return [block.attention.cache(batch) for block in self.blocks.values() if isinstance(block, Block)]

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:  # the scale of a norm
            parameter.fill_(1)
        elif name.endswith(("attention.out.weight", "mlp.down.weight")):
            std = 0 if self.zero_init else self.init / (2 * self.depth) ** 0.5  # GPT-2's scaling of residual writes
            parameter.normal_(0, std, generator=generator)
        else:
            parameter.normal_(0, self.init, generator=generator)


class Embedding(nn.Module):
    def __init__(self, vocabulary: int, width: int, positions: int | None, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width) if positions else None
        self.dropout = RowDropout(dropout)

    def forward(self, tokens: Tensor, position: int = 0) -> Tensor:
        hidden = self.tokens(tokens)  # [b, s, h]
        if self.positions is not None:
            hidden = hidden + self.positions.weight[position : position + tokens.shape[1]]
        return self.dropout(hidden)


class Block(nn.Module):
    def __init__(self, norm1: nn.Module, attention: "Attention", norm2: nn.Module, mlp: "MLP", dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.attention = norm1, attention
        self.mlp_norm, self.mlp = norm2, mlp
        self.attention_dropout, self.mlp_dropout = RowDropout(dropout), RowDropout(dropout)

    def forward(self, hidden: Tensor, state: "KVCache | None" = None) -> tuple[Tensor, "KVCache | None"]:
        hidden = hidden + self.attention_dropout(self.attention(self.attention_norm(hidden), state))
        hidden = hidden + self.mlp_dropout(self.mlp(self.mlp_norm(hidden)))
        return hidden, state


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
    def __init__(
        self, width: int, heads: int, kv_heads: int, bias: bool, qk_norm: bool, rope_base: float | None, capacity: int
    ) -> None:
        super().__init__()
        self.size = width // heads
        self.kv_heads, self.qk_norm, self.rope_base, self.capacity = kv_heads, qk_norm, rope_base, capacity
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, kv_heads * self.size, bias=bias)
        self.value = nn.Linear(width, kv_heads * self.size, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, hidden: Tensor, cache: KVCache | None = None) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.size)).transpose(1, 2)  # [b, s, n*d] -> [b, n, s, d]

        query, key, value = map(split, together(hidden, self.query, self.key, self.value))
        if self.qk_norm:
            query, key = F.rms_norm(query, (self.size,)), F.rms_norm(key, (self.size,))
        start = cache.length if cache else 0
        if self.rope_base:
            query, key = rotate((query, key), start, self.rope_base)
        mask = None
        if cache:
            key, value = cache.append(key, value)
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(start)
        out = attend(query, key, value, mask)
        return self.out(out.transpose(1, 2).flatten(2))  # [b, n, s, d] -> [b, s, h]

    def cache(self, batch: int) -> KVCache:
        weight = self.key.weight
        return KVCache(weight.new_zeros(batch, self.kv_heads, self.capacity, self.size))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention, causal unless there is a mask; query `[b, n, s, d]`, key and value `[b, g, t, d]`."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=grouped)

    low = kernels.low_precision(query)
    if kernels.on_gpu(query):
        if low == torch.float32 and key.shape[1] != query.shape[1]:
            # its float32 kernel knows no groups: torch would keep the probabilities of all pairs of positions
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        return attention(query, key, value)
    if low != torch.float32 and query.dtype != torch.float64:
        # the CPU's flash kernel takes 3 times as long in bf16 as in fp32 at 64 to 128 positions
        with torch.autocast("cpu", enabled=False):
            return attention(query.float(), key.float(), value.float()).to(low)
    return attention(query, key, value)


def rotate(parts: tuple[Tensor, ...], start: int, base: float) -> list[Tensor]:
    """Rotary positions on `x [b, n, s, d]`, each of which begins at position `start`; pairs (i, i + d/2) as Llama's code has
    it."""
    x = parts[0]
    half = x.shape[-1] // 2
    compute = torch.promote_types(x.dtype, torch.float32)  # angles lose positions in bf16
    frequency = base ** (-torch.arange(half, device=x.device, dtype=compute) / half)
    angle = torch.arange(start, start + x.shape[2], device=x.device, dtype=compute)[:, None] * frequency  # [s, d/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    def turned(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return [turned(part[..., :half], part[..., half:]) for part in parts]


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, inner, bias=bias)
        self.gate = nn.Linear(width, inner, bias=bias) if activation == "swiglu" else None
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.gate is not None:
            up, gate = together(hidden, self.up, self.gate)
            inner = F.silu(gate) * up
        elif self.activation == "relu2":
            inner = F.relu(self.up(hidden))
            inner = inner * inner  # not `square`: a GPU's autocast computes powers in float32
        else:
            inner = F.gelu(self.up(hidden), approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.down(inner)
