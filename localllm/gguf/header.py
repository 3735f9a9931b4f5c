"""A header as frozen values: metadata, tensor table and what follows from them. Knows no bytes and no files' contents."""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from localllm.errors import ModelError
from localllm.gguf.types import FILE_TYPES, SCALAR_CODES

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Array:
    """An array, or a text too long to keep (then of type UINT8), by its place and its digest.

    A vocabulary has 256,000 tokens: as Python strings they would take 20 MB for each model listed.
    """

    type: str
    """Of the elements: UINT8 … FLOAT64, STRING or ARRAY."""
    length: int
    offset: int
    """Of the first element, in bytes from the start of the file."""
    n_bytes: int
    sha256: str
    """Of the elements as they lie in the file."""
    data: bytes = field(default=b"", repr=False)
    """The elements as they lie in the file; empty when they are long or arrays themselves."""

    def values(self) -> tuple[Scalar, ...]:
        """The elements; raises ModelError when they were too long to keep."""
        if len(self.data) != self.n_bytes:
            raise ModelError(
                f"an array of {self.length:,} elements of type {self.type} stands where a short list belongs",
                hint="the file may be damaged; fetch it again",
            )
        if self.type != "STRING":
            return struct.unpack(f"<{self.length}{SCALAR_CODES[self.type]}", self.data)
        texts: list[str] = []
        position = 0
        for _ in range(self.length):
            end = position + 8 + int.from_bytes(self.data[position : position + 8], "little")
            texts.append(self.data[position + 8 : end].decode("utf-8", "replace"))
            position = end
        return tuple(texts)


Value = Scalar | Array


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of the tensor table."""

    name: str
    shape: tuple[int, ...]
    """In ggml's order: the first dimension is the one whose elements lie side by side."""
    type: str
    """Such as Q4_K."""
    offset: int
    """In bytes from the start of its file."""
    n_bytes: int
    file: int = 0
    """Index into `Header.files`."""

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A model as its file, or its parts, describe it. Texts are as found: they may hold terminal escapes."""

    version: int
    alignment: int
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    data_offset: int
    """Where the weights begin in the first file, in bytes."""
    file_bytes: int
    """Of all files together."""
    tokenizer_hash: str
    """Equal when text becomes the same tokens: model, pre-tokenizer, tokens, types, merges, special ids. Empty without a tokenizer."""
    vocab_hash: str
    """Equal when token ids stand for the same texts, trailing padding aside: what a draft model must share with its target."""
    files: tuple[Path, ...] = ()
    """The first part first; empty for a source that is not a file."""
    raw_keys: tuple[bytes, ...] = field(default=(), repr=False)
    """The metadata but the vocabulary, each key with its value as it lies in the file: what `write_outline` copies."""

    @property
    def architecture(self) -> str:
        return self._text("general.architecture")

    @property
    def name(self) -> str:
        return self._text("general.name")

    @property
    def chat_template(self) -> str:
        """The jinja source; empty if there is none."""
        return self._text("tokenizer.chat_template")

    @property
    def n_layers(self) -> int:
        return self._count("block_count")

    @property
    def n_ctx_train(self) -> int:
        return self._count("context_length")

    @property
    def n_embd(self) -> int:
        return self._count("embedding_length")

    @property
    def n_vocab(self) -> int:
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens.length if isinstance(tokens, Array) else self._count("vocab_size")

    @property
    def n_params(self) -> int:
        return sum(tensor.n_weights for tensor in self.tensors)

    @property
    def weights_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def quant(self) -> str:
        """Such as Q4_K_M: what the file says, else the type of most weights, made exact by the file's name."""
        said = self.metadata.get("general.file_type")
        if isinstance(said, int) and said in FILE_TYPES:
            return FILE_TYPES[said]
        weights = Counter[str]()
        for tensor in self.tensors:
            weights[tensor.type] += tensor.n_weights
        if not weights:
            return ""
        usual = weights.most_common(1)[0][0]
        # Q4_K alone leaves open whether the recipe was Q4_K_S or Q4_K_M
        named = re.search(rf"(?<![A-Z0-9]){usual}(_[A-Z]+)?(?![A-Z0-9_])", self.files[0].name.upper()) if self.files else None
        return named[0] if named else usual

    def get(self, key: str, default: Value | None = None) -> Value | None:
        """The value of `key` of this architecture: `get("block_count")` reads `llama.block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def _text(self, key: str) -> str:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def _count(self, key: str) -> int:
        value = self.get(key)
        return value if isinstance(value, int) and value > 0 else 0
