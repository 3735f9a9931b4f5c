"""Blowing a demo model up to the shape, file size and cost of a real one, without changing what it says.

The weights of the demo model sit in the first columns and rows of each tensor; everything else is
zero, so each added width, head and layer computes exactly nothing and costs exactly what it would
cost in a trained model. RMSNorm averages over the wider vector: its weights are scaled by
sqrt(old width / new width) and its epsilon by old width / new width, which keeps it exact.
A draft model of the demo family keeps its true acceptance rate against the inflated target.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localllm.errors import ModelError
from localllm.paths import directories

if TYPE_CHECKING:
    import gguf
    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

QUANTS = ("q8_0", "q4_k_m")
SHIPPED = "q8_0"


@dataclass(frozen=True, slots=True)
class Shape:
    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    hidden: int

    def with_head(self, head: int, heads: int) -> Shape:
        """The same size with heads of the source's size: a wider one would change the softmax scale and the rotary pairs.

        All `heads` of the source must share key/value head 0.
        """
        mine, kv = self.heads * self.head // head, self.kv_heads * self.head // head
        if mine // kv < heads:
            kv = mine // heads
        return Shape(self.layers, self.width, mine, kv, head, self.hidden)


SHAPES = {
    "1b": Shape(16, 2048, 32, 8, 64, 8192),
    "3b": Shape(28, 3072, 24, 8, 128, 8192),
    "8b": Shape(32, 4096, 32, 8, 128, 14336),
    "70b": Shape(80, 8192, 64, 8, 128, 28672),
}
"""The published shapes of Llama 3."""


def inflated_demo(source: Path, shape: str, quant: str, report: Callable[[str], None]) -> Path:
    """The file of a built-in model in that shape and quantisation, in the cache directory; made when it is not there.

    Raises ModelError, and OSError when the disk is full.
    """
    name = source.stem.removesuffix(f"-{SHIPPED}")
    target = directories().cache / "bench" / f"{name}-{shape}-{quant}.gguf"
    if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
        return target
    report(f"making {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        small, large = Path(folder) / "small.gguf", Path(folder) / "large.gguf"
        if quant == SHIPPED:
            small = source
        else:
            _requantize(source, small, quant)
        inflate(small, large, shape)
        os.replace(large, target)
    return target


def _requantize(source: Path, target: Path, quant: str) -> None:
    command = [sys.executable, "-P", "-m", "localllm.llama.quantize", str(source), str(target), quant]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"llama.cpp ended with code {done.returncode}"]
        raise ModelError(f"cannot make a {quant} of {source.name}: {said[-1]}", hint="use --quant q8_0")


def inflate(source: Path, target: Path, shape: str, *, vocab: int = 0) -> None:
    """Write `source` in the size of SHAPES[shape]; `vocab` pads the vocabulary with unused tokens (Llama 3: 128256).

    The source's width must be a multiple of its quantisation block, and it must have one key/value
    head; raises ModelError otherwise.
    """
    import gguf

    model = _Source(gguf.GGUFReader(source))
    if model.field("llama.attention.head_count_kv") != 1:
        raise ModelError(f"{source.name} has more than one key/value head", hint="inflate one of the built-in models")
    heads = int(model.field("llama.attention.head_count"))
    to = SHAPES[shape].with_head(model.width // heads, heads)
    writer = gguf.GGUFWriter(str(target), "llama")
    try:
        _write_metadata(writer, model, to, shape.upper(), vocab)
        _write_tensors(writer, model, to, vocab)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
    finally:
        writer.close()


class _Source:
    """The model that is inflated."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self.reader = reader
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.width = int(self.field("llama.embedding_length"))
        self.layers = int(self.field("llama.block_count"))
        self.vocab = int(self.tensors["token_embd.weight"].data.shape[0])

    def field(self, key: str) -> Any:
        return self.reader.fields[key].contents()

    def norm(self, name: str, width: int) -> npt.NDArray[np.float32]:
        """Weights of a norm over `width` values; zero for a layer that the source lacks."""
        import numpy as np

        out = np.zeros(width, np.float32)
        if name in self.tensors:
            out[: self.width] = np.asarray(self.tensors[name].data, np.float32) * np.float32(np.sqrt(self.width / width))
        return out

    def matrix(self, name: str, like: str, rows: int, columns: int) -> tuple[Bytes, gguf.GGMLQuantizationType]:
        """A tensor extended with zeros, of the type of `like`, as bytes; all-zero bytes are a zero block in every type used here."""
        import gguf
        import numpy as np

        kind = self.tensors[like].tensor_type
        block, size = gguf.GGML_QUANT_SIZES[kind]
        out = np.zeros((rows, columns // block * size), np.uint8)
        if name in self.tensors:
            data = np.ascontiguousarray(self.tensors[name].data)
            blocks = data.view(np.uint8).reshape(data.shape[0], -1)
            out[: blocks.shape[0], : blocks.shape[1]] = blocks
        return out, kind


def _write_metadata(writer: gguf.GGUFWriter, model: _Source, to: Shape, label: str, vocab: int) -> None:
    import gguf

    extra = max(0, vocab - model.vocab)
    changed: dict[str, Any] = {
        "general.name": f"{model.field('general.name')} inflated to {label.lower()}",
        "general.size_label": label,
        "llama.embedding_length": to.width,
        "llama.block_count": to.layers,
        "llama.feed_forward_length": to.hidden,
        "llama.attention.head_count": to.heads,
        "llama.attention.head_count_kv": to.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5 * model.width / to.width,
        "llama.vocab_size": max(vocab, model.vocab),
        "tokenizer.ggml.tokens": [*model.field("tokenizer.ggml.tokens"), *(f"<|unused_{i}|>" for i in range(extra))],
        "tokenizer.ggml.token_type": [*model.field("tokenizer.ggml.token_type"), *[int(gguf.TokenType.UNUSED)] * extra],
    }
    for key, field in model.reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            value = changed.get(key, field.contents())
            writer.add_key_value(key, value, kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)


def _write_tensors(writer: gguf.GGUFWriter, model: _Source, to: Shape, vocab: int) -> None:
    def put(name: str, like: str, rows: int, columns: int) -> None:
        data, kind = model.matrix(name, like, rows, columns)
        writer.add_tensor(name, data, raw_dtype=kind)

    put("token_embd.weight", "token_embd.weight", max(vocab, model.vocab), to.width)
    matrices = {
        "attn_q": (to.heads * to.head, to.width),
        "attn_k": (to.kv_heads * to.head, to.width),
        "attn_v": (to.kv_heads * to.head, to.width),
        "attn_output": (to.width, to.heads * to.head),
        "ffn_gate": (to.hidden, to.width),
        "ffn_up": (to.hidden, to.width),
        "ffn_down": (to.width, to.hidden),
    }
    for i in range(to.layers):
        for name in ("attn_norm.weight", "ffn_norm.weight"):
            writer.add_tensor(f"blk.{i}.{name}", model.norm(f"blk.{i}.{name}", to.width))
        for name, (rows, columns) in matrices.items():
            # layers past the source are zero, in the mix of quantisation types that the source has
            put(f"blk.{i}.{name}.weight", f"blk.{i % model.layers}.{name}.weight", rows, columns)
    writer.add_tensor("output_norm.weight", model.norm("output_norm.weight", to.width))
