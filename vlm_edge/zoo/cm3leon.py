"""CM3Leon: scaling autoregressive multi-modal models (Yu et al., 2023, arXiv 2309.02591), as a configuration over Chameleon.

Sections 2.2 and 2.3: a decoder-only transformer over one vocabulary of text and images. An image of 256 × 256 becomes 1024
tokens of a codebook of 8192 entries by the tokenizer of Make-a-Scene (arXiv 2203.13131): three halvings, 32 × 32 codes; text
has a vocabulary of 56320; a special `<break>` stands where one modality gives way to the other. 4096 tokens are read at once;
the 7B model has 32 layers of width 4096.

Chameleon (arXiv 2405.09818, section 2.3) is its successor, and transformers' classes of it hold the same graph: code tokens that
take the places of the image's, one embedding, one head. What differs between the two papers is kept as Chameleon has it:
queries and keys are normalised, norms are RMSNorm with learned weights, positions are rotary. Retrieved documents (section 2.1)
are ordinary parts of the prompt, each after a `<break>`, and the infilling objective (equation 1) is one of training.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, ChameleonConfig, ChameleonForConditionalGeneration
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

IMAGE_SIZE, CODES = 256, 8192
BREAK = "<break>"
TEXT_VOCABULARY = 56320


class CM3LeonConfig(ChameleonConfig):
    """ChameleonConfig with the paper's 7B sizes. `vocabulary_map`: the tokenizer's, as for Chameleon."""

    model_type = "cm3leon"

    vocab_size: int = TEXT_VOCABULARY + CODES
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 32
    max_position_embeddings: int = 4096

    def __post_init__(self, **kwargs: Any) -> None:
        if getattr(self, "vq_config", None) is None:
            self.vq_config = ChameleonVQVAEConfig(
                resolution=IMAGE_SIZE, num_embeddings=CODES, channel_multiplier=[1, 2, 2, 4], num_res_blocks=2
            )
        super().__post_init__(**kwargs)


class CM3LeonForConditionalGeneration(ChameleonForConditionalGeneration):
    """See the module's docstring."""

    config_class = CM3LeonConfig


AutoConfig.register("cm3leon", CM3LeonConfig, exist_ok=True)
AutoModelForImageTextToText.register(CM3LeonConfig, CM3LeonForConditionalGeneration, exist_ok=True)
