"""A device's memory as so many characters."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from localllm.plan.bar import apportion, segments
from localllm.plan.loadplan import DevicePlan

GIB = 1 << 30


def device(**sizes: int | None) -> DevicePlan:
    return DevicePlan(
        **{"name": "CUDA0", "kind": "gpu", "description": "", "total_bytes": 24 * GIB, "free_bytes": None, "room_bytes": None, **sizes}
    )  # type: ignore[arg-type]


def test_parts_come_in_order_and_fill_the_bar() -> None:
    parts = segments(device(other_bytes=2 * GIB, weights_bytes=12 * GIB, kv_bytes=4 * GIB, compute_bytes=GIB, reserve_bytes=GIB), 48)
    assert [(part.part, part.cells) for part in parts] == [
        ("others", 4),
        ("weights", 24),
        ("kv", 8),
        ("compute", 2),
        ("reserve", 2),
        ("free", 8),
    ]


def test_small_parts_are_seen() -> None:
    parts = segments(device(weights_bytes=20 * GIB, kv_bytes=1), 40)
    assert min(part.cells for part in parts) == 1
    assert sum(part.cells for part in parts) == 40


def test_what_does_not_fit_eats_the_reserve_and_then_shows() -> None:
    tight = {part.part: part.n_bytes for part in segments(device(weights_bytes=23 * GIB, reserve_bytes=2 * GIB), 40)}
    assert tight == {"weights": 23 * GIB, "reserve": GIB}
    over = {part.part: part.n_bytes for part in segments(device(weights_bytes=25 * GIB, reserve_bytes=GIB), 40)}
    assert over == {"weights": 25 * GIB, "over": GIB}


def test_a_device_of_unknown_size_is_as_large_as_the_plan() -> None:
    parts = segments(device(total_bytes=None, weights_bytes=3 * GIB, kv_bytes=GIB), 40)
    assert [(part.part, part.cells) for part in parts] == [("weights", 30), ("kv", 10)]
    assert segments(device(total_bytes=None), 40) == ()


@given(st.lists(st.integers(1, 1 << 40), min_size=1, max_size=8), st.integers(1, 120))
def test_characters_add_up_and_none_is_stolen(sizes: list[int], width: int) -> None:
    cells = apportion(sizes, width)
    assert sum(cells) == width
    assert all(count >= (1 if width >= len(sizes) else 0) for count in cells)
    for one, other in zip(sizes, cells, strict=True):
        assert other <= max(1, one * width / sum(sizes) + 1)
