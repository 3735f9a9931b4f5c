"""Tiny GGUFs with random weights, one for each kind of memory that llama.cpp has.

    plain      llama    full attention                              drops any suffix
    hybrid     qwen35   gated delta net and attention by turns      drops nothing
    recurrent  mamba    state-space layers only                     drops nothing
    window     olmo2    sliding-window and full attention by turns  drops a suffix while its window is there

All weights are f32 and drawn with a fixed seed; outputs are not tied to the embeddings and the layers
weigh more than the embeddings, so that the next token depends on the whole context (on the window's
part of it where there is one). The vocabulary is real: the 256 bytes as gpt2 spells them, a few merges,
ChatML's control tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

WINDOW = 32
"""Sliding window of the `window` model, in tokens."""
N_CTX_TRAIN = 4096
END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
LONG = f"<{'long' * 30}>"
"""A user-defined token, longer than a piece usually is."""

_MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("i", "n"), ("Ġt", "he")]
_WIDTH, _LAYERS, _HIDDEN = 48, 4, 64
_EPSILON = 1e-6


class _Writer:
    """A GGUF in the making: metadata of one architecture and random tensors, shapes in ggml's order."""

    def __init__(self, path: Path, architecture: str, seed: int) -> None:
        self.architecture = architecture
        self.gguf = gguf.GGUFWriter(path, architecture)
        self.random = np.random.default_rng(seed)
        self.n_vocab = self._vocabulary()
        self.gguf.add_context_length(N_CTX_TRAIN)
        self.gguf.add_embedding_length(_WIDTH)
        self.gguf.add_block_count(_LAYERS)
        self.gguf.add_feed_forward_length(_HIDDEN)
        self.gguf.add_layer_norm_rms_eps(_EPSILON)
        self.random_tensor("token_embd.weight", _WIDTH, self.n_vocab, gain=3.0)
        self.random_tensor("output.weight", _WIDTH, self.n_vocab, gain=2.5)
        self.constant("output_norm.weight", 1.0, _WIDTH)

    def number(self, key: str, value: int) -> None:
        self.gguf.add_uint32(f"{self.architecture}.{key}", value)

    def random_tensor(self, name: str, *shape: int, gain: float = 1.0) -> None:
        """Normal, with the deviation that keeps a vector's length times `gain`."""
        self._add(name, self.random.normal(0.0, gain / np.sqrt(shape[0]), shape[::-1]))

    def constant(self, name: str, value: float | npt.NDArray[np.float64], *shape: int) -> None:
        self._add(name, np.broadcast_to(value, shape[::-1]))

    def feed_forward(self, block: str) -> None:
        self.random_tensor(f"{block}.ffn_gate.weight", _WIDTH, _HIDDEN)
        self.random_tensor(f"{block}.ffn_up.weight", _WIDTH, _HIDDEN)
        self.random_tensor(f"{block}.ffn_down.weight", _HIDDEN, _WIDTH, gain=2.0)

    def close(self) -> None:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()

    def _add(self, name: str, data: npt.NDArray[np.float64]) -> None:
        self.gguf.add_tensor(name, np.ascontiguousarray(data, np.float32))

    def _vocabulary(self) -> int:
        usual = [*_byte_alphabet(), *("".join(pair) for pair in _MERGES)]
        tokens = [*usual, LONG, END, TURN, TURN_END]
        kinds = [gguf.TokenType.NORMAL] * len(usual) + [gguf.TokenType.USER_DEFINED] + [gguf.TokenType.CONTROL] * 3
        w = self.gguf
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("gpt-2")
        w.add_token_list(tokens)
        w.add_token_types(kinds)
        w.add_token_merges([" ".join(pair) for pair in _MERGES])
        w.add_bos_token_id(tokens.index(END))
        w.add_eos_token_id(tokens.index(END))
        w.add_eot_token_id(tokens.index(TURN_END))
        w.add_add_bos_token(False)
        return len(tokens)


def hybrid(path: Path, seed: int = 1) -> Path:
    """qwen35: layers 0 and 2 are a gated delta net, 1 and 3 are attention."""
    heads, head, state, groups, kernel = 2, 32, 16, 2, 4
    inner = state * groups
    mixed = 3 * inner
    w = _Writer(path, "qwen35", seed)
    w.gguf.add_head_count(heads)
    w.gguf.add_head_count_kv(1)
    w.gguf.add_key_length(head)
    w.gguf.add_value_length(head)
    w.gguf.add_rope_dimension_count(16)
    w.gguf.add_rope_freq_base(10_000.0)
    w.gguf.add_array("qwen35.rope.dimension_sections", [3, 3, 2, 0])
    w.number("ssm.conv_kernel", kernel)
    w.number("ssm.inner_size", inner)
    w.number("ssm.state_size", state)
    w.number("ssm.time_step_rank", groups)
    w.number("ssm.group_count", groups)
    w.number("full_attention_interval", 2)
    for layer in range(_LAYERS):
        block = f"blk.{layer}"
        w.constant(f"{block}.attn_norm.weight", 1.0, _WIDTH)
        w.constant(f"{block}.post_attention_norm.weight", 1.0, _WIDTH)
        if layer % 2:
            w.random_tensor(f"{block}.attn_q.weight", _WIDTH, heads * head * 2)
            w.random_tensor(f"{block}.attn_k.weight", _WIDTH, head)
            w.random_tensor(f"{block}.attn_v.weight", _WIDTH, head)
            w.random_tensor(f"{block}.attn_output.weight", heads * head, _WIDTH, gain=6.0)
            w.constant(f"{block}.attn_q_norm.weight", 1.0, head)
            w.constant(f"{block}.attn_k_norm.weight", 1.0, head)
        else:
            w.random_tensor(f"{block}.attn_qkv.weight", _WIDTH, mixed)
            w.random_tensor(f"{block}.attn_gate.weight", _WIDTH, inner)
            w.random_tensor(f"{block}.ssm_conv1d.weight", kernel, mixed)
            w.constant(f"{block}.ssm_dt.bias", -3.0, groups)
            w.constant(f"{block}.ssm_a", -0.5, groups)
            w.random_tensor(f"{block}.ssm_beta.weight", _WIDTH, groups)
            w.random_tensor(f"{block}.ssm_alpha.weight", _WIDTH, groups)
            w.constant(f"{block}.ssm_norm.weight", 1.0, state)
            w.random_tensor(f"{block}.ssm_out.weight", inner, _WIDTH, gain=2.0)
        w.feed_forward(block)
    w.close()
    return path


def recurrent(path: Path, seed: int = 2) -> Path:
    """mamba: a state of fixed size per sequence and no attention."""
    inner, state, rank, kernel = 2 * _WIDTH, 8, 4, 4
    w = _Writer(path, "mamba", seed)
    w.number("ssm.conv_kernel", kernel)
    w.number("ssm.inner_size", inner)
    w.number("ssm.state_size", state)
    w.number("ssm.time_step_rank", rank)
    w.gguf.add_head_count(0)
    # decay per state, from long memory to short
    decay = -np.linspace(0.05, 1.0, state)
    for layer in range(_LAYERS):
        block = f"blk.{layer}"
        w.constant(f"{block}.attn_norm.weight", 1.0, _WIDTH)
        w.random_tensor(f"{block}.ssm_in.weight", _WIDTH, 2 * inner)
        w.random_tensor(f"{block}.ssm_conv1d.weight", kernel, inner)
        w.constant(f"{block}.ssm_conv1d.bias", 0.0, inner)
        w.random_tensor(f"{block}.ssm_x.weight", inner, rank + 2 * state, gain=2.0)
        w.random_tensor(f"{block}.ssm_dt.weight", rank, inner)
        w.constant(f"{block}.ssm_dt.bias", -1.0, inner)
        w.constant(f"{block}.ssm_a", decay, state, inner)
        w.constant(f"{block}.ssm_d", 0.2, inner)
        w.random_tensor(f"{block}.ssm_out.weight", inner, _WIDTH, gain=2.0)
    w.close()
    return path


def window(path: Path, seed: int = 3) -> Path:
    """olmo2: layers 0 and 2 see the last WINDOW tokens, 1 and 3 see all."""
    heads = 3
    head = _WIDTH // heads
    w = _Writer(path, "olmo2", seed)
    w.gguf.add_head_count(heads)
    w.gguf.add_head_count_kv(1)
    w.gguf.add_rope_freq_base(10_000.0)
    w.gguf.add_sliding_window(WINDOW)
    w.number("attention.sliding_window_pattern", 2)
    for layer in range(_LAYERS):
        block = f"blk.{layer}"
        w.random_tensor(f"{block}.attn_q.weight", _WIDTH, heads * head)
        w.random_tensor(f"{block}.attn_k.weight", _WIDTH, head)
        w.random_tensor(f"{block}.attn_v.weight", _WIDTH, head)
        w.random_tensor(f"{block}.attn_output.weight", heads * head, _WIDTH)
        w.constant(f"{block}.attn_q_norm.weight", 1.5, heads * head)
        w.constant(f"{block}.attn_k_norm.weight", 1.5, head)
        w.constant(f"{block}.post_attention_norm.weight", 1.5, _WIDTH)
        w.constant(f"{block}.post_ffw_norm.weight", 1.5, _WIDTH)
        w.feed_forward(block)
    w.close()
    return path


def plain(path: Path, seed: int = 4) -> Path:
    """llama: full attention in every layer."""
    heads = 3
    head = _WIDTH // heads
    w = _Writer(path, "llama", seed)
    w.gguf.add_head_count(heads)
    w.gguf.add_head_count_kv(1)
    w.gguf.add_rope_dimension_count(head)
    w.gguf.add_rope_freq_base(10_000.0)
    for layer in range(_LAYERS):
        block = f"blk.{layer}"
        w.constant(f"{block}.attn_norm.weight", 1.0, _WIDTH)
        w.constant(f"{block}.ffn_norm.weight", 1.0, _WIDTH)
        w.random_tensor(f"{block}.attn_q.weight", _WIDTH, heads * head, gain=1.5)
        w.random_tensor(f"{block}.attn_k.weight", _WIDTH, head, gain=1.5)
        w.random_tensor(f"{block}.attn_v.weight", _WIDTH, head)
        w.random_tensor(f"{block}.attn_output.weight", heads * head, _WIDTH, gain=6.0)
        w.feed_forward(block)
    w.close()
    return path


KINDS: dict[str, Callable[[Path], Path]] = {"plain": plain, "hybrid": hybrid, "recurrent": recurrent, "window": window}


def _byte_alphabet() -> list[str]:
    """gpt2's printable character for each of the 256 bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256)]
