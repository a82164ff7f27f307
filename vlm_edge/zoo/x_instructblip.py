"""X-InstructBLIP: aligning image, 3D, audio and video to LLMs (Panagopoulou et al., ECCV 2024, arXiv 2311.18799).

Several kinds of input speak to one frozen language model, each through a projection of its own (section 3.1, figure 2): a frozen
encoder with a layer norm, an instruction-aware Q-Former initialised from BLIP-2's, in which K learned queries and the tokens of
the instruction attend to each other and the queries to the encoder's output, and a linear layer to the language model's width.
Projections are trained one kind at a time, and still answer questions about several kinds together. What the language model reads
is, with one cue (modality prefix) before each input's K embeddings,

    <s> image: [q_1 … q_K] audio: [q_1 … q_K] instruction

Here: images and audio. The image encoder, the Q-Formers and their attention are transformers' InstructBLIP classes: the paper's
EVA-CLIP ViT-g and Q-Former are those of InstructBLIP (arXiv 2305.06500). The language model is any decoder; Vicuna, a
Llama, in the paper.

Deviations. The paper's audio encoder is BEATs on mel spectrograms; here an audio input is a sequence of features that were
computed before (`audio_features [clips, steps, feature_size]`, BEATs' or others), and a small transformer with sinusoidal
positions stands in for the encoder's upper layers. The paper cuts audio into segments of some seconds, each of which becomes K
embeddings behind a common cue; here a segment is an input of its own, with its own cue. 3D and video are left out: video is
frames as images, 3D another branch of the same form.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.models.instructblip.modeling_instructblip import (
    BaseModelOutputWithVisionQformerOutputs as Features,
)
from transformers.models.instructblip.modeling_instructblip import (
    InstructBlipEncoder,
    InstructBlipPreTrainedModel,
)


class XInstructBlipAudioConfig(InstructBlipVisionConfig):
    """Sizes of the audio encoder, as of a vision transformer; `feature_size`: width of the features that come in (BEATs: 768)."""

    model_type = "x_instructblip_audio_model"
    base_config_key = "audio_config"

    feature_size: int = 768


class XInstructBlipConfig(PreTrainedConfig):
    """Both encoders, both Q-Formers, the language model, and how the prompt is written.

    `num_query_tokens`: K. `image_token_id`, `audio_token_id`: what stands for one embedding of an input in `input_ids`;
    `image_prefix`, `audio_prefix`: the cues.
    """

    model_type = "x_instructblip"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "image_config": InstructBlipVisionConfig,
        "audio_config": XInstructBlipAudioConfig,
        "image_qformer_config": InstructBlipQFormerConfig,
        "audio_qformer_config": InstructBlipQFormerConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    image_config: Any = None
    audio_config: Any = None
    image_qformer_config: Any = None
    audio_qformer_config: Any = None
    text_config: Any = None
    num_query_tokens: int = 32
    image_token_id: int = 32000
    audio_token_id: int = 32001
    image_prefix: str = " image: "
    audio_prefix: str = " audio: "
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for kind in ("image", "audio"):
            getattr(self, f"{kind}_qformer_config").encoder_hidden_size = getattr(self, f"{kind}_config").hidden_size


class XInstructBlipAudioModel(InstructBlipPreTrainedModel):
    """`audio_features [clips, steps, feature_size]` → hidden states `[clips, steps, hidden]`, normalised."""

    config: XInstructBlipAudioConfig

    def __init__(self, config: XInstructBlipAudioConfig) -> None:
        super().__init__(config)
        self.projection = nn.Linear(config.feature_size, config.hidden_size)
        self.encoder = InstructBlipEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(self, audio_features: torch.Tensor) -> BaseModelOutput:
        hidden = self.projection(audio_features)
        encoded = self.encoder(inputs_embeds=hidden + sinusoids(hidden)).last_hidden_state
        return BaseModelOutput(last_hidden_state=self.layernorm(encoded))


def sinusoids(like: torch.Tensor) -> torch.Tensor:
    """Fixed positions `[steps, width]` of Attention Is All You Need (arXiv 1706.03762, section 3.5), for `[…, steps, width]`."""
    steps, width = like.shape[-2:]
    frequencies = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
    angles = torch.arange(steps, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1).to(like.dtype)


class Branch(nn.Module):
    """One kind of input: encoder, Q-Former with its queries, linear projection."""

    def __init__(self, encoder: nn.Module, qformer: PreTrainedConfig, queries: int, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.query_tokens = nn.Parameter(torch.zeros(1, queries, qformer.hidden_size))
        self.qformer = InstructBlipQFormerModel._from_config(qformer)
        self.language_projection = nn.Linear(qformer.hidden_size, width)

    def forward(self, values: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None) -> Features:
        """`pooler_output [inputs, K, width]` is what the language model reads; `ids` and `mask` hold an instruction each."""
        hidden = self.encoder(values).last_hidden_state
        rows = hidden.shape[0]
        ids = ids.expand(rows, -1)
        mask = torch.ones_like(ids) if mask is None else mask.expand(rows, -1)
        queries = self.query_tokens.expand(rows, -1, -1)
        output = self.qformer(
            input_ids=ids,
            attention_mask=torch.cat([torch.ones(queries.shape[:2], dtype=mask.dtype, device=mask.device), mask], 1),
            query_embeds=queries,
            encoder_hidden_states=hidden,
            encoder_attention_mask=torch.ones(hidden.shape[:2], dtype=torch.long, device=mask.device),
        )
        projected = self.language_projection(output.last_hidden_state[:, : queries.shape[1]])
        return Features(last_hidden_state=hidden, qformer_outputs=output, pooler_output=projected)


class XInstructBlipForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The whole model; generates as InstructBLIP does in transformers, by its language model."""

    config: XInstructBlipConfig
    config_class = XInstructBlipConfig
    base_model_prefix = "x_instructblip"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: XInstructBlipConfig) -> None:
        super().__init__(config)
        width, queries = config.text_config.hidden_size, config.num_query_tokens
        image = InstructBlipVisionModel._from_config(config.image_config)
        audio = XInstructBlipAudioModel._from_config(config.audio_config)
        self.image = Branch(image, config.image_qformer_config, queries, width)
        self.audio = Branch(audio, config.audio_qformer_config, queries, width)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Branch):
            nn.init.normal_(module.query_tokens, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        qformer_input_ids: torch.Tensor,
        qformer_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Features:
        """`pixel_values [images, 3, size, size]`, an instruction for each image (or one for all) → Features."""
        return self.image(pixel_values, qformer_input_ids, qformer_attention_mask)

    def get_audio_features(
        self,
        audio_features: torch.Tensor,
        qformer_input_ids: torch.Tensor,
        qformer_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Features:
        """`audio_features [clips, steps, feature_size]`, an instruction for each clip (or one for all) → Features."""
        return self.audio(audio_features, qformer_input_ids, qformer_attention_mask)

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token embeddings `[batch, sequence, width]` with the inputs' features in their places, each kind in order."""
        embeddings = self.get_input_embeddings()(input_ids)
        given = (
            (pixel_values, self.get_image_features, self.config.image_token_id),
            (audio_features, self.get_audio_features, self.config.audio_token_id),
        )
        for values, features, token in given:
            if values is None:
                continue
            if qformer_input_ids is None:
                raise ValueError("the Q-Formers read the instruction: give qformer_input_ids with an image or audio.")
            found = features(values, qformer_input_ids, qformer_attention_mask).pooler_output
            embeddings = embeddings.masked_scatter((input_ids == token)[..., None], found.to(embeddings.dtype))
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every token; the loss too where `labels` are given (−100 on what is not learned)."""
        embeddings = self.embed(input_ids, pixel_values, audio_features, qformer_input_ids, qformer_attention_mask)
        return self.language_model(inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        **generation: Any,
    ) -> torch.Tensor:
        """Prompt and answer, as the language model's own `generate` with these options."""
        embeddings = self.embed(input_ids, pixel_values, audio_features, qformer_input_ids, qformer_attention_mask)
        return self.language_model.generate(
            input_ids=input_ids, inputs_embeds=embeddings, attention_mask=attention_mask, **generation
        )


def prompt(config: XInstructBlipConfig, tokenizer: Any, text: str, images: int = 0, audio: int = 0) -> str:
    """The prompt's text, to be tokenised with the tokenizer's special tokens around it: cues, placeholders, the instruction."""
    written = ""
    for count, cue, token in (
        (images, config.image_prefix, config.image_token_id),
        (audio, config.audio_prefix, config.audio_token_id),
    ):
        written += (cue + str(tokenizer.convert_ids_to_tokens(token)) * config.num_query_tokens) * count
    return written + text


AutoConfig.register("x_instructblip", XInstructBlipConfig)
AutoModelForImageTextToText.register(XInstructBlipConfig, XInstructBlipForConditionalGeneration)
