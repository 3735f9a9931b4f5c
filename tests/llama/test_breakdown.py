"""The breakdown of live contexts: a std::map read right or not at all, and the log as the second witness."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from localllm.llama import breakdown as module
from localllm.llama import buffers
from localllm.llama.breakdown import account, breakdown
from localllm.llama.context import Context, ContextParams
from localllm.llama.model import Model
from localllm.rows import CPU, Row, by_device
from tests.tiny_models import KINDS

ROUNDING_BYTES = 5243
"""Half of 0.01 MiB, rounded up."""
HEAD, LAYERS = 16, 4
GNU = module._Layout(module._GnuMap, module._GnuNode, proven=True)
LLVM = module._Layout(module._LlvmMap, module._LlvmNode, proven=False)


@pytest.fixture
def context(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Context]:
    """A context of a tiny model of the kind and with the load mode that the test asks for."""
    kind, load_mode = getattr(request, "param", ("plain", "none"))
    model = Model(str(KINDS[kind](tmp_path / "m.gguf")), n_gpu_layers=0, load_mode=load_mode)
    made = Context(model, ContextParams(n_ctx=512, n_seq=3, n_outputs=5, n_batch=64, n_ubatch=64))
    yield made
    made.close()
    model.close()


def test_the_account_of_a_plain_model_is_what_the_sizes_say(context: Context) -> None:
    rows, exact = account(context)
    assert exact
    cpu = by_device(rows)[CPU]
    assert cpu.kv_bytes == 2 * LAYERS * 512 * HEAD * 2
    assert cpu.weights_bytes == pytest.approx(context.model.size_bytes, abs=32 * 50)
    assert cpu.output_bytes == 4 * 5 * context.n_vocab
    assert cpu.compute_bytes > 0
    assert cpu.mapped_bytes == 0


EVERY_KIND = [pytest.param((kind, mode), id=f"{kind}-{mode}") for kind in KINDS for mode in ("none", "mmap")]


@pytest.mark.parametrize("context", EVERY_KIND, indirect=True)
def test_the_log_tells_the_same_of_a_live_context(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = breakdown(context)
    monkeypatch.setattr(module, "_layout", lambda: None)
    told, is_exact = account(context)
    assert not is_exact
    assert [(row.buffer, row.device, row.host) for row in told] == [(row.buffer, row.device, row.host) for row in exact]
    for one, other in zip(told, exact, strict=True):
        # the cache is told in up to two lines
        assert one.weights_bytes == pytest.approx(other.weights_bytes, abs=ROUNDING_BYTES)
        assert one.kv_bytes == pytest.approx(other.kv_bytes, abs=2 * ROUNDING_BYTES)
        assert one.compute_bytes == pytest.approx(other.compute_bytes, abs=ROUNDING_BYTES)
        assert one.output_bytes == other.output_bytes
        assert one.mapped_bytes == pytest.approx(other.mapped_bytes, abs=ROUNDING_BYTES)


@pytest.mark.parametrize("context", [("plain", "mmap")], indirect=True)
def test_mapped_weights_are_told_apart(context: Context) -> None:
    rows = {row.buffer: row for row in breakdown(context)}
    mapped = rows["CPU_Mapped"]
    assert mapped.device == CPU
    assert mapped.host
    assert mapped.mapped_bytes == mapped.weights_bytes > 0
    assert mapped.anonymous_bytes == 0
    assert rows["CPU"].anonymous_bytes == rows["CPU"].total_bytes > 0


def test_the_output_buffer_is_the_one_that_llama_cpp_makes(tmp_path: Path) -> None:
    model = Model(str(KINDS["plain"](tmp_path / "m.gguf")), n_gpu_layers=0)
    # with as many outputs as sequences it does not grow after the log told of it
    made = Context(model, ContextParams(n_ctx=256, n_seq=100, n_outputs=100, n_batch=128))
    logged = next(each for each in made.buffers if each.kind == "output")
    assert by_device(breakdown(made))[CPU].output_bytes == pytest.approx(logged.n_bytes, abs=ROUNDING_BYTES)
    made.close()
    model.close()


def test_a_model_without_weights_makes_contexts_that_take_nothing(tmp_path: Path) -> None:
    model = Model(str(KINDS["plain"](tmp_path / "m.gguf")), n_gpu_layers=0, load_mode="mmap", no_alloc=True)
    before = psutil.Process().memory_info().rss
    context = Context(model, ContextParams(n_ctx=1 << 20))
    assert not context.can_cut
    rows = by_device(breakdown(context))
    assert rows[CPU].kv_bytes == 2 * LAYERS * (1 << 20) * HEAD * 2
    assert rows[CPU].mapped_bytes == rows[CPU].weights_bytes
    # llama.cpp's list of cells is there, the cells are not
    assert psutil.Process().memory_info().rss - before < rows[CPU].kv_bytes // 2
    context.close()
    model.close()


# std::map


class Tree:
    """A std::map as the C++ library would have it, made of ctypes: nodes in heap order, keys ascending."""

    def __init__(self, layout: Any, n: int) -> None:
        self.nodes = [layout.node() for _ in range(n)]
        self.map = layout.map()
        self.map.count = n
        self.map.root = ctypes.addressof(self.nodes[0]) if n else None
        for i, node in enumerate(self.nodes):
            node.left = ctypes.addressof(self.nodes[2 * i + 1]) if 2 * i + 1 < n else None
            node.right = ctypes.addressof(self.nodes[2 * i + 2]) if 2 * i + 2 < n else None
        for rank, i in enumerate(_in_order(0, n), 1):
            self.nodes[i].value = (rank * 0x1000, rank, rank * 10, rank * 100)


def _in_order(i: int, n: int) -> Iterator[int]:
    if i < n:
        yield from itertools.chain(_in_order(2 * i + 1, n), [i], _in_order(2 * i + 2, n))


@pytest.mark.parametrize("layout", [GNU, LLVM])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 10])
def test_both_layouts_are_read(layout: Any, n: int) -> None:
    tree = Tree(layout, n)
    entries = list(module._entries(tree.map, layout))
    assert entries == [(rank * 0x1000, (rank, rank * 10, rank * 100)) for rank in range(1, n + 1)]


def test_the_sizes_of_the_layouts_are_those_of_the_libraries() -> None:
    assert [ctypes.sizeof(each) for each in (GNU.map, GNU.node, LLVM.map, LLVM.node)] == [48, 64, 24, 64]
    assert (GNU.node.value.offset, LLVM.node.value.offset) == (32, 32)


def damage(tree: Tree, how: str) -> None:
    match how:
        case "count too high":
            tree.map.count += 1
        case "count too low":
            tree.map.count -= 1
        case "count absurd":
            tree.map.count = 1 << 40
        case "no root":
            tree.map.root = None
        case "order":
            tree.nodes[3].value.buffer_type = 1 << 40
        case "null key":
            tree.nodes[3].value.buffer_type = 0
        case "loop to the left":
            tree.nodes[3].left = ctypes.addressof(tree.nodes[0])
        case "loop to the right":
            tree.nodes[4].right = ctypes.addressof(tree.nodes[0])
        case "odd pointer":
            tree.nodes[0].left += 1
        case _:
            raise AssertionError(how)


HOWS = [
    "count too high",
    "count too low",
    "count absurd",
    "no root",
    "order",
    "null key",
    "loop to the left",
    "loop to the right",
    "odd pointer",
]


@pytest.mark.parametrize("layout", [GNU, LLVM])
@pytest.mark.parametrize("how", HOWS)
def test_what_is_no_map_is_not_believed(layout: Any, how: str) -> None:
    tree = Tree(layout, 5)
    damage(tree, how)
    with pytest.raises(module._Implausible):
        list(module._entries(tree.map, layout))


def test_an_implausible_account_gives_way_to_the_log(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    # the other library's layout, read from this one's map
    mine, other = (GNU, LLVM) if module._layout() == GNU else (LLVM, GNU)
    monkeypatch.setattr(module, "_layout", lambda: module._Layout(mine.map, other.node, proven=True))
    rows, exact = account(context)
    assert not exact
    assert by_device(rows)[CPU].kv_bytes == pytest.approx(2 * LAYERS * 512 * HEAD * 2, abs=ROUNDING_BYTES)


def test_a_live_model_is_not_risked_on_a_layout_that_was_never_tried(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    assert account(context)[1]
    monkeypatch.setattr(module, "_layout", lambda: replace(GNU, proven=False))
    assert not account(context)[1]


# the log


def test_lines_of_the_log() -> None:
    lines = """\
load_tensors:   CPU_Mapped model buffer size =   762.81 MiB
load_tensors:   CPU_REPACK model buffer size =   445.50 MiB
load_tensors:        CUDA0 model buffer size =     0.00 MiB
llama_context:        CPU  output buffer size =     0.49 MiB
llama_kv_cache:      CUDA0 KV buffer size =   136.00 MiB
llama_memory_recurrent:        CPU RS buffer size =    19.27 MiB
sched_reserve:  CUDA_Host compute buffer size =    24.01 MiB
~llama_context:        CPU compute buffer size is  72.0117 MiB, matches expectation of  72.0117 MiB
llama_kv_cache: size =  136.00 MiB (  8192 cells,   4 layers,  1/1 seqs), K (f16):   68.00 MiB, V (f16):   68.00 MiB
""".splitlines()
    assert [(each.buffer, each.kind, each.n_bytes) for each in buffers.logged(lines)] == [
        ("CPU_Mapped", "model", 799864259),
        ("CPU_REPACK", "model", 467140608),
        ("CUDA0", "model", 0),
        ("CPU", "output", 513802),
        ("CUDA0", "KV", 142606336),
        ("CPU", "RS", 20206060),
        ("CUDA_Host", "compute", 25176310),
    ]


# rows


def test_rows_of_a_device_add_up() -> None:
    rows = [
        Row("CUDA0", "CUDA0", False, 1, 2, 3),
        Row("CPU", CPU, True, 10, 20, 30, 40, mapped_bytes=5),
        Row("CPU_REPACK", CPU, False, 100),
    ]
    sums = by_device(rows)
    assert list(sums) == ["CUDA0", CPU]
    assert sums[CPU] == Row(CPU, CPU, True, 110, 20, 30, 40, mapped_bytes=5)
    assert (sums[CPU].total_bytes, sums[CPU].anonymous_bytes) == (200, 195)
