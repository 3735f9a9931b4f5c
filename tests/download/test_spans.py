from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from localllm.download.spans import Spans

SIZE = 60
ranges = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=12)


def members(spans: Spans) -> set[int]:
    return {position for start, end in spans for position in range(start, end)}


@given(ranges)
def test_a_set_of_spans_holds_what_was_added(added: list[tuple[int, int]]) -> None:
    spans = Spans(added)
    expected = {position for start, end in added for position in range(start, end)}
    assert members(spans) == expected
    assert spans.total_bytes == len(expected)
    assert spans.frontier() == next(position for position in range(SIZE + 1) if position not in expected)


@given(ranges)
def test_spans_are_apart_and_in_order(added: list[tuple[int, int]]) -> None:
    pairs = list(Spans(added))
    assert all(start < end for start, end in pairs)
    assert all(before[1] < after[0] for before, after in zip(pairs, pairs[1:], strict=False))


@given(ranges, st.integers(SIZE, SIZE + 5))
def test_missing_is_the_complement(added: list[tuple[int, int]], size: int) -> None:
    spans = Spans(added)
    missing = list(spans.missing(size))
    assert {position for start, end in missing for position in range(start, end)} == set(range(size)) - members(spans)
    assert missing == sorted(missing)


def test_a_copy_is_independent() -> None:
    spans = Spans([(0, 4)])
    copy = spans.copy()
    spans.add(4, 9)
    assert list(copy) == [(0, 4)]
    assert copy.total_bytes == 4
    assert list(spans) == [(0, 9)]
