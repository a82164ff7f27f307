"""Stop strings and incremental text: what is shown never runs into a stop string, however the text was sliced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_edge_runtime.decode.row_text import RowText
from vlm_edge_runtime.decode.stop import StopMatcher

VOCABULARY = {257: "cat", 258: " dog", 65: "A"}


class Words:
    """A vocabulary in which every token is a word; `held` is what an incomplete character would be."""

    def __init__(self, held: str = "") -> None:
        self.held = held

    def push(self, token: int) -> str:
        return VOCABULARY[token]

    def flush(self) -> str:
        return self.held


def run(stops, pieces) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece) for piece in pieces)
    if matcher.matched is None:
        shown += matcher.flush()
    return shown, matcher.matched


@pytest.mark.parametrize(
    ("stops", "text", "shown", "matched"),
    [
        ([], "all of it", "all of it", None),
        (["END"], "before END after", "before ", "END"),
        (["END"], "before EN", "before EN", None),
        (["\n\n"], "a\nb\n\nc", "a\nb", "\n\n"),
        (["aab"], "aaab", "a", "aab"),
        (["abcd", "bc"], "xabcd", "xa", "bc"),
        (["bc", "abc"], "xabc", "x", "abc"),
        (["stop"], "stop", "", "stop"),
    ],
)
def test_cut(stops, text, shown, matched) -> None:
    assert run(stops, [text]) == (shown, matched)
    assert run(stops, list(text)) == (shown, matched)


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_slicing_does_not_matter(text, stops, data) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, matched = run(stops, pieces)
    assert (shown, matched) == run(stops, list(text))
    assert not any(stop in shown for stop in stops)
    if matched is None:
        assert shown == text


@given(st.text("abc", max_size=12), st.text("abc", min_size=1, max_size=4))
def test_nothing_shown_begins_a_stop_string_that_follows(text, stop) -> None:
    matcher = StopMatcher([stop])
    shown = ""
    for character in text + stop:
        shown += matcher.push(character)
        assert stop not in shown
    assert matcher.matched == stop
    assert (text + stop).startswith(shown)
    assert shown == (text + stop)[: (text + stop).index(stop)]


def test_tokens_before_a_stop_string() -> None:
    row = RowText(Words(), ["dog"])
    shown = "".join(row.push(token) for token in [257, 258, 65])  # cat, " dog", A
    assert (shown, row.text, row.stopped) == ("cat ", "cat ", True)
    assert row.tokens_within() == 1  # " dog" is half inside: it is forgotten
    whole = RowText(Words(), [" dog"])
    for token in [257, 258]:
        whole.push(token)
    assert (whole.text, whole.tokens_within()) == ("cat", 1)
    at_once = RowText(Words(), ["cat"])
    at_once.push(257)
    assert (at_once.text, at_once.tokens_within()) == ("", 0)


def test_finish_shows_what_was_withheld() -> None:
    row = RowText(Words(), ["cats"])
    assert row.push(257) == ""
    assert row.finish() == "cat"
    assert not row.stopped


def test_what_the_decoder_held_back_is_searched_too() -> None:
    row = RowText(Words(held="X"), ["catX"])
    assert row.push(257) == ""
    assert row.finish() == ""
    assert row.stopped
