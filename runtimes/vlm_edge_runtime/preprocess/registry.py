"""Which class stands for which `image_processor_type`. A new processor is one file and one line here."""

from __future__ import annotations

from vlm_edge_runtime.errors import UnsupportedModelError

from .any_resolution import LlavaNextImageProcessor, LlavaOnevisionImageProcessor
from .base import ImageProcessor
from .blip import BlipImageProcessor
from .chameleon import ChameleonImageProcessor
from .clip import ClipImageProcessor, LlavaImageProcessor
from .donut import DonutImageProcessor
from .gemma3 import Gemma3ImageProcessor
from .got_ocr2 import Cohere2VisionImageProcessor, GotOcr2ImageProcessor
from .idefics import IdeficsImageProcessor
from .idefics3 import Idefics3ImageProcessor
from .janus import JanusImageProcessor
from .mllama import MllamaImageProcessor
from .options import Config
from .pix2struct import Pix2StructImageProcessor
from .pixtral import PixtralImageProcessor
from .qwen2_vl import Qwen2VLImageProcessor
from .siglip import SiglipImageProcessor
from .vit import DeiTImageProcessor, ViTImageProcessor

PROCESSORS: dict[str, type[ImageProcessor]] = {
    "BlipImageProcessor": BlipImageProcessor,
    "CLIPImageProcessor": ClipImageProcessor,
    "LlavaImageProcessor": LlavaImageProcessor,
    "SiglipImageProcessor": SiglipImageProcessor,
    "Gemma3ImageProcessor": Gemma3ImageProcessor,
    "IdeficsImageProcessor": IdeficsImageProcessor,
    "MllamaImageProcessor": MllamaImageProcessor,
    "Idefics3ImageProcessor": Idefics3ImageProcessor,
    "SmolVLMImageProcessor": Idefics3ImageProcessor,
    "Qwen2VLImageProcessor": Qwen2VLImageProcessor,
    "ViTImageProcessor": ViTImageProcessor,
    "DeiTImageProcessor": DeiTImageProcessor,
    "DonutImageProcessor": DonutImageProcessor,
    "Pix2StructImageProcessor": Pix2StructImageProcessor,
    "LlavaNextImageProcessor": LlavaNextImageProcessor,
    "LlavaOnevisionImageProcessor": LlavaOnevisionImageProcessor,
    "GotOcr2ImageProcessor": GotOcr2ImageProcessor,
    "Cohere2VisionImageProcessor": Cohere2VisionImageProcessor,
    "PixtralImageProcessor": PixtralImageProcessor,
    "ChameleonImageProcessor": ChameleonImageProcessor,
    "JanusImageProcessor": JanusImageProcessor,
}


def load_image_processor(
    preprocessor_config: Config, processor_config: Config | None = None, overrides: Config | None = None
) -> ImageProcessor:
    """The image processor that the saved JSON describes.

    `preprocessor_config`: the content of `preprocessor_config.json` (may be empty where the other file holds it).
    `processor_config`: the content of `processor_config.json`; its `image_processor` entry, when there is one, goes first,
    as in transformers, and its `patch_size`, `image_seq_len` … tell how many tokens an image becomes.
    `overrides`: options that take the place of the saved ones (`{"do_image_splitting": False}`).

    Raises UnsupportedModelError for an unknown processor type, an unknown option, or a value that cannot be honoured.
    """
    nested = (processor_config or {}).get("image_processor")
    config: Config = nested if isinstance(nested, dict) else preprocessor_config
    name = config.get("image_processor_type")
    if name is None and isinstance(older := config.get("feature_extractor_type"), str):
        name = older.replace("FeatureExtractor", "ImageProcessor")
    if not isinstance(name, str):
        raise UnsupportedModelError("preprocessor_config.json names no image_processor_type; add one of " + ", ".join(PROCESSORS))
    # `Fast` and `Pil` are transformers' names for other implementations of the same processor.
    base = name.removesuffix("Fast").removesuffix("Pil")
    if base not in PROCESSORS:
        from difflib import get_close_matches  # here and not above: of no use but to a message

        near = get_close_matches(base, PROCESSORS, n=1)
        hint = f" (the nearest is {near[0]})" if near else ""
        raise UnsupportedModelError(f"image processor {name!r} is not known{hint}; known are {', '.join(PROCESSORS)}")
    return PROCESSORS[base](name=base, config={**config, **(overrides or {})}, processor_config=processor_config)
