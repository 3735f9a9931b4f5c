from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from localllm.prompt.stream import StopMatcher, Utf8Stream


def scanned(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """The whole-text definition: the stop that begins first, then the one given first."""
    found = [(at, n) for n, stop in enumerate(stops) if (at := text.find(stop)) >= 0]
    if not found:
        return text, None
    at, n = min(found)
    return text[:at], stops[n]


def streamed(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        text, stop = matcher.push(piece)
        shown += text
        if stop is not None:
            return shown, stop
    text, stop = matcher.flush()
    return shown + text, stop


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


WORDS = st.text("abx", min_size=1, max_size=4)


@given(st.text("abx", max_size=30), st.lists(WORDS, max_size=4, unique=True), st.lists(st.integers(0, 30), max_size=6))
@example("xab", ["xaby", "ab"], [1, 2])
@example("aaab", ["aab", "aa"], [1])
def test_cuts_do_not_change_the_first_stop(text: str, stops: list[str], places: list[int]) -> None:
    assert streamed(cut(text, places), tuple(stops)) == scanned(text, tuple(stops))


@given(st.text("abx", max_size=30), st.lists(WORDS, min_size=1, max_size=4, unique=True))
def test_no_part_of_a_stop_is_shown_and_nothing_else_is_held(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(tuple(stops))
    shown = ""
    for i, char in enumerate(text, 1):
        out, stop = matcher.push(char)
        shown += out
        if stop is not None:
            return
        held = text[len(shown) : i]
        assert text[:i] == shown + held
        assert not held or any(s.startswith(held) for s in stops) or any(s in held for s in stops)


def test_without_stops_text_passes_through() -> None:
    matcher = StopMatcher(())
    text = "as it is"
    assert matcher.push(text) == (text, None)
    assert matcher.flush() == ("", None)


def test_text_after_a_stop_is_dropped() -> None:
    assert StopMatcher(("\n\n",)).push("one\n\ntwo") == ("one", "\n\n")


@given(st.text(), st.lists(st.integers(0, 400), max_size=8))
def test_utf8_cut_anywhere_is_the_same_text(text: str, places: list[int]) -> None:
    data = text.encode("utf-8", "replace")
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    stream = Utf8Stream()
    out = "".join(stream.push(data[a:b]) for a, b in zip(edges, edges[1:], strict=False)) + stream.flush()
    assert out == data.decode("utf-8")


@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=8))
def test_any_bytes_cut_anywhere_decode_alike(data: bytes, places: list[int]) -> None:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    stream = Utf8Stream()
    out = "".join(stream.push(data[a:b]) for a, b in zip(edges, edges[1:], strict=False)) + stream.flush()
    assert out == data.decode("utf-8", "replace")


def test_an_unfinished_code_point_is_held() -> None:
    stream = Utf8Stream()
    assert stream.push("é€".encode()[:3]) == "é"
    assert stream.pending == "€".encode()[:1]
    assert stream.flush() == "\ufffd"
