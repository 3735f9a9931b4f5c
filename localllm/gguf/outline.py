"""A file that has a model's header and no weights: what llama.cpp needs to say how much memory the model would take.

The weights are a hole in the file, which takes no room on the disk. The vocabulary is only a number: llama.cpp takes a second over
the tokens and merges of a real one. So a model can be asked for that is not here yet, as long as its header is.
"""

from __future__ import annotations

import struct
from pathlib import Path

from localllm.errors import ModelError
from localllm.gguf.header import Header, Tensor
from localllm.gguf.parser import MAGIC, VERSIONS
from localllm.gguf.types import STRING, TENSOR_TYPES, UINT32

_CODES = {name: code for code, (name, _, _) in TENSOR_TYPES.items()}
_DROPPED = ("split.",)


def write_outline(header: Header, path: Path) -> None:
    """Write a file of the same architecture, tensors and vocabulary size, as one part.

    Raises ModelError for a header that was not read from a GGUF file, OSError when a file of that size cannot be made there.
    """
    if not header.raw_keys:
        raise ModelError(f"the header of {header.name or 'the model'} is not complete", hint="read it from the file")
    replaced = f"{header.architecture}.vocab_size"
    keys = [raw for raw in header.raw_keys if (key := _key(raw)) != replaced and not key.startswith(_DROPPED)]
    keys += [_entry(replaced, UINT32, struct.pack("<I", header.n_vocab)), _entry("tokenizer.ggml.model", STRING, _text("none"))]
    table: list[bytes] = []
    offset = 0
    for tensor in header.tensors:
        table.append(_row(tensor, offset))
        offset += _padded(tensor.n_bytes, header.alignment)
    start = MAGIC + struct.pack("<IQQ", max(VERSIONS), len(table), len(keys)) + b"".join(keys) + b"".join(table)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(_padded(len(start), header.alignment) + offset)


def _key(raw: bytes) -> str:
    (length,) = struct.unpack_from("<Q", raw)
    return raw[8 : 8 + length].decode("utf-8", "replace")


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _entry(key: str, kind: int, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + value


def _row(tensor: Tensor, offset: int) -> bytes:
    n = len(tensor.shape)
    return _text(tensor.name) + struct.pack(f"<I{n}QIQ", n, *tensor.shape, _CODES[tensor.type], offset)


def _padded(n: int, alignment: int) -> int:
    return n + -n % alignment
