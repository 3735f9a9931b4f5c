"""What a context and its model hold, by buffer: exact where llama.cpp's own account can be read, else what its log says.

The account is a C++ function that returns a std::map by value. Its nodes are read as the two usual standard libraries lay them
out; a map that does not look right is not believed, and where there is no such library the log has to do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from localllm.llama import buffers
from localllm.llama.context import Context
from localllm.llama.lib import raw
from localllm.llama.model import Model
from localllm.rows import CPU, Row

__all__ = ["Row", "account", "breakdown"]

_SYMBOL = "_Z26llama_get_memory_breakdownPK13llama_context"
_LIBSTDCXX = "_ZSt18_Rb_tree_incrementPSt18_Rb_tree_node_base"
_LIBCXX = "_ZNSt3__16localeC1Ev"
_MANY = 256
"""More kinds of buffers than that are no kinds of buffers."""
_FLOAT_BYTES = 4
_POINTER = ctypes.c_void_p
_Sizes = tuple[int, int, int]
"""Weights, context and compute, in bytes."""


class _Value(ctypes.Structure):
    """std::pair<const ggml_backend_buffer_type_t, llama_memory_breakdown_data>"""

    _fields_ = (
        ("buffer_type", ctypes.c_size_t),
        ("model", ctypes.c_size_t),
        ("context", ctypes.c_size_t),
        ("compute", ctypes.c_size_t),
    )


class _GnuMap(ctypes.Structure):
    """libstdc++: a comparator that is empty, the header node, whose parent is the root, and the count."""

    _fields_ = (
        ("comparator", ctypes.c_size_t),
        ("color", ctypes.c_int),
        ("root", _POINTER),
        ("first", _POINTER),
        ("last", _POINTER),
        ("count", ctypes.c_size_t),
    )


class _GnuNode(ctypes.Structure):
    _fields_ = (("color", ctypes.c_int), ("parent", _POINTER), ("left", _POINTER), ("right", _POINTER), ("value", _Value))


class _LlvmMap(ctypes.Structure):
    """libc++: the first node, the end node, whose left child is the root, and the count."""

    _fields_ = (("first", _POINTER), ("root", _POINTER), ("count", ctypes.c_size_t))


class _LlvmNode(ctypes.Structure):
    _fields_ = (("left", _POINTER), ("right", _POINTER), ("parent", _POINTER), ("black", ctypes.c_bool), ("value", _Value))


class _Implausible(Exception):
    """The memory read is no such map."""


@dataclass(frozen=True, slots=True)
class _Layout:
    map: type[_GnuMap | _LlvmMap]
    node: type[_GnuNode | _LlvmNode]
    proven: bool
    """Whether it was held against the real library. If not, only a dry run may try it, whose crash ends nothing else."""


def breakdown(context: Context) -> tuple[Row, ...]:
    """What `context` and its model hold, devices first; of a model without allocated weights, what they would hold."""
    return account(context)[0]


def account(context: Context) -> tuple[tuple[Row, ...], bool]:
    """The same, and whether it is exact; if not, it is rounded to 0.01 MiB, and weights and caches that were not allocated are 0."""
    exact = _from_map(context)
    rows = _with_output(context, _from_log(context) if exact is None else exact)
    held = (row for row in rows if row.total_bytes)
    return tuple(sorted(held, key=lambda row: (row.device == CPU, len(row.device), row.device, row.buffer))), exact is not None


@cache
def _layout() -> _Layout | None:
    """How the C++ library behind llama.cpp lays out a std::map; None when it is none of those known."""
    if ctypes.sizeof(_POINTER) != 8 or not hasattr(raw, _SYMBOL):
        return None
    if hasattr(raw, _LIBSTDCXX):
        return _Layout(_GnuMap, _GnuNode, proven=True)
    if hasattr(raw, _LIBCXX):
        return _Layout(_LlvmMap, _LlvmNode, proven=False)
    return None


def _from_map(context: Context) -> list[Row] | None:
    """llama.cpp's own account; None where it cannot be read."""
    layout = _layout()
    if layout is None or not (layout.proven or context.model.no_alloc):
        return None
    # a call leaks the map's few nodes: they are C++'s to free
    function: Callable[[int | None], _GnuMap | _LlvmMap] = getattr(raw, _SYMBOL)
    function.restype, function.argtypes = layout.map, [_POINTER]  # pyright: ignore[reportFunctionMemberAccess]
    try:
        sizes = dict(_entries(function(context.handle), layout))
    except _Implausible:
        return None
    return [_row(context.model, buffers.describe(address), each) for address, each in sizes.items()]


def _entries(tree: _GnuMap | _LlvmMap, layout: _Layout) -> Iterator[tuple[int, _Sizes]]:
    """The map's entries in order; raises _Implausible for what cannot be one."""
    if tree.count > _MANY or bool(tree.count) != bool(tree.root):
        raise _Implausible
    path: list[_GnuNode | _LlvmNode] = []
    at, seen, before = tree.root, 0, 0
    while at or path:
        while at:
            if at % ctypes.alignment(layout.node) or len(path) > _MANY:
                raise _Implausible
            path.append(layout.node.from_address(at))
            at = path[-1].left
        node = path.pop()
        value = node.value
        seen += 1
        # a map is sorted by its keys
        if seen > tree.count or value.buffer_type <= before:
            raise _Implausible
        before = value.buffer_type
        yield before, (value.model, value.context, value.compute)
        at = node.right
    if seen != tree.count:
        raise _Implausible


def _row(model: Model, kind: buffers.BufferType, sizes: _Sizes) -> Row:
    mapped = model.maps_files and kind.mappable if model.no_alloc else kind.name.endswith(buffers.MAPPED)
    return Row(kind.name, kind.device, kind.host, *sizes, mapped_bytes=sizes[0] if mapped else 0)


def _from_log(context: Context) -> list[Row]:
    """The account as far as the log gives it."""
    # compute buffers are told again whenever they are reserved anew
    told = {(each.buffer, each.kind, 0 if each.kind == "compute" else i): each for i, each in enumerate(_logged(context))}
    sizes: dict[str, list[int]] = {}
    for each in told.values():
        if each.kind in _COLUMNS:
            sizes.setdefault(each.buffer, [0, 0, 0])[_COLUMNS[each.kind]] += each.n_bytes
    device = {each.buffer: each.device for each in told.values()}
    return [
        Row(name, device[name], _is_host(name), *row, mapped_bytes=row[0] if name.endswith(buffers.MAPPED) else 0)
        for name, row in sizes.items()
    ]


_COLUMNS = {"model": 0, "KV": 1, "RS": 1, "compute": 2}
"""Where a kind of line belongs among weights, cache and compute."""


def _logged(context: Context) -> tuple[buffers.Logged, ...]:
    return context.model.buffers + context.buffers


def _is_host(name: str) -> bool:
    return name in (CPU, CPU + buffers.MAPPED) or name.endswith("_Host")


def _with_output(context: Context, rows: list[Row]) -> list[Row]:
    """`rows` with the logits' buffer, in the size that it may grow to; llama.cpp makes it for one row a sequence."""
    output = next((each for each in context.buffers if each.kind == "output"), None)
    n_bytes = _FLOAT_BYTES * context.n_vocab * context.n_outputs
    name = output.buffer if output else CPU
    for i, row in enumerate(rows):
        if row.buffer == name:
            return [*rows[:i], replace(row, output_bytes=n_bytes), *rows[i + 1 :]]
    return [*rows, Row(name, CPU, True, output_bytes=n_bytes)]
