"""vlm-edge: the bundle's build, run without PyTorch (worker: see worker.py)."""

from __future__ import annotations

import compileall
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.worker import Job, arithmetic, cpu_flags, files_bytes, main

PACKAGES = ("vlm-edge", "onnxruntime", "numpy")
TURN_TOKENS = 8
CHECKED_BYTES = 3_000_000_000
"""Checkpoints up to this size are compared with PyTorch at export."""


class Ours:
    """`load` and `generate` as a user calls them. Nothing is handed over ready: the picture is preprocessed in every call."""

    def __init__(self, job: Job) -> None:
        from PIL import Image

        from vlm_edge_runtime import load

        self.job = job
        self.vlm: Any = load(job["bundle"], build=job["variant"], threads=job["threads"], image_options=job["image_options"])
        with Image.open(job["image"]["picture"]) as opened:
            self.image = opened.convert("RGB")
        self.reuse = ""

    def _answer(self, text: str, new_tokens: int, image: bool, keep: bool = False) -> Any:
        if not keep:
            self.vlm.clear_caches()
        images = [self.image] if image else None
        answer = self.vlm.generate(text, images, raw=True, max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        return answer, self.vlm.stats

    def picture(self) -> float:
        return float(self._answer(self.job["image"]["text"], 1, True)[1].ttft_s)

    def turn(self) -> float:
        answer, _ = self._answer(self.job["image"]["text"], TURN_TOKENS, True)
        follow = self.job["image"]["text"] + answer.text + self.job["turn"]["text"]
        stats = self._answer(follow, 1, True, keep=True)[1]
        kept = f"{stats.reused_tokens} of {stats.prompt_tokens} tokens from the kept cache, {stats.image_cache_misses}"
        self.reuse = f"; second turn: {kept} images encoded"
        return float(stats.ttft_s)

    def vision(self) -> float:
        return float(self._answer(self.job["image"]["text"], 1, True)[1].vision_s)

    def text(self, prompt: dict[str, Any], new_tokens: int) -> Sequence[float]:
        _, stats = self._answer(prompt["text"], new_tokens, False)
        if stats.prompt_tokens != len(prompt["ids"]) or stats.new_tokens != new_tokens:
            raise SystemExit(
                f"{stats.prompt_tokens} prompt and {stats.new_tokens} new tokens, not {len(prompt['ids'])} and {new_tokens}"
            )
        return [stats.ttft_s + stats.tpot_s * index for index in range(new_tokens)]

    def facts(self) -> dict[str, Any]:
        from vlm_edge_runtime.bundle.reader import open_bundle

        bundle = open_bundle(self.job["bundle"], build=self.job["variant"], verify=False)
        entry = bundle.build.graphs["decoder"] if bundle.build else bundle.manifest.graphs["decoder"]
        said = bundle.build.options.get("decoder.token_bytes") if bundle.build else None  # a head of two planes is not read whole
        decoder = int(said or entry.model.bytes + sum(data.bytes for data in entry.data))
        kv = bundle.kv
        width = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1 + 2 / 32}[kv.dtype if kv else "float32"]
        note = "picture decoded and preprocessed inside every figure; " + ", ".join(
            f"{role} {graph.precision}"
            for role, graph in (bundle.build.graphs if bundle.build else bundle.manifest.graphs).items()
        )
        note += self.reuse
        kept = {"token_bytes": decoder, "kv_bytes": width, "whole": True}
        return {"files": self._files(bundle), **kept, "note": note, "arithmetic": self._arithmetic(bundle)}

    def _arithmetic(self, bundle: Any) -> dict[str, str | None]:
        """Weights of 4 and 8 bits meet activations of 8. Native attention beside them: the decoder's over a cache of less than
        float32 is in bfloat16 where the CPU has it, else in float32. The encoder's, whose keys are float32 and all seen, is in 8
        bits with AVX-512 VNNI, else like the decoder's.
        """
        graphs = bundle.build.graphs if bundle.build else bundle.manifest.graphs
        half = "bf16" if "avx512_bf16" in cpu_flags() else "fp32"
        whole = bundle.kv is not None and bundle.kv.dtype == "float32"
        narrow = {"decoder": "fp32" if whole else half, "vision_encoder": "int8" if "avx512_vnni" in cpu_flags() else half}
        found: dict[str, tuple[str, str]] = {}
        for role in ("decoder", "vision_encoder"):
            coded, native = graphs[role].precision.startswith("int"), graphs[role].format == "plan"
            found[role] = ("int8" if coded else "fp32", narrow[role] if coded and native else "fp32")
        known = (
            "precisions in the manifest; native attention: the decoder's in bfloat16 where the CPU has it (cache below float32), "
            "the encoder's, in which all keys are seen, in 8 bits with AVX-512 VNNI, else in bfloat16 or float32"
        )
        return arithmetic(*found["decoder"], *found["vision_encoder"], known)

    def _files(self, bundle: Any) -> list[str]:
        graphs = bundle.build.graphs if bundle.build else bundle.manifest.graphs
        refs = [ref for graph in graphs.values() for ref in (graph.model, *graph.data)] + list(bundle.manifest.files)
        return sorted({str(bundle.path / ref.file) for ref in refs} | {str(bundle.path / "manifest.json")})


def prepare(job: Job) -> None:
    """Exports the checkpoint and builds the variant as shipped, where they are not there yet or `rebuild` is asked."""
    import vlm_edge_runtime
    from vlm_edge.export import export
    from vlm_edge.targets.build import build

    # As pip does with what it installs, and environments.py with the peers: else each start does, where
    # PYTHONDONTWRITEBYTECODE is set.
    compileall.compile_dir(Path(vlm_edge_runtime.__file__).parent, quiet=1)
    bundle = Path(job["bundle"])
    if not (bundle / "manifest.json").is_file():
        checkpoint = Path(job["checkpoint"])
        # The comparison with PyTorch holds both models in float32; weights are random, and smaller shapes were compared.
        export(checkpoint, bundle, check=files_bytes([checkpoint]) < CHECKED_BYTES)
    have = json.loads((bundle / "manifest.json").read_text())["builds"]
    if job["variant"] not in have or job["rebuild"]:
        began = time.perf_counter()
        build(bundle, job["variant"], name=job["variant"], overwrite=True)
        print(f"built {job['variant']} in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(Ours, prepare, PACKAGES)
