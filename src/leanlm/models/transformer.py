"""A Transformer: GPT-2's block and the modern one (Llama, modded-nanoGPT), decoder or encoder (BERT), by configuration.

Shapes: b rows, s positions, h width, n heads, g key-value heads, d = h / n.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlm.models.attention import Attention, KVCache, Rotary
from leanlm.models.borders import Borders
from leanlm.models.contract import Model
from leanlm.models.dropout import RowDropout
from leanlm.models.head import Transform, make_head
from leanlm.models.linear import together

Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "gelu_tanh", "relu2", "swiglu", "geglu"]


class Transformer(Model):
    """GPT-2 with the defaults; each modern change is an argument.

    Args:
        vocabulary: number of token types.
        sequence: longest context in tokens.
        width: size of the residual stream.
        depth: number of blocks.
        heads: query heads per block.
        kv_heads: key-value heads, shared by groups of query heads (GQA, Ainslie et al. 2023); None: as many as heads.
        head_size: numbers of a head; None: width / heads.
        mlp_width: inner size of the MLP; None: 4 * width.
        causal: a position attends to none after it; False: to all of its row (BERT, Devlin et al. 2018).
        positions: learned table (GPT-2) or rotary (RoPE, Su et al. 2021).
        position_offset: rows at the beginning of that table which no position has (RoBERTa: 2).
        token_types: rows of a table of which the first is added to each token (BERT: 2); 0: there is none.
        embed_norm: normalise the sum of these, so that a pre-norm block 0 does not before its attention (ModernBERT).
        rope_base: wavelength base of the rotary positions.
        local_rope_base: that in layers with a window; None: the same.
        rope_scaling: how their wavelengths are stretched, see `attention.Rotary`; None: not at all.
        window: tokens up to itself that a position attends to (Mistral 7B, Jiang et al. 2023), or half as many to each side,
            if it is not `causal`; None: all.
        global_every: each so many-th layer, from the first on, has no window (ModernBERT, Warner et al. 2024); None: all have.
        norm: LayerNorm or RMSNorm.
        post_norm: after each sublayer, norm(x + f(x)), as in BERT; else before it, x + f(norm(x)), and before the head.
        norm_eps: added to the variance.
        norm_weight: whether norms have a learned scale.
        qk_norm: RMS-normalise queries and keys per head (Dehghani et al. 2023).
        qk_norm_weight: whether these norms have a learned scale, and add `norm_eps` (Qwen3).
        activation: gelu, gelu_tanh (GPT-2's approximation), relu2 (So et al. 2021), swiglu, geglu (Shazeer 2020).
        bias: biases in linear layers and LayerNorms.
        qkv_bias: biases in the layers of queries, keys and values (Qwen2); None: as `bias`.
        tied: share the embedding's weights with the head's.
        head_transform: a dense layer, GELU and a norm before the projection to the vocabulary (BERT).
        head_bias: a bias in that projection.
        cutoffs: numbers of the types at which the bands of an adaptive softmax begin; None: a plain one.
        zero_init: start the projections back to the residual stream at zero.
        init: standard deviation of the other matrices.
        dropout: rate on the embedding and on what each sublayer adds (none inside attention: it would leave the fused
            kernel).
    """

    compiles = isolates = True
    tensor_split = {
        "embed.tokens": "vocabulary",
        "blocks.*.attention": "input",
        "blocks.*.attention.query": "colwise",
        "blocks.*.attention.key": "colwise",
        "blocks.*.attention.value": "colwise",
        "blocks.*.attention.query_norm": "partial",
        "blocks.*.attention.key_norm": "partial",
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
        head_size: int | None = None,
        mlp_width: int | None = None,
        causal: bool = True,
        positions: Literal["learned", "rope"] = "learned",
        position_offset: int = 0,
        token_types: int = 0,
        embed_norm: bool = False,
        rope_base: float = 10000.0,
        local_rope_base: float | None = None,
        rope_scaling: dict[str, float] | None = None,
        window: int | None = None,
        global_every: int | None = None,
        norm: Norm = "layernorm",
        post_norm: bool = False,
        norm_eps: float = 1e-5,
        norm_weight: bool = True,
        qk_norm: bool = False,
        qk_norm_weight: bool = False,
        activation: Activation = "gelu_tanh",
        bias: bool = True,
        qkv_bias: bool | None = None,
        tied: bool = True,
        head_transform: bool = False,
        head_bias: bool = False,
        cutoffs: list[int] | None = None,
        zero_init: bool = False,
        init: float = 0.02,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(vocabulary, sequence)
        self.causal, self.depth, self.init, self.zero_init, self.post_norm = causal, depth, init, zero_init, post_norm
        self.units = {"heads": heads, "kv_heads": kv_heads or heads, "mlp_width": mlp_width or 4 * width}

        def make_norm() -> nn.Module:
            if norm == "rmsnorm":
                return nn.RMSNorm(width, norm_eps, norm_weight)
            return nn.LayerNorm(width, norm_eps, norm_weight, bias)

        def make_block(i: int) -> nn.Module:
            local = window is not None and (global_every is None or i % global_every > 0)
            base = local_rope_base if local and local_rope_base else rope_base
            attention = Attention(
                (width, heads, self.units["kv_heads"], head_size or width // heads),
                sequence,
                causal=causal,
                bias=bias,
                qkv_bias=bias if qkv_bias is None else qkv_bias,
                rotary=Rotary(base, **(rope_scaling or {})) if positions == "rope" else None,
                window=window if local else None,
                qk_norm=qk_norm,
                norm_eps=norm_eps if qk_norm_weight else None,
            )
            mlp = MLP(width, self.units["mlp_width"], activation, bias)
            normalised = i == 0 and embed_norm and not post_norm
            return Block(nn.Identity() if normalised else make_norm(), attention, make_norm(), mlp, dropout, post_norm)

        table = sequence + position_offset if positions == "learned" else 0
        normed = make_norm() if embed_norm else nn.Identity()
        self.embed = Embedding(vocabulary, width, table, position_offset, token_types, normed, dropout)
        self.blocks = nn.ModuleDict({str(i): make_block(i) for i in range(depth)})
        self.head = make_head(width, vocabulary, nn.Identity() if post_norm else make_norm(), head_bias, cutoffs)
        if head_transform:
            self.head.transform = Transform(width, make_norm(), bias)
        if tied:
            self.head.projection.weight = self.embed.tokens.weight
        self.name_sites()

    @classmethod
    def problems(cls, **arguments: Any) -> list[str]:
        given, found = cls.given(arguments), super().problems(**arguments)
        width, heads = given["width"], given["heads"]
        groups = given["kv_heads"] or heads
        found += Rotary.problems(given["rope_scaling"] or {})
        if width < 1 or heads < 1:
            return found
        size = given["head_size"] or width // heads
        if width % heads and not given["head_size"]:
            near = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - heads))
            found.append(f"width={width} does not divide by heads={heads}: write heads={near}")
        elif given["positions"] == "rope" and size % 2:
            found.append(f"rope turns pairs, but a head of size {size} (head_size, or width={width} / heads={heads}) is odd")
        if heads % groups:
            found.append(f"heads={heads} does not divide by kv_heads={groups}")
        return found

    def tensor_units(self) -> dict[str, int]:
        return self.units

    def start(self, batch: int) -> list[KVCache]:
        return [block.attention.cache(batch) for block in self.blocks.values() if isinstance(block, Block)]

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:  # the scale of a norm
            parameter.fill_(1)
        elif name.endswith(("attention.out.weight", "mlp.down.weight")):
            writes = 1 if self.post_norm else 2 * self.depth  # into a stream that nothing normalises; GPT-2's scaling
            std = 0 if self.zero_init else self.init / writes**0.5
            parameter.normal_(0, std, generator=generator)
        else:
            parameter.normal_(0, self.init, generator=generator)


class Embedding(nn.Module):
    """Tokens, their positions (a table whose first `offset` rows are unused) and the first of `types`, added and normalised."""

    def __init__(
        self, vocabulary: int, width: int, positions: int, offset: int, types: int, norm: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width) if positions else None
        self.types = nn.Embedding(types, width) if types else None
        self.offset, self.norm = offset, norm
        self.dropout = RowDropout(dropout)

    def forward(self, tokens: Tensor, position: int | Tensor = 0) -> Tensor:
        hidden = self.tokens(tokens)  # [b, s, h]
        position = position + self.offset
        if self.positions is not None and isinstance(position, Tensor):
            hidden = hidden + self.positions(position)
        elif self.positions is not None:
            hidden = hidden + self.positions.weight[position : position + tokens.shape[1]]
        if self.types is not None:
            hidden = hidden + self.types.weight[0]
        return self.dropout(self.norm(hidden))


class Block(nn.Module):
    def __init__(
        self, norm1: nn.Module, attention: Attention, norm2: nn.Module, mlp: "MLP", dropout: float, post_norm: bool
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.attention_norm, self.attention = norm1, attention
        self.mlp_norm, self.mlp = norm2, mlp
        self.attention_dropout, self.mlp_dropout = RowDropout(dropout), RowDropout(dropout)

    def forward(self, hidden: Tensor, state: KVCache | Borders | None = None) -> tuple[Tensor, KVCache | Borders | None]:
        if self.post_norm:
            hidden = self.attention_norm(hidden + self.attention_dropout(self.attention(hidden, state)))
            return self.mlp_norm(hidden + self.mlp_dropout(self.mlp(hidden))), state
        hidden = hidden + self.attention_dropout(self.attention(self.attention_norm(hidden), state))
        hidden = hidden + self.mlp_dropout(self.mlp(self.mlp_norm(hidden)))
        return hidden, state


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, inner, bias=bias)
        self.gate = nn.Linear(width, inner, bias=bias) if activation.endswith("glu") else None
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.gate is not None:
            up, gate = together(hidden, self.up, self.gate)
            inner = (F.silu(gate) if self.activation == "swiglu" else F.gelu(gate)) * up
        elif self.activation == "relu2":
            inner = F.relu(self.up(hidden))
            inner = inner * inner  # not `square`: a GPU's autocast computes powers in float32
        else:
            inner = F.gelu(self.up(hidden), approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.down(inner)
