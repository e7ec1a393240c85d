"""Families of published models, as data. One of the Llama kind is one entry in FAMILIES."""

from dataclasses import replace
from typing import Any

from leanlm.common.errors import UserError, refuse
from leanlm.models.family import NEEDED, Family, rules

PLAIN = {"norm_weight": True, "qk_norm": False, "qk_norm_weight": False, "window": None}
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys={
        "width": ("hidden_size", NEEDED),
        "depth": ("num_hidden_layers", NEEDED),
        "heads": ("num_attention_heads", NEEDED),
        "kv_heads": ("num_key_value_heads", None),
        "head_size": ("head_dim", None),
        "mlp_width": ("intermediate_size", NEEDED),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "tied": ("tie_word_embeddings", False),
    },
    fixed={
        **PLAIN, "positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "qkv_bias": False,
    },
    same={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    rules=rules([
        ("model.embed_tokens", "embed.tokens"),
        ("model.layers.*.input_layernorm", "blocks.*.attention_norm"),
        ("model.layers.*.self_attn.q_proj", "blocks.*.attention.query"),
        ("model.layers.*.self_attn.k_proj", "blocks.*.attention.key"),
        ("model.layers.*.self_attn.v_proj", "blocks.*.attention.value"),
        ("model.layers.*.self_attn.o_proj", "blocks.*.attention.out"),
        ("model.layers.*.self_attn.q_norm", "blocks.*.attention.query_norm"),
        ("model.layers.*.self_attn.k_norm", "blocks.*.attention.key_norm"),
        ("model.layers.*.post_attention_layernorm", "blocks.*.mlp_norm"),
        ("model.layers.*.mlp.gate_proj", "blocks.*.mlp.gate"),
        ("model.layers.*.mlp.up_proj", "blocks.*.mlp.up"),
        ("model.layers.*.mlp.down_proj", "blocks.*.mlp.down"),
        ("model.norm", "head.norm"),
        ("lm_head", "head.projection"),
    ]),
    prefix="model.",
    given={"vocab_size": "vocabulary", "max_position_embeddings": "sequence"},
)  # fmt: skip
MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=LLAMA.keys | {"window": ("sliding_window", 4096)},
    fixed={key: value for key, value in LLAMA.fixed.items() if key != "window"},
    same={"hidden_act": "silu"},
)
QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fixed=LLAMA.fixed | {"qkv_bias": True},
    same={"hidden_act": "silu", "use_sliding_window": False},
)
QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed=LLAMA.fixed | {"qk_norm": True, "qk_norm_weight": True},
    same={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
)
GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    keys={
        "width": ("n_embd", NEEDED),
        "depth": ("n_layer", NEEDED),
        "heads": ("n_head", NEEDED),
        "mlp_width": ("n_inner", None),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tied": ("tie_word_embeddings", True),
    },
    fixed={
        **PLAIN, "positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True, "qkv_bias": None,
    },
    same={"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
          "add_cross_attention": False},
    rules=rules([
        ("transformer.wte", "embed.tokens"),
        ("transformer.wpe", "embed.positions"),
        ("transformer.h.*.ln_1", "blocks.*.attention_norm"),
        ("transformer.h.*.attn.c_attn", "blocks.*.attention.query blocks.*.attention.key blocks.*.attention.value"),
        ("transformer.h.*.attn.c_proj", "blocks.*.attention.out"),
        ("transformer.h.*.ln_2", "blocks.*.mlp_norm"),
        ("transformer.h.*.mlp.c_fc", "blocks.*.mlp.up"),
        ("transformer.h.*.mlp.c_proj", "blocks.*.mlp.down"),
        ("transformer.ln_f", "head.norm"),
        ("lm_head", "head.projection"),
    ], [f"transformer.h.*.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]),
    prefix="transformer.",
    given={"vocab_size": "vocabulary", "n_positions": "sequence", "resid_pdrop": "dropout", "embd_pdrop": "dropout",
           "attn_pdrop": 0.0},
)  # fmt: skip


def _encoder(prefix: str) -> list[tuple[str, str]]:
    return [
        (f"{prefix}.embeddings.word_embeddings", "embed.tokens"),
        (f"{prefix}.embeddings.position_embeddings", "embed.positions"),
        (f"{prefix}.embeddings.token_type_embeddings", "embed.types"),
        (f"{prefix}.embeddings.LayerNorm", "embed.norm"),
        (f"{prefix}.encoder.layer.*.attention.self.query", "blocks.*.attention.query"),
        (f"{prefix}.encoder.layer.*.attention.self.key", "blocks.*.attention.key"),
        (f"{prefix}.encoder.layer.*.attention.self.value", "blocks.*.attention.value"),
        (f"{prefix}.encoder.layer.*.attention.output.dense", "blocks.*.attention.out"),
        (f"{prefix}.encoder.layer.*.attention.output.LayerNorm", "blocks.*.attention_norm"),
        (f"{prefix}.encoder.layer.*.intermediate.dense", "blocks.*.mlp.up"),
        (f"{prefix}.encoder.layer.*.output.dense", "blocks.*.mlp.down"),
        (f"{prefix}.encoder.layer.*.output.LayerNorm", "blocks.*.mlp_norm"),
    ]


# The weights of their decoder are the embedding's; its bias stands beside it.
MASKED = {**PLAIN, "norm": "layernorm", "causal": False, "embed_norm": True, "head_transform": True, "tied": True}
BERT = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    keys={
        "width": ("hidden_size", NEEDED),
        "depth": ("num_hidden_layers", NEEDED),
        "heads": ("num_attention_heads", NEEDED),
        "mlp_width": ("intermediate_size", NEEDED),
        "norm_eps": ("layer_norm_eps", 1e-12),
        "token_types": ("type_vocab_size", 2),
    },
    fixed={
        **MASKED, "positions": "learned", "post_norm": True, "activation": "gelu", "bias": True, "qkv_bias": None,
        "head_bias": True,
    },
    same={"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
          "tie_word_embeddings": True},
    rules=rules([
        *_encoder("bert"),
        ("cls.predictions.transform.dense", "head.transform.dense"),
        ("cls.predictions.transform.LayerNorm", "head.transform.norm"),
        ("cls.predictions", "head.projection"),
    ]),
    prefix="bert.",
    given={"vocab_size": "vocabulary", "max_position_embeddings": "places", "hidden_dropout_prob": "dropout",
           "attention_probs_dropout_prob": 0.0},
    head=("cls.",),
)  # fmt: skip
ROBERTA = replace(
    BERT,
    model_type="roberta",
    architecture="RobertaForMaskedLM",
    fixed=BERT.fixed | {"position_offset": 2},
    same=BERT.same | {"pad_token_id": 1},  # positions are counted from the number after it
    rules=rules([
        *_encoder("roberta"),
        ("lm_head.dense", "head.transform.dense"),
        ("lm_head.layer_norm", "head.transform.norm"),
        ("lm_head", "head.projection"),
    ]),
    prefix="roberta.",
    head=("lm_head.",),
)  # fmt: skip
MODERNBERT = Family(
    model_type="modernbert",
    architecture="ModernBertForMaskedLM",
    keys={
        "width": ("hidden_size", NEEDED),
        "depth": ("num_hidden_layers", NEEDED),
        "heads": ("num_attention_heads", NEEDED),
        "mlp_width": ("intermediate_size", NEEDED),
        "norm_eps": ("norm_eps", 1e-5),
        "window": ("local_attention", 128),
        "global_every": ("global_attn_every_n_layers", 3),
        "rope_base": ("global_rope_theta", 160000.0),
        "local_rope_base": ("local_rope_theta", 10000.0),
        "head_bias": ("decoder_bias", True),
    },
    fixed={
        **{key: value for key, value in MASKED.items() if key != "window"},
        "positions": "rope", "activation": "geglu", "bias": False, "qkv_bias": False,
    },
    same={"hidden_activation": "gelu", "classifier_activation": "gelu", "attention_bias": False, "mlp_bias": False,
          "norm_bias": False, "classifier_bias": False, "position_embedding_type": "absolute", "tie_word_embeddings": True},
    rules=rules([
        ("model.embeddings.tok_embeddings", "embed.tokens"),
        ("model.embeddings.norm", "embed.norm"),
        ("model.layers.*.attn_norm", "blocks.*.attention_norm"),
        ("model.layers.*.attn.Wqkv", "blocks.*.attention.query blocks.*.attention.key blocks.*.attention.value"),
        ("model.layers.*.attn.Wo", "blocks.*.attention.out"),
        ("model.layers.*.mlp_norm", "blocks.*.mlp_norm"),
        ("model.layers.*.mlp.Wi", "blocks.*.mlp.gate blocks.*.mlp.up"),
        ("model.layers.*.mlp.Wo", "blocks.*.mlp.down"),
        ("model.final_norm", "head.norm"),
        ("head.dense", "head.transform.dense"),
        ("head.norm", "head.transform.norm"),
        ("decoder", "head.projection"),
    ]),
    prefix="model.",
    given={"vocab_size": "vocabulary", "max_position_embeddings": "sequence", "embedding_dropout": "dropout",
           "mlp_dropout": "dropout", "pad_token_id": None, "cls_token_id": None, "sep_token_id": None},
    head=("head.", "decoder."),
)  # fmt: skip

FAMILIES = {
    family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, BERT, ROBERTA, MODERNBERT)
}  # fmt: skip


def family_of(config: dict[str, Any], where: str) -> tuple[Family, dict[str, Any]]:
    """The family of a config.json, and the arguments of the Transformer.

    Raises:
        UserError: with all that is not understood; `where` it stands.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type={kind} is not known here; the families are {', '.join(FAMILIES)}")
    arguments, problems = FAMILIES[kind].arguments(config)
    refuse(f"{where}: {problem}" for problem in problems)
    return FAMILIES[kind], arguments
