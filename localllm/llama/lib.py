"""llama.cpp's library, loaded once: its log, its devices, its build.

Importing this module loads the shared libraries, so only the process that decodes imports it.
ggml's own functions are bound through libllama's handle: opening libggml by path would create a
second registry without devices.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp

logger = logging.getLogger("localllm.llama")

logger.addHandler(logging.NullHandler())

# llama.cpp's info is a developer's debug
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
_DEBUG, _ERROR, _CONTINUE = 1, 4, 5
_HARMLESS = "possible training context overflow"
"""Our contexts are pools of cells for many sequences, each held to the trained length."""

api: Any = llama_cpp.llama_cpp
"""The bindings, untyped: their own annotations are partial and disagree with ctypes."""

raw: Any = api._lib
"""libllama's ctypes handle, for symbols that the bindings leave out."""


class _Log:
    """Joins the fragments that llama.cpp logs into lines and keeps the last errors for exceptions."""

    def __init__(self) -> None:
        self.local = threading.local()
        self.errors: list[str] = []
        self.listeners: list[list[str]] = []
        self.lock = threading.Lock()

    def write(self, level: int, text: bytes) -> None:
        state = self.local
        if level == _CONTINUE:
            level = getattr(state, "level", 1)
        state.level = level
        line = getattr(state, "line", "") + text.decode("utf-8", "replace")
        if not line.endswith("\n"):
            state.line = line
            return
        state.line = ""
        line = line.rstrip()
        # progress dots and blank lines say nothing
        if not line.strip("."):
            return
        for lines in self.listeners:
            lines.append(line)
        if _HARMLESS in line:
            level = _DEBUG
        if level == _ERROR:
            with self.lock:
                self.errors = [*self.errors[-7:], line]
        logger.log(_LEVELS.get(level, logging.DEBUG), "%s", line)


_log = _Log()


@api.llama_log_callback
def _on_log(level: int, text: bytes, _: Any) -> None:
    # an exception must not cross into C, and logging may fail during interpreter shutdown
    try:
        _log.write(level, text)
    except Exception:
        return


api.llama_log_set(_on_log, ctypes.c_void_p(0))
api.llama_backend_init()


def take_errors() -> str:
    """The errors that llama.cpp logged since the last call, joined; empty if none."""
    with _log.lock:
        errors, _log.errors = _log.errors, []
    return "; ".join(dict.fromkeys(errors))


@contextmanager
def log_lines() -> Generator[list[str]]:
    """Collect what llama.cpp logs meanwhile, on any thread, whatever the logger's level."""
    lines: list[str] = []
    with _log.lock:
        _log.listeners = [*_log.listeners, lines]
    try:
        yield lines
    finally:
        with _log.lock:
            _log.listeners = [each for each in _log.listeners if each is not lines]


_stderr_lock = threading.Lock()


@contextmanager
def captured_stderr() -> Generator[list[str]]:
    """Collect what C code prints to file descriptor 2: llama.cpp's grammar parser does not use its log."""
    lines: list[str] = []
    with _stderr_lock, tempfile.TemporaryFile() as sink:
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            sink.seek(0)
            lines += sink.read().decode("utf-8", "replace").splitlines()


@dataclass(frozen=True, slots=True)
class Device:
    """One ggml device as llama.cpp sees it; `kind` is cpu, gpu, igpu, accel or meta, sizes in bytes."""

    name: str
    description: str
    kind: str
    free_bytes: int
    total_bytes: int
    device_id: str = ""
    """Its PCI address, as `0000:01:00.0`; empty where the backend does not tell."""


_KINDS = ("cpu", "gpu", "igpu", "accel", "meta")


def _handles() -> list[Any]:
    # a Windows handle does not search its dependencies, but loading a DLL twice gives the same one
    if sys.platform != "win32":
        return [raw]
    folder = Path(llama_cpp.__file__).parent / "lib"
    return [raw, *(ctypes.CDLL(str(p)) for p in (folder / "ggml.dll", folder / "ggml-base.dll") if p.exists())]


_ggml = _handles()


def _bind(name: str, result: Any, *arguments: Any) -> Any:
    # an item is a new object each time, an attribute one that all share, with its types
    function = next(handle[name] for handle in _ggml if hasattr(handle, name))
    function.restype = result
    function.argtypes = arguments
    return function


class _Caps(ctypes.Structure):
    _fields_ = [(name, ctypes.c_bool) for name in ("async_", "host_buffer", "buffer_from_host_ptr", "events", "mmap_support")]


class _Props(ctypes.Structure):
    """ggml_backend_dev_props."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", _Caps),
    ]


_dev_count = _bind("ggml_backend_dev_count", ctypes.c_size_t)
_dev_get = _bind("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
_dev_props = _bind("ggml_backend_dev_get_props", None, ctypes.c_void_p, ctypes.POINTER(_Props))


def devices() -> list[Device]:
    """Every device that this build can use, in llama.cpp's order."""
    out: list[Device] = []
    for address in device_addresses():
        props = device_props(address)
        kind = int(props.type)
        out.append(
            Device(
                name=_text(props.name),
                description=_text(props.description),
                kind=_KINDS[kind] if 0 <= kind < len(_KINDS) else "unknown",
                free_bytes=props.memory_free,
                total_bytes=props.memory_total,
                device_id=_text(props.device_id),
            )
        )
    return out


def device_addresses() -> list[int]:
    """Where ggml has its devices, in llama.cpp's order."""
    return [_dev_get(i) for i in range(_dev_count())]


def device_props(address: int) -> Any:
    """What the device says of itself: ggml_backend_dev_props."""
    props = _Props()
    _dev_props(address, ctypes.byref(props))
    return props


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")


def build() -> str:
    """Version of the bindings and the CPU features and backends compiled in, as one stable line."""
    info = (api.llama_print_system_info() or b"").decode("utf-8", "replace").strip()
    return f"llama-cpp-python {llama_cpp.__version__} ({info})"
