from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.runtime.text_stream import TextStream


class Words:
    """A vocabulary of strings. `flush` returns the rest of an incomplete character."""

    def __init__(self, words: Sequence[str], rest: str = "") -> None:
        self._words, self._rest = words, rest

    def push(self, token_id: int) -> str:
        return self._words[token_id]

    def flush(self) -> str:
        return self._rest


def answer(text: str, stop: Sequence[str], unstoppable: int = 0) -> str:
    """Applies the rule letter by letter: the answer ends before the stop string that is complete first, or before the
    longest of them, but not one that is complete within the first `unstoppable` letters."""
    for end in range(unstoppable + 1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


letters = st.text("ab<é", max_size=6)


@given(
    st.lists(letters, max_size=12),
    letters,
    st.lists(st.text("ab<é", min_size=1, max_size=5), max_size=4),
    st.sampled_from([0, 0, 1, 2, 5]),
)
def test_deltas_add_up_to_the_text_before_the_first_stop(
    words: list[str], rest: str, stop: list[str], min_tokens: int
) -> None:
    rest = rest if len(words) >= min_tokens else ""
    stream = TextStream(Words(words, rest), stop, min_tokens)
    unstoppable = len("".join(words[:min_tokens]))
    expected = answer("".join(words) + rest, stop, unstoppable)
    shown = ""
    for token_id in range(len(words)):
        shown += stream.push(token_id)
        assert expected.startswith(shown)
        now = "".join(words[: token_id + 1])
        assert stream.stopped == (answer(now, stop, unstoppable) != now)
    assert shown + stream.flush() == expected


@given(st.lists(letters, max_size=12), st.lists(st.text("ab<é", min_size=1, max_size=5), max_size=4))
def test_only_a_possible_stop_is_held_back(words: list[str], stop: list[str]) -> None:
    stream = TextStream(Words(words), stop)
    text = shown = ""
    for token_id, word in enumerate(words):
        text += word
        shown += stream.push(token_id)
        if stream.stopped:
            break
        held = text[len(shown) :]
        assert held == "" or any(s.startswith(held) for s in stop)


def test_a_stop_string_spans_tokens() -> None:
    stream = TextStream(Words(["The ", "end</", "ans", "wer> more"]), ["</answer>"])
    assert [stream.push(i) for i in range(4)] == ["The ", "end", "", ""]
    assert stream.stopped
    assert stream.flush() == ""


def test_a_stop_string_among_the_first_tokens_is_text_even_where_another_may_follow() -> None:
    stream = TextStream(Words(["xab", "q", "ab"]), ["ab", "xabyz"], min_tokens=1)
    assert [stream.push(i) for i in range(3)] == ["", "xabq", ""]
    assert stream.stopped


def test_held_text_appears_when_it_was_no_stop_after_all() -> None:
    stream = TextStream(Words(["a</", "b"]), ["</answer>"])
    assert [stream.push(0), stream.push(1), stream.flush()] == ["a", "</b", ""]
