"""A checkpoint as the exporter needs it: the model in float32, its tokenizer, its image processor, and where it all came from."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from vlm_edge.families import registry
from vlm_edge.families.base import Family
from vlm_edge.families.registry import Entry
from vlm_edge_runtime.bundle.manifest import Source
from vlm_edge_runtime.errors import ExportError, UnsupportedModelError
from vlm_edge_runtime.preprocess import PROCESSORS

from .trace import quiet

_CHUNK = 4 << 20
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
_EXTRA_TOKENIZERS = ("qformer_tokenizer",)
"""Names of tokenizers that processors have besides their own, each saved in a folder of that name."""
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(slots=True)
class Checkpoint:
    """A loaded checkpoint. `image_processor`: the flat configuration of the image processor, defaults filled in.

    It is empty where there is only a video processor, whose configuration is `video_processor`. `processor`:
    `processor_config.json` where there is one. `chat_template`: the Jinja text, or None. `extra_tokenizers`: by name, those that
    the processor has besides (`qformer_tokenizer`). `generator`: the part whose own `generate` writes, where it is not that of
    the model (BLIP-2's language model); a family sets it, and that part's generation configuration then counts.
    """

    model: PreTrainedModel
    tokenizer: Any
    image_processor: dict[str, Any]
    processor: dict[str, Any] | None
    chat_template: str | None
    source: Source
    extra_tokenizers: dict[str, Any] = field(default_factory=dict)
    video_processor: dict[str, Any] | None = None
    generator: Any = None

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def generation(self) -> GenerationConfig | None:
        """How the checkpoint wants to be generated from; None for models that do not generate."""
        return getattr(self.model if self.generator is None else self.generator, "generation_config", None)

    def eos_token_ids(self) -> list[int]:
        """Every token that ends an answer. Raises UnsupportedModelError when the checkpoint names none."""
        for value in (self._generation("eos_token_id"), self._text("eos_token_id"), self.tokenizer.eos_token_id):
            if value is not None:
                return [int(token) for token in value] if isinstance(value, (list, tuple)) else [int(value)]
        raise UnsupportedModelError(f"{self.source.name} names no end-of-sequence token: generation would never stop.")

    def pad_token_id(self) -> int:
        """The token that fills a batch; the first end token where the checkpoint has none of its own."""
        for value in (self._generation("pad_token_id"), self.tokenizer.pad_token_id, self._text("pad_token_id")):
            if value is not None:
                return int(value)
        return self.eos_token_ids()[0]

    def bos_token_id(self) -> int | None:
        """The token that begins a text, where the checkpoint has one."""
        for value in (self._generation("bos_token_id"), self._text("bos_token_id"), self.tokenizer.bos_token_id):
            if value is not None:
                return int(value)
        return None

    def _generation(self, key: str) -> Any:
        return getattr(self.generation, key, None)

    def _text(self, key: str) -> Any:
        return getattr(self.config.get_text_config(), key, None)


def identify(
    source: str | Path | PreTrainedModel, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedConfig, Entry, Family]:
    """Configuration, registry entry and family of a source; nothing big is loaded.

    Raises ExportError when there is no such checkpoint, UnsupportedModelError when its model type or configuration cannot be
    carried.
    """
    if isinstance(source, PreTrainedModel):
        config = source.config
        entry = registry.lookup(str(config.model_type), [type(source).__name__])
    else:
        with _reading(source):
            raw, _ = PreTrainedConfig.get_config_dict(str(source), revision=revision)
        if not raw:
            raise ExportError(f"{source} has no config.json: it is not a checkpoint. Name a folder that save_pretrained() wrote.")
        entry = registry.lookup(str(raw.get("model_type")), raw.get("architectures") or ())
        with _reading(source):
            config = AutoConfig.from_pretrained(str(source), revision=revision, trust_remote_code=trust_remote_code)
    family = registry.load(entry.family)
    family.refuse(config, entry)
    return config, entry, family


def load(
    source: str | Path | PreTrainedModel,
    auto_class: str,
    config: PreTrainedConfig,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    processor: Any = None,
) -> Checkpoint:
    """Loads the checkpoint in float32 on the CPU, for evaluation, through the transformers class named `auto_class`.

    A model object is used as it is when it is already so, and copied otherwise: it is never changed. `processor` is needed
    beside a model object: its processor, or a folder that holds one. Raises ExportError.
    """
    beside = source if processor is None else processor
    if isinstance(beside, PreTrainedModel):
        raise ExportError("A model object does not carry its tokenizer and image processor: pass processor=… as well.")
    known = {"revision": revision, "trust_remote_code": trust_remote_code}
    parts = _read_processor(str(beside), known) if isinstance(beside, (str, Path)) else _take_processor(beside)
    for tokenizer in (parts.tokenizer, *parts.extra_tokenizers.values()):
        if not getattr(tokenizer, "is_fast", False):
            raise ExportError(
                f"The tokenizer {type(tokenizer).__name__} has no fast form, so no tokenizer.json can be written for it. "
                "Convert it (transformers.convert_slow_tokenizer) and save it beside the checkpoint."
            )
    if isinstance(source, PreTrainedModel):
        plain = source.device.type == "cpu" and all(p.dtype == torch.float32 for p in source.parameters())
        copied: Any = source if plain else copy.deepcopy(source)
        model: PreTrainedModel = copied if plain else copied.to("cpu", torch.float32)
        name, commit = str(source.config._name_or_path or type(source).__name__), _hash_tensors(source)
    else:
        with _reading(source):
            model = getattr(transformers, auto_class).from_pretrained(str(source), config=config, dtype=torch.float32, **known)
        local = Path(source).is_dir()
        name = Path(source).resolve().name if local else str(source)
        commit = _hash_files(Path(source)) if local else str(config._commit_hash)
    return Checkpoint(
        model,
        parts.tokenizer,
        parts.images,
        parts.config,
        parts.template,
        Source(name=name, revision=commit, architecture=type(model).__name__),
        extra_tokenizers=parts.extra_tokenizers,
        video_processor=parts.videos,
    )


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout and the like are off inside; every module is in its former mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _reading(source: object) -> Iterator[None]:
    """Turns what transformers raises for a missing or damaged checkpoint into one sentence."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        said = " ".join(str(error).split())
        if isinstance(source, (str, Path)) and not Path(source).exists() and isinstance(error, OSError):
            raise ExportError(
                f"'{source}' is not a local directory, and the hub could not be reached or has no such model ({said[:200]})."
            ) from None
        raise ExportError(f"The checkpoint '{source}' cannot be loaded: {type(error).__name__}: {said[:400]}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("safetensors", "safetensors_rust"):
            raise
        raise ExportError(f"The weights of '{source}' are damaged: {error}. Copy or download the checkpoint again.") from error


@dataclass(slots=True)
class _Parts:
    """What a processor consists of; see Checkpoint."""

    tokenizer: Any
    images: dict[str, Any]
    videos: dict[str, Any] | None
    config: dict[str, Any] | None
    template: str | None
    extra_tokenizers: dict[str, Any]


def _read_processor(source: str, known: dict[str, Any]) -> _Parts:
    """Tokenizer and image processor by themselves: the joint class may want a video processor, and with it torchvision."""
    if not any(_find(source, name, known["revision"]) for name in _VOCABULARIES):
        # transformers would go on with an empty tokenizer of the model's usual class.
        raise ExportError(f"'{source}' has no tokenizer (tokenizer.json, vocab.json, …): save it beside the model.")
    config, plain, videos = (
        json.loads(_read_text(source, name, known["revision"]) or "null")
        for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
    )
    videos = (config or {}).get("video_processor") or videos
    if plain and "Video" in f"{plain.get('video_processor_type')} {plain.get('image_processor_type')}":
        videos, plain = videos or plain, None  # as older checkpoints of models without images have it
    extra = [name for name in _EXTRA_TOKENIZERS if _find(source, f"{name}/tokenizer_config.json", known["revision"])]
    with _reading(source):
        tokenizer = AutoTokenizer.from_pretrained(source, **known)
        has_images = plain or "image_processor" in (config or {}) or not videos
        images = _image_options(source, (config or {}).get("image_processor") or plain, known) if has_images else {}
        others = {name: AutoTokenizer.from_pretrained(source, subfolder=name, **known) for name in extra}
    template = _read_text(source, "chat_template.jinja", known["revision"]) or getattr(tokenizer, "chat_template", None)
    if template is None and (older := _read_text(source, "chat_template.json", known["revision"])):
        template = json.loads(older).get("chat_template")
    return _Parts(tokenizer, images, videos, config, template, others)


def _image_options(source: str, saved: dict[str, Any] | None, known: dict[str, Any]) -> dict[str, Any]:
    """The image processor's configuration, defaults filled in by transformers.

    Some classes of transformers cannot be made without torchvision; the runtime's own class then knows the same defaults.
    """
    try:
        return _plain(AutoImageProcessor.from_pretrained(source, **known).to_dict())
    except ValueError:
        kind = str((saved or {}).get("image_processor_type")).removesuffix("Fast")
        if saved is None or kind not in PROCESSORS:
            raise
        return saved


def _take_processor(processor: Any) -> _Parts:
    """The parts of a processor object."""
    tokenizer, images, videos = (getattr(processor, name, None) for name in ("tokenizer", "image_processor", "video_processor"))
    if tokenizer is None or (images is None and videos is None):
        raise ExportError(f"{type(processor).__name__} is not a processor with a tokenizer and an image_processor.")
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    extra = {name: found for name in _EXTRA_TOKENIZERS if (found := getattr(processor, name, None)) is not None}
    plain_images = _plain(images.to_dict()) if images is not None else {}
    plain_videos = _plain(videos.to_dict()) if videos is not None else None
    return _Parts(tokenizer, plain_images, plain_videos, _plain(processor.to_dict()), template, extra)


def _find(source: str, name: str, revision: str | None) -> str | None:
    """The path of a checkpoint's file, fetched from the hub where needed; None when there is no such file."""
    found: str | None = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return found


def _read_text(source: str, name: str, revision: str | None) -> str | None:
    found = _find(source, name, revision)
    return Path(found).read_text(encoding="utf-8") if found else None


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON would give it back: tuples are lists, enumerations are numbers."""
    plain: dict[str, Any] = json.loads(json.dumps(value, default=_number_or_name))
    return plain


def _number_or_name(value: object) -> object:
    return int(value) if hasattr(value, "__int__") else str(value)


def _hash_files(folder: Path) -> str:
    """SHA-256 over the names and bytes of a folder's weight files."""
    digest = hashlib.sha256()
    for file in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _hash_tensors(model: PreTrainedModel) -> str:
    """SHA-256 over the names and values of a model's parameters."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
