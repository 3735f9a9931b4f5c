"""Any bytes at all: a Header or a ModelError, from bounded reads."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from localllm.errors import ModelError
from localllm.gguf import Array, Header, parse_header
from localllm.gguf.cursor import MAX_HEADER_BYTES
from tests.gguf_file import small_model

VALID = small_model()
EXTREMES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def outcome(data: bytes, file_bytes: int) -> None:
    """What comes of `data` as the start of a file of that many bytes; reads stay in order and bounded."""
    position = 0

    def read(offset: int, n: int) -> bytes:
        nonlocal position
        assert offset == position
        assert n > 0
        position += n
        assert position <= min(file_bytes, MAX_HEADER_BYTES)
        return data[offset : offset + n].ljust(n, b"\0")

    with contextlib.suppress(ModelError):
        look_at(parse_header(read, file_bytes, "fuzzed.gguf"))


def look_at(header: Header) -> None:
    """What any user of a header does with it raises nothing but ModelError."""
    assert all(0 <= t.offset <= t.offset + t.n_bytes <= header.file_bytes for t in header.tensors)
    for name in ("architecture", "name", "chat_template", "quant", "tokenizer_hash", "vocab_hash"):
        assert isinstance(getattr(header, name), str)
    for name in ("n_layers", "n_ctx_train", "n_embd", "n_vocab", "n_params", "weights_bytes"):
        assert getattr(header, name) >= 0
    for value in header.metadata.values():
        if isinstance(value, Array) and len(value.data) == value.n_bytes:
            assert len(value.values()) == value.length


@given(st.binary(max_size=400), st.integers(0, 1 << 20))
def test_random_bytes(data: bytes, more: int) -> None:
    outcome(data, len(data) + more)


@settings(deadline=None)  # zeros are up to 32,768 tensors
@given(st.binary(max_size=400), st.integers(0, 1 << 40), st.integers(2, 3))
@example(struct.pack("<QQ", 0, 1), 1 << 40, 3)
def test_random_bytes_after_the_magic(data: bytes, more: int, version: int) -> None:
    data = b"GGUF" + struct.pack("<I", version) + data
    outcome(data, len(data) + more)


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_valid_file_with_other_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for position, byte in changes:
        data[position] = byte
    outcome(bytes(data), len(data))


@settings(deadline=None)
@given(st.integers(0, len(VALID) - 8), st.sampled_from(EXTREMES), st.sampled_from(["<Q", "<I"]), st.sampled_from([0, 1 << 20, 1 << 45]))
def test_a_valid_file_with_an_extreme_number(position: int, value: int, layout: str, more: int) -> None:
    data = bytearray(VALID)
    struct.pack_into(layout, data, position, value if layout == "<Q" else value & 0xFFFFFFFF)
    outcome(bytes(data), len(data) + more)


@given(st.integers(0, len(VALID)), st.integers(0, len(VALID)), st.integers(0, len(VALID)))
def test_a_valid_file_with_pieces_moved(a: int, b: int, c: int) -> None:
    a, b = min(a, b), max(a, b)
    data = VALID[:c] + VALID[a:b] + VALID[c:]
    outcome(data, len(data))


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_a_valid_file_with_everything_done_to_it(choose: st.DataObject) -> None:
    data = bytearray(VALID)
    for _ in range(choose.draw(st.integers(1, 6))):
        position = choose.draw(st.integers(0, max(len(data) - 8, 0)))
        match choose.draw(st.sampled_from(["flip", "extreme", "cut", "insert"])):
            case "flip":
                data[position : position + 1] = bytes([choose.draw(st.integers(0, 255))])
            case "extreme":
                data[position : position + 8] = struct.pack("<Q", choose.draw(st.sampled_from(EXTREMES)))
            case "cut":
                del data[position : position + choose.draw(st.integers(1, 16))]
            case _:
                data[position:position] = choose.draw(st.binary(max_size=16))
    outcome(bytes(data), len(data) + choose.draw(st.sampled_from([0, 1 << 20])))


ATHERIS = """
import sys, atheris
with atheris.instrument_imports(include=["localllm.gguf"]):
    from localllm import gguf
from tests.gguf.test_fuzz import outcome
atheris.Setup(sys.argv, lambda data: outcome(data, len(data)))
atheris.Fuzz()
"""


@pytest.mark.slow
def test_atheris_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "small").write_bytes(VALID)
    (corpus / "empty").write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-c",
        ATHERIS,
        "-atheris_runs=20000",
        "-max_len=4096",
        "-timeout=5",
        "-rss_limit_mb=1500",
        "-seed=1",
        str(corpus),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done 20000" in done.stderr
