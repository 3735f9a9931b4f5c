"""GGUF files put together by hand, byte by byte: what no writer would write, too."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from localllm.gguf import Header, parse_header

UINT8, INT8, UINT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 1, 2, 4, 5, 6, 7, 8, 9, 10
F32, Q8_0, Q4_K = 0, 8, 12
_LETTERS = {UINT8: "B", INT8: "b", UINT16: "H", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?", UINT64: "Q"}


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A text, with another length than its own if one is given."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def number(name: str | bytes, value: float, kind: int = UINT32) -> bytes:
    return text(name) + struct.pack(f"<I{_LETTERS[kind]}", kind, value)


def string(name: str | bytes, value: str | bytes, length: int | None = None) -> bytes:
    return text(name) + struct.pack("<I", STRING) + text(value, length)


def items(kind: int, data: bytes, length: int) -> bytes:
    """An array's value."""
    return struct.pack("<IQ", kind, length) + data


def array(name: str | bytes, kind: int, data: bytes, length: int) -> bytes:
    return text(name) + struct.pack("<I", ARRAY) + items(kind, data, length)


def strings(name: str, values: Sequence[str]) -> bytes:
    return array(name, STRING, b"".join(map(text, values)), len(values))


def numbers(name: str, kind: int, values: Sequence[float]) -> bytes:
    return array(name, kind, struct.pack(f"<{len(values)}{_LETTERS[kind]}", *values), len(values))


def tensor(name: str | bytes, shape: Sequence[int], kind: int = F32, offset: int = 0, n_dimensions: int | None = None) -> bytes:
    n = len(shape) if n_dimensions is None else n_dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", n, *shape, kind, offset)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    weights: bytes = b"",
    *,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; `n_keys` and `n_tensors` are what it claims to have."""
    counts = len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + b"\0" * (-len(header) % alignment) + weights


def parsed(data: bytes, name: str = "model.gguf") -> Header:
    """The header of a file that lies in memory."""
    return parse_header(lambda offset, n: data[offset : offset + n], len(data), name)


def small_model() -> bytes:
    """A file with something of every kind in it."""
    keys = [
        string("general.architecture", "llama"),
        string("general.name", "Small \x1b[31m one"),
        number("general.file_type", 7),
        number("llama.block_count", 2),
        number("llama.context_length", 512),
        number("llama.embedding_length", 32),
        number("llama.rope.freq_base", 1e4, FLOAT32),
        numbers("llama.attention.head_count_kv", INT32, [1, 2]),
        string("tokenizer.ggml.model", "gpt2"),
        strings("tokenizer.ggml.tokens", ["a", "b", "é", "<end>"]),
        numbers("tokenizer.ggml.token_type", INT32, [1, 1, 1, 3]),
        numbers("tokenizer.ggml.scores", FLOAT32, [0.0, -1.0, -2.0, 0.0]),
        strings("tokenizer.ggml.merges", ["a b"]),
        number("tokenizer.ggml.eos_token_id", 3),
        number("tokenizer.ggml.add_bos_token", False, BOOL),
        string("tokenizer.chat_template", "{{ messages }}"),
        array("nested", ARRAY, items(UINT8, b"\1\2", 2) + items(STRING, text("x"), 1), 2),
    ]
    tensors = [tensor("token_embd.weight", [32, 4], Q8_0), tensor("output_norm.weight", [32], F32, 160)]
    return gguf(keys, tensors, bytes(160 + 128))
