"""Families of published models, as data: how their config.json and their weights name what a Transformer has here.

A family of the Llama kind is one entry in FAMILIES. Names of weights have `*` for the number of a block.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from leanlm.common.errors import UserError, refuse

NEEDED = object()  # the default of a key that config.json must have


class Rule(NamedTuple):
    """A tensor of theirs: one parameter of ours or, one behind the other along the outputs, several; perhaps transposed."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """Attributes:
    model_type: in config.json.
    architecture: the class of transformers.
    keys: argument of the Transformer -> their key, and its value where config.json has none.
    fixed: arguments that all models of the family have.
    same: their key -> the only value with which their mathematics is ours, also where config.json has none.
    rules: of the weights.
    prefix: of the names of weights, which some files leave out.
    head: beginnings of the names of weights that a file may do without, all of them.
    given: their key -> what an export writes for it: an argument of the Transformer by its name, or a value.
    """

    model_type: str
    architecture: str
    keys: dict[str, tuple[str, Any]]
    fixed: dict[str, Any]
    same: dict[str, Any]
    rules: tuple[Rule, ...]
    prefix: str
    given: dict[str, Any]
    head: tuple[str, ...] = ()

    def arguments(self, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Arguments of the Transformer for a config.json, and what in that cannot be understood, one line each."""
        config = _without_kinds(config)
        problems = [f"it has no {key}" for key, default in self.keys.values() if default is NEEDED and key not in config]
        found = self.fixed | {ours: config.get(key, default) for ours, (key, default) in self.keys.items()}
        if self.scales_rope:
            rope, wrong = _rope(config)
            found, problems = found | rope, problems + wrong
        problems += [
            f"{key}={config[key]}: only {wanted} is computed here"
            for key, wanted in self.same.items()
            if config.get(key, wanted) != wanted
        ]
        kinds = config.get("layer_types")
        if kinds and not problems and kinds != _layer_types(found):
            problems.append(f"layer_types={kinds}: one kind of attention in all layers is computed here, or ModernBERT's two")
        known = {*self.same, *(key for key, _ in self.keys.values()), *WITHOUT_EFFECT}
        unknown = [key for key in config if key not in known and not key.startswith("_")]
        problems += [f"{key}={config[key]}: not understood, it may change the model" for key in unknown]
        return found, problems

    @property
    def scales_rope(self) -> bool:
        """Whether its config.json has Llama's keys for rotary positions."""
        return self.fixed["positions"] == "rope" and "rope_base" not in self.keys

    def source(self, name: str) -> tuple[str, int, bool]:
        """Of a parameter: the tensor that holds it, which of the parameters in it it is, whether they are transposed there."""
        number = re.search(r"\.(\d+)\.", name)
        general = name.replace(number[0], ".*.", 1) if number else name
        (rule,) = (rule for rule in self.rules if general in rule.ours)
        return rule.theirs.replace("*", number[1] if number else ""), rule.ours.index(general), rule.transposed


SCALING = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# They say how a model is trained, generates, is stored, or what other heads it may have.
WITHOUT_EFFECT = {
    "architectures", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "classifier_dropout", "classifier_pooling", "cls_token_id", "deterministic_flash_attn",
    "directionality", "dtype", "embd_pdrop", "embedding_dropout", "eos_token_id", "finetuning_task", "gradient_checkpointing",
    "hidden_dropout_prob", "id2label", "initializer_cutoff_factor", "initializer_range", "is_encoder_decoder",
    "is_llama_config", "label2id", "layer_norm_eps", "layer_types", "max_position_embeddings", "max_window_layers",
    "mlp_dropout", "model_type", "n_ctx", "n_positions", "output_attentions", "output_hidden_states", "output_past",
    "pad_token_id", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
    "pooler_type", "predict_special_tokens", "pretraining_tp", "problem_type", "reference_compile", "reorder_and_upcast_attn",
    "repad_logits_with_grad", "resid_pdrop", "return_dict", "rope_parameters", "rope_scaling", "rope_theta", "sep_token_id",
    "sliding_window", "sparse_pred_ignore_index", "sparse_prediction", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params", "torch_dtype",
    "transformers.js_config", "transformers_version", "unk_token_id", "use_cache", "vocab_size",
}  # fmt: skip


def _rope(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`rope_base` and `rope_scaling`: transformers 5 writes both as `rope_parameters`, earlier ones as two keys."""
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = scaling.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    if scaling.keys() != set(SCALING.get(kind, ["?"])):
        return {}, [f"rope_scaling={kind} with {scaling}: computed here are {SCALING}"]
    return {"rope_base": float(base), "rope_scaling": {key: float(value) for key, value in scaling.items()} or None}, []


def _without_kinds(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of ModernBERT's with numbers in place of kinds of layers, as transformers wrote it before version 5."""
    rope, kinds = config.get("rope_parameters") or {}, config.get("layer_types") or []
    if "full_attention" not in rope:
        return config
    told: dict[str, Any] = {}
    if kinds:
        told["global_attn_every_n_layers"] = [*kinds[1:], "full_attention"].index("full_attention") + 1
    for kind, key in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta")):
        for name, value in (rope.get(kind) or {}).items():
            if (name, value) != ("rope_type", "default"):
                told[key if name == "rope_theta" else f"rope_parameters.{kind}.{name}"] = value
    return told | config


def _layer_types(arguments: dict[str, Any]) -> list[str]:
    """What `layer_types` is for arguments of the Transformer."""
    window, every = arguments.get("window"), arguments.get("global_every")
    local = [window and (not every or i % every) for i in range(arguments["depth"])]
    return ["sliding_attention" if each else "full_attention" for each in local]


def _rules(names: Iterable[tuple[str, str]], transposed: Iterable[str] = ()) -> tuple[Rule, ...]:
    """Rules of weights and biases by the names of their modules; several names of ours are parted by spaces."""
    return tuple(
        Rule(f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours.split()), theirs in transposed and kind == "weight")
        for theirs, ours in names
        for kind in ("weight", "bias")
    )


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
    rules=_rules([
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
    rules=_rules([
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
    rules=_rules([
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
    rules=_rules([
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
    rules=_rules([
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
