"""Who runs: ours, and the peers. A peer's figures come from the versions pinned in requirements/PEER.txt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Contender:
    """`peer`: the worker's module and its environment's name."""

    key: str
    label: str
    peer: str
    variant: str

    @property
    def ours(self) -> bool:
        """Whether it is this project's own."""
        return self.peer == "ours"


CONTENDERS = (
    Contender("ours-int4", "vlm-edge cpu-int4", "ours", "cpu-int4"),
    Contender("llama.cpp-q4_0", "llama.cpp Q4_0", "llama_cpp", "q4_0"),
    Contender("ort-genai-int4", "onnxruntime-genai int4", "ort_genai", "int4"),
    Contender("openvino-int4", "OpenVINO int4", "openvino_genai", "vlm-int4"),
    Contender("openvino-genai-int4", "OpenVINO GenAI int4, decoder alone", "openvino_genai", "llm-int4"),
    Contender("ours-int8", "vlm-edge cpu-int8", "ours", "cpu-int8"),
    Contender("llama.cpp-q8_0", "llama.cpp Q8_0", "llama_cpp", "q8_0"),
    Contender("openvino-int8", "OpenVINO int8", "openvino_genai", "vlm-int8"),
    Contender("openvino-genai-int8", "OpenVINO GenAI int8, decoder alone", "openvino_genai", "llm-int8"),
    Contender("ours-fp32", "vlm-edge cpu-fp32", "ours", "cpu-fp32"),
    Contender("transformers-fp32", "transformers eager fp32", "transformers_eager", "fp32"),
    Contender("transformers-bf16", "transformers eager bf16", "transformers_eager", "bf16"),
)
OWN_ENVIRONMENT = ("llama_cpp", "openvino_genai", "ort_genai")
"""Peers that are installed; the others run in this project's environment."""


def chosen(only: str | None) -> tuple[Contender, ...]:
    """The contenders whose key or peer begins with one of `only`'s words (between commas); all for None. Raises ValueError."""
    if only is None:
        return CONTENDERS
    words = [word.strip().lower() for word in only.split(",") if word.strip()]
    for word in words:
        if not any(one.key.startswith(word) for one in CONTENDERS):
            raise ValueError(f"no contender begins with '{word}'; there are: {', '.join(one.key for one in CONTENDERS)}")
    return tuple(one for one in CONTENDERS if any(one.key.startswith(word) for word in words))
