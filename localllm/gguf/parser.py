"""The GGUF format, versions 2 and 3: from bytes to a Header, every count, size and offset checked before it is believed.

llama.cpp checks much of this itself by now; builds of a year ago read beyond their memory instead (CVE-2025-49847, CVE-2026-7482).
"""

from __future__ import annotations

import math
from operator import attrgetter
from struct import Struct
from types import MappingProxyType

from localllm.errors import ModelError
from localllm.gguf import foreign, tokenizer
from localllm.gguf.cursor import Cursor, Read, quoted
from localllm.gguf.header import Array, Header, Scalar, Tensor, Value
from localllm.gguf.types import ARRAY, RETIRED_TENSOR_TYPES, SCALARS, STRING, TENSOR_TYPES, UINT32

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAX_ALIGNMENT = "general.alignment", 32, 1 << 16
TOKENIZER = "tokenizer."
MAX_KEYS = MAX_TENSORS = 1 << 15
MAX_DIMENSIONS = 4
MAX_NESTING = 4
MAX_KEY_BYTES = (1 << 16) - 1
MAX_TENSOR_NAME_BYTES = 63
"""llama.cpp's GGML_MAX_NAME, less the final zero."""
MAX_TEXT_BYTES = 1 << 20
"""Longer ones, such as a whole tokenizer.json, become an Array of bytes."""
MAX_KEPT_ARRAY_BYTES = 1 << 16
MAX_SIZE = (1 << 63) - 1
ROW_ITEMS = 32
"""What a key or tensor takes of the budget: as long as that many texts in a list."""

_COUNTS, _LIST = Struct("<QQ"), Struct("<IQ")
_SHAPES = [Struct(f"<{n}QIQ") for n in range(MAX_DIMENSIONS + 1)]
"""By number of dimensions: the dimensions, the type, the offset."""

Row = tuple[str, tuple[int, ...], str, int, int]
"""Name, shape, type, offset from the start of the weights and size in bytes."""


def parse_header(read: Read, file_bytes: int, name: str) -> Header:
    """The header of a file of `file_bytes` bytes, fetched with `read(offset, length)` in growing chunks from the start.

    `name` is for error messages. Raises ModelError, and whatever `read` raises.
    """
    return parse(Cursor(read, file_bytes, name))


def parse(cursor: Cursor) -> Header:
    """The header at the start of a source. Raises ModelError."""
    version = _version(cursor)
    n_tensors, n_keys = cursor.unpack(_COUNTS)
    if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
        raise cursor.damaged(f"it claims {n_tensors:,} tensors and {n_keys:,} metadata keys, {MAX_TENSORS:,} are the most")
    metadata: dict[str, Value] = {}
    raw_keys: list[bytes] = []
    for _ in range(n_keys):
        start = cursor.position
        key = _key_and_value(cursor, metadata)
        n_bytes = cursor.position - start
        if not key.startswith(TOKENIZER) and n_bytes <= MAX_KEPT_ARRAY_BYTES:
            cursor.spend(kept_bytes=n_bytes)
            raw_keys.append(cursor.slice(start, n_bytes))
    alignment = _alignment(cursor, metadata)
    rows = [_row(cursor) for _ in range(n_tensors)]
    data_offset = -(-cursor.position // alignment) * alignment
    tensors = _placed(cursor, rows, data_offset, alignment)
    tokenizer_hash, vocab_hash = tokenizer.hashes(cursor, metadata)
    return Header(
        version=version,
        alignment=alignment,
        metadata=MappingProxyType(metadata),
        tensors=tensors,
        data_offset=data_offset,
        file_bytes=cursor.file_bytes,
        tokenizer_hash=tokenizer_hash,
        vocab_hash=vocab_hash,
        raw_keys=tuple(raw_keys),
    )


def _version(cursor: Cursor) -> int:
    start = cursor.peek(foreign.PEEK_BYTES)
    if not start.startswith(MAGIC):
        what, hint = foreign.explain(start, cursor.file_bytes)
        raise ModelError(f"{cursor.name} is not a GGUF file: it is {what}", hint=hint)
    cursor.skip(len(MAGIC))
    version = cursor.number()
    if version in VERSIONS:
        return version
    if version and not version & 0xFFFF:
        raise ModelError(f"{cursor.name} is a big-endian GGUF file", hint="fetch the little-endian one: this machine reads no other")
    if version < min(VERSIONS):
        raise ModelError(f"{cursor.name} is a GGUF file of version {version}, which is not read any more", hint="fetch a newer one")
    raise ModelError(f"{cursor.name} is a GGUF file of version {version:,}, newer than this localllm", hint="update localllm")


def _key_and_value(cursor: Cursor, metadata: dict[str, Value]) -> str:
    """Read one entry into `metadata`; returns its key."""
    key = _name(cursor, "metadata key", MAX_KEY_BYTES)
    if key in metadata:
        raise cursor.damaged(f"its header has the key {quoted(key)} twice")
    kind = cursor.number()
    if key == ALIGNMENT_KEY and kind != UINT32:
        raise cursor.damaged(f"{ALIGNMENT_KEY} is not of type UINT32")
    if kind in SCALARS:
        (metadata[key],) = cursor.unpack(SCALARS[kind][1])
    elif kind == STRING:
        metadata[key] = _text(cursor)
    elif kind == ARRAY:
        metadata[key] = _array(cursor)
    else:
        raise cursor.damaged(f"the value of {quoted(key)} is of the unknown type {kind:,}")
    return key


def _name(cursor: Cursor, what: str, most_bytes: int) -> str:
    """A text that names something: bounded and UTF-8."""
    start, length = cursor.string()
    if length > most_bytes:
        raise cursor.damaged(f"a {what} is {length:,} bytes long, {most_bytes:,} are the most")
    cursor.spend(items=ROW_ITEMS, kept_bytes=length)
    data = cursor.slice(start, length)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise cursor.damaged(f"the {what} {quoted(data.decode('utf-8', 'replace'))} is not UTF-8") from None


def _text(cursor: Cursor) -> Scalar | Array:
    start, length = cursor.string()
    if length > MAX_TEXT_BYTES:
        return Array("UINT8", length, start, length, cursor.sha256(start, length))
    cursor.spend(kept_bytes=length)
    return cursor.slice(start, length).decode("utf-8", "replace")


def _array(cursor: Cursor) -> Array:
    kind, length = cursor.unpack(_LIST)
    start = cursor.position
    _step_over(cursor, kind, length, depth=1)
    n_bytes = cursor.position - start
    data = b""
    if n_bytes <= MAX_KEPT_ARRAY_BYTES and kind != ARRAY:
        cursor.spend(kept_bytes=n_bytes)
        data = cursor.slice(start, n_bytes)
    name = SCALARS[kind][0] if kind in SCALARS else "STRING" if kind == STRING else "ARRAY"
    return Array(name, length, start, n_bytes, cursor.sha256(start, n_bytes), data)


def _step_over(cursor: Cursor, kind: int, length: int, depth: int) -> None:
    """Pass the elements of an array."""
    if kind in SCALARS:
        n_bytes = length * SCALARS[kind][1].size
        cursor.expect(length, SCALARS[kind][1].size)
        cursor.skip(n_bytes)
    elif kind == STRING:
        cursor.expect(length, 8)
        cursor.spend(items=length)
        cursor.strings(length)
    elif kind == ARRAY:
        if depth == MAX_NESTING:
            raise cursor.damaged(f"its header has arrays nested more than {MAX_NESTING} deep")
        cursor.expect(length, _LIST.size)
        cursor.spend(items=length * ROW_ITEMS)
        for _ in range(length):
            inner_kind, inner_length = cursor.unpack(_LIST)
            _step_over(cursor, inner_kind, inner_length, depth + 1)
    else:
        raise cursor.damaged(f"an array has elements of the unknown type {kind:,}")


def _alignment(cursor: Cursor, metadata: dict[str, Value]) -> int:
    value = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    assert isinstance(value, int), "its type was checked when it was read"
    if not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise cursor.damaged(f"{ALIGNMENT_KEY} is {value:,}, not a power of two from 8 to {MAX_ALIGNMENT:,}")
    return value


def _row(cursor: Cursor) -> Row:
    """A row of the tensor table."""
    name = _name(cursor, "tensor name", MAX_TENSOR_NAME_BYTES)
    n_dimensions = cursor.number()
    if n_dimensions > MAX_DIMENSIONS:
        raise cursor.damaged(f"the tensor {quoted(name)} has {n_dimensions:,} dimensions, {MAX_DIMENSIONS} are the most")
    *shape, kind, offset = cursor.unpack(_SHAPES[n_dimensions])
    if kind in RETIRED_TENSOR_TYPES:
        raise ModelError(f"{cursor.name} uses tensor type {kind}, which llama.cpp reads no more", hint="fetch a newer version of the model")
    if kind not in TENSOR_TYPES:
        raise ModelError(f"{cursor.name} uses tensor type {kind:,}, newer than this localllm", hint="update localllm")
    type_name, block_weights, block_bytes = TENSOR_TYPES[kind]
    n_weights = math.prod(shape)
    n_bytes = n_weights // block_weights * block_bytes
    if not 0 < n_weights <= MAX_SIZE or n_bytes > MAX_SIZE:
        raise cursor.damaged(f"the tensor {quoted(name)} has the shape {shape}")
    if (shape[0] if shape else 1) % block_weights:
        raise cursor.damaged(f"the rows of the tensor {quoted(name)} are no multiple of {block_weights}, the block of {type_name}")
    return name, tuple(shape), type_name, offset, n_bytes


def _placed(cursor: Cursor, rows: list[Row], data_offset: int, alignment: int) -> tuple[Tensor, ...]:
    """The tensors of the table, in its order; their names and places are checked."""
    names: set[str] = set()
    tensors: list[Tensor] = []
    for name, shape, type_name, offset, n_bytes in rows:
        if name in names:
            raise cursor.damaged(f"it has the tensor {quoted(name)} twice")
        names.add(name)
        if offset % alignment:
            raise cursor.damaged(f"the tensor {quoted(name)} lies at offset {offset:,}, no multiple of {alignment}")
        if offset > MAX_SIZE - n_bytes:
            raise cursor.damaged(f"the tensor {quoted(name)} of {n_bytes:,} bytes lies at offset {offset:,}, beyond any disk")
        tensors.append(Tensor(name, shape, type_name, data_offset + offset, n_bytes))
    end, last = data_offset, ""
    for tensor in sorted(tensors, key=attrgetter("offset")):
        if tensor.offset < end:
            raise cursor.damaged(f"the tensors {quoted(last)} and {quoted(tensor.name)} overlap")
        end, last = tensor.offset + tensor.n_bytes, tensor.name
    if tensors and end > cursor.file_bytes:
        raise cursor.incomplete(end)
    return tuple(tensors)
