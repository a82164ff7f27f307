"""What the prompt holds for an image, and where its tokens stand: read off the checkpoint. A part of family `projector`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge_runtime.bundle.manifest import (
    CropsPlaceholder,
    FixedPlaceholder,
    GridPlaceholder,
    Modality,
    MRopePositions,
    Placeholder,
    Positions,
    SequentialPositions,
    TilePlaceholder,
)
from vlm_edge_runtime.bundle.vision_layout import (
    AnyResolutionPlaceholder,
    FramedTilesPlaceholder,
    LabelledFramesPlaceholder,
    MarkedTilesPlaceholder,
    PatchRowsPlaceholder,
    PooledFramesPlaceholder,
    TimedFramesPlaceholder,
)
from vlm_edge_runtime.errors import UnsupportedModelError
from vlm_edge_runtime.preprocess import VIDEO_PROCESSORS


def image_token_id(config: PreTrainedConfig) -> int:
    """The token that stands for an image. Raises UnsupportedModelError when the configuration names none."""
    for name in ("image_token_id", "image_token_index"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    raise UnsupportedModelError(f"The configuration of '{config.model_type}' names no image token (image_token_id).")


def positions(config: PreTrainedConfig) -> Positions:
    """M-RoPE where the text model rotates by sections of time, height and width; else one position per token."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if "mrope_section" not in rope:
        return SequentialPositions()
    return MRopePositions(
        merge_size=int(config.vision_config.spatial_merge_size),
        image_token_id=image_token_id(config),
        vision_start_token_id=int(config.vision_start_token_id),
        tokens_per_second=getattr(config.vision_config, "tokens_per_second", None),
    )


def placeholder(checkpoint: Checkpoint, layout: str, tokens: int) -> Placeholder:
    """The text that stands for an image in the prompt, in the tokens of this checkpoint's tokenizer.

    `tokens`: how many one image or tile becomes; 0 where that depends on the image.
    """
    return _PLACEHOLDERS[layout](checkpoint, _token(checkpoint, image_token_id(checkpoint.config)), tokens)


def _token(checkpoint: Checkpoint, number: int) -> str:
    found: str | None = checkpoint.tokenizer.convert_ids_to_tokens(number)
    if found is None:
        raise UnsupportedModelError(f"The tokenizer has no token {number}, which the configuration calls its image.")
    return found


def _known(checkpoint: Checkpoint, token: str | None, what: str) -> str:
    """A token by its text. Raises UnsupportedModelError when the tokenizer has no such token."""
    tokenizer = checkpoint.tokenizer
    if token is None or tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
        raise UnsupportedModelError(f"The tokenizer has no token '{token}', which {what}.")
    return token


def _fixed(checkpoint: Checkpoint, image_token: str, tokens: int) -> Placeholder:
    return FixedPlaceholder(image_token=image_token, tokens_per_image=tokens)


def _crops(checkpoint: Checkpoint, image_token: str, tokens: int) -> Placeholder:
    """What Gemma3Processor writes for an image, in code."""
    config: Any = checkpoint.config
    begin, end = checkpoint.tokenizer.convert_ids_to_tokens([config.boi_token_index, config.eoi_token_index])
    return CropsPlaceholder(
        image_token=begin,
        soft_token=image_token,
        before=f"\n\n{begin}",
        after=f"{end}\n\n",
        tokens_per_image=tokens,
        crops="Here is the original image {image} and here are some crops to help you see better {crops}",
    )


def _tiles(checkpoint: Checkpoint, image_token: str, tokens: int) -> Placeholder:
    """The processors of Idefics3 and SmolVLM fix these words in their code; a tokenizer may name others (SmolVLM's does)."""
    tokenizer = checkpoint.tokenizer
    fake = getattr(tokenizer, "fake_image_token", None) or "<fake_token_around_image>"
    overall = getattr(tokenizer, "global_image_token", None) or "<global-img>"
    fake = _known(checkpoint, fake, "frames every tile of an image")
    return TilePlaceholder(image_token=image_token, fake_token=fake, global_token=overall, tokens_per_tile=tokens)


def _any_resolution(checkpoint: Checkpoint, image_token: str, tokens: int) -> Placeholder:
    """LlavaNextProcessor's and LlavaOnevisionProcessor's count; the tiles are the image processor's choice."""
    config: Any = checkpoint.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    if tokens - 1 != side**2:
        raise UnsupportedModelError(
            f"A tile becomes {tokens - 1} features, which are no {side} × {side} picture of it: set "
            "vision_feature_select_strategy so that a class token is left out."
        )
    chosen, own = (source.get("image_grid_pinpoints") for source in (checkpoint.image_processor, config.to_dict()))
    if [list(size) for size in chosen or ()] != [list(size) for size in own or ()]:
        raise UnsupportedModelError(
            f"image_grid_pinpoints of the image processor ({chosen}) are not those of the model ({own}): make them equal."
        )
    aspect = str(getattr(config, "vision_aspect_ratio", "") or "")
    largest = aspect.removeprefix("anyres_max_")
    return AnyResolutionPlaceholder(image_token=image_token, side=side, max_tiles=int(largest) if largest.isdigit() else 0)


def _framed(checkpoint: Checkpoint, image_token: str, tokens: int) -> Placeholder:
    """InternVLProcessor's frame; the tokenizer names both ends."""
    start, end = (getattr(checkpoint.tokenizer, f"{name}_image_token", None) for name in ("start", "end"))
    return FramedTilesPlaceholder(
        image_token=image_token,
        start_token=_known(checkpoint, start, "begins an image (start_image_token)"),
        end_token=_known(checkpoint, end, "ends an image (end_image_token)"),
        tokens_per_tile=tokens,
    )


def _numbered(checkpoint: Checkpoint, image_token: str, tokens: int) -> Placeholder:
    """AyaVisionProcessor's: each tile's number before it, in words that processor_config.json may change."""
    own = checkpoint.processor or {}
    return MarkedTilesPlaceholder(
        image_token=own.get("image_token", "<image>"),
        soft_token=image_token,
        start=_known(checkpoint, own.get("start_of_img_token", "<|START_OF_IMG|>"), "begins an image"),
        tile=f"{own.get('tile_token', 'TILE')}_{{number}}",
        whole=own.get("tile_global_token", "TILE_GLOBAL"),
        tile_end="",
        end=_known(checkpoint, own.get("end_of_img_token", "<|END_OF_IMG|>"), "ends an image"),
        tokens_per_tile=tokens,
    )


def _ended(checkpoint: Checkpoint, image_token: str, tokens: int) -> Placeholder:
    """Cohere2VisionProcessor's: a token after each tile; the tokenizer names all of them."""
    start, tile, end = (getattr(checkpoint.tokenizer, f"{name}_token", None) for name in ("boi", "img_line_break", "eoi"))
    return MarkedTilesPlaceholder(
        image_token=image_token,
        soft_token=image_token,
        start=_known(checkpoint, start, "begins an image (boi_token)"),
        tile="",
        whole="",
        tile_end=_known(checkpoint, tile, "ends a tile (img_line_break_token)"),
        end=_known(checkpoint, end, "ends an image (eoi_token)"),
        tokens_per_tile=tokens,
    )


def _grid(checkpoint: Checkpoint, image_token: str, tokens: int) -> Placeholder:
    return GridPlaceholder(image_token=image_token, merge_size=int(checkpoint.config.vision_config.spatial_merge_size))


def _patch_rows(checkpoint: Checkpoint, image_token: str, tokens: int) -> Placeholder:
    """PixtralProcessor's rows; it looks for these two tokens unless processor_config.json names others."""
    own = checkpoint.processor or {}
    return PatchRowsPlaceholder(
        image_token=image_token,
        break_token=_known(checkpoint, own.get("image_break_token", "[IMG_BREAK]"), "ends a row of patches"),
        end_token=_known(checkpoint, own.get("image_end_token", "[IMG_END]"), "ends an image"),
        merge=int(getattr(checkpoint.config, "spatial_merge_size", 1)),
    )


def _patch_grid(checkpoint: Checkpoint, image_token: str, tokens: int) -> Placeholder:
    return GridPlaceholder(image_token=image_token, merge_size=int(getattr(checkpoint.config, "spatial_merge_size", 1)))


def video_modality(checkpoint: Checkpoint, kind: str, image: Modality) -> Modality | None:
    """Videos through the graphs of images, frame by frame; None where the checkpoint has no token or processor for them.

    `kind`: how the registry says that a video stands in the prompt ("" is not at all).
    """
    config: Any = checkpoint.config
    number = next((getattr(config, name, None) for name in ("video_token_id", "video_token_index")), None)
    named = getattr(checkpoint.tokenizer, "video_token", None)
    token = _token(checkpoint, number) if isinstance(number, int) else named
    if not kind or token is None or str((checkpoint.video_processor or {}).get("video_processor_type")) not in VIDEO_PROCESSORS:
        return None
    # Where videos have no token of their own among the features', they are written in images'.
    filled = number if isinstance(number, int) else image.token_id
    return Modality(
        kind="video",
        graphs=image.graphs,
        batch=image.batch if image.batch == "patches" else "tile",
        token_id=filled,
        placeholder=_VIDEO_PLACEHOLDERS[kind](checkpoint, token, image.placeholder),
        geometry=image.geometry,
    )


def _pooled_frames(checkpoint: Checkpoint, token: str, image: Any) -> Placeholder:
    return PooledFramesPlaceholder(image_token=token, side=image.side)


def _timed_frames(checkpoint: Checkpoint, token: str, image: Any) -> Placeholder:
    """Qwen3VLProcessor takes these two tokens."""
    start, end = (
        _known(
            checkpoint, getattr(checkpoint.tokenizer, f"vision_{end}_token", f"<|vision_{end}|>"), f"{end}s a frame of a video"
        )
        for end in ("start", "end")
    )
    return TimedFramesPlaceholder(image_token=token, start_token=start, end_token=end, merge_size=image.merge_size)


def _labelled_frames(checkpoint: Checkpoint, token: str, image: Any) -> Placeholder:
    return LabelledFramesPlaceholder(
        image_token=token,
        frame_token=image.image_token,
        start_token=image.start_token,
        end_token=image.end_token,
        tokens_per_frame=image.tokens_per_tile,
    )


_VIDEO_PLACEHOLDERS: dict[str, Callable[[Checkpoint, str, Any], Placeholder]] = {
    "grid": lambda checkpoint, token, image: GridPlaceholder(image_token=token, merge_size=image.merge_size),
    "pooled_frames": _pooled_frames,
    "timed_frames": _timed_frames,
    "labelled_frames": _labelled_frames,
}
_PLACEHOLDERS: dict[str, Callable[[Checkpoint, str, int], Placeholder]] = {
    "image": _fixed,
    "crops": _crops,
    "tiles": _tiles,
    "any_resolution": _any_resolution,
    "framed_tiles": _framed,
    "numbered_tiles": _numbered,
    "ended_tiles": _ended,
    "patches": _grid,
    "patch_rows": _patch_rows,
    "patch_grid": _patch_grid,
}
