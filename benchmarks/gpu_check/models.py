"""The models of the check: the trained tiny ones as they are, and shapes of real models as hollow bundles.

A shape is exported and lowered with four layers by the product itself, then deepened and stripped; see deepen.py and
hollow.py. Run by pack.py on a machine with PyTorch.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import onnx_ir as ir

from vlm_edge_runtime.bundle.manifest import FileRef, GenerativeContract, GraphEntry, Manifest, TensorSpec
from vlm_edge_runtime.bundle.reader import MANIFEST, file_sha256, read_manifest

from .deepen import deepen
from .hollow import SUFFIX, fill, strip

ROOT = Path(__file__).resolve().parents[2]
TRAINED = ("tiny-llava", "tiny-smolvlm", "tiny-clip")
FEW = 4
"""Layers that are really exported."""
BUILDS = {"cuda-fp16": None, "cuda-int4": "decoder=int4,lm_head=int4"}
"""Builds of the target cuda-desktop that a shape travels with: name → precision."""
EXAMPLES = 24


@dataclass(slots=True, frozen=True)
class Shape:
    """A SmolVLM of some size (SigLIP encoder, pixel shuffle, Llama decoder); `source` says whose figures these are."""

    source: str
    text: dict[str, int]
    vision: dict[str, int]
    scale_factor: int
    rope_theta: float = 100000.0
    vocabulary: int = 49280

    @property
    def decoder_parameters(self) -> int:
        """Weights of the matrix products of one decoder step, the logits' among them."""
        t = self.text
        width = t["num_attention_heads"] * t["head_dim"]
        cache = t["num_key_value_heads"] * t["head_dim"]
        layer = t["hidden_size"] * (2 * width + 2 * cache + 3 * t["intermediate_size"])
        return t["num_hidden_layers"] * layer + t["hidden_size"] * self.vocabulary

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache entries of one token in half precision."""
        t = self.text
        return 2 * 2 * t["num_hidden_layers"] * t["num_key_value_heads"] * t["head_dim"]

    @property
    def image_tokens(self) -> int:
        """Tokens of one tile."""
        side = self.vision["image_size"] // self.vision["patch_size"]
        return (side // self.scale_factor) ** 2


SHAPES = {
    "smolvlm-256m": Shape(
        source="SmolVLM-256M-Instruct: SigLIP-B/16 at 512 px, SmolLM2-135M",
        text={"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
        | {"num_key_value_heads": 3, "head_dim": 64},
        vision={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"image_size": 512, "patch_size": 16},
        scale_factor=4,
    ),
    "smolvlm-2b": Shape(
        source="SmolVLM-Instruct (2.2B): SigLIP-SO400M/14 at 384 px, SmolLM2-1.7B",
        text={"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32}
        | {"num_key_value_heads": 32, "head_dim": 64},
        vision={"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
        | {"image_size": 378, "patch_size": 14},
        scale_factor=3,
        rope_theta=130000.0,
    ),
    "tiny": Shape(
        source="nobody's: for the flow itself, where there is no GPU",
        text={"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 3}
        | {"num_key_value_heads": 1, "head_dim": 64},
        vision={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5, "num_attention_heads": 2}
        | {"image_size": 64, "patch_size": 16},
        scale_factor=2,
        vocabulary=49280,
    ),
}


def config_of(shape: Shape, special: dict[str, int], layers: int | None = None) -> Any:
    """transformers' SmolVLMConfig, with `layers` decoder and encoder layers where that is given."""
    from transformers import SmolVLMConfig

    few = {} if layers is None else {"num_hidden_layers": layers}
    ids = {name: special[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"model_type": "llama", "vocab_size": shape.vocabulary, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    text |= {"rope_theta": shape.rope_theta, "tie_word_embeddings": True, "hidden_act": "silu", **ids, **shape.text, **few}
    vision = {"num_channels": 3, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, **shape.vision, **few}
    return SmolVLMConfig(
        text_config=text,
        vision_config=vision,
        scale_factor=shape.scale_factor,
        tie_word_embeddings=True,
        image_token_id=special["image_token_id"],
        pad_token_id=special["pad_token_id"],
    )


def make_shape(name: str, folder: Path, builds: dict[str, str | None] | None = None) -> None:
    """Writes `folder`/NAME.vlm, hollow, with its builds for cuda-desktop; and NAME.json, what the peers need to know."""
    from vlm_edge.export import export
    from vlm_edge.targets.build import build

    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vlm-edge-shape-") as scratch:
        checkpoint, bundle = Path(scratch) / "checkpoint", Path(scratch) / f"{name}.vlm"
        special = _checkpoint(shape, checkpoint)
        export(checkpoint, bundle)
        for label, precision in (BUILDS if builds is None else builds).items():
            build(bundle, "cuda-desktop", precision=precision, name=label)
        hollow_bundle(bundle, folder / f"{name}.vlm", shape)
    describe(name, special, folder)


def describe(name: str, special: dict[str, int], folder: Path) -> None:
    """Writes NAME.json: the ids of special tokens, which the peers need, and the shape's figures."""
    shape = SHAPES[name]
    known = {"shape": name, "special": special, "decoder_parameters": shape.decoder_parameters}
    known |= {"kv_bytes_per_token": shape.kv_bytes_per_token, "image_tokens": shape.image_tokens, "source": shape.source}
    (folder / f"{name}.json").write_text(json.dumps(known, indent=2) + "\n")


def _checkpoint(shape: Shape, folder: Path) -> dict[str, int]:
    import torch
    from transformers import GenerationConfig, Idefics3Processor, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil

    from benchmarks.smolvlm_256m.model import CHAT_TEMPLATE, _tokenizer

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    special["image_token_id"] = tokenizer.convert_tokens_to_ids("<image>")
    model = SmolVLMForConditionalGeneration(config_of(shape, special, layers=FEW)).eval()
    model.generation_config = GenerationConfig(**{key: value for key, value in special.items() if key != "image_token_id"})
    size = shape.vision["image_size"]
    images = SmolVLMImageProcessorPil(
        do_convert_rgb=True,
        do_resize=True,
        size={"longest_edge": 4 * size},
        do_image_splitting=False,
        max_image_size={"longest_edge": size},
        do_rescale=True,
        do_normalize=True,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_pad=True,
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=shape.image_tokens, chat_template=CHAT_TEMPLATE)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    images.save_pretrained(folder)
    return special


def hollow_bundle(bundle: Path, target: Path, shape: Shape) -> None:
    """A bundle of four layers → the shape's, without its large weights. Portable graphs and builds alike."""
    manifest = read_manifest(bundle)
    target.mkdir(parents=True)
    for ref in manifest.files:
        (target / ref.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(bundle / ref.file, target / ref.file)
    contract = manifest.contract
    assert isinstance(contract, GenerativeContract)
    contract.kv = msgspec.structs.replace(contract.kv, layers=shape.text["num_hidden_layers"])
    sets = [manifest.graphs, *(build.graphs for build in manifest.builds.values())]
    for build in manifest.builds.values():
        build.parity = None
        if build.kv is not None:
            build.kv = msgspec.structs.replace(build.kv, layers=shape.text["num_hidden_layers"])
    manifest.parity = None
    for graphs in sets:
        for role, entry in graphs.items():
            graphs[role] = _hollow_graph(bundle, target, entry, shape)
    _write_manifest(target, manifest)


def _hollow_graph(bundle: Path, target: Path, entry: GraphEntry, shape: Shape) -> GraphEntry:
    model = ir.load(bundle / entry.model.file)
    layers = {"decoder": shape.text, "vision_encoder": shape.vision}.get(entry.role)
    if layers is not None:
        deepen(model, layers["num_hidden_layers"], of=FEW)
    path = Path(entry.model.file)
    size = strip(model, target / path.parent, path.name)
    data = [FileRef(file=f"{entry.model.file}.data", sha256="", bytes=size)] if size else []
    return msgspec.structs.replace(
        entry,
        model=_ref(target, entry.model.file),
        data=data,
        inputs=[_spec(value) for value in model.graph.inputs],
        outputs=[_spec(value) for value in model.graph.outputs],
        nodes=sum(1 for _ in model.graph),
    )


def _ref(root: Path, file: str) -> FileRef:
    return FileRef(file=file, sha256=file_sha256(root / file), bytes=(root / file).stat().st_size)


def _spec(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None and value.shape is not None
    shape = tuple(size if isinstance(size, int) else str(size.value or f"dim{axis}") for axis, size in enumerate(value.shape))
    return TensorSpec(name=str(value.name), dtype=value.dtype.numpy().name, shape=shape)


def fill_bundle(bundle: Path, parts: Literal["builds", "portable"]) -> dict[str, int]:
    """Fills a hollow bundle's builds, or its portable graphs, and enters what was written into its manifest: file → bytes.

    Builds are not hashed (gigabytes; open them with `verify=False`), portable graphs are, since builds are made from them.
    """
    made = fill(bundle / parts)
    manifest = read_manifest(bundle)
    sets = [manifest.graphs] if parts == "portable" else [build.graphs for build in manifest.builds.values()]
    for graphs in sets:
        for entry in graphs.values():
            entry.data[:] = [_filled(bundle, ref, hashed=parts == "portable") for ref in entry.data]
    _write_manifest(bundle, manifest)
    return {str(path.relative_to(bundle)): size for path, size in made.items()}


def _filled(root: Path, ref: FileRef, *, hashed: bool) -> FileRef:
    path = root / ref.file
    if not path.is_file():
        return ref
    return FileRef(file=ref.file, sha256=file_sha256(path) if hashed else ref.sha256, bytes=path.stat().st_size)


def decoder_bytes(bundle: Path, build: str) -> int:
    """Bytes of weights that a decoder step of a build reads."""
    entry = read_manifest(bundle).builds[build].graphs["decoder"]
    return sum(ref.bytes for ref in entry.data)


def unfilled(bundle: Path) -> bool:
    """Whether any graph still lacks its data."""
    return any(
        json.loads(spec.read_text()) and not spec.with_name(f"{spec.name.removesuffix(SUFFIX)}.data").is_file()
        for spec in bundle.rglob(f"*{SUFFIX}")
    )


def make_trained(name: str, folder: Path, count: int = EXAMPLES) -> None:
    """Writes `folder`/NAME.vlm, portable and whole, with held-out examples beside it."""
    from vlm_edge.export import export

    bundle = folder / f"{name}.vlm"
    export(ROOT / "tests" / "checkpoints" / name, bundle, overwrite=True)
    write_examples(name, folder / f"{name}.examples", count)


def write_examples(name: str, folder: Path, count: int) -> None:
    """Held-out scenes as PNG files and one JSON list of {image, prompt, answer}; captions alone for the dual encoder."""
    from benchmarks.train import scenes

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name == "tiny-clip":
        found = [(image, "", text) for image, text in scenes.held_out_captions(count, seed=0)]
    else:
        kind: Literal["llava", "smolvlm"] = "smolvlm" if name == "tiny-smolvlm" else "llava"
        found = [(one.image, one.prompt, one.answer) for one in scenes.held_out_examples(count, model=kind)]
    rows = []
    for number, (image, prompt, answer) in enumerate(found):
        image.save(folder / f"{number:03}.png")
        rows.append({"image": f"{number:03}.png", "prompt": prompt, "answer": answer})
    (folder / "examples.json").write_text(json.dumps(rows, indent=1) + "\n")


def _write_manifest(root: Path, manifest: Manifest) -> None:
    text = msgspec.json.format(msgspec.json.encode(copy.deepcopy(manifest)), indent=2)
    (root / MANIFEST).write_bytes(text)
