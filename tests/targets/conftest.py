"""Fresh bundles of small graphs for each test."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import sketch_bundle


@pytest.fixture
def vlm_bundle(tmp_path) -> Path:
    """vision_encoder, projector, embed_tokens, decoder."""
    return sketch_bundle.vlm_bundle(tmp_path / "sketch.vlm")


@pytest.fixture
def dual_bundle(tmp_path) -> Path:
    """vision_encoder, text_encoder."""
    return sketch_bundle.dual_bundle(tmp_path / "dual.vlm")
