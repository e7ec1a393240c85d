"""A model of leanlm's for transformers: `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`, or
AutoModelForMaskedLM.

An export writes this file beside the weights, and with it the files that it imports.
"""

from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from leanlm.models.contract import ties
from leanlm.models.transformer import Transformer as Network


class ExportedConfig(PretrainedConfig):
    """Of `network`, the arguments of the model, and what all configurations of transformers have."""

    model_type = "leanlm"


class ExportedModel(PreTrainedModel, GenerationMixin):
    """Reads whole rows: it keeps no cache, so that generation takes longer with each token. Dropout is left out."""

    config_class = ExportedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.net = Network(config.vocab_size, config.max_position_embeddings, **config.network)
        self._tied_weights_keys = {f"net.{name}": f"net.{owner}" for name, owner in ties(self.net).items()}
        self.loss_type = "ForCausalLM" if self.net.causal else "ForMaskedLM"
        self.post_init()

    def generate(self, *arguments: Any, **more: Any) -> Any:
        """As of all models, but never with a cache, which some ask for: transformers would hand over the last token alone."""
        return super().generate(*arguments, **{**more, "use_cache": False})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutput:
        """`input_ids [b, s]` -> `logits [b, s, v]`, or of the last `logits_to_keep` positions.

        Raises:
            ValueError: rows are padded where that would be read as text: at their left, or in both directions.
        """
        if attention_mask is not None and not attention_mask[:, : 1 if self.net.causal else None].all():
            right = "rows are padded at their left: write tokenizer.padding_side='right'"
            raise ValueError(right if self.net.causal else "rows are padded: give it rows of one length")
        hidden, _states = self.net.hidden(input_ids)
        logits = self.net.head(hidden[:, -logits_to_keep:])
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)
