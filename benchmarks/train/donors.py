"""Weights that a student has from `tiny-llava`: its eyes, its words, its language model.

Systems of this kind are made in this way: a vision encoder and a language model exist, and what joins them is trained. Where the
student's class computes the same, its weights are the donor's to the last bit and the student begins by seeing what the
donor sees; where it differs in a detail, the nearest thing stands in and training does the rest:

- CLIP normalises patches before the first layer, SigLIP, ViT and BLIP-2's encoder do not: their patch embedding and positions are
  the least-squares fit to what CLIP's first layer is given;
- Gemma's norms multiply by 1 + w, its embeddings by √hidden: both are undone in the weights. Its GELU has no counterpart;
- a class without grouped keys gets each key head twice.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.train import scenes
from benchmarks.train.models import HEADS, KV_HEADS, PATCH, WIDTH

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "checkpoints" / "tiny-llava"
LAYERS = 3
"""The donor reads its eyes at the second last of four layers; the fourth was never trained."""
Weights = dict[str, Tensor]

_VIT = {
    "layer_norm1": "layernorm_before",
    "layer_norm2": "layernorm_after",
    "self_attn.out_proj": "attention.o_proj",
    "self_attn.": "attention.",
}


@functools.cache
def _donor() -> Weights:
    return {name: weight.float() for name, weight in load_file(FOLDER / "model.safetensors").items()}


def words(added: list[str] | None = None, **named: str) -> Any:
    """The donor's tokenizer, with further special tokens; `named` are attributes of it (image_token)."""
    found: Any = t.PreTrainedTokenizerFast(
        tokenizer_file=str(FOLDER / "tokenizer.json"),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=named,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    if added:
        found.add_tokens([t.AddedToken(token, special=True, normalized=False) for token in added], special_tokens=True)
    return found


def give(module: nn.Module, weights: Weights, *, frozen: bool = False) -> None:
    """Puts `weights` into the module's parameters of these names. Raises KeyError for an unknown one, ValueError for a shape.

    A parameter with more rows than are given (words that the donor has not) keeps its own in the others.
    """
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            target = own[name]
            if target.shape[1:] != weight.shape[1:] or len(target) < len(weight):
                raise ValueError(f"{name} is {tuple(target.shape)}, the donor's {tuple(weight.shape)}: they do not fit.")
            target[: len(weight)] = weight
            target.requires_grad_(not frozen)


def layers(renamed: dict[str, str] | None = None, prefix: str = "encoder.layers") -> Weights:
    """The layers of the donor's vision encoder, under CLIP's names (which are SigLIP's and IDEFICS's) or others."""
    begin, found = "vision_tower.encoder.layers.", {}
    for name, weight in _donor().items():
        if name.startswith(begin) and int(name.removeprefix(begin).split(".")[0]) < LAYERS:
            inner = name.removeprefix(begin)
            for before, after in (renamed or {}).items():
                inner = inner.replace(before, after)
            found[f"{prefix}.{inner}"] = weight
    return found


def clip_eyes() -> Weights:
    """For CLIPVisionModel and IDEFICS's vision transformer: exact."""
    begin = "vision_tower."
    first = {name.removeprefix(begin): weight for name, weight in _donor().items() if name.startswith(begin)}
    return {name: first[name] for name in first if name.startswith(("embeddings.", "pre_layrnorm."))} | layers()


def siglip_eyes(images: Any) -> Weights:
    """For SiglipVisionModel; it has no class token."""
    weight, bias, positions, _ = _patches(images)
    named = {"patch_embedding.weight": weight, "patch_embedding.bias": bias, "position_embedding.weight": positions}
    return {f"embeddings.{name}": value for name, value in named.items()} | layers()


def vit_eyes(images: Any) -> Weights:
    """For ViTModel."""
    weight, bias, positions, token = _patches(images)
    placed = torch.cat([torch.zeros(1, WIDTH), positions])[None]
    named = {"cls_token": token.reshape(1, 1, WIDTH), "position_embeddings": placed}
    named |= {"patch_embeddings.projection.weight": weight, "patch_embeddings.projection.bias": bias}
    return {f"embeddings.{name}": value for name, value in named.items()} | layers(_VIT, "layers")


def blip2_eyes(images: Any) -> Weights:
    """For Blip2VisionModel: query, key and value in one matrix, no bias on keys (it moves all scores alike)."""
    weight, bias, positions, token = _patches(images)
    placed = torch.cat([torch.zeros(1, WIDTH), positions])[None]
    named = {"class_embedding": token.reshape(1, 1, WIDTH), "position_embedding": placed}
    named |= {"patch_embedding.weight": weight, "patch_embedding.bias": bias}
    found = {f"embeddings.{name}": value for name, value in named.items()}
    given = layers()
    for name, value in given.items():
        layer, part = name.rsplit(".self_attn.", 1) if ".self_attn." in name else (name, "")
        if not part:
            found[name] = value
        elif part.startswith("out_proj"):
            found[f"{layer}.self_attn.{part.replace('out_proj', 'projection')}"] = value
        elif part == "q_proj.weight":
            found[f"{layer}.self_attn.qkv.weight"] = torch.cat([given[f"{layer}.self_attn.{p}_proj.weight"] for p in "qkv"])
        elif part == "q_proj.bias":
            key = torch.zeros(WIDTH)
            found[f"{layer}.self_attn.qkv.bias"] = torch.cat([value, key, given[f"{layer}.self_attn.v_proj.bias"]])
    return found


def embeddings() -> Tensor:
    """`[512, 128]`: the donor's words, in the order of its tokenizer."""
    return _donor()["language_model.model.embed_tokens.weight"]


def llama(prefix: str = "", *, grouped: bool = True) -> Weights:
    """The donor's language model. `grouped`: with its two key heads for four query heads."""
    begin, found = "language_model.model.", {}
    for name, weight in _donor().items():
        if name.startswith(begin):
            if not grouped and name.endswith(("k_proj.weight", "v_proj.weight")):
                weight = weight.view(KV_HEADS, -1, WIDTH).repeat_interleave(HEADS // KV_HEADS, 0).reshape(-1, WIDTH)
            found[prefix + name.removeprefix(begin)] = weight
    return found


def gemma() -> Weights:
    """The donor's language model in Gemma's terms; words are tied, so that the last norm makes up for their scale."""
    found = llama()
    for name, weight in found.items():
        if name == "embed_tokens.weight":
            found[name] = weight / WIDTH**0.5
        elif name == "norm.weight":
            found[name] = weight * WIDTH**0.5 - 1.0
        elif name.endswith("norm.weight"):
            found[name] = weight - 1.0
    return found


def _patches(images: Any, count: int = 1500) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patch embedding, bias, positions and class token in the pixels that `images` makes: the fit to CLIP's first layer.

    Least squares over patches of scenes; three quarters of a scene are paper, so patches that show something count fivefold.
    """
    rng, mine = random.Random("donor"), t.AutoImageProcessor.from_pretrained(FOLDER, local_files_only=True)
    shown = [scenes.sample(rng, "train", 4, 4) for _ in range(count)]
    raw = torch.from_numpy(np.stack([np.asarray(scene.render(), np.float32) for scene in shown])).permute(0, 3, 1, 2) / 255
    full = torch.tensor([[any((x.row, x.column) == (r, c) for x in s.things) for r in range(4) for c in range(4)] for s in shown])

    def cut(processor: Any) -> Tensor:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
        return F.unfold((raw - mean) / std, PATCH, stride=PATCH).transpose(1, 2)

    begin = "vision_tower."
    donor = {name.removeprefix(begin): weight for name, weight in _donor().items() if name.startswith(begin)}
    place = donor["embeddings.position_embedding.weight"]
    scale, shift = donor["pre_layrnorm.weight"], donor["pre_layrnorm.bias"]
    with torch.no_grad():
        made = cut(mine) @ donor["embeddings.patch_embedding.weight"].reshape(WIDTH, -1).T + place[1:]
        wanted = F.layer_norm(made, (WIDTH,), scale, shift, 1e-5)
        token = F.layer_norm(donor["embeddings.class_embedding"] + place[0], (WIDTH,), scale, shift, 1e-5)
        where = torch.eye(place.shape[0] - 1).expand(count, -1, -1)
        given = torch.cat([cut(images), where], -1).flatten(0, 1).double()
        weight = (1.0 + 4.0 * full.flatten()).sqrt()[:, None].double()
        left, right = given * weight, wanted.flatten(0, 1).double() * weight
        ridge = 1e-3 * len(left) * torch.eye(left.shape[1], dtype=torch.double)
        fitted = torch.linalg.solve(left.T @ left + ridge, left.T @ right).float()
    pixels = fitted[: -len(where[0])].T.reshape(WIDTH, 3, PATCH, PATCH)
    return pixels, torch.zeros(WIDTH), fitted[-len(where[0]) :], token
