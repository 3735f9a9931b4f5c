"""Sound files: what the reader says is what the gguf package and llama.cpp say."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest

from localllm.demo import demo_models
from localllm.errors import ModelError
from localllm.gguf import Array, Header, parse_header, read_header, read_model
from localllm.gguf.types import FILE_TYPES, RETIRED_TENSOR_TYPES, SCALARS, TENSOR_TYPES
from tests import gguf_file as raw
from tests.tiny_models import KINDS, N_CTX_TRAIN

DEMOS = ["demo-large", "demo-small"]


@pytest.mark.parametrize("name", DEMOS)
def test_the_demo_models_read_as_the_gguf_package_reads_them(name: str) -> None:
    path = demo_models()[name]
    header, reader = read_model(path), package.GGUFReader(path)
    theirs = [(t.name, tuple(t.shape.tolist()), t.tensor_type.name, int(t.data_offset), int(t.n_bytes)) for t in reader.tensors]
    assert [(t.name, t.shape, t.type, t.offset, t.n_bytes) for t in header.tensors] == theirs
    assert header.n_params == sum(int(t.n_elements) for t in reader.tensors)
    assert header.weights_bytes == sum(int(t.n_bytes) for t in reader.tensors)
    assert (header.data_offset, header.alignment) == (reader.data_offset, reader.alignment)
    assert header.file_bytes == path.stat().st_size
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for key, value in header.metadata.items():
        if not isinstance(value, Array):
            assert value == fields[key], key
        elif value.data:
            assert list(value.values()) == fields[key], key
        else:
            assert value.length == len(fields[key]), key


@pytest.mark.parametrize("name", DEMOS)
def test_the_demo_models_have_their_properties(name: str) -> None:
    header = read_model(demo_models()[name])
    assert (header.architecture, header.n_vocab, header.n_ctx_train, header.quant) == ("llama", 2048, 1024, "Q8_0")
    assert header.n_layers == header.get("block_count") > 0
    assert header.n_embd == header.get("embedding_length") > 0
    assert "messages" in header.chat_template
    assert header.name
    assert header.files == (demo_models()[name],)


def test_the_demo_models_share_a_tokenizer(demo_large: Path, demo_small: Path, tmp_path: Path) -> None:
    large, small = read_model(demo_large), read_model(demo_small)
    assert len(large.tokenizer_hash) == len(large.vocab_hash) == 64
    assert (large.tokenizer_hash, large.vocab_hash) == (small.tokenizer_hash, small.vocab_hash)
    other = read_model(KINDS["plain"](tmp_path / "plain.gguf"))
    assert other.tokenizer_hash != large.tokenizer_hash
    assert other.vocab_hash != large.vocab_hash


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_read(kind: str, tmp_path: Path) -> None:
    header = read_model(KINDS[kind](tmp_path / "tiny.gguf"))
    assert (header.n_ctx_train, header.n_layers, header.quant) == (N_CTX_TRAIN, 4, "F32")
    assert header.n_params * 4 == header.weights_bytes


def test_every_value_type_comes_back(tmp_path: Path) -> None:
    values: dict[str, tuple[str, Any]] = {
        "u8": ("uint8", 255), "i8": ("int8", -128), "u16": ("uint16", 65535), "i16": ("int16", -32768),
        "u32": ("uint32", 2**32 - 1), "i32": ("int32", -(2**31)), "f32": ("float32", 0.5), "u64": ("uint64", 2**64 - 1),
        "i64": ("int64", -(2**63)), "f64": ("float64", 1e300), "bool": ("bool", True), "text": ("string", "é \x1b]0;x\a 中"),
        "ints": ("array", [1, -2, 3]), "floats": ("array", [0.5, 2.0]), "bools": ("array", [True, False]),
        "texts": ("array", ["", "é", "x" * 99]),
    }  # fmt: skip
    writer = package.GGUFWriter(tmp_path / "all.gguf", "llama")
    for key, (kind, value) in values.items():
        getattr(writer, f"add_{kind}")(key, value)
    writer.add_tensor("t", np.zeros((2, 3), np.float32))
    write(writer)
    header = read_header(tmp_path / "all.gguf")
    for key, (_, value) in values.items():
        found = header.metadata[key]
        assert (list(found.values()) if isinstance(found, Array) else found) == value, key
    assert header.metadata["bool"] is True
    assert header.tensors[0].shape == (3, 2)


def write(writer: package.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_the_alignment_is_the_files_own(tmp_path: Path, alignment: int) -> None:
    writer = package.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_tensor("a", np.zeros(3, np.float32))
    writer.add_tensor("b", np.zeros(3, np.float32))
    write(writer)
    header = read_header(tmp_path / "model.gguf")
    assert header.alignment == alignment
    assert header.data_offset % alignment == 0
    assert [t.offset - header.data_offset for t in header.tensors] == [0, max(alignment, 16)]


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(version: int) -> None:
    assert raw.parsed(raw.gguf([raw.string("general.architecture", "llama")], version=version)).architecture == "llama"


def test_a_file_without_anything_has_empty_properties() -> None:
    header = raw.parsed(raw.gguf())
    assert (header.architecture, header.name, header.chat_template, header.quant, header.tokenizer_hash, header.vocab_hash) == ("",) * 6
    assert (header.n_layers, header.n_ctx_train, header.n_embd, header.n_vocab, header.n_params, header.weights_bytes) == (0,) * 6
    assert header.get("anything", 5) == 5


def test_properties_of_the_wrong_type_are_as_if_absent() -> None:
    keys = [raw.number("general.architecture", 1), raw.string(".block_count", "many"), raw.numbers("general.name", raw.UINT8, [1])]
    header = raw.parsed(raw.gguf(keys))
    assert (header.architecture, header.name, header.n_layers) == ("", "", 0)


def test_a_scalar_tensor_has_one_weight() -> None:
    header = raw.parsed(raw.gguf(tensors=[raw.tensor("scale", [])], weights=bytes(4)))
    assert (header.tensors[0].shape, header.tensors[0].n_bytes, header.n_params) == ((), 4, 1)


def test_texts_stay_as_they_are() -> None:
    header = raw.parsed(raw.small_model())
    assert header.name == "Small \x1b[31m one"
    broken = raw.parsed(raw.gguf([raw.string("general.name", b"a\xffb")]))
    assert broken.name == "a�b"


def test_nothing_can_be_changed() -> None:
    header = raw.parsed(raw.small_model())
    with pytest.raises(TypeError):
        header.metadata["general.name"] = "other"  # pyright: ignore[reportIndexIssue]
    for value, name in [(header, "version"), (header.tensors[0], "offset"), (header.metadata["tokenizer.ggml.tokens"], "offset")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 1)


# arrays


def test_short_lists_are_kept_and_long_ones_are_known_by_their_digest() -> None:
    def header(n: int, last: int) -> Header:
        return raw.parsed(raw.gguf([raw.numbers("short", raw.UINT8, [1, 2]), raw.numbers("long", raw.INT32, [*range(n), last])]))

    one, same, other = header(20_000, 1), header(20_000, 1), header(20_000, 2)
    short, long = one.metadata["short"], one.metadata["long"]
    assert isinstance(short, Array)
    assert isinstance(long, Array)
    assert short.values() == (1, 2)
    assert (long.type, long.length, long.n_bytes, long.data) == ("INT32", 20_001, 80_004, b"")
    with pytest.raises(ModelError, match="20,001 elements"):
        long.values()
    assert one.metadata == same.metadata
    assert one.metadata["long"] != other.metadata["long"]


def test_a_nested_list_is_known_by_its_digest() -> None:
    nested = raw.parsed(raw.small_model()).metadata["nested"]
    assert isinstance(nested, Array)
    assert (nested.type, nested.length, nested.data) == ("ARRAY", 2, b"")
    with pytest.raises(ModelError, match="ARRAY"):
        nested.values()


def test_an_empty_list_has_no_values() -> None:
    header = raw.parsed(raw.gguf([raw.array("none", kind, b"", 0) for kind in [raw.STRING]]))
    none = header.metadata["none"]
    assert isinstance(none, Array)
    assert none.values() == ()


def test_a_text_too_long_to_keep_is_an_array_of_its_bytes() -> None:
    data = raw.gguf([raw.string("tokenizer.chat_template", "x" * (1 << 20)), raw.string("long", "x" * ((1 << 20) + 1))])
    header = raw.parsed(data)
    assert len(header.chat_template) == 1 << 20
    long = header.metadata["long"]
    assert isinstance(long, Array)
    assert (long.type, long.length) == ("UINT8", (1 << 20) + 1)
    assert data[long.offset : long.offset + long.n_bytes] == b"x" * long.length


# the quant


@pytest.mark.parametrize("number, name", [(0, "F32"), (1, "F16"), (7, "Q8_0"), (15, "Q4_K_M"), (30, "IQ4_XS"), (32, "BF16"), (38, "MXFP4")])
def test_the_quant_is_what_the_file_says(number: int, name: str) -> None:
    assert raw.parsed(raw.gguf([raw.number("general.file_type", number)])).quant == name


@pytest.mark.parametrize(
    "file, quant",
    [
        ("llama-3-8b-Q4_K_M.gguf", "Q4_K_M"),
        ("llama-3-8b.q4_k_s.gguf", "Q4_K_S"),
        ("llama-3-8b-Q4_K.gguf", "Q4_K"),
        ("llama-3-8b-Q5_K_M.gguf", "Q4_K"),
        ("llama-3-8b-IQ4_K_M.gguf", "Q4_K"),
        ("llama-3-8b-Q4_K_M9.gguf", "Q4_K"),
        ("model.gguf", "Q4_K"),
    ],
)
@pytest.mark.parametrize("file_type", [None, 999, 1024])
def test_the_quant_is_else_the_type_of_most_weights_and_the_name(tmp_path: Path, file: str, quant: str, file_type: int | None) -> None:
    keys = [] if file_type is None else [raw.number("general.file_type", file_type)]
    tensors = [raw.tensor("a", [256, 2], raw.Q4_K), raw.tensor("b", [256], raw.F32, 288)]
    (tmp_path / file).write_bytes(raw.gguf(keys, tensors, bytes(288 + 1024)))
    assert read_model(tmp_path / file).quant == quant


# tokenizer hashes


def tokenizer(tokens: str = "abcd", types: tuple[int, ...] = (1, 1, 1, 3), eos: int = 3, pad: int = 0, model: str = "gpt2") -> Header:
    keys = [
        raw.string("tokenizer.ggml.model", model),
        raw.strings("tokenizer.ggml.tokens", list(tokens)),
        raw.numbers("tokenizer.ggml.token_type", raw.INT32, types),
        raw.number("tokenizer.ggml.eos_token_id", eos),
        raw.number("tokenizer.ggml.padding_token_id", pad),
        raw.string("tokenizer.chat_template", f"{eos}"),
    ]
    return raw.parsed(raw.gguf(keys))


def same(a: Header, b: Header) -> tuple[bool, bool]:
    return a.tokenizer_hash == b.tokenizer_hash, a.vocab_hash == b.vocab_hash


def test_equal_tokenizers_have_equal_hashes() -> None:
    assert same(tokenizer(), tokenizer()) == (True, True)


def test_padding_makes_no_difference() -> None:
    padded = tokenizer("abcd567", (1, 1, 1, 3, 5, 5, 5), pad=6)
    assert padded.n_vocab == 7
    assert same(tokenizer(), padded) == (True, True)
    assert same(tokenizer(), tokenizer("abcd5", (1, 1, 1, 3, 1))) == (False, False)
    # an unused token among the others keeps the ids behind it where they are
    assert same(tokenizer(), tokenizer("ab5cd", (1, 1, 5, 1, 3))) == (False, False)


def test_other_ids_and_types_make_another_tokenizer_of_the_same_vocabulary() -> None:
    assert same(tokenizer(), tokenizer(eos=2)) == (False, True)
    assert same(tokenizer(), tokenizer(types=(1, 1, 1, 4))) == (False, True)


def test_other_tokens_make_another_vocabulary() -> None:
    assert same(tokenizer(), tokenizer("abce")) == (False, False)
    assert same(tokenizer(), tokenizer("abdc")) == (False, False)
    assert same(tokenizer(), tokenizer(model="llama")) == (False, False)


def test_a_vocabulary_of_padding_only_has_hashes() -> None:
    assert same(tokenizer("a", (5,)), tokenizer("b", (5,))) == (True, True)


@pytest.mark.parametrize(
    "key, value",
    [
        ("merges", raw.strings("tokenizer.ggml.merges", ["a b"])),
        ("scores", raw.numbers("tokenizer.ggml.scores", raw.FLOAT32, [1.0, 2.0])),
        ("add_bos", raw.number("tokenizer.ggml.add_bos_token", True, raw.BOOL)),
        ("pre", raw.string("tokenizer.ggml.pre", "qwen2")),
    ],
)
def test_everything_that_changes_tokenisation_changes_the_hash(key: str, value: bytes) -> None:
    tokens = raw.strings("tokenizer.ggml.tokens", ["a", "b"])
    assert same(raw.parsed(raw.gguf([tokens])), raw.parsed(raw.gguf([tokens, value]))) == (False, True), key


# how a source is read


def test_a_source_is_read_from_the_start_in_growing_chunks_and_no_weights() -> None:
    tokens = ["x" * 40] * 100_000
    n_weights = 1 << 34
    header = raw.gguf([raw.strings("tokenizer.ggml.tokens", tokens)], [raw.tensor("big", [n_weights])])
    seen: list[tuple[int, int]] = []

    def read(offset: int, n: int) -> bytes:
        seen.append((offset, n))
        return header[offset : offset + n].ljust(n, b"\0")

    found = parse_header(read, len(header) + 4 * n_weights, "far.gguf")
    assert found.n_params == n_weights
    assert found.n_vocab == len(tokens)
    position = 0
    for offset, n in seen:
        assert offset == position
        position += n
    assert len(header) <= position <= 2 * len(header) + (8 << 20)
    assert len(seen) <= 4


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_short_reads_are_completed(most: int, demo_small: Path) -> None:
    data = demo_small.read_bytes()
    assert parse_header(lambda offset, n: data[offset : offset + min(n, most)], len(data), "x") == raw.parsed(data)


def test_more_bytes_than_asked_for_do_no_harm() -> None:
    data = raw.small_model()
    assert parse_header(lambda offset, n: data[offset:] + b"more", len(data), "x") == raw.parsed(data)


def test_a_source_that_dries_up_is_a_model_error() -> None:
    data = raw.small_model()
    with pytest.raises(ModelError, match="ended at byte 100 while it was read"):
        parse_header(lambda offset, n: data[offset : min(offset + n, 100)], len(data), "x")


def test_an_error_of_the_source_passes_through() -> None:
    def read(offset: int, n: int) -> bytes:
        raise ConnectionError("line cut")

    with pytest.raises(ConnectionError, match="line cut"):
        parse_header(read, 1000, "x")


# the tables


def test_the_tables_hold_what_the_gguf_package_has() -> None:
    for kind, sizes in package.GGML_QUANT_SIZES.items():
        # the package still counts the float scales that Q8_1, a type of llama.cpp's working memory, once had
        assert TENSOR_TYPES[kind] == (kind.name, *sizes) or kind.name == "Q8_1"
    for recipe in package.LlamaFileType:
        assert recipe.name == "GUESSED" or FILE_TYPES[recipe] == recipe.name.partition("_")[2].removesuffix("_MOE")
    kinds = {kind.value: kind.name for kind in package.GGUFValueType}
    assert {n: name for n, (name, _) in SCALARS.items()} | {8: "STRING", 9: "ARRAY"} == kinds
    assert all(layout.size == np.dtype(name.lower()).itemsize for name, layout in SCALARS.values())


@pytest.mark.skipif(sys.platform == "win32", reason="a handle does not search its dependencies")
def test_the_tables_are_those_of_llama_cpp() -> None:
    from llama_cpp import llama_cpp as api

    from localllm.llama import lib

    type_name, block_weights, block_bytes = lib.raw.ggml_type_name, lib.raw.ggml_blck_size, lib.raw.ggml_type_size
    type_name.restype, block_weights.restype, block_bytes.restype = ctypes.c_char_p, ctypes.c_int64, ctypes.c_size_t
    types = {n: (type_name(n).decode().upper(), block_weights(n), block_bytes(n)) for n in range(api.GGML_TYPE_COUNT)}
    assert {n: kind for n, kind in types.items() if n not in RETIRED_TENSOR_TYPES} == TENSOR_TYPES
    assert {kind[1:] for n, kind in types.items() if n in RETIRED_TENSOR_TYPES} == {(0, 0)}
    recipes = {value: name for name, value in vars(api).items() if name.startswith("LLAMA_FTYPE_")}
    assert {n: name.split("_", 3)[3].removesuffix("_MOE") for n, name in recipes.items() if n != api.LLAMA_FTYPE_GUESSED} == FILE_TYPES


def test_reading_a_header_loads_no_heavy_library(demo_small: Path) -> None:
    code = f"""
import pathlib, sys
from localllm.gguf import read_model
read_model(pathlib.Path({str(demo_small)!r}))
print(sorted(sys.modules.keys() & {{"numpy", "gguf", "yaml", "llama_cpp", "pydantic", "huggingface_hub"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
