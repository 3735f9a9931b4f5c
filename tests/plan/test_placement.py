"""Layers on devices, by llama.cpp's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.plan.placement import place
from localllm.plan.spec import CPU


def test_the_last_layers_and_the_output_go_first() -> None:
    placement = place(32, 1, ["CUDA0"], ())
    assert placement.items() == [(CPU, 0, 32), ("CUDA0", 32, 33)]
    assert place(32, 5, ["CUDA0"], ()).items() == [(CPU, 0, 28), ("CUDA0", 28, 33)]
    assert place(32, 33, ["CUDA0"], ()).items() == [("CUDA0", 0, 33)]
    assert place(32, 99, ["CUDA0"], ()).items() == [("CUDA0", 0, 33)]


def test_without_devices_or_layers_all_is_on_the_cpu() -> None:
    assert place(32, 33, [], ()).items() == [(CPU, 0, 33)]
    assert place(32, 0, ["CUDA0", "CUDA1"], (1.0, 1.0)).items() == [(CPU, 0, 33)]
    assert place(0, 1, ["CUDA0"], ()).items() == [("CUDA0", 0, 1)]


def test_a_device_without_a_share_gets_nothing() -> None:
    assert place(32, 33, ["CUDA0", "CUDA1"], (0.0, 1.0)).items() == [("CUDA1", 0, 33)]


@pytest.mark.parametrize("split", [(), (1.0,), (0.0, 0.0)])
def test_several_devices_need_a_share_each(split: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="a share for each"):
        place(32, 33, ["CUDA0", "CUDA1"], split)


shares = st.floats(0, 2.0**40, allow_nan=False, width=32) | st.integers(0, 48 << 30).map(float)


@given(
    n_layers=st.integers(0, 200),
    n_gpu_layers=st.integers(0, 210),
    split=st.lists(shares, min_size=1, max_size=8).filter(lambda split: sum(split) > 0),
)
def test_every_layer_lies_where_32_bit_arithmetic_puts_it(n_layers: int, n_gpu_layers: int, split: list[float]) -> None:
    names = [f"CUDA{i}" for i in range(len(split))]
    placement = place(n_layers, n_gpu_layers, names, split)
    total = np.float32(0)
    bounds: list[np.float32] = []
    for share in split:
        total = np.float32(total + np.float32(share))
        bounds.append(total)
    bounds = [np.float32(bound / total) for bound in bounds]
    on_gpu = min(n_gpu_layers, n_layers + 1)
    first = n_layers + 1 - on_gpu
    for layer in range(n_layers + 1):
        expected = CPU
        if layer >= first:
            share = np.float32(np.float32(layer - first) / np.float32(on_gpu))
            expected = names[next(i for i, bound in enumerate(bounds) if bound > share)]
        assert placement.device(layer) == expected
    assert sum(end - begin for begin, end in placement.ranges) == n_layers + 1
