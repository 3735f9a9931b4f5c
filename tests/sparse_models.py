"""GGUFs with the dimensions of published models and no weights: gigabytes long, a few kilobytes on disk.

The weights are a hole in the file, which reads as zeros. llama.cpp plans such a file like a real one and can even load it; its
vocabulary has a size and no tokens. Recipes follow llama.cpp's Q4_K_M unless the model is published in another type.

    write(llama_8b(), tmp_path / "8b.gguf")

The architectures are functions of their dimensions, so that a test can draw its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tests import gguf_file as raw

Value = bool | int | float | str | Sequence[int]
Row = tuple[str, tuple[int, ...], str]
"""A tensor's name, its shape in ggml's order, and its type."""

_ALIGNMENT = 32
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp takes for rows that are no multiple of 256."""


@dataclass(frozen=True)
class Sparse:
    """A model without weights; the keys are without their architecture."""

    architecture: str
    n_vocab: int
    keys: Mapping[str, Value]
    rows: tuple[Row, ...]

    @property
    def weights_bytes(self) -> int:
        """Of all tensors, as they lie in the file."""
        return sum(_padded(_bytes(shape, kind)) for _, shape, kind in self.rows)


def write(model: Sparse, path: Path) -> Path:
    """Make the file; returns `path`."""
    keys = [
        raw.string("general.architecture", model.architecture),
        raw.string("tokenizer.ggml.model", "none"),
        raw.number(f"{model.architecture}.vocab_size", model.n_vocab),
        *(_key(f"{model.architecture}.{name}", value) for name, value in model.keys.items()),
    ]
    table: list[bytes] = []
    offset = 0
    for name, shape, kind in model.rows:
        table.append(raw.tensor(name, shape, GGMLQuantizationType[kind].value, offset))
        offset += _padded(_bytes(shape, kind))
    header = raw.gguf(keys, table)
    with path.open("wb") as file:
        file.write(header + b"\0" * (-len(header) % _ALIGNMENT))
        file.truncate(file.tell() + offset)
    return path


def _key(name: str, value: Value) -> bytes:
    if isinstance(value, bool):
        return raw.number(name, value, raw.BOOL)
    if isinstance(value, int):
        return raw.number(name, value)
    if isinstance(value, float):
        return raw.number(name, value, raw.FLOAT32)
    if isinstance(value, str):
        return raw.string(name, value)
    return raw.numbers(name, raw.BOOL if all(isinstance(each, bool) for each in value) else raw.INT32, value)


def _bytes(shape: Sequence[int], kind: str) -> int:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert shape[0] % block == 0, (shape, kind)
    return math.prod(shape) // block * size


def _padded(n: int) -> int:
    return n + -n % _ALIGNMENT


class _Rows(list[Row]):
    """Tensors in the making; `kind` is the type of plain matrices, `Q4_K_M` the mix of that name."""

    def __init__(self, kind: str, layers: int) -> None:
        self.kind = kind
        self.layers = layers

    def vector(self, name: str, *shape: int) -> None:
        self.append((name, shape, "F32"))

    def vectors(self, block: str, **widths: int) -> None:
        for name, width in widths.items():
            self.vector(f"{block}.{name}.weight", width)

    def matrix(self, name: str, *shape: int, kind: str = "") -> None:
        kind = kind or ("Q4_K" if self.kind == "Q4_K_M" else self.kind)
        fits = shape[0] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0
        self.append((name, shape, kind if fits else _FALLBACK[kind]))

    def precise(self, layer: int, name: str, *shape: int) -> None:
        """A matrix of a layer (attn_v, ffn_down) that Q4_K_M gives more bits in half of the layers."""
        n = self.layers
        more = layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
        self.matrix(name, *shape, kind="Q6_K" if self.kind == "Q4_K_M" and more else "")

    def vocabulary(self, width: int, n_vocab: int, tied: bool, embedding: str = "", output: str = "") -> None:
        """Embedding, output and its norm; a tied embedding has the type of an output."""
        mixed = self.kind == "Q4_K_M"
        output = output or ("Q6_K" if mixed else self.kind)
        self.matrix("token_embd.weight", width, n_vocab, kind=embedding or (output if tied else ""))
        self.vector("output_norm.weight", width)
        if not tied:
            self.matrix("output.weight", width, n_vocab, kind=output)

    def attention(self, layer: int, width: int, heads: int, kv_heads: int, head: int, *, gated: bool = False) -> None:
        block = f"blk.{layer}"
        self.matrix(f"{block}.attn_q.weight", width, heads * head * (2 if gated else 1))
        self.matrix(f"{block}.attn_k.weight", width, kv_heads * head)
        self.precise(layer, f"{block}.attn_v.weight", width, kv_heads * head)
        self.matrix(f"{block}.attn_output.weight", heads * head, width)

    def feed_forward(self, layer: int, width: int, hidden: int, experts: tuple[int, ...] = (), suffix: str = "") -> None:
        block = f"blk.{layer}"
        self.matrix(f"{block}.ffn_gate{suffix}.weight", width, hidden, *experts)
        self.matrix(f"{block}.ffn_up{suffix}.weight", width, hidden, *experts)
        self.precise(layer, f"{block}.ffn_down{suffix}.weight", hidden, width, *experts)


def _sizes(layers: int, width: int, hidden: int, heads: int, kv_heads: int, head: int, n_ctx: int, eps: float = 1e-6) -> dict[str, Value]:
    return {
        "block_count": layers,
        "context_length": n_ctx,
        "embedding_length": width,
        "feed_forward_length": hidden,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": eps,
        "rope.freq_base": 10_000.0,
    }


def llama(
    layers: int = 32,
    width: int = 4096,
    heads: int = 32,
    kv_heads: int = 8,
    head: int = 128,
    hidden: int = 14336,
    n_vocab: int = 128_256,
    n_ctx: int = 131_072,
    tied: bool = False,
    kind: str = "Q4_K_M",
) -> Sparse:
    """Full attention, grouped queries."""
    rows = _Rows(kind, layers)
    rows.vocabulary(width, n_vocab, tied)
    for layer in range(layers):
        rows.vectors(f"blk.{layer}", attn_norm=width, ffn_norm=width)
        rows.attention(layer, width, heads, kv_heads, head)
        rows.feed_forward(layer, width, hidden)
    keys = _sizes(layers, width, hidden, heads, kv_heads, head, n_ctx, 1e-5) | {"rope.dimension_count": head}
    return Sparse("llama", n_vocab, keys, tuple(rows))


def qwen3(
    layers: int = 36,
    width: int = 4096,
    heads: int = 32,
    kv_heads: int = 8,
    head: int = 128,
    hidden: int = 12288,
    n_vocab: int = 151_936,
    n_ctx: int = 40_960,
    tied: bool = False,
    kind: str = "Q4_K_M",
) -> Sparse:
    """Full attention with norms of queries and keys."""
    rows = _Rows(kind, layers)
    rows.vocabulary(width, n_vocab, tied)
    for layer in range(layers):
        rows.vectors(f"blk.{layer}", attn_norm=width, ffn_norm=width, attn_q_norm=head, attn_k_norm=head)
        rows.attention(layer, width, heads, kv_heads, head)
        rows.feed_forward(layer, width, hidden)
    return Sparse("qwen3", n_vocab, _sizes(layers, width, hidden, heads, kv_heads, head, n_ctx), tuple(rows))


def qwen3moe(
    layers: int = 48,
    width: int = 2048,
    heads: int = 32,
    kv_heads: int = 4,
    head: int = 128,
    hidden: int = 768,
    experts: int = 128,
    used: int = 8,
    n_vocab: int = 151_936,
    n_ctx: int = 262_144,
    kind: str = "Q4_K_M",
) -> Sparse:
    """Experts in every layer; `hidden` is an expert's."""
    rows = _Rows(kind, layers)
    rows.vocabulary(width, n_vocab, tied=False)
    for layer in range(layers):
        rows.vectors(f"blk.{layer}", attn_norm=width, ffn_norm=width, attn_q_norm=head, attn_k_norm=head)
        rows.attention(layer, width, heads, kv_heads, head)
        rows.vector(f"blk.{layer}.ffn_gate_inp.weight", width, experts)
        rows.feed_forward(layer, width, hidden, (experts,), "_exps")
    keys = _sizes(layers, width, 3 * width, heads, kv_heads, head, n_ctx)
    keys |= {"expert_count": experts, "expert_used_count": used, "expert_feed_forward_length": hidden}
    return Sparse("qwen3moe", n_vocab, keys, tuple(rows))


def gemma3(
    layers: int = 26,
    width: int = 1152,
    heads: int = 4,
    kv_heads: int = 1,
    head: int = 256,
    hidden: int = 6912,
    window: int = 512,
    n_vocab: int = 262_144,
    n_ctx: int = 32_768,
    kind: str = "Q4_0",
    embedding: str = "Q8_0",
) -> Sparse:
    """Five layers with a sliding window, then one without; the embedding is the output."""
    rows = _Rows(kind, layers)
    rows.vocabulary(width, n_vocab, tied=True, embedding=embedding)
    for layer in range(layers):
        block = f"blk.{layer}"
        rows.vectors(block, attn_norm=width, ffn_norm=width, attn_q_norm=head, attn_k_norm=head)
        rows.vectors(block, post_attention_norm=width, post_ffw_norm=width)
        rows.attention(layer, width, heads, kv_heads, head)
        rows.feed_forward(layer, width, hidden)
    keys = _sizes(layers, width, hidden, heads, kv_heads, head, n_ctx) | {"attention.sliding_window": window}
    return Sparse("gemma3", n_vocab, keys, tuple(rows))


def deepseek2(
    layers: int = 27,
    width: int = 2048,
    heads: int = 16,
    hidden: int = 10944,
    expert_hidden: int = 1408,
    experts: int = 64,
    used: int = 6,
    shared: int = 2,
    lora: int = 512,
    rope: int = 64,
    nope: int = 128,
    value: int = 128,
    n_vocab: int = 102_400,
    n_ctx: int = 163_840,
    kind: str = "Q4_0",
) -> Sparse:
    """Multi-head latent attention and, after the first layer, experts beside shared ones; the lite layout (no query compression)."""
    rows = _Rows(kind, layers)
    rows.vocabulary(width, n_vocab, tied=False, output="Q6_K")
    for layer in range(layers):
        block = f"blk.{layer}"
        rows.vectors(block, attn_norm=width, ffn_norm=width, attn_kv_a_norm=lora)
        rows.matrix(f"{block}.attn_q.weight", width, heads * (nope + rope))
        rows.matrix(f"{block}.attn_kv_a_mqa.weight", width, lora + rope)
        rows.matrix(f"{block}.attn_k_b.weight", nope, lora, heads)
        rows.matrix(f"{block}.attn_v_b.weight", lora, value, heads)
        rows.matrix(f"{block}.attn_output.weight", heads * value, width)
        if layer == 0:
            rows.feed_forward(layer, width, hidden)
        else:
            rows.vector(f"{block}.ffn_gate_inp.weight", width, experts)
            rows.feed_forward(layer, width, expert_hidden, (experts,), "_exps")
            rows.feed_forward(layer, width, expert_hidden * shared, (), "_shexp")
    keys = _sizes(layers, width, hidden, heads, 1, lora + rope, n_ctx) | {
        "attention.value_length": lora,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": value,
        "attention.kv_lora_rank": lora,
        "rope.dimension_count": rope,
        "leading_dense_block_count": 1,
        "expert_count": experts,
        "expert_used_count": used,
        "expert_shared_count": shared,
        "expert_feed_forward_length": expert_hidden,
        "expert_weights_scale": 1.0,
    }
    return Sparse("deepseek2", n_vocab, keys, tuple(rows))


def qwen35(
    layers: int = 24,
    width: int = 1024,
    heads: int = 8,
    kv_heads: int = 2,
    head: int = 256,
    hidden: int = 3584,
    state: int = 128,
    groups: int = 16,
    value_heads: int = 16,
    kernel: int = 4,
    interval: int = 4,
    n_vocab: int = 248_320,
    n_ctx: int = 262_144,
    kind: str = "Q4_K_M",
) -> Sparse:
    """Three layers of a gated delta net, then one of gated attention; the embedding is the output."""
    rows = _Rows(kind, layers)
    rows.vocabulary(width, n_vocab, tied=True)
    inner = state * value_heads
    mixed = 2 * state * groups + inner
    for layer in range(layers):
        block = f"blk.{layer}"
        rows.vectors(block, attn_norm=width, post_attention_norm=width)
        if (layer + 1) % interval == 0:
            rows.vectors(block, attn_q_norm=head, attn_k_norm=head)
            rows.attention(layer, width, heads, kv_heads, head, gated=True)
        else:
            rows.matrix(f"{block}.attn_qkv.weight", width, mixed)
            rows.matrix(f"{block}.attn_gate.weight", width, inner)
            rows.vector(f"{block}.ssm_conv1d.weight", kernel, mixed)
            rows.vector(f"{block}.ssm_dt.bias", value_heads)
            rows.vector(f"{block}.ssm_a", value_heads)
            rows.matrix(f"{block}.ssm_beta.weight", width, value_heads)
            rows.matrix(f"{block}.ssm_alpha.weight", width, value_heads)
            rows.vector(f"{block}.ssm_norm.weight", state)
            rows.matrix(f"{block}.ssm_out.weight", inner, width)
        rows.feed_forward(layer, width, hidden)
    keys = _sizes(layers, width, hidden, heads, kv_heads, head, n_ctx) | {
        "rope.dimension_count": head // 4,
        "rope.dimension_sections": [11, 11, 10, 0],
        "ssm.conv_kernel": kernel,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": value_heads,
        "ssm.group_count": groups,
        "full_attention_interval": interval,
    }
    return Sparse("qwen35", n_vocab, keys, tuple(rows))


def gpt_oss(
    layers: int = 24,
    width: int = 2880,
    heads: int = 64,
    kv_heads: int = 8,
    head: int = 64,
    hidden: int = 2880,
    experts: int = 32,
    used: int = 4,
    window: int = 128,
    n_vocab: int = 201_088,
    n_ctx: int = 131_072,
) -> Sparse:
    """MXFP4 experts, attention sinks, biases, a sliding window in every other layer."""
    rows = _Rows("Q8_0", layers)
    rows.vocabulary(width, n_vocab, tied=False)
    for layer in range(layers):
        block = f"blk.{layer}"
        rows.vectors(block, attn_norm=width, post_attention_norm=width, attn_sinks=heads)
        rows.attention(layer, width, heads, kv_heads, head)
        for name, size in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head), ("output", width)):
            rows.vector(f"{block}.attn_{name}.bias", size)
        rows.vector(f"{block}.ffn_gate_inp.weight", width, experts)
        rows.vector(f"{block}.ffn_gate_inp.bias", experts)
        for name, into, out in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            rows.matrix(f"{block}.ffn_{name}_exps.weight", into, out, experts, kind="MXFP4")
            rows.vector(f"{block}.ffn_{name}_exps.bias", out, experts)
    keys = _sizes(layers, width, hidden, heads, kv_heads, head, n_ctx, 1e-5) | {
        "attention.sliding_window": window,
        "expert_count": experts,
        "expert_used_count": used,
        "expert_feed_forward_length": hidden,
    }
    return Sparse("gpt-oss", n_vocab, keys, tuple(rows))


def llama_1b() -> Sparse:
    return llama(16, 2048, 32, 8, 64, 8192, tied=True)


def llama_8b() -> Sparse:
    return llama()


def llama_70b() -> Sparse:
    return llama(80, 8192, 64, 8, 128, 28672)


def qwen3_06b() -> Sparse:
    return qwen3(28, 1024, 16, 8, 128, 3072, tied=True)


def qwen3_8b() -> Sparse:
    return qwen3()


def qwen3_30b_a3b() -> Sparse:
    return qwen3moe()


def gemma3_1b() -> Sparse:
    return gemma3()


def gemma3_12b() -> Sparse:
    return gemma3(48, 3840, 16, 8, 256, 15360, 1024, 262_208, 131_072, "Q4_K_M", "Q6_K")


def deepseek2_lite() -> Sparse:
    return deepseek2()


def qwen35_08b() -> Sparse:
    return qwen35()


def gpt_oss_20b() -> Sparse:
    return gpt_oss()


MODELS: dict[str, Callable[[], Sparse]] = {
    "llama-1b": llama_1b,
    "llama-8b": llama_8b,
    "llama-70b": llama_70b,
    "qwen3-0.6b": qwen3_06b,
    "qwen3-8b": qwen3_8b,
    "qwen3-30b-a3b": qwen3_30b_a3b,
    "gemma3-1b": gemma3_1b,
    "gemma3-12b": gemma3_12b,
    "deepseek2-lite": deepseek2_lite,
    "qwen35-0.8b": qwen35_08b,
    "gpt-oss-20b": gpt_oss_20b,
}
