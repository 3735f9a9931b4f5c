"""Files that are damaged, foreign or made to do harm: a ModelError that says so, after few steps and little memory."""

from __future__ import annotations

import os
import random
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from localllm.errors import ModelError
from localllm.gguf import parse_header, read_header, read_model
from localllm.gguf.cursor import MAX_HEADER_BYTES, MAX_ITEMS, MAX_STRING_BYTES
from localllm.gguf.parser import MAX_KEYS, MAX_NESTING
from tests import gguf_file as raw
from tests.gguf_file import gguf, parsed

HUGE = [2**63, 2**63 - 1, 2**64 - 1, 2**32, 1 << 30]
MEMORY_BYTES = 200_000_000


def refused(data: bytes, match: str) -> ModelError:
    with pytest.raises(ModelError, match=match) as caught:
        parsed(data)
    assert caught.value.message.startswith("model.gguf ")
    assert caught.value.hint
    assert caught.value.message.isprintable()
    return caught.value


# other files


@pytest.mark.parametrize(
    "content, match, hint",
    [
        (b"", "not a GGUF file: it is empty", "pull"),
        (bytes(5000), "zeros where a model should begin", "pull it again"),
        (b"<!DOCTYPE html><html><body>404", "a web page", "pull it again"),
        (b"\n <HTML>busy", "a web page", "login"),
        (b'{"error": "Repository not found"}', "JSON", "look into it"),
        (struct.pack("<Q", 30) + b'{"__metadata__":{}}' + bytes(100), "a safetensors file", "-GGUF"),
        (b"\x80\x02}q\x00.", "a Python pickle", "-GGUF"),
        (b"\x80\x04\x95\x00", "a Python pickle", "-GGUF"),
        (b"\x1f\x8b\x08\x00", "a compressed file", "unpack"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer", "git lfs pull"),
        (b"tjgg\x03\0\0\0", "a GGML file of 2023", "newer"),
        (b"lmgg\x03\0\0\0", "a GGML file of 2023", "newer"),
        (b"FUGG\x03\0\0\0", "wrong order", "convert"),
        (b"\x89HDF\r\n", "an HDF5 file", "-GGUF"),
        (b"\x7fELF\x02", "of an unknown kind", "GGUF format"),
        (b"GGU", "of an unknown kind", "GGUF format"),
        (b"\xff\xfe\xfd" * 500, "of an unknown kind", "GGUF format"),
    ],
)
def test_another_kind_of_file_is_named(content: bytes, match: str, hint: str) -> None:
    error = refused(content, f"is not a GGUF file: .*{match}" if content else match)
    assert hint in error.hint


def test_a_zip_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("data.pkl", b"x")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is not a GGUF file: it is a zip archive"):
        read_model(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize(
    "version, match, hint",
    [
        (0, "version 0", "newer one"),
        (1, "version 1, which is not read any more", "fetch a newer one"),
        (4, "version 4, newer than this localllm", "update localllm"),
        (2**32 - 1, "newer than", "update localllm"),
        (3 << 24, "a big-endian GGUF file", "little-endian"),
    ],
)
def test_another_version_is_named(version: int, match: str, hint: str) -> None:
    assert hint in refused(gguf(version=version), match).hint


# counts and lengths


@pytest.mark.parametrize("n", [*HUGE, MAX_KEYS + 1])
def test_counts_are_bounded(n: int) -> None:
    refused(gguf(n_keys=n), "metadata keys")
    refused(gguf(n_tensors=n), "tensors")


@pytest.mark.parametrize("n", [*HUGE, MAX_STRING_BYTES + 1])
@pytest.mark.parametrize("where", ["key", "text", "tensor", "element"])
def test_the_length_of_a_text_is_bounded(n: int, where: str) -> None:
    files = {
        "key": gguf([raw.text("key", n)]),
        "text": gguf([raw.string("key", "value", n)]),
        "tensor": gguf(tensors=[raw.text("name", n)]),
        "element": gguf([raw.array("key", raw.STRING, raw.text("a") + raw.text("b", n), 2)]),
    }
    refused(files[where] + bytes(64), f"a text of {n:,} bytes")


@pytest.mark.parametrize("where", ["key", "text", "tensor", "element"])
def test_a_text_longer_than_the_file_is_cut_off(where: str) -> None:
    n = 1_000_000
    files = {
        "key": gguf([raw.text("key", n)]),
        "text": gguf([raw.string("key", "value", n)]),
        "tensor": gguf(tensors=[raw.text("name", n)]),
        "element": gguf([raw.array("key", raw.STRING, raw.text("a") + raw.text("b", n), 2)]),
    }
    refused(files[where], "is incomplete: it ends at byte")


@pytest.mark.parametrize("kind", [raw.UINT8, raw.FLOAT32, raw.UINT64, raw.STRING, raw.ARRAY])
@pytest.mark.parametrize("n", HUGE)
def test_the_length_of_an_array_is_bounded_by_the_file(kind: int, n: int) -> None:
    data = gguf([raw.array("key", kind, bytes(4096), n)])
    steps = counted(data, "is incomplete: it ends at byte 4,.*promises")
    assert steps <= 1


@pytest.mark.parametrize("kind", [raw.UINT8, raw.UINT64])
def test_the_length_of_an_array_is_bounded_by_the_header(kind: int) -> None:
    data = gguf([raw.array("key", kind, b"", MAX_HEADER_BYTES)])
    counted(data, "header takes more than 64 MiB", file_bytes=1 << 40)


def counted(data: bytes, match: str, file_bytes: int = 0) -> int:
    """How many reads a file took that is refused; it seems to be `file_bytes` long, the rest of it zeros."""
    reads: list[int] = []

    def read(offset: int, n: int) -> bytes:
        reads.append(n)
        return data[offset : offset + n].ljust(n if file_bytes else 0, b"\0")

    with pytest.raises(ModelError, match=match):
        parse_header(read, file_bytes or len(data), "model.gguf")
    assert sum(reads) <= MAX_HEADER_BYTES
    return len(reads)


def test_the_43_bytes_that_hang_the_gguf_package() -> None:
    # an array whose length, 2**63, is cut off or not
    whole = gguf([raw.array("", raw.ARRAY, b"", 2**63)], alignment=1)
    for end in range(24, len(whole) + 1):
        refused(whole[:end], "is incomplete")
    assert len(whole[:43]) == 43


def test_the_nesting_of_arrays_is_bounded() -> None:
    def nested(depth: int) -> bytes:
        value = raw.items(raw.UINT8, b"\1", 1)
        for _ in range(depth - 1):
            value = raw.items(raw.ARRAY, value, 1)
        return gguf([raw.text("key") + struct.pack("<I", raw.ARRAY) + value])

    assert parsed(nested(MAX_NESTING)).metadata
    refused(nested(MAX_NESTING + 1), "nested more than 4 deep")
    refused(nested(2000), "nested more than 4 deep")


@pytest.mark.parametrize("kind", [13, 255, 2**32 - 1])
def test_value_types_are_known(kind: int) -> None:
    refused(gguf([raw.text("key") + struct.pack("<IQ", kind, 0)]), f"value of 'key' is of the unknown type {kind:,}")
    refused(gguf([raw.array("key", kind, bytes(8), 1)]), f"elements of the unknown type {kind:,}")


def test_keys_and_names_come_once() -> None:
    refused(gguf([raw.number("key", 1), raw.string("key", "x")]), "the key 'key' twice")
    rows = [raw.tensor("a", [8]), raw.tensor("a", [8], offset=32)]
    refused(gguf(tensors=rows, weights=bytes(64)), "the tensor 'a' twice")


def test_keys_and_names_are_utf8_and_short() -> None:
    refused(gguf([raw.number(b"\xff\x1b", 1)]), r"metadata key '�\\x1b' is not UTF-8")
    refused(gguf(tensors=[raw.tensor(b"\xff", [1])]), "tensor name .* is not UTF-8")
    refused(gguf([raw.number("k" * 65536, 1)]), "metadata key is 65,536 bytes long")
    refused(gguf(tensors=[raw.tensor("n" * 64, [1])], weights=bytes(4)), "tensor name is 64 bytes long, 63 are the most")
    assert parsed(gguf([raw.number("k" * 65535, 1)], [raw.tensor("n" * 63, [1])], bytes(4))).n_params == 1


def test_what_a_header_says_is_escaped_and_cut_in_messages() -> None:
    error = refused(gguf([raw.number("\x1b]0;owned\a" + "x" * 500, 1)] * 2), "twice")
    assert "\\x1b]0;owned" in error.message
    assert len(error.message) < 200
    with pytest.raises(ModelError) as caught:
        parsed(b"", "evil\x1b[2J.gguf")
    assert caught.value.message.isprintable()


# alignment and tensors


@pytest.mark.parametrize("alignment", [0, 1, 4, 12, 24, 33, 1 << 17, 1 << 31])
def test_the_alignment_is_a_small_power_of_two(alignment: int) -> None:
    refused(gguf([raw.number("general.alignment", alignment)]), "power of two")


@pytest.mark.parametrize("value", [raw.number("general.alignment", 32, raw.UINT64), raw.string("general.alignment", "32")])
def test_the_alignment_has_the_type_that_llama_cpp_insists_on(value: bytes) -> None:
    refused(gguf([value]), "general.alignment is not of type UINT32")


@pytest.mark.parametrize("n", [5, 1000, 2**32 - 1])
def test_dimensions_are_few(n: int) -> None:
    refused(gguf(tensors=[raw.tensor("a", [1] * 5, n_dimensions=n)]), f"{n:,} dimensions, 4 are the most")


@pytest.mark.parametrize(
    "shape", [[0], [8, 0], [2**63], [2**64 - 1], [2**32, 2**32], [4194305, 4194305, 211106198978564], [2**16] * 4, [2**62, 2]]
)
def test_the_product_of_dimensions_is_positive_and_fits(shape: list[int]) -> None:
    refused(gguf(tensors=[raw.tensor("a", shape)], weights=bytes(64)), "the tensor 'a' has the shape")


def test_the_size_of_a_tensor_fits() -> None:
    refused(gguf(tensors=[raw.tensor("a", [2**62])], weights=bytes(64)), "the tensor 'a' has the shape")


@pytest.mark.parametrize(
    "kind, match", [(4, "reads no more"), (36, "reads no more"), (99, "newer than this"), (2**32 - 1, "newer than this")]
)
def test_tensor_types_are_known(kind: int, match: str) -> None:
    refused(gguf(tensors=[raw.tensor("a", [32], kind)], weights=bytes(64)), match)


@pytest.mark.parametrize("kind, shape", [(raw.Q8_0, [31]), (raw.Q8_0, [16, 2]), (raw.Q4_K, [32]), (raw.Q8_0, [])])
def test_rows_are_whole_blocks(kind: int, shape: list[int]) -> None:
    refused(gguf(tensors=[raw.tensor("a", shape, kind)], weights=bytes(4096)), "no multiple of|has the shape")


@pytest.mark.parametrize("offset", [1, 16, 31, 2**64 - 1])
def test_offsets_are_aligned(offset: int) -> None:
    refused(gguf(tensors=[raw.tensor("a", [8], offset=offset)], weights=bytes(4096)), "no multiple of 32")


@pytest.mark.parametrize("offset", [2**63, 2**64 - 32, 2**63 - 32])
def test_offsets_are_below_any_disk(offset: int) -> None:
    refused(gguf(tensors=[raw.tensor("a", [8], offset=offset)], weights=bytes(4096)), "beyond any disk")


def test_offsets_lie_inside_the_file() -> None:
    tensors = [raw.tensor("a", [8]), raw.tensor("b", [8], offset=1 << 40)]
    error = refused(gguf(tensors=tensors, weights=bytes(64)), "is incomplete: it ends at byte")
    assert f"promises {(1 << 40) + 96 + 32:,}" in error.message


@pytest.mark.parametrize("order", [1, -1])
def test_tensors_do_not_overlap(order: int) -> None:
    rows = [raw.tensor("a", [16]), raw.tensor("b", [8], offset=32)][::order]
    refused(gguf(tensors=rows, weights=bytes(128)), "'a' and 'b' overlap")
    rows = [raw.tensor("a", [8]), raw.tensor("b", [8], offset=64), raw.tensor("c", [8], offset=32)][::order]
    assert len(parsed(gguf(tensors=rows, weights=bytes(96))).tensors) == 3


# the tokenizer's lists


@pytest.mark.parametrize(
    "value, match",
    [
        (raw.numbers("tokenizer.ggml.scores", raw.FLOAT32, [0.0]), "scores has 1 entries for 2 tokens"),
        (raw.numbers("tokenizer.ggml.token_type", raw.INT32, []), "token_type has 0 entries for 2 tokens"),
        (raw.numbers("tokenizer.ggml.scores", raw.UINT8, [0, 0]), "scores is not a list of FLOAT32"),
        (raw.numbers("tokenizer.ggml.token_type", raw.UINT8, [0, 0]), "token_type is not a list of INT32"),
        (raw.numbers("tokenizer.ggml.merges", raw.UINT8, [0, 0]), "merges is not a list of STRING"),
        (raw.string("tokenizer.ggml.merges", "a b"), "merges is not a list of STRING"),
    ],
)
def test_the_tokenizers_lists_fit_together(value: bytes, match: str) -> None:
    refused(gguf([raw.strings("tokenizer.ggml.tokens", ["a", "b"]), value]), match)


def test_tokens_are_texts() -> None:
    refused(gguf([raw.numbers("tokenizer.ggml.tokens", raw.UINT8, [0, 0])]), "tokens is not a list of STRING")


# incomplete


def test_a_file_cut_off_anywhere_is_a_model_error() -> None:
    whole = raw.small_model()
    header = parsed(whole)
    end = max(t.offset + t.n_bytes for t in header.tensors)
    assert end == len(whole)
    for n in range(len(whole)):
        with pytest.raises(ModelError) as caught:
            parsed(whole[:n])
        if n >= 4:
            assert "is incomplete: it ends at byte" in caught.value.message
            assert caught.value.hint == "pull it again"
        if n >= header.data_offset:
            assert f"it ends at byte {n:,}, its header promises {len(whole):,}" in caught.value.message


# bounds as a whole


TEXT = "a" * ((1 << 20) - 8) + "\U0001f600"
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "texts": (lambda: gguf([raw.array("key", raw.STRING, bytes(8 * MAX_ITEMS + 8), MAX_ITEMS + 1)]), "more entries than any model"),
    "arrays": (lambda: gguf([raw.array("key", raw.ARRAY, bytes(12 * 1_000_000), 1_000_000)]), "more entries than any model"),
    "wide texts": (lambda: gguf([raw.string(f"k{i}", TEXT) for i in range(20)]), "take more than 8 MiB"),
    "lists": (lambda: gguf([raw.array(f"k{i}", raw.UINT8, bytes(65_536), 65_536) for i in range(200)]), "take more than 8 MiB"),
    "long texts": (lambda: gguf([raw.string(f"k{i}", "x" * (15 << 20)) for i in range(5)]), "header takes more than 64 MiB"),
    "keys": (lambda: gguf([raw.number(f"k{i}", 1) for i in range(MAX_KEYS)], n_tensors=1), "is incomplete"),
    "tensors": (lambda: gguf(tensors=[raw.tensor(f"t{i}", [1], offset=32 * i) for i in range(MAX_KEYS)]), "is incomplete"),
}
"""Headers that ask for as much time or memory as there is to get, and how they end."""


@pytest.mark.parametrize("name", HOSTILE)
def test_entries_and_texts_are_bounded_together(name: str) -> None:
    build, match = HOSTILE[name]
    refused(build(), match)


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_no_header_takes_much_memory(name: str) -> None:
    data = HOSTILE[name][0]()
    tracemalloc.start()
    try:
        with pytest.raises(ModelError):
            parse_header(lambda offset, n: data[offset : offset + n], len(data), name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_BYTES


# files


def test_a_missing_file_a_directory_and_a_pipe_are_model_errors(tmp_path: Path) -> None:
    paths = [tmp_path / "gone.gguf", tmp_path, Path("bad\0name")]
    if sys.platform != "win32":
        os.mkfifo(tmp_path / "pipe.gguf")
        paths.append(tmp_path / "pipe.gguf")
    for path in paths:
        with pytest.raises(ModelError, match="no file at"):
            read_header(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_a_model_error(tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(raw.small_model())
    path.chmod(0)
    with pytest.raises(ModelError, match="cannot be read: Permission denied"):
        read_header(path)


def test_an_error_while_reading_a_file_is_a_model_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bad-sector.gguf"
    path.write_bytes(raw.small_model())

    def broken(fd: int) -> os.stat_result:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("localllm.gguf.split.os.fstat", broken)
    with pytest.raises(ModelError, match=r"bad-sector\.gguf cannot be read: Input/output error"):
        read_header(path)


@pytest.mark.parametrize("seed", range(5))
def test_noise_after_the_magic_is_a_model_error(seed: int) -> None:
    noise = random.Random(seed).randbytes(4096)
    with pytest.raises(ModelError):
        parsed(b"GGUF\x03\0\0\0" + noise)
