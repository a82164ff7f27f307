"""Prompt lookup: what is drafted, how much, and with which options it goes."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_edge_runtime.decode.options import GenerationDefaults
from vlm_edge_runtime.decode.prompt_lookup import LookupRow, PromptLookup, PromptLookupLoop, draft
from vlm_edge_runtime.engines.base import RowTokens
from vlm_edge_runtime.errors import OptionError


def resolve(config=None, **keywords):
    return GenerationDefaults(config or {}, [2], vocab_size=100).resolve(1, keywords)


def drafted(ids, count=3, longest=2):
    return draft(np.array(ids, np.int64), count, longest).tolist()


def by_hand(ids, count, longest):
    """The rule, place by place."""
    for size in range(min(longest, len(ids) - 1), 0, -1):
        starts = [i + size for i in range(len(ids) - size) if ids[i : i + size] == ids[-size:] and ids[i + size] >= 0]
        if starts:
            full = [start for start in starts if start + count <= len(ids)]
            found = ids[full[-1] if full else starts[0] :][:count]
            return found[: next((k for k, token in enumerate(found) if token < 0), count)]
    return []


def test_what_followed_the_same_tokens_is_drafted() -> None:
    assert drafted([1, 2, 3, 4, 5, 1, 2]) == [3, 4, 5]
    assert drafted([1, 2, 3, 9, 2]) == [3, 9, 2], "one token where two were not there"
    assert drafted([1, 2, 3, 1, 2, 4, 5, 6, 1, 2]) == [4, 5, 6], "the last place"
    assert drafted([1, 2, 3, 4, 1, 2, 5, 1, 2], 4) == [3, 4, 1, 2], "that has enough after it"
    assert drafted([7, 7, 7]) == [7], "none has enough: the one with most"
    assert drafted([1, 2, 3]) == []
    assert drafted([1]) == []
    assert drafted([]) == []
    assert drafted([1, 2, 1], 0) == []
    assert drafted([1, 2, -1, 3, 1, 2]) == [], "never from images"
    assert drafted([2, 8, 1, 2, -1, 3, 1, 2]) == [8, 1, 2], "then from a shorter end"


def test_drafts_are_those_of_the_rule() -> None:
    random = np.random.default_rng(0)
    for _ in range(2000):
        ids = random.integers(-1, 4, random.integers(1, 30)).tolist()
        ids[-1] = abs(ids[-1])
        count, longest = (int(number) for number in random.integers(1, 7, 2))
        assert drafted(ids, count, longest) == by_hand(ids, count, longest), (ids, count, longest)


def test_a_row_drafts_more_after_success_and_pauses_after_failure() -> None:
    row = LookupRow(np.array([1, 2, 3, 4, 5, 6, 7, 8] * 4), 100, PromptLookup(4))
    assert len(row.draft(50)) == 4
    row.take([1, 9], 4)
    widths = []
    for _ in range(3):
        row.take([1, 2], 0)
        widths.append(len(row.draft(50)))
        row.take([3] * (widths[-1] + 1), widths[-1])
    assert widths == [2, 4, 4], "one more than was accepted, then twice as many, up to the limit"
    pauses = []
    for _ in range(4):
        steps = 0
        row.take([1, 2], 0)
        while not (found := row.draft(50)):
            steps += 1
        pauses.append(steps)
        row.take([9], len(found))
    assert pauses == [0, 0, 1, 3]


def test_a_draft_is_never_longer_than_what_is_left() -> None:
    row = LookupRow(np.array([1, 2, 3, 4, 5, 6, 1, 2]), 4, PromptLookup(10))
    assert row.draft(50) == [3, 4, 5]
    assert row.draft(2) == [3, 4]
    assert row.draft(0) == row.draft(-1) == []
    row.take([3, 4, 5], 3)
    assert (row.left, row.draft(50)) == (1, [])


class _Counting:
    """A state whose rows count up from their prompt's last token, modulo 5. No real decoder would do so for sure."""

    capacity = 40

    def __init__(self, prompts) -> None:
        self.newest = [None] * len(prompts)
        self.last = list(prompts)
        self.lengths = [8] * len(prompts)
        self.calls: list[str] = []

    def decode(self, steps):
        self.calls.append("decode")
        return self._advance([[] for _ in self.last])

    def verify(self, drafts):
        self.calls.append("verify")
        return self._advance(drafts)

    def _advance(self, drafts):
        found = []
        for row, proposed in enumerate(drafts):
            tokens = [(self.last[row] + 1) % 5]
            for token in proposed:
                if token != tokens[-1]:
                    break
                tokens.append((token + 1) % 5)
            self.lengths[row] += len(tokens) - (self.newest[row] is None)
            self.newest[row] = self.last[row] = tokens[-1]
            found.append(RowTokens(tokens))
        return found


def test_the_loop_gives_each_row_its_own_tokens_in_order_with_a_stand_in_for_a_decoder() -> None:
    state = _Counting([4, 1])
    rows = [LookupRow(np.array(ids), limit, PromptLookup(6)) for ids, limit in (([0, 1, 2, 3, 4] * 2, 30), ([1], 19))]
    loop = PromptLookupLoop(state, rows, lambda: False)
    tokens: list[list[int]] = [[], []]
    passes = 0
    while any(row.left for row in rows):
        for number, new in enumerate(loop.decode(3)):
            tokens[number] += new.tokens
            if rows[number].open and not rows[number].left:
                loop.drop(number)
        passes += 1
        assert passes < 40
    assert tokens[0] == [i % 5 for i in range(30)]
    assert tokens[1] == [(2 + i) % 5 for i in range(19)]
    assert state.calls[0] == "decode", "the first tokens come from the prompts' logits"
    assert loop.steps < 20 < loop.drafted
    assert 0 < loop.accepted <= loop.drafted


def test_options() -> None:
    assert resolve().lookup is None
    assert resolve(prompt_lookup_num_tokens=0).lookup is None
    assert resolve(prompt_lookup_num_tokens=7).lookup == PromptLookup(7, 2, True)
    assert resolve(prompt_lookup_num_tokens=7, max_matching_ngram_size=3).lookup == PromptLookup(7, 3, True)
    file = {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 4}
    assert resolve(file).lookup == PromptLookup(5, 4, False)
    assert resolve(file, prompt_lookup_num_tokens=0).lookup is None
    assert resolve(file, max_matching_ngram_size=1).lookup == PromptLookup(5, 1, False)
    assert resolve(file, ignore_config=["prompt_lookup_num_tokens"]).lookup is None
    # In a file it is a wish for speed: without effect beside what does not allow it.
    assert resolve(file, temperature=0.5).lookup is None
    assert resolve(file, num_beams=2).lookup is None
    assert resolve({**file, "do_sample": True}).lookup is None
    assert resolve({"do_sample": True}, temperature=0, prompt_lookup_num_tokens=3).lookup == PromptLookup(3)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"temperature": 0.5}, "sampling"),
        ({"num_beams": 2}, "beam search"),
        ({"guidance_scale": 2.0}, "guidance"),
        ({"encoder_repetition_penalty": 2.0}, "encoder_"),
        ({"prompt_lookup_num_tokens": -1}, "0 or more"),
        ({"prompt_lookup_num_tokens": 2.5}, "integer"),
        ({"max_matching_ngram_size": 0}, "1 or more"),
        ({"prompt_lookup_num_tokens": None, "max_matching_ngram_size": 2}, "no effect"),
    ],
)
def test_what_it_does_not_go_with_is_refused(keywords, said) -> None:
    with pytest.raises(OptionError, match=said):
        resolve(**{"prompt_lookup_num_tokens": 4, **keywords})
