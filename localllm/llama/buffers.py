"""ggml's buffer types: what they are called, where they lie, which of them map a file, and what llama.cpp logs of them."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from localllm.errors import UsageError
from localllm.llama.lib import _bind as bind  # pyright: ignore[reportPrivateUsage]
from localllm.llama.lib import device_addresses, device_props
from localllm.rows import CPU

_CPU, _GPU, _IGPU, _ACCELERATOR = range(4)
_MIB = 1 << 20
MAPPED = "_Mapped"
"""The end of the names of buffers that are a mapping of the file."""
_LOGGED = re.compile(r"^\w+: +(\S+) +(model|KV|RS|compute|output) buffer size = +(\d+\.\d+) MiB$")
_POINTER = ctypes.c_void_p


_buft_name = bind("ggml_backend_buft_name", ctypes.c_char_p, _POINTER)
_buft_is_host = bind("ggml_backend_buft_is_host", ctypes.c_bool, _POINTER)
_buft_device = bind("ggml_backend_buft_get_device", _POINTER, _POINTER)
_cpu_buft = bind("ggml_backend_cpu_buffer_type", _POINTER)
_dev_name = bind("ggml_backend_dev_name", ctypes.c_char_p, _POINTER)
_dev_type = bind("ggml_backend_dev_type", ctypes.c_int, _POINTER)
_dev_buft = bind("ggml_backend_dev_buffer_type", _POINTER, _POINTER)
_dev_host_buft = bind("ggml_backend_dev_host_buffer_type", _POINTER, _POINTER)


@dataclass(frozen=True, slots=True)
class BufferType:
    """One kind of buffer."""

    name: str
    device: str
    """A device's name, or CPU."""
    host: bool
    mappable: bool
    """Whether weights in it are left in the mapped file, where files are mapped at all."""


def describe(address: int) -> BufferType:
    """The buffer type that llama.cpp has at `address`."""
    device = _buft_device(address)
    host = bool(_buft_is_host(address))
    away = device and not host and _dev_type(device) in (_GPU, _IGPU)
    return BufferType(
        name=_text(_buft_name(address)),
        device=_text(_dev_name(device)) if away else CPU,
        host=host,
        mappable=_mappable(address, device),
    )


def find(name: str) -> int:
    """The address of the buffer type that a device, or the CPU, calls its own; UsageError names those that there are."""
    known = {_text(_buft_name(buft)): buft for buft in (_cpu_buft(), *(_dev_buft(device) for device in device_addresses())) if buft}
    if name not in known:
        raise UsageError(f"there is no buffer {name!r} to place tensors in", hint=f"use one of {', '.join(known)}")
    return known[name]


def maps_files(load_mode: str, split_mode: str = "layer", main_gpu: int = 0) -> bool:
    """Whether llama.cpp maps the file in this mode: `auto` maps it where every device that takes part can do without a copy."""
    if load_mode != "auto":
        return "mmap" in load_mode
    gpus = [device for device in device_addresses() if _dev_type(device) == _GPU] or [
        each for each in device_addresses() if _dev_type(each) == _IGPU
    ]
    if split_mode == "none":
        gpus = gpus[main_gpu : main_gpu + 1] if main_gpu >= 0 else []
    return all(device_props(gpu).caps.mmap_support for gpu in gpus)


@dataclass(frozen=True, slots=True)
class Logged:
    """One `buffer size` line of llama.cpp's log, to 0.01 MiB."""

    buffer: str
    """The name of the buffer's type."""
    kind: str
    """model, KV, RS (recurrent states), compute or output."""
    n_bytes: int

    @property
    def device(self) -> str:
        """Where the name says that it lies: a device's name, or CPU."""
        owner = self.buffer.partition("_")[0]
        return owner if owner in _device_names() else CPU


def logged(lines: Iterable[str]) -> tuple[Logged, ...]:
    """The buffers that llama.cpp spoke of."""
    found = (_LOGGED.match(line) for line in lines)
    return tuple(Logged(match[1], match[2], round(float(match[3]) * _MIB)) for match in found if match)


@cache
def _device_names() -> frozenset[str]:
    """Of the devices that have memory of their own."""
    return frozenset(_text(_dev_name(device)) for device in device_addresses() if _dev_type(device) in (_GPU, _IGPU))


def _mappable(address: int, device: int | None) -> bool:
    """llama.cpp maps weights of a device's own buffer type where the device takes host memory, as the CPU does;
    pinned memory gives way to the CPU's where files are mapped."""
    if not device:
        return address == _cpu_buft()
    if address == _dev_host_buft(device):
        return True
    return address == _dev_buft(device) and bool(device_props(device).caps.buffer_from_host_ptr)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
