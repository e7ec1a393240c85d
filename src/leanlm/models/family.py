"""What a family of published models is: how their config.json and their weights name what a Transformer has here.

Names of weights have `*` for the number of a block.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

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


def rules(names: Iterable[tuple[str, str]], transposed: Iterable[str] = ()) -> tuple[Rule, ...]:
    """Rules of weights and biases by the names of their modules; several names of ours are parted by spaces."""
    return tuple(
        Rule(f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours.split()), theirs in transposed and kind == "weight")
        for theirs, ours in names
        for kind in ("weight", "bias")
    )
