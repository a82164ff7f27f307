"""What MiniGPT-v2, Frozen and PaLM-E share: features of images (and states) in the places of tokens before a language model.

The language model is any of transformers' causal ones (`text_config`); only how features are made differs between them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast


class VisualTokensConfig(PreTrainedConfig):
    """A language model and the token that stands for a row of image features in `input_ids`."""

    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_id: int = 4

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = as_config(self.text_config, "llama")
        super().__post_init__(**kwargs)


def as_config(given: dict[str, Any] | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    """A part's configuration from what config.json holds."""
    if isinstance(given, PreTrainedConfig):
        return given
    values = dict(given or {})
    made: PreTrainedConfig = CONFIG_MAPPING[values.pop("model_type", default)](**values)
    return made


class VisualTokensPreTrainedModel(PreTrainedModel):
    """What transformers wants to know."""

    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _supports_attention_backend = True


class VisualTokensForCausalLM(VisualTokensPreTrainedModel, GenerationMixin):
    """The prompt holds one image token for each row of `get_image_features`; features take their places, in order."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.language_model.get_input_embeddings()
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """`pooler_output [images, tokens, hidden]`."""
        raise NotImplementedError(f"{type(self).__name__} must say what an image becomes: define get_image_features")

    def other_features(self, **inputs: Any) -> list[tuple[int, torch.Tensor]]:
        """(token, features `[…, hidden]`) of what enters besides images."""
        return []

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        entering = [] if states is None else self.other_features(states=states)
        if pixel_values is not None:
            entering.append((self.config.image_token_id, self.get_image_features(pixel_values).pooler_output))
        for token, features in entering:
            assert input_ids is not None, "where features stand is read off input_ids"
            here = (input_ids == token)[..., None].expand_as(inputs_embeds)
            if int(here.sum()) != features.numel():
                rows = features.numel() // features.shape[-1]
                raise ValueError(f"{int(here[..., 0].sum())} tokens {token} for {rows} rows of features")
            inputs_embeds = inputs_embeds.masked_scatter(here, features)
        output: CausalLMOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
        )
        return output

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if not kwargs.get("is_first_iteration", False):
            inputs["pixel_values"] = inputs["states"] = None
        return inputs
