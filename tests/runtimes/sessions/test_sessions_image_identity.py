"""Which pictures a session takes for the same: by a file's bytes, by the pixels of what is in memory; and what that saves."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from session_pictures import noise

from vlm_edge_runtime import ImageError, load

ASK = "what is in the picture?"
SHORT = {"max_new_tokens": 3, "ignore_eos": True, "temperature": 0.0}


def file(picture: Image.Image, kind: str = "PNG", **more) -> bytes:
    to = io.BytesIO()
    picture.save(to, kind, **more)
    return to.getvalue()


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """What was decoded so far."""
    seen = []
    right = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **more: seen.append("once") or right(*args, **more))
    return seen


def test_a_file_seen_before_is_not_decoded_again(session, decoded, tmp_path) -> None:
    vlm = session("smolvlm")
    content = file(noise(1))
    (tmp_path / "one.png").write_bytes(content)
    expected = vlm.generate(ASK, images=noise(1), **SHORT)
    first = vlm.generate(ASK, images=content, **SHORT)
    assert (first.tokens, decoded, vlm.stats.image_cache_misses) == (expected.tokens, ["once"], 1)
    for source in (content, tmp_path / "one.png", io.BytesIO(content)):
        assert vlm.generate(ASK, images=source, **SHORT).tokens == expected.tokens
        assert (vlm.stats.image_cache_hits, vlm.stats.image_cache_misses) == (1, 0)
    assert decoded == ["once"]
    (tmp_path / "one.png").write_bytes(file(noise(2)))
    vlm.generate(ASK, images=tmp_path / "one.png", **SHORT)
    assert (decoded, vlm.stats.image_cache_misses) == (["once"] * 2, 1), "another picture lies there now"


def test_features_that_were_forgotten_are_made_of_the_same_bytes(built_bundle, decoded) -> None:
    with load(built_bundle("smolvlm", "cpu-fp32"), image_cache_bytes=0, prefix_cache=False) as vlm:
        answers = [vlm.generate(ASK, images=file(noise(1)), **SHORT).tokens for _ in range(2)]
    assert answers[0] == answers[1]
    assert len(decoded) == 2


def test_orientation_and_options_make_another_picture(session, built_bundle) -> None:
    vlm = session("smolvlm")
    exif = Image.Exif()
    exif[0x0112] = 3
    upright, turned = file(noise(3)), file(noise(3), exif=exif)
    np.testing.assert_array_equal(vlm.embed_image(turned), vlm.embed_image(noise(3).rotate(180)))
    assert np.abs(vlm.embed_image(turned) - vlm.embed_image(upright)).max() > 1e-3
    with load(built_bundle("smolvlm", "cpu-fp32"), image_options={"do_image_splitting": False}) as other:
        assert vlm.embed_image(upright).shape != other.embed_image(upright).shape


def test_bytes_that_are_no_image_are_refused_each_time(session) -> None:
    vlm = session("smolvlm")
    for _ in range(2):
        with pytest.raises(ImageError, match="not an image"):
            vlm.generate(ASK, images=b"no picture", **SHORT)
        with pytest.raises(ImageError, match="truncated"):
            vlm.generate(ASK, images=file(noise(4), "PNG")[:600], **SHORT)
