"""Models in several files: one from any part, or an error that names the part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf as package
import numpy as np
import pytest

from localllm.errors import ModelError
from localllm.gguf import read_header, read_model
from tests import gguf_file as raw

UINT16, INT32 = raw.UINT16, raw.INT32


def keys(no: int, count: int = 3, tensors: int = 4) -> list[bytes]:
    return [raw.number("split.no", no, UINT16), raw.number("split.count", count, UINT16), raw.number("split.tensors.count", tensors, INT32)]


def part(no: int, names: list[str], *more: bytes, count: int = 3, tensors: int = 4) -> bytes:
    rows = [raw.tensor(name, [8], offset=32 * i) for i, name in enumerate(names)]
    return raw.gguf([*keys(no, count, tensors), *more], rows, bytes(32 * len(names)))


PARTS = [
    part(0, ["a"], raw.string("general.architecture", "llama"), raw.strings("tokenizer.ggml.tokens", ["x", "y"])),
    part(1, ["b", "c"]),
    part(2, ["d"]),
]


@pytest.fixture
def split(tmp_path: Path) -> Callable[..., list[Path]]:
    """Writes the parts; some may be replaced by other content or, by None, left out."""

    def write(*parts: bytes | None) -> list[Path]:
        paths = [tmp_path / f"big-{i:05}-of-{len(parts):05}.gguf" for i in range(1, len(parts) + 1)]
        for path, content in zip(paths, parts, strict=True):
            if content is not None:
                path.write_bytes(content)
        return paths

    return write


@pytest.mark.parametrize("given", range(3))
def test_any_part_stands_for_the_whole(split: Callable[..., list[Path]], given: int) -> None:
    paths = split(*PARTS)
    header = read_model(paths[given])
    assert header.files == tuple(paths)
    assert [(t.name, t.file) for t in header.tensors] == [("a", 0), ("b", 1), ("c", 1), ("d", 2)]
    assert (header.architecture, header.n_vocab, header.n_params, header.weights_bytes) == ("llama", 2, 32, 128)
    assert header.file_bytes == sum(map(len, PARTS))
    assert header.tokenizer_hash
    for tensor in header.tensors:
        assert tensor.offset + tensor.n_bytes <= paths[tensor.file].stat().st_size


def test_one_file_alone_is_read_as_it_is(split: Callable[..., list[Path]]) -> None:
    path = split(*PARTS)[1]
    header = read_header(path)
    assert [(t.name, t.file) for t in header.tensors] == [("b", 0), ("c", 0)]
    assert header.files == (path,)


def test_the_parts_that_the_gguf_package_writes(tmp_path: Path) -> None:
    writer = package.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((4, 32), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(tmp_path.glob("*.gguf"))
    assert len(paths) == 3
    header = read_model(paths[2])
    assert header.files == tuple(paths)
    for i, tensor in enumerate(header.tensors):
        with header.files[tensor.file].open("rb") as file:
            file.seek(tensor.offset)
            assert np.frombuffer(file.read(tensor.n_bytes), np.float32).tolist() == [i] * 128


@pytest.mark.parametrize(
    "missing, given, message", [(2, 0, "big-00003-of-00003.gguf, one of 3"), (0, 1, "big-00001-of-00003.gguf, one of 3")]
)
def test_a_missing_part_is_named(split: Callable[..., list[Path]], missing: int, given: int, message: str) -> None:
    parts = [None if i == missing else content for i, content in enumerate(PARTS)]
    with pytest.raises(ModelError, match=message) as caught:
        read_model(split(*parts)[given])
    assert "is missing in" in caught.value.message
    assert "pull" in caught.value.hint


def test_missing_parts_are_counted(split: Callable[..., list[Path]]) -> None:
    with pytest.raises(ModelError, match=r"big-00002-of-00003\.gguf and 1 more of the 3 parts are missing in"):
        read_model(split(PARTS[0], None, None)[0])


@pytest.mark.parametrize(
    "index, content, match",
    [
        (1, part(2, ["b", "c"]), r"big-00002-of-00003\.gguf is damaged: it is not part 2 of 3"),
        (1, part(1, ["b", "c"], count=4), "it is not part 2 of 3"),
        (1, raw.gguf(), "it is not part 2 of 3"),
        (1, part(1, ["b", "c"], tensors=9), "belongs to another model"),
        (1, part(1, ["b"]), "its parts hold 3 tensors of 4"),
        (1, part(1, ["b", "a"]), "two of its parts hold the same tensor"),
        (2, part(2, ["d"])[:-1], r"big-00003-of-00003\.gguf is incomplete"),
        (2, b"", r"big-00003-of-00003\.gguf is not a GGUF file: it is empty"),
    ],
)
def test_parts_must_belong_together(split: Callable[..., list[Path]], index: int, content: bytes, match: str) -> None:
    parts = [*PARTS]
    parts[index] = content
    with pytest.raises(ModelError, match=match):
        read_model(split(*parts)[0])


def test_a_renamed_part_is_refused(tmp_path: Path) -> None:
    for name in ("model.gguf", "big-00001-of-00002.gguf"):
        (tmp_path / name).write_bytes(PARTS[0])
        with pytest.raises(ModelError, match=r"its name does not end in -0000N-of-00003\.gguf"):
            read_model(tmp_path / name)
    (tmp_path / "big-00002-of-00003.gguf").write_bytes(PARTS[0])
    with pytest.raises(ModelError, match="its header, which says part 1 of 3"):
        read_model(tmp_path / "big-00002-of-00003.gguf")


@pytest.mark.parametrize("count", [raw.number("split.count", 0), raw.number("split.count", 5000), raw.string("split.count", "3")])
def test_a_senseless_count_is_refused(tmp_path: Path, count: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(raw.gguf([count]))
    with pytest.raises(ModelError, match=r"split\.count makes no sense"):
        read_model(tmp_path / "x.gguf")


def test_a_whole_model_may_call_itself_part_one_of_one(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(part(0, ["a"], count=1, tensors=1))
    assert read_model(tmp_path / "x.gguf").n_params == 8


def test_the_budget_is_for_all_parts_together(split: Callable[..., list[Path]]) -> None:
    texts = [raw.string(f"k{i}", "x" * (1 << 20)) for i in range(4)]
    parts = [part(i, [name], *texts, tensors=3) for i, name in enumerate("abc")]
    with pytest.raises(ModelError, match="take more than 8 MiB"):
        read_model(split(*parts)[0])
