"""Weights in Hugging Face's layout: the same logits as transformers', whatever the family; what is not known is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed

from leanlm.common.errors import UserError
from leanlm.config.checks import check
from leanlm.models.contract import without_storage
from leanlm.models.families import FAMILIES, family_of
from leanlm.models.pretrained import Weights
from leanlm.models.transformer import Transformer

transformers = pytest.importorskip("transformers")

TYPES, LENGTH = 300, 64
SIZES: dict[str, Any] = {
    "vocab_size": TYPES, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": LENGTH,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
ENCODER: dict[str, Any] = {**{key: value for key, value in SIZES.items() if "key" not in key}, "pad_token_id": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"vocab_size": TYPES, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}),
    "llama": ("Llama", SIZES),
    "llama, tied, scaled": ("Llama", {**SIZES, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama, stretched": ("Llama", {**SIZES, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 16}),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 9, "head_dim": 12}),
    "bert": ("Bert", ENCODER),
    "roberta": ("Roberta", {**ENCODER, "max_position_embeddings": LENGTH + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "modernbert": ("ModernBert", {**ENCODER, "num_hidden_layers": 5, "local_attention": 9}),
    "modernbert, alternating": (
        "ModernBert",
        {**ENCODER, "local_attention": 16, "decoder_bias": False, "global_attn_every_n_layers": 2, "global_rope_theta": 500.0},
    ),
}
ENCODERS = [case for case, (_, sizes) in CASES.items() if "pad_token_id" in sizes]


def theirs(case: str) -> Any:
    """A model of transformers' with random weights whose logits are of order 30."""
    name, arguments = CASES[case]
    kind = "MaskedLM" if case in ENCODERS else "CausalLM"
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}For{kind}")(
        getattr(transformers, f"{name}Config")(**arguments)
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = key.endswith("weight") and ("norm" in key.lower() or "ln_" in key)
            parameter.normal_(float(scale), 0.1 if parameter.dim() == 1 else 0.3, generator=draw)
    return model.eval()


def saved(case: str, folder: Path, **more: Any) -> Any:
    model = theirs(case)
    model.save_pretrained(folder, **more)
    return model


def imported(folder: Path, length: int = LENGTH) -> Transformer:
    weights = Weights(folder)
    net = Transformer(TYPES, length, **family_of(weights.config, "")[1])
    assert weights.problems(net) == []
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(weights(name, parameter))
    return net.eval()


def tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(2, TYPES, (2, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_same_logits(case: str, tmp_path: Path) -> None:
    model = saved(case, tmp_path, **({"max_shard_size": "50KB"} if case == "qwen3" else {}))
    expected = model(tokens()).logits
    assert expected.abs().max() > 5
    found, _ = imported(tmp_path)(tokens())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@torch.no_grad()
def test_a_window_holds_token_by_token(tmp_path: Path) -> None:
    saved("mistral", tmp_path)
    net = imported(tmp_path)
    states, row = net.start(1), tokens()[:1]
    found = torch.cat([net(row[:, i : i + 1], states, i)[0] for i in range(LENGTH)], 1)
    torch.testing.assert_close(found, net(row)[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_shorter_context_and_names_without_their_prefix(tmp_path: Path) -> None:
    model = saved("gpt2", tmp_path)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model.safetensors"
    bare = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(4)}, file)  # as GPT-2 was published
    found, _ = imported(tmp_path, 20)(tokens(20))
    torch.testing.assert_close(found, model(tokens(20)).logits, rtol=0, atol=1e-4)
    with without_storage():
        net = Transformer(TYPES, 65, **family_of(Weights(tmp_path).config, "")[1])
    (problem,) = Weights(tmp_path).problems(net)
    assert "transformer.wpe.weight is [64, 48]; by config.json it should be [65, 48]" in problem


@torch.no_grad()
def test_a_checkpoint_without_a_head_as_bert_was_published(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file, bert = tmp_path / "model.safetensors", saved("bert", tmp_path).bert
    named = {name.removeprefix("bert."): value for name, value in load_file(file).items() if not name.startswith("cls.")}
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in named.items()
    }
    save_file({**old, "pooler.dense.weight": torch.ones(2), "embeddings.position_ids": torch.ones(1, LENGTH)}, file)
    weights = Weights(tmp_path)
    net = Transformer(TYPES, LENGTH, **family_of(weights.config, "")[1])
    assert weights.problems(net) == []
    assert [name for name, _ in net.named_parameters() if name not in weights] == [
        "head.transform.dense.weight", "head.transform.dense.bias", "head.transform.norm.weight", "head.transform.norm.bias",
        "head.projection.bias",
    ]  # fmt: skip
    for name, parameter in net.named_parameters():
        parameter.copy_(weights(name, parameter) if name in weights else parameter)
    torch.testing.assert_close(net.hidden(tokens())[0], bert(tokens()).last_hidden_state, rtol=0, atol=1e-4)
    save_file({**old, "cls.predictions.bias": torch.ones(TYPES)}, file)
    assert any("cls.predictions.transform.dense.weight is not there" in each for each in Weights(tmp_path).problems(net))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_rules_name_each_parameter_once(family: Any) -> None:
    _, arguments = CASES[next(case for case, (name, _) in CASES.items() if name.lower() == family.model_type)]
    with without_storage():
        net = Transformer(
            TYPES, LENGTH, **{**family.arguments({"model_type": family.model_type, **arguments})[0], "tied": False, "depth": 2}
        )
    names = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in net.named_parameters()}
    ours = [name for rule in family.rules for name in rule.ours]
    assert names <= {*ours}
    assert len({*ours}) == len(ours)
    assert len({rule.theirs for rule in family.rules}) == len(family.rules)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gemma"}, "model_type=gemma is not known here; the families are gpt2, llama, mistral, qwen2, qwen3,"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: only silu is computed here"),
        ({"logit_scale": 2.0}, "logit_scale=2.0: not understood, it may change the model"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling=yarn with {'factor': 4.0}: computed here are"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling=linear with {}: computed here are"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "one kind of attention in all layers is computed here"),
        ({"hidden_size": None}, "it has no hidden_size"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    config = {"model_type": "llama", **SIZES, **change}
    with pytest.raises(UserError) as error:
        family_of({key: value for key, value in config.items() if value is not None}, "f/config.json")
    (problem,) = error.value.problems
    assert problem.startswith("f/config.json: ")
    assert says in problem


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("bert", {"hidden_act": "relu"}, "hidden_act=relu: only gelu is computed here"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type=relative_key: only absolute is"),
        ("roberta", {"pad_token_id": 0}, "pad_token_id=0: only 1 is computed here"),
        ("modernbert", {"layer_types": ["sliding_attention", "full_attention"]}, "or ModernBERT's two"),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 9.0}}},
         "rope_parameters.full_attention.rope_type=yarn: not understood, it may change the model"),
    ],
)  # fmt: skip
def test_encoders_that_are_not_understood(kind: str, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        family_of({"model_type": kind, **ENCODER, **change}, "f/config.json")
    (problem,) = error.value.problems
    assert says in problem


def test_earlier_spellings_of_rotary_positions() -> None:
    scaling = {"type": "linear", "factor": 4}
    _, found = family_of({"model_type": "llama", **SIZES, "rope_theta": 5e5, "rope_scaling": scaling}, "")
    assert (found["rope_base"], found["rope_scaling"]) == (5e5, {"factor": 4.0})


def test_tensors_that_are_missing_or_too_many_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.extra.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file)
    with without_storage():
        net = Transformer(TYPES, LENGTH, **family_of(Weights(tmp_path).config, "")[1])
    assert Weights(tmp_path).problems(net) == [
        f"{tmp_path}: model.layers.0.mlp.extra.weight is [80, 48]; by config.json it should be not there",
        f"{tmp_path}: model.layers.1.mlp.up_proj.weight is not there; by config.json it should be [80, 48]",
    ]
    file.unlink()
    with pytest.raises(UserError, match="there is no model.safetensors; weights are read from safetensors files"):
        Weights(tmp_path)


def test_a_run_takes_model_and_tokenizer_from_the_folder(tmp_path: Path, text: Path) -> None:
    from leanlm.data.tokenizer import Subwords

    saved("llama", tmp_path)
    model = Subwords.train([text.read_bytes()], 280).state()["model"]
    (tmp_path / "tokenizer.json").write_text(model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}, "bos_token": None}))
    asked = [f"init_from={tmp_path}", "data=text", f"data.path={text}", "sequence=16"]
    settings = check(composed(*asked, "model.dropout=0.2"))
    assert settings.config.model["width"] == 48
    assert settings.config.model["dropout"] == 0.2
    assert settings.config.data["tokenizer"] == str(tmp_path)
    for key in ("model.width=3", "model=lstm", "data.tokenizer=byte"):
        with pytest.raises(UserError, match=f"{key.partition('=')[0]}=...: init_from gives the model and the tokenizer"):
            composed(*asked, key)
    (tmp_path / "config.json").write_text(json.dumps({**json.loads((tmp_path / "config.json").read_text()), "vocab_size": 50}))
    with pytest.raises(UserError, match="it has 280 token types, the model beside it 50"):
        check(composed(*asked))
