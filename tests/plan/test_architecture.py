"""Headers as llama.cpp reads them, and shapes as the engine makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.engine import opening
from localllm.engine.config import EngineConfig
from localllm.gguf import read_header
from localllm.plan import architecture as architectures
from localllm.plan import families
from localllm.plan.architecture import Architecture
from tests import gguf_file as raw
from tests import sparse_models
from tests.plan import other_models
from tests.plan.reality import write
from tests.sparse_models import Sparse, Value
from tests.tiny_models import KINDS


def read(model: Sparse, folder: Path) -> Architecture:
    return architectures.read(read_header(write(model, folder)))


def keys(name: str, **more: Value) -> Sparse:
    """A header without tensors."""
    sizes: dict[str, Value] = {
        "block_count": 8,
        "embedding_length": 512,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "context_length": 4096,
    }
    return Sparse(name, 100, sizes | {key.replace("__", "."): value for key, value in more.items()}, ())


def windows(model: Sparse, folder: Path) -> str:
    return "".join("w" if layer.window else "." for layer in read(model, folder).layers)


def test_heads_and_widths(tmp_path: Path) -> None:
    llama = read(sparse_models.llama_8b(), tmp_path)
    assert (llama.n_layers, llama.n_trunk, llama.n_heads, llama.n_vocab, llama.n_ff) == (32, 32, 32, 128_256, 14_336)
    assert {(layer.k_width, layer.v_width, layer.states) for layer in llama.layers} == {(1024, 1024, ())}
    assert (llama.mla, llama.recurrent, llama.windowed, llama.tied, llama.doubt) == (False, False, False, False, "")


def test_latent_attention_keeps_one_vector(tmp_path: Path) -> None:
    deepseek = read(sparse_models.deepseek2_lite(), tmp_path)
    assert deepseek.mla
    assert {(layer.k_width, layer.v_width) for layer in deepseek.layers} == {(576, 0)}


def test_hybrids_keep_states(tmp_path: Path) -> None:
    qwen = read(sparse_models.qwen35_08b(), tmp_path)
    assert qwen.recurrent
    assert [bool(layer.states) for layer in qwen.layers] == [True, True, True, False] * 6
    assert qwen.layers[0].states == (3 * (2048 + 2 * 16 * 128), 128 * 2048)
    assert (qwen.layers[0].k_width, qwen.layers[3].k_width) == (0, 512)


@pytest.mark.parametrize(
    "name, given, expected",
    [
        ("gemma3", {"attention.sliding_window": 512}, "wwwww.ww"),
        ("gemma3", {}, "........"),
        ("gemma2", {}, "w.w.w.w."),
        ("gpt-oss", {"attention.sliding_window": 128}, "w.w.w.w."),
        ("cohere2", {"attention.sliding_window": 64}, "www.www."),
        ("cohere2moe", {"attention.sliding_window": 64}, ".www.www"),
        ("olmo2", {"attention.sliding_window": 64, "attention.sliding_window_pattern": 2}, "w.w.w.w."),
        ("gpt-oss", {"attention.sliding_window": 64, "attention.sliding_window_pattern": [True, False] + [True] * 6}, "w.wwwwww"),
        ("exaone4", {"attention.sliding_window": 64}, "........"),
        ("llama4", {}, "www.www."),
        ("llama4", {"attention.sliding_window": 0}, "........"),
        ("phi3", {"attention.sliding_window": 64}, "........"),
        ("gemma3", {"attention.sliding_window": 64, "nextn_predict_layers": 2}, "wwwww..."),
        ("lfm2", {"attention.sliding_window": 64, "attention.head_count_kv": [0, 2, 0, 2, 0, 2, 0, 2]}, ".w.w.w.w"),
    ],
)
def test_which_layers_have_a_window(name: str, given: dict[str, Value], expected: str, tmp_path: Path) -> None:
    assert windows(keys(name, **given), tmp_path) == expected


def test_windows_that_the_file_does_not_tell(tmp_path: Path) -> None:
    assert read(keys("gemma2"), tmp_path).n_swa == 4096
    assert read(keys("llama4", attention__sliding_window=100), tmp_path).n_swa == 8192
    assert read(keys("exaone4", attention__sliding_window=100), tmp_path).n_swa == 100


def test_shared_caches_are_counted_once(tmp_path: Path) -> None:
    gemma = read(other_models.gemma4(), tmp_path)
    assert [layer.k_width for layer in gemma.layers] == [128, 128, 256, 0, 0, 0]
    assert gemma.v_width_max == 256


def test_prediction_heads_are_not_part_of_the_trunk(tmp_path: Path) -> None:
    glm = read(other_models.glm4moe(), tmp_path)
    assert (glm.n_layers, glm.n_trunk) == (4, 3)
    assert [layer.k_width for layer in glm.layers] == [128, 128, 128, 0]
    assert "prediction head" in read(keys("glm4moe", nextn_predict_layers=1), tmp_path).doubt


@pytest.mark.parametrize("name", ["deepseek4", "qwen4exp", "t5", "eagle3", "nanbeige", "of-next-year"])
def test_unknown_caches_are_doubtful(name: str, tmp_path: Path) -> None:
    assert name in read(keys(name), tmp_path).doubt
    assert name not in families.KNOWN


def test_nonsense_is_doubtful_and_never_an_error(tmp_path: Path) -> None:
    short = read(keys("llama", attention__head_count_kv=[2, 2]), tmp_path)
    assert "2 of 8 layers" in short.doubt
    assert "which layers" in read(keys("gemma4", attention__sliding_window=64), tmp_path).doubt
    assert read(Sparse("llama", 0, {}, ()), tmp_path).n_layers == 0
    path = tmp_path / "odd.gguf"
    path.write_bytes(
        raw.gguf(
            [raw.string("general.architecture", "llama"), raw.string("llama.block_count", "many"), raw.string("llama.embedding_length", "")]
        )
    )
    assert architectures.read(read_header(path)).layers == ()


NUMBERS = (
    *("embedding_length", "attention.head_count", "attention.head_count_kv", "attention.sliding_window", "nextn_predict_layers"),
    *("attention.sliding_window_pattern", "full_attention_interval", "ssm.conv_kernel", "attention.shared_kv_layers"),
)


@given(name=st.sampled_from(sorted(families.KNOWN)), data=st.data())
def test_any_numbers_are_read(name: str, data: st.DataObject) -> None:
    """Whatever a file says, facts come out: sizes are never negative."""
    from localllm.gguf import Header

    number = st.integers(0, 1 << 20)
    entries = {
        f"{name}.{key}": data.draw(number)
        for key in (
            "embedding_length",
            "attention.head_count",
            "attention.head_count_kv",
            "attention.sliding_window",
            "nextn_predict_layers",
        )
    } | {
        f"{name}.{key}": data.draw(number)
        for key in ("attention.sliding_window_pattern", "full_attention_interval", "ssm.conv_kernel", "attention.shared_kv_layers")
    }
    entries |= {"general.architecture": name, f"{name}.block_count": data.draw(st.integers(0, 20))}
    header = Header(3, 32, entries, (), 0, 0, "", "")
    facts = architectures.read(header)
    assert facts.n_layers == entries[f"{name}.block_count"]
    assert 0 <= facts.n_trunk <= facts.n_layers
    assert all(min(layer.k_width, layer.v_width, *layer.states, 0) == 0 for layer in facts.layers)
    shape = facts.shape(1000, n_seq=2)
    assert shape.n_ctx == 1024
    assert 0 <= shape.n_gpu_layers <= facts.n_layers + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"n_ctx": 300, "n_seq": 1, "n_resident": 0, "n_ubatch": 64},
        {"n_ctx": 2048, "n_seq": 3, "n_resident": 9, "n_draft": 6},
        {"n_ctx": 1000, "n_seq": 20, "n_resident": 30, "n_batch": 32, "n_ubatch": 100},
    ],
)
def test_a_shape_is_what_the_engine_tells_llama_cpp(kind: str, asked: dict[str, int], tmp_path: Path) -> None:
    from localllm.llama.context import Context
    from localllm.llama.lib import api

    path = KINDS[kind](tmp_path / "m.gguf")
    config = EngineConfig(str(path), n_threads=1, **asked)
    facts = architectures.read(read_header(path))
    shape = facts.shape(
        config.n_ctx,
        n_seq=config.n_seq,
        n_resident=config.n_resident,
        n_draft=config.n_draft,
        n_batch=config.n_batch,
        n_ubatch=config.n_ubatch,
    )
    model = opening.open_model(config)
    context = Context(model, opening.context_params(config, model))
    told = (context.n_ctx, context.n_seq, context.n_batch, api.llama_n_ubatch(context.handle), context.n_outputs)
    assert told == (shape.n_ctx, shape.n_seq_max, shape.n_batch, shape.n_ubatch, shape.n_outputs)
    assert (model.n_layer, model.n_swa, model.n_vocab) == (facts.n_trunk, facts.n_swa, facts.n_vocab)
    assert (model.is_recurrent or model.is_hybrid) == facts.recurrent
    context.close()
    model.close()


def test_the_engines_constants_are_these() -> None:
    assert opening.RECURRENT_RESIDENTS == architectures.RECURRENT_RESIDENTS
    assert opening.DEFAULT_CELLS == architectures.DEFAULT_CELLS
