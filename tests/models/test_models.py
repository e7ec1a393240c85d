"""Models against other implementations of the same mathematics."""

import pytest
import torch
from conftest import composed
from hydra.utils import instantiate
from torch import nn

from leanlm.common.errors import UserError
from leanlm.config.arguments import typed
from leanlm.models import dropout
from leanlm.models.borders import Borders
from leanlm.models.contract import Model, initialize
from leanlm.models.generation import generate


def build(vocabulary: int, sequence: int, *overrides: str) -> Model:
    net = instantiate(composed(*overrides).model, vocabulary=vocabulary, sequence=sequence)
    initialize(net, 3)
    return net.eval()


def copy(own: Model, theirs: nn.Module, names: dict[str, str], transposed: tuple[str, ...] = ()) -> None:
    """Give `theirs` our weights; `names` maps our name, with {i} for a block, to theirs."""
    target = dict(theirs.named_parameters())
    source = dict(own.named_parameters())
    with torch.no_grad():
        for ours, other in names.items():
            for i in range(len(own.blocks)) if "{i}" in ours else [0]:
                value = source[ours.format(i=i)]
                target[other.format(i=i)].copy_(
                    value.t() if ours.endswith(transposed) and value.dim() == 2 and transposed else value
                )


@pytest.mark.parametrize("depth", [1, 3])
def test_gpt2_equals_transformers(depth: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    own = build(97, 32, "model=gpt2", "model.width=48", f"model.depth={depth}", "model.heads=4", "model.init=0.2")
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=48, n_layer=depth, n_head=4)).eval()
    source, target = dict(own.named_parameters()), dict(theirs.named_parameters())
    with torch.no_grad():
        for i in range(depth):
            at, to = f"blocks.{i}.", f"transformer.h.{i}."
            for kind, dim in (("weight", 1), ("bias", 0)):
                parts = [source[f"{at}attention.{part}.{kind}"] for part in ("query", "key", "value")]
                parts = [part.t() if kind == "weight" else part for part in parts]  # Conv1D keeps [in, out]
                target[f"{to}attn.c_attn.{kind}"].copy_(torch.cat(parts, dim))
                for ours, other in (
                    ("attention.out", "attn.c_proj"),
                    ("mlp.up", "mlp.c_fc"),
                    ("mlp.down", "mlp.c_proj"),
                ):
                    value = source[f"{at}{ours}.{kind}"]
                    target[f"{to}{other}.{kind}"].copy_(value.t() if kind == "weight" else value)
                target[f"{to}ln_1.{kind}"].copy_(source[f"{at}attention_norm.{kind}"])
                target[f"{to}ln_2.{kind}"].copy_(source[f"{at}mlp_norm.{kind}"])
        target["transformer.wte.weight"].copy_(source["embed.tokens.weight"])
        target["transformer.wpe.weight"].copy_(source["embed.positions.weight"])
        target["transformer.ln_f.weight"].copy_(source["head.norm.weight"])
        target["transformer.ln_f.bias"].copy_(source["head.norm.bias"])
    tokens = torch.randint(97, (3, 32))
    torch.testing.assert_close(own(tokens)[0], theirs(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_equals_transformers(kv_heads: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    own = build(
        97, 40, "model=llama", "model.width=32", "model.depth=2", "model.heads=4", f"model.kv_heads={kv_heads}",
        "model.mlp_width=56", "model.init=0.2",
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, rms_norm_eps=1e-5, max_position_embeddings=40, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    layer = {
        "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    }  # fmt: skip
    names = {f"blocks.{{i}}.{ours}.weight": f"model.layers.{{i}}.{other}.weight" for ours, other in layer.items()}
    names |= {"embed.tokens.weight": "model.embed_tokens.weight", "head.norm.weight": "model.norm.weight"}
    copy(own, theirs, names | {"head.projection.weight": "lm_head.weight"})
    tokens = torch.randint(97, (3, 40))
    torch.testing.assert_close(own(tokens)[0], theirs(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("cell", "kind"), [("elman_tanh", nn.RNN), ("elman_relu", nn.RNN), ("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_rnn_equals_torch_over_carried_steps(cell: str, kind: type, depth: int = 3) -> None:
    own = build(31, 7, "model=lstm", f"model.cell={cell}", "model.width=10", f"model.depth={depth}")
    extra = {"nonlinearity": "relu"} if cell == "elman_relu" else {}
    theirs = kind(10, 10, depth, batch_first=True, **extra)
    with torch.no_grad():
        for i, block in enumerate(own.blocks.values()):
            for name, value in block.cell.named_parameters():
                getattr(theirs, name.replace("_l0", f"_l{i}")).copy_(value)
    states = memory = None
    for _ in range(3):
        tokens = torch.randint(31, (4, 7))
        logits, states = own(tokens, states)
        hidden, memory = theirs(own.embed.tokens(tokens), memory)
        torch.testing.assert_close(logits, own.head.projection(hidden), atol=1e-6, rtol=0)
    last = memory[0] if isinstance(memory, tuple) else memory
    torch.testing.assert_close(states[-1][0], last[-1])


def test_a_narrow_embedding_is_met_by_linear_maps() -> None:
    own = build(31, 7, "model=lstm", "model.width=10", "model.embedding=4", "model.tied=true")
    theirs = nn.LSTM(10, 10, batch_first=True)
    theirs.load_state_dict(own.blocks["0"].cell.state_dict())
    tokens = torch.randint(31, (4, 7))
    words = own.embed.tokens.weight
    hidden, _ = theirs(words[tokens] @ own.embed.resize.weight.t())
    expected = hidden @ own.head.norm.weight.t() @ words.t() + own.head.projection.bias
    torch.testing.assert_close(own(tokens)[0], expected, atol=1e-6, rtol=0)
    assert sum(p.numel() for p in own.parameters()) == 31 * 4 + 31 + 2 * 4 * 10 + 2 * 40 * 10 + 80


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_presets_have_the_published_sizes(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        net = instantiate(composed(f"model={preset}").model, vocabulary=50257, sequence=1024)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


@pytest.mark.parametrize(
    ("preset", "kind", "parameters", "sizes"),
    [
        ("bert", "Bert", 109_514_298, {}),
        ("roberta", "Roberta", 124_697_433, {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}),
        ("modernbert", "ModernBert", 149_655_232, {}),
    ],
)  # fmt: skip
def test_encoders_have_the_published_sizes(preset: str, kind: str, parameters: int, sizes: dict) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**sizes)
    sequence = config.max_position_embeddings - (2 if preset == "roberta" else 0)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForMaskedLM")(config)
        net = instantiate(composed(f"model={preset}").model, vocabulary=config.vocab_size, sequence=sequence)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in theirs.parameters()) == parameters


ENCODERS = {
    "bert": ["model=bert", "model.width=16", "model.depth=2", "model.heads=2"],
    "modernbert": ["model=modernbert", "model.width=16", "model.depth=3", "model.heads=2", "model.window=4",
                   "model.global_every=2", "model.mlp_width=24"],
}  # fmt: skip


@pytest.mark.parametrize("model", ENCODERS)
@torch.no_grad()
def test_documents_of_a_row_read_in_both_directions_are_what_they_are_alone(model: str) -> None:
    net = build(50, 16, *ENCODERS[model], "model.init=0.3").double()
    tokens = torch.randint(50, (1, 16), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(11), torch.arange(5)])[None]
    hidden = net.embed(tokens, positions)
    for block in net.blocks.values():
        hidden, _ = block(hidden, Borders.of(positions, net.causal))
    alone = torch.cat([net(tokens[:, :11])[0], net(tokens[:, 11:])[0]], 1)
    torch.testing.assert_close(net.head(hidden), alone, atol=1e-12, rtol=0)
    changed = tokens.clone()
    changed[0, 10] = (tokens[0, 10] + 1) % 50
    assert ((net(changed)[0] - net(tokens)[0]).abs().amax((0, 2)) > 0).all(), "every position sees the others"


def test_who_reads_in_both_directions_does_not_go_on() -> None:
    net = build(50, 16, *ENCODERS["bert"])
    with pytest.raises(UserError, match="causal=false: this model reads a text in both directions, and cannot go on from one"):
        next(generate(net, [1], 4))


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    deep = build(31, 8, "model=transformer", "model.width=16", "model.depth=3", "model.heads=2", "model.zero_init=false")
    shallow = build(31, 8, "model=transformer", "model.width=16", "model.depth=1", "model.heads=2", "model.zero_init=false")
    ours = dict(deep.named_parameters())
    for name, value in shallow.named_parameters():
        same = torch.equal(value, ours[name])
        assert same or name.endswith(("out.weight", "down.weight")), name  # those are scaled by the depth
    assert not torch.equal(ours["blocks.0.attention.query.weight"], ours["blocks.1.attention.query.weight"])
    initialize(shallow, 4)
    assert not torch.equal(dict(shallow.named_parameters())["embed.tokens.weight"], ours["embed.tokens.weight"])


def test_gpt2_starts_with_gpt2s_spread() -> None:
    net = build(500, 64, "model=gpt2", "model.width=128", "model.depth=8", "model.heads=4")
    weights = dict(net.named_parameters())
    assert weights["blocks.3.mlp.up.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    assert weights["blocks.3.mlp.down.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert torch.all(weights["blocks.0.attention_norm.weight"] == 1)


@pytest.mark.parametrize("model", ["gpt2", "llama", "transformer"])
def test_no_position_sees_the_future(model: str) -> None:
    net = build(
        50,
        16,
        f"model={model}",
        "model.width=16",
        "model.depth=2",
        "model.heads=2",
        "model.zero_init=false",
        *(["model.kv_heads=1"] if model == "llama" else []),
    )
    tokens = torch.randint(50, (1, 16))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 50
    before, after = net(tokens)[0], net(changed)[0]
    assert torch.equal(before[0, :9], after[0, :9])
    assert not torch.allclose(before[0, 9:], after[0, 9:])


def test_dropout_reaches_every_site_once() -> None:
    """All sites differ, so no two masks of a step are equal."""
    net = build(50, 16, "model=transformer", "model.width=16", "model.depth=2", "model.heads=2", "model.dropout=0.2")
    every = dropout.sites(net)
    assert len(every) == 5
    assert len({each.site for each in every}) == 5
    net.train()
    tokens, rows = torch.randint(50, (4, 16)), torch.arange(4)
    dropout.draw(every, dropout.row_keys(1, 7, rows, every))
    first = net(tokens)[0]
    again = net(tokens)[0]
    dropout.draw(every, dropout.row_keys(1, 8, rows, every))
    other = net(tokens)[0]
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("wrong", [{"width": 30, "heads": 4}, {"heads": 4, "kv_heads": 3}, {"width": 12, "heads": 4}])
def test_sizes_that_cannot_work_are_explained(wrong: dict) -> None:
    from leanlm.models.transformer import Transformer

    assert any(str(value) in Transformer.problems(positions="rope", **wrong)[0] for value in wrong.values())


def test_every_preset_is_typed() -> None:
    from pathlib import Path

    from leanlm.common.files import CONF

    for file in Path(CONF, "model").glob("*.yaml"):
        assert typed(composed(f"model={file.stem}"))[0] == []
