"""Rows are shared fully, within limits, in a fair order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from localllm.engine.scheduler import FIRST_CHUNK, IDLE_STEP_MS, MIN_CHUNK, Prompt, StepCost, share_rows

prompts = st.lists(
    st.builds(
        lambda remaining, limit, rank, waited: (remaining, min(limit, remaining), rank, waited),
        st.integers(1, 5000),
        st.integers(1, 5000),
        st.integers(0, 1),
        st.floats(0, 100),
    ),
    max_size=20,
).map(lambda rows: [Prompt(i, remaining, limit, rank, waited_s=waited) for i, (remaining, limit, rank, waited) in enumerate(rows)])


@given(prompts, st.integers(0, 4096))
def test_no_row_is_lost_or_given_twice(waiting: list[Prompt], budget: int) -> None:
    rows = share_rows(waiting, budget)
    assert sum(rows.values()) == min(budget, sum(p.limit for p in waiting))
    for prompt in waiting:
        assert rows.get(prompt.key, 1) >= 1
        assert rows.get(prompt.key, 0) <= prompt.limit


@given(prompts, st.integers(1, 4096))
def test_a_batch_prompt_never_takes_rows_from_an_interactive_one(waiting: list[Prompt], budget: int) -> None:
    rows = share_rows(waiting, budget)
    starved = any(p.rank == 0 and rows.get(p.key, 0) < p.limit for p in waiting)
    assert not (starved and any(p.rank == 1 and p.key in rows for p in waiting))


def test_the_shortest_prompt_goes_first_and_the_rest_is_used() -> None:
    long, short = Prompt(0, 4000, 4000), Prompt(1, 30, 30)
    assert share_rows([long, short], 100) == {1: 30, 0: 70}


def test_waiting_counts_as_progress_so_that_a_long_prompt_is_not_starved() -> None:
    long = Prompt(0, 4000, 4000, waited_s=41.0)
    fresh = Prompt(1, 30, 30)
    assert share_rows([long, fresh], 100, rows_per_second=100.0) == {0: 100}


def test_an_earlier_deadline_goes_first() -> None:
    assert share_rows([Prompt(0, 10, 10, deadline_s=9.0), Prompt(1, 500, 500, deadline_s=5.0)], 64) == {1: 64}


def test_prompt_chunks_follow_the_measured_cost() -> None:
    cost = StepCost()
    assert cost.prompt_rows(100.0, decoding=True) == FIRST_CHUNK
    for _ in range(50):
        cost.record(20.0, decode_rows=4, prompt_rows=0)
        cost.record(20.0 + 64 * 2.0, decode_rows=4, prompt_rows=64)
    assert cost.prompt_rows(100.0, decoding=True) == 40
    assert cost.prompt_rows(21.0, decoding=True) == MIN_CHUNK
    assert cost.prompt_rows(100.0, decoding=False) == IDLE_STEP_MS / 2


@given(st.lists(st.tuples(st.floats(0.01, 1e4), st.integers(0, 64), st.integers(0, 512)), max_size=30))
def test_any_measurement_leaves_a_usable_chunk(steps: list[tuple[float, int, int]]) -> None:
    cost = StepCost()
    for elapsed_ms, decode_rows, prompt_rows in steps:
        cost.record(elapsed_ms, decode_rows, prompt_rows)
    assert cost.prompt_rows(100.0, decoding=True) >= MIN_CHUNK
