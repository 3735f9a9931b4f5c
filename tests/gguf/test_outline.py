"""Outlines: the same model to whoever asks for sizes, and nothing to whoever wants weights or words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from localllm.errors import ModelError
from localllm.gguf import Header, read_header, read_model, write_outline
from tests import sparse_models
from tests.gguf_file import FLOAT32, INT32, UINT8, UINT64, gguf, number, numbers, parsed, string, tensor

VOCABULARY = "tokenizer."


def outline(header: Header, folder: Path) -> Header:
    path = folder / "outline.gguf"
    write_outline(header, path)
    return read_model(path)


def described(header: Header) -> dict[str, object]:
    """The metadata that an outline keeps, arrays by their content."""
    kept = {key: value for key, value in header.metadata.items() if not key.startswith(VOCABULARY)}
    return {key: value if isinstance(value, str | int | float) else (value.type, value.data) for key, value in kept.items()}


def layout(header: Header) -> list[tuple[str, tuple[int, ...], str, int]]:
    return [(each.name, each.shape, each.type, each.n_bytes) for each in header.tensors]


def test_an_outline_says_what_the_model_says(demo_large: Path, tmp_path: Path) -> None:
    whole = read_model(demo_large)
    short = outline(whole, tmp_path)
    assert layout(short) == layout(whole)
    assert short.n_vocab == whole.n_vocab == 2048
    assert described(short) | {"llama.vocab_size": 2048} == described(whole) | {"llama.vocab_size": 2048}
    assert short.metadata["tokenizer.ggml.model"] == "none"
    assert short.chat_template == ""
    assert (short.n_params, short.weights_bytes, short.quant) == (whole.n_params, whole.weights_bytes, whole.quant)
    assert outline(short, tmp_path).raw_keys == short.raw_keys


def test_an_outline_takes_no_room(tmp_path: Path) -> None:
    path = sparse_models.write(sparse_models.llama_70b(), tmp_path / "70b.gguf")
    write_outline(read_model(path), tmp_path / "outline.gguf")
    made = (tmp_path / "outline.gguf").stat()
    assert made.st_size > 40e9
    assert made.st_blocks * 512 < 1 << 20


def test_types_are_kept(tmp_path: Path) -> None:
    """llama.cpp does not take a number of 64 bits for one of 32."""
    keys = [
        string("general.architecture", "llama"),
        number("general.alignment", 128),
        number("llama.block_count", 2),
        number("a.byte", 7, UINT8),
        number("a.long", 7, UINT64),
        number("a.negative", -7, INT32),
        number("a.real", 0.1, FLOAT32),
        numbers("a.list", INT32, [3, -4]),
    ]
    header = parsed(gguf(keys, [tensor("x", [5]), tensor("y", [7], offset=128)], bytes(256), alignment=128))
    short = outline(header, tmp_path)
    assert short.raw_keys[: len(keys)] == tuple(keys)
    assert short.alignment == 128
    assert [each.offset % 128 for each in short.tensors] == [0, 0]


def test_a_split_model_becomes_one_file(tmp_path: Path) -> None:
    for i in range(2):
        keys = [number("split.no", i, 2), number("split.count", 2, 2), number("split.tensors.count", 2, INT32)]
        keys += [string("general.architecture", "llama"), number("llama.block_count", 1)] if i == 0 else []
        (tmp_path / f"m-{i + 1:05}-of-00002.gguf").write_bytes(gguf(keys, [tensor(f"t{i}", [32])], bytes(128)))
    short = outline(read_model(tmp_path / "m-00002-of-00002.gguf"), tmp_path)
    assert [each.name for each in short.tensors] == ["t0", "t1"]
    assert not any(key.startswith("split.") for key in short.metadata)
    assert short.files == (tmp_path / "outline.gguf",)


def test_what_is_long_is_left_out(tmp_path: Path) -> None:
    keys = [string("general.architecture", "llama"), string("general.licence", "x" * 100_000)]
    short = outline(parsed(gguf(keys)), tmp_path)
    assert set(short.metadata) == {"general.architecture", "llama.vocab_size", "tokenizer.ggml.model"}


def test_a_header_made_by_hand_has_no_outline(demo_small: Path, tmp_path: Path) -> None:
    header = replace(read_header(demo_small), raw_keys=())
    with pytest.raises(ModelError, match="not complete"):
        write_outline(header, tmp_path / "x.gguf")
