"""The cache in numbers worked out by hand, and what llama.cpp refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from localllm.plan.cache import window_cells
from localllm.plan.footprint import Footprint
from localllm.plan.spec import CPU
from tests import sparse_models
from tests.fake_gpu import RTX_24
from tests.plan import other_models
from tests.plan.reality import footprint, write
from tests.sparse_models import Sparse

KIB, MIB = 1 << 10, 1 << 20


def of(model: Callable[[], Sparse], folder: Path) -> Footprint:
    return footprint(write(model(), folder), [RTX_24])


@pytest.mark.parametrize("kind, kib", [("f16", 128), ("q8_0", 68), ("q4_0", 36)])
def test_a_token_of_llama_8b(kind: str, kib: int, tmp_path: Path) -> None:
    model = of(sparse_models.llama_8b, tmp_path)
    shape = model.architecture.shape(8192, type_k=kind, type_v=kind)
    assert model.cell_bytes(shape) == kib * KIB
    assert model.kv(shape).by_device == {"CUDA0": kib * KIB * 8192}


def test_measured_sizes(tmp_path: Path) -> None:
    """research/memory.md, measured with llama.cpp."""
    llama = of(sparse_models.llama_8b, tmp_path)
    assert llama.kv(llama.architecture.shape(8192, n_gpu_layers=20)).by_device == {"CUDA0": 637_534_208, CPU: 436_207_616}
    gemma = of(sparse_models.gemma3_1b, tmp_path)
    assert gemma.kv(gemma.architecture.shape(32768)).total_bytes == 157_286_400
    assert gemma.kv(gemma.architecture.shape(32768, swa_full=True)).total_bytes == 872_415_232
    assert gemma.kv(gemma.architecture.shape(32768, n_seq=4, n_batch=1024, n_ubatch=1024)).total_bytes == 203_423_744
    deepseek = of(sparse_models.deepseek2_lite, tmp_path)
    assert deepseek.kv(deepseek.architecture.shape(32768)).total_bytes == 1_019_215_872
    qwen = of(sparse_models.qwen35_08b, tmp_path)
    assert qwen.kv(qwen.architecture.shape(32768)).total_bytes == 422_854_656
    assert qwen.kv(qwen.architecture.shape(32768, n_seq=4)).total_bytes == 483_459_072


def test_windows_grow_with_sequences_and_batches_until_the_context_ends_them(tmp_path: Path) -> None:
    model = of(sparse_models.gemma3_1b, tmp_path)
    facts = model.architecture
    cells = [window_cells(facts, facts.shape(32768, n_seq=n, n_ubatch=ub), 32768) for n, ub in ((1, 512), (1, 128), (4, 512), (100, 512))]
    assert cells == [1024, 768, 2560, 32768]
    assert window_cells(facts, facts.shape(512), 512) == 512


def test_values_without_flash_attention_are_as_wide_as_the_widest(tmp_path: Path) -> None:
    model = of(other_models.gemma4, tmp_path)
    on, off = (model.kv(model.architecture.shape(4096, flash_attn=flash)) for flash in ("on", "off"))
    assert off.total_bytes > on.total_bytes
    assert on.exact
    assert off.exact
    assert "flash attention" in model.kv(model.architecture.shape(4096)).doubt


def test_a_quantised_row_is_padded_once_on_a_device_that_pads(tmp_path: Path) -> None:
    model = of(sparse_models.gemma3_1b, tmp_path)
    shape = model.architecture.shape(4096, type_k="q8_0", type_v="q8_0", swa_full=True)
    row = 256 // 32 * 34
    assert row == 272
    assert model.kv(shape).by_device == {"CUDA0": 26 * 2 * (4096 * row + 384)}
    on_cpu = model.architecture.shape(4096, type_k="q8_0", type_v="q8_0", swa_full=True, n_gpu_layers=0)
    assert model.kv(on_cpu).by_device == {CPU: 26 * 2 * 4096 * row}


def test_reading_is_what_attention_reaches(tmp_path: Path) -> None:
    model = of(sparse_models.gemma3_1b, tmp_path)
    shape = model.architecture.shape(32768)
    row = 2 * 2 * 256
    assert model.kv_read_bytes(shape, 100) == {"CUDA0": 26 * 100 * row}
    assert model.kv_read_bytes(shape, 20_000) == {"CUDA0": (4 * 20_000 + 22 * 512) * row}
    hybrid = of(sparse_models.qwen35_08b, tmp_path)
    shape = hybrid.architecture.shape(32768)
    states = 4 * (3 * 6144 + 128 * 2048)
    assert hybrid.kv_read_bytes(shape, 1000) == {"CUDA0": 18 * states + 6 * 1000 * 2 * 2 * 512}


@pytest.mark.parametrize(
    "model, asked, why",
    [
        (sparse_models.llama_8b, {"type_v": "q8_0", "flash_attn": "off"}, "flash attention"),
        (sparse_models.llama_8b, {"type_k": "q8_0", "flash_attn": "off"}, ""),
        (sparse_models.llama_8b, {"type_k": "q8_0", "type_v": "q4_0"}, ""),
        (sparse_models.deepseek2_lite, {"type_k": "q8_0"}, "one type"),
        (lambda: sparse_models.llama(2, 160, 2, 2, 80, 256, 100, kind="F16"), {"type_k": "q8_0"}, "no multiple of 32"),
        (sparse_models.gemma3_1b, {"n_seq": 30, "n_ubatch": 16}, "below the number of sequences"),
        (sparse_models.llama_8b, {"n_seq": 30, "n_ubatch": 16}, ""),
    ],
)
def test_what_llama_cpp_refuses_is_known_before(model: Callable[[], Sparse], asked: dict[str, object], why: str, tmp_path: Path) -> None:
    ours = of(model, tmp_path)
    refusal = ours.refusal(ours.architecture.shape(8192, **asked))
    assert (why in refusal) if why else not refusal
