"""Small sparse models of the families whose caches or placements follow rules of their own, beside those of `tests.sparse_models`.

Dimensions are as small as llama.cpp takes them; tensors are what its loaders ask for, no more.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.sparse_models import Row, Sparse, Value

WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD, VOCAB = 256, 512, 4, 2, 64, 512


class _Block(list[Row]):
    """Tensors in the making: matrices are Q8_0, vectors F32."""

    def __init__(self, tied: bool = False, norm: str = "output_norm") -> None:
        self.matrix("token_embd", WIDTH, VOCAB)
        self.vector(norm, WIDTH)
        if not tied:
            self.matrix("output", WIDTH, VOCAB)

    def matrix(self, name: str, *shape: int) -> None:
        self.append((f"{name}.weight", shape, "Q8_0"))

    def vector(self, name: str, *shape: int, suffix: str = ".weight") -> None:
        self.append((name + suffix, shape, "F32"))

    def norms(self, i: int, *names: str, width: int = WIDTH) -> None:
        for name in names:
            self.vector(f"blk.{i}.{name}", width)

    def attention(self, i: int, head: int = HEAD, kv_heads: int = KV_HEADS, *, heads: int = HEADS) -> None:
        for name, width in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            self.matrix(f"blk.{i}.attn_{name}", WIDTH, width)
        self.matrix(f"blk.{i}.attn_output", heads * head, WIDTH)

    def feed_forward(self, i: int, *, gate: bool = True, experts: tuple[int, ...] = (), suffix: str = "") -> None:
        for name in ("gate", "up") if gate else ("up",):
            self.matrix(f"blk.{i}.ffn_{name}{suffix}", WIDTH, HIDDEN, *experts)
        self.matrix(f"blk.{i}.ffn_down{suffix}", HIDDEN, WIDTH, *experts)

    def mamba2(self, i: int, inner: int, state: int, groups: int, heads: int) -> None:
        mixed = inner + 2 * groups * state
        self.matrix(f"blk.{i}.ssm_in", WIDTH, inner + mixed + heads)
        self.vector(f"blk.{i}.ssm_conv1d", 4, mixed)
        self.vector(f"blk.{i}.ssm_conv1d", mixed, suffix=".bias")
        self.vector(f"blk.{i}.ssm_dt", heads, suffix=".bias")
        self.vector(f"blk.{i}.ssm_a", 1, heads, suffix="")
        self.vector(f"blk.{i}.ssm_d", 1, heads, suffix="")
        self.vector(f"blk.{i}.ssm_norm", inner // groups, groups)
        self.matrix(f"blk.{i}.ssm_out", inner, WIDTH)


def _keys(layers: int, **more: Value) -> dict[str, Value]:
    return {
        "block_count": layers,
        "context_length": 8192,
        "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.layer_norm_epsilon": 1e-6,
        "rope.freq_base": 10_000.0,
    } | {key.replace("__", "."): value for key, value in more.items()}


def _ssm(inner: int, state: int, groups: int, heads: int) -> dict[str, Value]:
    sizes = {"inner_size": inner, "state_size": state, "group_count": groups, "time_step_rank": heads, "conv_kernel": 4}
    return {f"ssm.{name}": size for name, size in sizes.items()}


def llama_with_frequencies() -> Sparse:
    """Each device has its own copy of the frequencies."""
    rows = _Block()
    rows.vector("rope_freqs", HEAD // 2)
    for i in range(4):
        rows.norms(i, "attn_norm", "ffn_norm")
        rows.attention(i)
        rows.feed_forward(i)
    return Sparse("llama", VOCAB, _keys(4), tuple(rows))


def gemma2() -> Sparse:
    rows = _Block(tied=True)
    for i in range(5):
        rows.norms(i, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        rows.attention(i)
        rows.feed_forward(i)
    return Sparse("gemma2", VOCAB, _keys(5, attention__sliding_window=300), tuple(rows))


def gemma4() -> Sparse:
    """Wider heads in full layers, the last layers use the cache of others, an embedding for each layer."""
    layers, extra = 6, 64
    windows = [i % 3 != 2 for i in range(layers)]
    rows = _Block(tied=True)
    rows.matrix("per_layer_token_embd", extra * layers, VOCAB)
    rows.matrix("per_layer_model_proj", WIDTH, extra * layers)
    rows.vector("per_layer_proj_norm", extra)
    rows.vector("rope_freqs", HEAD)
    for i, window in enumerate(windows):
        head = HEAD if window else 2 * HEAD
        rows.norms(i, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm")
        rows.norms(i, "attn_q_norm", "attn_k_norm", width=head)
        rows.attention(i, head)
        rows.feed_forward(i)
        rows.matrix(f"blk.{i}.inp_gate", WIDTH, extra)
        rows.matrix(f"blk.{i}.proj", extra, WIDTH)
    more: dict[str, Value] = {
        "attention.key_length": 2 * HEAD,
        "attention.value_length": 2 * HEAD,
        "attention.key_length_swa": HEAD,
        "attention.value_length_swa": HEAD,
        "attention.sliding_window": 300,
        "attention.sliding_window_pattern": windows,
        "attention.shared_kv_layers": 3,
        "embedding_length_per_layer_input": extra,
        "rope.freq_base_swa": 10_000.0,
        "rope.dimension_count": 2 * HEAD,
        "rope.dimension_count_swa": HEAD,
    }
    return Sparse("gemma4", VOCAB, _keys(layers) | more, tuple(rows))


def cohere2() -> Sparse:
    rows = _Block(tied=True)
    for i in range(5):
        rows.norms(i, "attn_norm")
        rows.attention(i)
        rows.feed_forward(i)
    return Sparse("cohere2", VOCAB, _keys(5, attention__sliding_window=300, logit_scale=1.0), tuple(rows))


def phi3() -> Sparse:
    """It has a window that llama.cpp does not use."""
    rows = _Block()
    rows.vector("rope_factors_long", HEAD // 2)
    rows.vector("rope_factors_short", HEAD // 2)
    for i in range(3):
        rows.norms(i, "attn_norm", "ffn_norm")
        rows.attention(i)
        rows.matrix(f"blk.{i}.ffn_up", WIDTH, 2 * HIDDEN)
        rows.matrix(f"blk.{i}.ffn_down", HIDDEN, WIDTH)
    return Sparse("phi3", VOCAB, _keys(3, attention__sliding_window=300, rope__dimension_count=HEAD), tuple(rows))


def smallthinker() -> Sparse:
    rows = _Block()
    for i in range(5):
        rows.norms(i, "attn_norm", "ffn_norm")
        rows.attention(i)
        rows.vector(f"blk.{i}.ffn_gate_inp", WIDTH, 8)
        rows.feed_forward(i, experts=(8,), suffix="_exps")
    more: dict[str, Value] = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": HIDDEN, "expert_gating_func": 2}
    return Sparse("smallthinker", VOCAB, _keys(5, attention__sliding_window=300) | more, tuple(rows))


def glm4moe() -> Sparse:
    """The last block is a prediction head, which is not loaded."""
    layers, experts = 4, 8
    rows = _Block()
    for i in range(layers):
        rows.norms(i, "attn_norm", "post_attention_norm")
        rows.attention(i)
        if i == 0:
            rows.feed_forward(i)
        else:
            rows.vector(f"blk.{i}.ffn_gate_inp", WIDTH, experts)
            rows.vector(f"blk.{i}.exp_probs_b", experts, suffix=".bias")
            rows.feed_forward(i, experts=(experts,), suffix="_exps")
            rows.feed_forward(i, suffix="_shexp")
    last = layers - 1
    rows.matrix(f"blk.{last}.nextn.eh_proj", 2 * WIDTH, WIDTH)
    rows.norms(last, "nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm")
    more: dict[str, Value] = {
        "nextn_predict_layers": 1,
        "leading_dense_block_count": 1,
        "expert_count": experts,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_feed_forward_length": HIDDEN,
    }
    return Sparse("glm4moe", VOCAB, _keys(layers) | more, tuple(rows))


def lfm2() -> Sparse:
    """Short convolutions and attention; what it calls token_embd_norm is the output's."""
    kv_heads = [0, 0, KV_HEADS, 0, KV_HEADS]
    rows = _Block(tied=True, norm="token_embd_norm")
    for i, heads in enumerate(kv_heads):
        rows.norms(i, "attn_norm", "ffn_norm")
        rows.feed_forward(i)
        if heads:
            rows.norms(i, "attn_q_norm", "attn_k_norm", width=HEAD)
            rows.attention(i)
        else:
            rows.vector(f"blk.{i}.shortconv.conv", 3, WIDTH)
            rows.matrix(f"blk.{i}.shortconv.in_proj", WIDTH, 3 * WIDTH)
            rows.matrix(f"blk.{i}.shortconv.out_proj", WIDTH, WIDTH)
    more: dict[str, Value] = {"attention.head_count_kv": kv_heads, "shortconv.l_cache": 3}
    return Sparse("lfm2", VOCAB, _keys(5) | more, tuple(rows))


def _mamba(rows: _Block, i: int, inner: int, state: int, rank: int) -> None:
    rows.matrix(f"blk.{i}.ssm_in", WIDTH, 2 * inner)
    rows.vector(f"blk.{i}.ssm_conv1d", 4, inner)
    rows.vector(f"blk.{i}.ssm_conv1d", inner, suffix=".bias")
    rows.matrix(f"blk.{i}.ssm_x", inner, rank + 2 * state)
    rows.matrix(f"blk.{i}.ssm_dt", rank, inner)
    rows.vector(f"blk.{i}.ssm_dt", inner, suffix=".bias")
    rows.vector(f"blk.{i}.ssm_a", state, inner, suffix="")
    rows.vector(f"blk.{i}.ssm_d", inner, suffix="")
    rows.matrix(f"blk.{i}.ssm_out", inner, WIDTH)


def mamba() -> Sparse:
    inner, state, rank = 2 * WIDTH, 16, 32
    rows = _Block(tied=True)
    for i in range(4):
        rows.norms(i, "attn_norm")
        _mamba(rows, i, inner, state, rank)
    keys = _keys(4, attention__head_count=0, feed_forward_length=0) | _ssm(inner, state, 0, rank)
    del keys["ssm.group_count"]
    return Sparse("mamba", VOCAB, keys, tuple(rows))


def jamba() -> Sparse:
    inner, state, rank = 2 * WIDTH, 16, 32
    kv_heads = [0, KV_HEADS, 0, KV_HEADS]
    rows = _Block()
    for i, heads in enumerate(kv_heads):
        rows.norms(i, "attn_norm", "ffn_norm")
        if heads:
            rows.attention(i)
        else:
            _mamba(rows, i, inner, state, rank)
            rows.norms(i, "ssm_dt_norm", width=rank)
            rows.norms(i, "ssm_b_norm", "ssm_c_norm", width=state)
        rows.feed_forward(i)
    keys = _keys(4) | _ssm(inner, state, 0, rank) | {"attention.head_count_kv": kv_heads}
    del keys["ssm.group_count"]
    return Sparse("jamba", VOCAB, keys, tuple(rows))


def falcon_h1() -> Sparse:
    """Every layer has attention and a state."""
    rows = _Block(tied=True)
    for i in range(3):
        rows.norms(i, "attn_norm")
        rows.vector(f"blk.{i}.ffn_norm", WIDTH, suffix="")
        rows.mamba2(i, 384, 32, 1, 6)
        rows.attention(i)
        rows.feed_forward(i)
    return Sparse("falcon-h1", VOCAB, _keys(3) | _ssm(384, 32, 1, 6), tuple(rows))


def granite_hybrid() -> Sparse:
    kv_heads = [0, KV_HEADS, 0]
    rows = _Block(tied=True)
    for i, heads in enumerate(kv_heads):
        rows.norms(i, "attn_norm", "ffn_norm")
        if heads:
            rows.attention(i)
        else:
            rows.mamba2(i, 2 * WIDTH, 32, 2, 8)
        rows.feed_forward(i)
    more: dict[str, Value] = {"attention.head_count_kv": kv_heads, "logit_scale": 1.0}
    return Sparse("granitehybrid", VOCAB, _keys(3) | _ssm(2 * WIDTH, 32, 2, 8) | more, tuple(rows))


def nemotron_h() -> Sparse:
    """A layer is a state, attention or feed-forward."""
    kv_heads, hidden = [0, 0, KV_HEADS, 0], [0, HIDDEN, 0, 0]
    rows = _Block()
    for i in range(4):
        rows.norms(i, "attn_norm")
        if kv_heads[i]:
            rows.attention(i)
        elif hidden[i]:
            rows.feed_forward(i, gate=False)
        else:
            rows.mamba2(i, 384, 32, 2, 6)
    more: dict[str, Value] = {"attention.head_count_kv": kv_heads, "feed_forward_length": hidden}
    return Sparse("nemotron_h", VOCAB, _keys(4) | _ssm(384, 32, 2, 6) | more, tuple(rows))


def kimi_linear() -> Sparse:
    """Delta attention with a state, and latent attention."""
    kv_heads, lora, rope, nope, value, kda = [0, 0, 1, 0], 128, 32, 64, 64, 64
    rows = _Block()
    for i, heads in enumerate(kv_heads):
        block = f"blk.{i}"
        rows.norms(i, "attn_norm", "ffn_norm")
        if heads:
            rows.vector(f"{block}.attn_kv_a_norm", lora)
            rows.matrix(f"{block}.attn_q", WIDTH, HEADS * (nope + rope))
            rows.matrix(f"{block}.attn_kv_a_mqa", WIDTH, lora + rope)
            rows.matrix(f"{block}.attn_k_b", nope, lora, HEADS)
            rows.matrix(f"{block}.attn_v_b", lora, value, HEADS)
            rows.matrix(f"{block}.attn_output", HEADS * value, WIDTH)
        else:
            for name in "qkv":
                rows.vector(f"{block}.ssm_conv1d_{name}", 4, 1, kda * HEADS)
                rows.matrix(f"{block}.attn_{name}", WIDTH, kda * HEADS)
            for name in "fg":
                rows.matrix(f"{block}.ssm_{name}_a", WIDTH, kda)
                rows.matrix(f"{block}.ssm_{name}_b", kda, kda * HEADS)
            rows.matrix(f"{block}.ssm_beta", WIDTH, HEADS)
            rows.vector(f"{block}.ssm_a", 1, HEADS, suffix="")
            rows.vector(f"{block}.ssm_dt", kda * HEADS, suffix=".bias")
            rows.vector(f"{block}.ssm_norm", kda)
            rows.matrix(f"{block}.attn_output", kda * HEADS, WIDTH)
        rows.feed_forward(i)
    more: dict[str, Value] = {
        "attention.head_count_kv": kv_heads,
        "attention.key_length": lora + rope,
        "attention.value_length": lora,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": value,
        "attention.kv_lora_rank": lora,
        "rope.dimension_count": rope,
        "ssm.conv_kernel": 4,
        "kda.head_dim": kda,
        "leading_dense_block_count": 4,
        "expert_feed_forward_length": HIDDEN,
        "expert_shared_count": 1,
        "expert_gating_func": 2,
    }
    return Sparse("kimi-linear", VOCAB, _keys(4) | more, tuple(rows))


MODELS: dict[str, Callable[[], Sparse]] = {
    "cohere2": cohere2,
    "falcon-h1": falcon_h1,
    "gemma2": gemma2,
    "gemma4": gemma4,
    "glm4moe": glm4moe,
    "granite-hybrid": granite_hybrid,
    "jamba": jamba,
    "kimi-linear": kimi_linear,
    "lfm2": lfm2,
    "llama with frequencies": llama_with_frequencies,
    "mamba": mamba,
    "nemotron-h": nemotron_h,
    "phi3": phi3,
    "smallthinker": smallthinker,
}
