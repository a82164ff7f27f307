"""The comparison models: real shapes, random weights, a tokenizer trained on the standard library's sources.

Speed does not depend on the values of weights. `256m` is SmolVLM-256M-Instruct's shape (SigLIP-B/16 at 512 px, pixel shuffle 4,
SmolLM2-135M), `2b` Qwen2-VL-2B-Instruct's (1.5 B in the decoder). What some peers want is derived: the decoder as a text
model, and both as transformers 4 wrote them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environments import PEERS

QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SHARD = 1 << 30
"""Bytes of weights that are drawn, held and written at once."""


@dataclass(slots=True, frozen=True)
class Model:
    """`placeholder`: what stands for the image in a prompt. `one_tile`: the image processor's options for one tile, where the

    model splits pictures by default. `lengths`: tokens of the short, long and longest text prompt.
    """

    name: str
    title: str
    folder: Path
    checkpoint: Path
    placeholder: str
    side: int
    one_tile: Mapping[str, Any] | None = None
    lengths: tuple[int, int, int] = (96, 968, 1100)
    other_tokens: int = 32
    """Tokens of the image prompt beside the image's own; as many a second turn has."""
    new_tokens: int = 64

    @property
    def model_type(self) -> str:
        """transformers' word for the architecture."""
        return str(json.loads((self.checkpoint / "config.json").read_text())["model_type"])


def model_named(name: str) -> Model:
    """`256m`, `2b`, or a folder with a SmolVLM or Qwen2-VL checkpoint of one's own. Raises ValueError."""
    if name == "256m":
        folder = PEERS / "256m"
        tile = {"do_image_splitting": False}
        return Model(name, "SmolVLM-256M-Instruct's shape", folder, folder / "checkpoint", "<image>", 512, tile)
    if name == "2b":
        folder = PEERS / "2b"
        return Model(name, "Qwen2-VL-2B-Instruct's shape", folder, folder / "checkpoint", QWEN_IMAGE, 448)
    given = Path(name).resolve()
    if not (given / "config.json").is_file():
        raise ValueError(f"'{name}' is neither 256m nor 2b nor a folder with a config.json")
    config = json.loads((given / "config.json").read_text())
    kind, most = config["model_type"], config["text_config"]["max_position_embeddings"]
    lengths = (96, 968, 1100) if most >= 1200 else (most // 8, most // 4, most // 2)
    rest: dict[str, Any] = {"lengths": lengths, "new_tokens": min(64, most // 8)}
    folder = PEERS / given.name
    if kind == "smolvlm":
        tile = {"do_image_splitting": False}
        return Model(given.name, given.name, folder, given, "<image>", config["vision_config"]["image_size"], tile, **rest)
    if kind == "qwen2_vl":
        return Model(given.name, given.name, folder, given, QWEN_IMAGE, 448, **rest)
    raise ValueError(f"{name} is a checkpoint of '{kind}'; of one's own, smolvlm and qwen2_vl can be compared")


def make(model: Model) -> None:
    """Writes the checkpoint where it is missing. Peak memory: a model of float32 for `256m`, a shard for `2b`."""
    if model.name == "256m":
        from benchmarks.smolvlm_256m.model import make as make_smolvlm

        make_smolvlm(model.checkpoint)
    elif model.name == "2b":
        from benchmarks.smolvlm_256m.model import _tokenizer

        if not (model.checkpoint / "made.json").is_file():
            make_qwen2_vl(model.checkpoint, _tokenizer())


QWEN_TEXT: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
QWEN_VISION: Mapping[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 1536,
    "num_heads": 16,
    "mlp_ratio": 4,
    "patch_size": 14,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
"""Qwen2-VL-2B-Instruct's config.json."""


def make_qwen2_vl(
    folder: Path, tokenizer: Any, text: Mapping[str, Any] = QWEN_TEXT, vision: Mapping[str, Any] = QWEN_VISION
) -> None:
    """Writes a Qwen2-VL checkpoint: weights in bfloat16, drawn shard by shard, under the names of the published ones."""
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    marks = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    ids = {mark.strip("<|>"): tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen2VLConfig(
        text_config={**text, **special},
        vision_config=dict(vision),
        tie_word_embeddings=True,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        dtype=torch.bfloat16,
        **special,
    )
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    with torch.device("meta"):
        empty = Qwen2VLForConditionalGeneration(config)
    shapes = {_published(name): value.shape for name, value in empty.state_dict().items() if name != "lm_head.weight"}
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    shard: dict[str, Any] = {}
    held = number = 0
    for index, (name, shape) in enumerate(shapes.items()):
        if name.endswith(".bias"):
            shard[name] = torch.zeros(shape, dtype=torch.bfloat16)
        elif len(shape) == 1:  # normalisations
            shard[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            shard[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        held += shard[name].nbytes
        if held > SHARD or index == len(shapes) - 1:
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, file)
            shard, held = {}, 0
    total = sum(2 * shape.numel() for shape in shapes.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    (folder / "made.json").write_text(json.dumps({"parameters": total // 2}))


QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _published(name: str) -> str:
    """A parameter's name in transformers 5 → in the published Qwen2-VL checkpoints."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def derive(model: Model) -> dict[str, str]:
    """Folders with what peers want, made where missing: `text_checkpoint`, `plain_checkpoint`, `plain_text_checkpoint`."""
    text, plain, plain_text = (model.folder / name for name in ("text", "plain", "plain-text"))
    if not (text / "done").is_file():
        _text_model(model.checkpoint, text)
    for source, target in ((model.checkpoint, plain), (text, plain_text)):
        if not (target / "done").is_file():
            _as_transformers_4(source, target)
    return {"text_checkpoint": str(text), "plain_checkpoint": str(plain), "plain_text_checkpoint": str(plain_text)}


_TEXT = {"smolvlm": ("model.text_model.", "llama", "LlamaForCausalLM"), "qwen2_vl": ("model.", "qwen2", "Qwen2ForCausalLM")}


def _text_model(checkpoint: Path, folder: Path) -> None:
    """The decoder by itself, as the text model whose architecture it has."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    whole = json.loads((checkpoint / "config.json").read_text())
    prefix, kind, architecture = _TEXT[whole["model_type"]]
    config = {**whole["text_config"], "model_type": kind, "architectures": [architecture]}
    config["tie_word_embeddings"] = whole.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    ropes = dict(config.get("rope_parameters") or {})
    ropes.pop("mrope_section", None)
    if ropes:
        config["rope_parameters"] = ropes
    for name in ("layer_types", "mrope_section"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    where: dict[str, str] = {}
    for shard in sorted(checkpoint.glob("model*.safetensors")):
        kept: dict[str, Any] = {}
        with safe_open(shard, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                if name.startswith(prefix):
                    kept["model." + name.removeprefix(prefix)] = opened.get_tensor(name)
                elif name == "lm_head.weight" and not config["tie_word_embeddings"]:
                    kept[name] = opened.get_tensor(name)
        if kept:
            save_file(kept, folder / shard.name, metadata={"format": "pt"})
            where |= dict.fromkeys(kept, shard.name)
    if len(set(where.values())) > 1:
        index = {"metadata": {"total_size": sum((folder / name).stat().st_size for name in set(where.values()))}}
        (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": where}))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, folder / name)
    (folder / "done").write_text("")


def _as_transformers_4(source: Path, folder: Path) -> None:
    """The same checkpoint with config, tokenizer and processor as transformers 4.57 reads them; weights are linked."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).hardlink_to(file)
        elif file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    smolvlm = config["model_type"] == "smolvlm"
    for part in (config, config.get("text_config", {})):
        ropes = part.pop("rope_parameters", None) or {}
        if "rope_theta" in ropes:
            part["rope_theta"] = ropes["rope_theta"]
        if "mrope_section" in ropes:
            part["rope_scaling"] = {"type": "mrope", "mrope_section": ropes["mrope_section"]}
        if "dtype" in part:
            part["torch_dtype"] = part.pop("dtype")
    if smolvlm:  # the first releases were Idefics 3, the same modules; SmolVLM's own processor wants torchvision
        config |= {"model_type": "idefics3", "architectures": ["Idefics3ForConditionalGeneration"]}
        config["vision_config"]["model_type"] = "idefics3_vision"
    elif config["model_type"] == "qwen2_vl":
        config |= {name: value for name, value in config["text_config"].items() if name not in config}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {name: saved[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token") if saved.get(name)}
    kept |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "model_max_length": 8192}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept, indent=2))
    images = folder / "preprocessor_config.json"
    if images.is_file():
        options = json.loads(images.read_text())
        kinds = ("Idefics3ImageProcessor", "Idefics3Processor") if smolvlm else ("Qwen2VLImageProcessor", "Qwen2VLProcessor")
        options |= {"image_processor_type": kinds[0], "processor_class": kinds[1]}
        images.write_text(json.dumps(options, indent=2))
        own = {"processor_class": kinds[1], **({"image_seq_len": 64} if smolvlm else {})}
        (folder / "processor_config.json").write_text(json.dumps(own))
    (folder / "done").write_text("")
