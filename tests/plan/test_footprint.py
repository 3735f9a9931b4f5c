"""Formula = dry run = real load, in integer bytes: over architectures, placements, cache types, sequences and devices."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localllm.engine.opening import context_params, open_model
from localllm.plan.footprint import Footprint
from localllm.plan.spec import CPU
from localllm.plan.weights import experts_on_cpu
from tests import sparse_models
from tests.fake_gpu import APU, MACHINES, RTX_24, FakeGpu
from tests.plan import other_models
from tests.plan.reality import Asked, Measured, config, differences, footprint, measure, write
from tests.sparse_models import Sparse

TABLE: dict[str, Callable[[], Sparse]] = {
    "llama": sparse_models.llama_8b,
    "qwen3": sparse_models.qwen3_06b,
    "qwen3moe": sparse_models.qwen3_30b_a3b,
    "gemma3": sparse_models.gemma3_1b,
    "deepseek2": sparse_models.deepseek2_lite,
    "qwen35": sparse_models.qwen35_08b,
    "gpt-oss": sparse_models.gpt_oss_20b,
}
SMALL: dict[str, Callable[[], Sparse]] = {
    "llama": lambda: sparse_models.llama(3, 256, 4, 2, 64, 512, 1024, 4096),
    "qwen3": lambda: sparse_models.qwen3(3, 256, 4, 2, 64, 512, 1024, 4096, tied=True),
    "qwen3moe": lambda: sparse_models.qwen3moe(3, 256, 4, 2, 64, 256, 8, 2, 1024, 4096),
    "gemma3": lambda: sparse_models.gemma3(7, 256, 4, 2, 64, 512, 256, 1024, 4096),
    # 26 layers make it one of the lite models, whose queries are not compressed
    "deepseek2": lambda: sparse_models.deepseek2(26, 256, 4, 512, 256, 8, 2, 1, 128, 32, 64, 64, 1024, 4096),
    "qwen35": lambda: sparse_models.qwen35(4, 256, 4, 2, 64, 512, 32, 4, 4, n_vocab=1024, n_ctx=4096),
    "gpt-oss": lambda: sparse_models.gpt_oss(4, 256, 4, 2, 64, 256, 8, 2, 128, 1024, 4096),
}
TWO = (RTX_24, FakeGpu("CUDA1", 8 << 30))


def cases(n_layers: int, n_ctx: int = 8192) -> list[Asked]:
    """n_gpu_layers {all, some, 1, 0} x KV {f16, q8_0, q4_0} x sequences {1, 4} x flash attention."""
    every = itertools.product((-1, n_layers // 2, 1, 0), ("f16", "q8_0", "q4_0"), (1, 4), ("on", "off"))
    return [
        {"n_ctx": n_ctx, "n_gpu_layers": layers, "type_k": kind, "type_v": kind, "n_seq": n_seq, "flash_attn": flash}
        for layers, kind, n_seq, flash in every
    ]


def layers(path: Path) -> int:
    return footprint(path).architecture.n_layers


def assert_exact(model: Footprint, measured: list[Measured]) -> None:
    assert differences(model, measured) == []
    assert all(model.weights(each.shape).exact for each in measured)
    assert all(model.kv(each.shape).exact for each in measured)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_the_formula_is_the_dry_run(name: str, tmp_path: Path) -> None:
    path = write(TABLE[name](), tmp_path)
    model, measured = measure(path, cases(layers(path)), [RTX_24])
    assert len(measured) == 32, "values in a quantised cache need flash attention, all else is accepted"
    assert_exact(model, measured)


@pytest.mark.parametrize("name", TABLE)
def test_the_formula_is_the_dry_run_on_the_cpu(name: str, tmp_path: Path) -> None:
    path = write(TABLE[name](), tmp_path)
    mixed = {"type_k": "q8_0", "type_v": "q4_0"} if name != "deepseek2" else {"type_k": "q4_0", "type_v": "q4_0"}
    model, measured = measure(path, [{"n_ctx": 20_000, "n_gpu_layers": 0}, {"n_ctx": 20_000, "n_seq": 3, "n_resident": 7, **mixed}])
    assert len(measured) == 2
    assert_exact(model, measured)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_the_formula_is_the_dry_run_on_two_devices(name: str, tmp_path: Path) -> None:
    path = write(TABLE[name](), tmp_path)
    n = layers(path)
    splits = [(3.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.7), (1.0, 1.0)]
    overrides = [
        experts_on_cpu(5),
        ((r"blk\.1\.", CPU), (r"ffn_down", "CUDA1")),
        ((r"token_embd", "CUDA1"),),
        ((r"^output", CPU), (r"^token_embd", CPU)),
        ((r"attn", CPU),),
        ((r".*", "CUDA1"),),
    ]
    asked: list[Asked] = [
        *({"n_ctx": 8192, "n_gpu_layers": ngl, "tensor_split": split} for ngl in (-1, n - 3, 5, 1, 0) for split in splits),
        *({"n_ctx": 4096, "n_gpu_layers": ngl, "split_mode": "none", "main_gpu": gpu} for ngl in (-1, 7) for gpu in (0, 1, -1)),
        *({"n_ctx": 4096, "n_gpu_layers": ngl, "tensor_split": (1.0, 2.0), "overrides": each} for ngl in (-1, 9) for each in overrides),
    ]
    model, measured = measure(path, asked, TWO)
    assert len(measured) == len(asked)
    assert_exact(model, measured)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen35"])
def test_the_formula_is_the_dry_run_on_four_devices(name: str, tmp_path: Path) -> None:
    path = write(TABLE[name](), tmp_path)
    splits = [(1.0, 1.0, 1.0, 1.0), (0.2, 0.3, 0.1, 0.4), (7.0, 11.0, 0.0, 3.0)]
    asked: list[Asked] = [{"n_ctx": 65536, "n_gpu_layers": ngl, "tensor_split": split} for ngl in (-1, 13) for split in splits]
    model, measured = measure(path, asked, MACHINES["4x24"])
    assert_exact(model, measured)


def test_graphics_without_row_padding_are_counted_on_the_safe_side(tmp_path: Path) -> None:
    path = write(sparse_models.gpt_oss_20b(), tmp_path)
    model, measured = measure(path, [{"n_ctx": 8192}, {"n_ctx": 8192, "n_gpu_layers": 9}], [APU])
    for each in measured:
        weights, real = model.weights(each.shape), each.by_device["Vulkan0"].weights_bytes
        assert "alignment" in weights.doubt
        assert real <= weights.on("Vulkan0") <= real * 1.001


@pytest.mark.parametrize("name", other_models.MODELS)
def test_other_families_keep_their_own_rules(name: str, tmp_path: Path) -> None:
    path = write(other_models.MODELS[name](), tmp_path)
    n = layers(path)
    every = itertools.product((-1, n - 1, 1, 0), ((1, 0), (2, 9)), ("f16", "q8_0"), ("on", "off"))
    asked: list[Asked] = [
        {
            "n_ctx": 4096,
            "n_gpu_layers": ngl,
            "tensor_split": (3.0, 2.0),
            "n_seq": n_seq,
            "n_resident": resident,
            "type_k": kind,
            "type_v": kind,
            "flash_attn": flash,
        }
        for ngl, (n_seq, resident), kind, flash in every
    ]
    model, measured = measure(path, asked, TWO)
    assert_exact(model, measured)
    overrides = ((("rope", "CUDA1"),), ((".*", "CUDA1"),), ((".*", CPU),), (("embd", "CUDA0"), ("norm", CPU)))
    ours, moved = measure(
        path, [{"n_ctx": 1024, "tensor_split": (3.0, 2.0), "overrides": each, "flash_attn": "on"} for each in overrides], TWO
    )
    assert_exact(ours, moved)
    alone, on_cpu = measure(path, [{"n_ctx": 2000, "n_seq": n_seq, "n_ubatch": 128, "flash_attn": "on"} for n_seq in (1, 4)])
    assert_exact(alone, on_cpu)


@pytest.mark.parametrize("name", SMALL)
def test_the_formula_is_the_real_load(name: str, tmp_path: Path) -> None:
    from localllm.llama.breakdown import breakdown
    from localllm.llama.context import Context

    path = write(SMALL[name](), tmp_path)
    model = footprint(path)
    asked: list[Asked] = [each for each in cases(0, 2048) if each["n_gpu_layers"] == 0]
    shapes = [(each, model.architecture.shape(**each)) for each in asked]
    shapes = [(each, shape) for each, shape in shapes if not model.refusal(shape)]
    assert len(shapes) >= 8
    loaded = open_model(config(path, asked[0]))
    try:
        measured: list[Measured] = []
        for each, shape in shapes:
            context = Context(loaded, context_params(config(path, each), loaded))
            measured.append(Measured(each, shape, breakdown(context)))
            context.close()
    finally:
        loaded.close()
    assert_exact(model, measured)


def test_a_mapped_file_shows_the_range_that_is_used(tmp_path: Path) -> None:
    from localllm.llama.breakdown import breakdown
    from localllm.llama.context import Context

    for name in ("llama", "gemma3", "qwen3moe"):
        path = write(SMALL[name](), tmp_path)
        model = footprint(path)
        asked = {"n_ctx": 1024, "n_gpu_layers": 0, "load_mode": "mmap"}
        shape = model.architecture.shape(**asked)
        loaded = open_model(config(path, asked))
        context = Context(loaded, context_params(config(path, asked), loaded))
        rows = breakdown(context)
        context.close()
        loaded.close()
        assert sum(row.mapped_bytes for row in rows) == model.mapped_bytes(shape)
        assert model.maps_file(shape)


_small = st.sampled_from([128, 256, 384, 512])
_heads = st.sampled_from([(2, 1), (4, 2), (4, 4), (8, 2)])
_kinds = st.sampled_from(["Q8_0", "Q4_0", "F16"])


@st.composite
def drawn(draw: st.DrawFn) -> Sparse:
    """A llama, a gemma3 or a qwen35 of random dimensions."""
    heads, kv_heads = draw(_heads)
    head, width, hidden = draw(st.sampled_from([32, 64, 96, 128])), draw(_small), draw(_small)
    n_vocab, kind, tied = draw(st.integers(100, 5000)), draw(_kinds), draw(st.booleans())
    match draw(st.sampled_from(["llama", "gemma3", "qwen35"])):
        case "llama":
            return sparse_models.llama(draw(st.integers(1, 9)), width, heads, kv_heads, head, hidden, n_vocab, 8192, tied, kind)
        case "gemma3":
            window, layers = draw(st.integers(1, 3000)), draw(st.integers(1, 13))
            return sparse_models.gemma3(layers, width, heads, kv_heads, head, hidden, window, n_vocab, 8192, kind, kind)
        case _:
            state, groups = draw(st.sampled_from([32, 64])), draw(st.sampled_from([2, 4]))
            return sparse_models.qwen35(
                draw(st.integers(1, 9)), width, heads, kv_heads, head, hidden, state, groups, groups, n_vocab=n_vocab, n_ctx=8192, kind=kind
            )


@st.composite
def shapes(draw: st.DrawFn) -> Asked:
    kind = draw(st.sampled_from(["f16", "q8_0", "q4_0", "bf16"]))
    return {
        "n_ctx": draw(st.integers(256, 9000)),
        "n_gpu_layers": draw(st.integers(-1, 14)),
        "tensor_split": draw(st.sampled_from([(1.0, 1.0), (1.0, 0.0), (0.37, 0.63), (5.0, 2.0)])),
        "n_seq": draw(st.integers(1, 5)),
        "n_resident": draw(st.integers(0, 5)),
        "n_ubatch": draw(st.sampled_from([32, 128, 512])),
        "type_k": kind,
        "type_v": kind,
        "flash_attn": draw(st.sampled_from(["on", "off"])),
        "swa_full": draw(st.booleans()),
        "overrides": draw(st.sampled_from([(), ((r"ffn_(up|gate)", CPU),), ((r"attn_k", "CUDA0"), (r"blk\.[0-3]\.", "CUDA1"))])),
    }


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model=drawn(), asked=st.lists(shapes(), min_size=3, max_size=12))
def test_the_formula_is_the_dry_run_for_any_dimensions(model: Sparse, asked: list[Asked]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(model, Path(folder))
        ours, measured = measure(path, asked, TWO)
        assert differences(ours, measured) == []


def test_what_is_asked_often_is_answered_at_once(tmp_path: Path) -> None:
    """A plan asks hundreds of times; what depends on the split or the overrides is worked out once."""
    model = footprint(write(sparse_models.llama_8b(), tmp_path), TWO)
    shape = model.architecture.shape(8192, tensor_split=(1.0, 1.0))
    assert model.placement(shape) is model.placement(model.architecture.shape(16384, tensor_split=(1.0, 1.0)))


def test_output_rows_count_all_that_may_ask(tmp_path: Path) -> None:
    model = footprint(write(sparse_models.llama_8b(), tmp_path))
    assert model.output(model.architecture.shape(n_seq=2, n_resident=5)).on(CPU) == 4 * 128_256 * 7
    assert model.output(model.architecture.shape(n_seq=2, n_draft=7)).on(CPU) == 4 * 128_256 * 16
