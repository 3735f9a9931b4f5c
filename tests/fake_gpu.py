"""GPUs that are not there: ggml devices whose functions are Python's, with any memory a test likes.

llama.cpp places layers, cache and graph on them as on real ones, as long as nothing is allocated or computed: in a dry run. They
copy what a CUDA device tells llama.cpp: alignment, padded rows, pinned host buffers, large batches taken off the CPU, room for
a dequantised cache. Registering is for good, so it is done in a child process:

    python tests/fake_gpu.py '[{"name": "CUDA0", "total_bytes": 25769803776}]' localllm.engine.dryrun

`command(gpus)` is that command line. The structures are ggml-backend-impl.h's, which no one promises to keep: they are those of one
version, and another one is refused.
"""

from __future__ import annotations

import ctypes as c
import json
import mmap
import runpy
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VERSION = "0.3.36"
"""Of llama-cpp-python, whose structures these are."""
GIB = 1 << 30
API_VERSION = 2
ROW_PADDING = 512
OFFLOAD_ROWS = 32
"""CUDA computes with weights in host memory for batches of at least that many rows."""


@dataclass(frozen=True)
class FakeGpu:
    """One device, as it would describe itself."""

    name: str
    total_bytes: int
    free_bytes: int = -1
    """-1 is all of it."""
    kind: str = "gpu"
    """Or `igpu`."""
    description: str = "Fake GPU"
    alignment: int = 128
    pads_rows: bool = True
    """Quantised rows are padded to a multiple of 512 weights, once per tensor."""
    denied: tuple[str, ...] = ()
    """Operations it cannot do, by ggml's names, such as FLASH_ATTN_EXT."""
    pipeline: bool = True
    """It computes and signals asynchronously: several of its kind work on four batches at once."""
    pinned: bool = True
    """It has a host buffer of its own, such as `CUDA_Host`."""

    @property
    def backend(self) -> str:
        return self.name.rstrip("0123456789")


RTX_8 = FakeGpu("CUDA0", 8 * GIB)
RTX_12 = FakeGpu("CUDA0", 12 * GIB)
RTX_24 = FakeGpu("CUDA0", 24 * GIB)
APU = FakeGpu("Vulkan0", 16 * GIB, 12 * GIB, "igpu", "AMD Radeon Graphics", alignment=64, pads_rows=False, pipeline=False, pinned=True)

MACHINES: dict[str, tuple[FakeGpu, ...]] = {
    "8": (RTX_8,),
    "12": (RTX_12,),
    "24": (RTX_24,),
    "24+24": (RTX_24, FakeGpu("CUDA1", 24 * GIB)),
    "4x24": tuple(FakeGpu(f"CUDA{i}", 24 * GIB) for i in range(4)),
    "24+8": (RTX_24, FakeGpu("CUDA1", 8 * GIB)),
    "8+12": (RTX_8, FakeGpu("CUDA1", 12 * GIB)),
    "igpu": (APU,),
    "zero": (FakeGpu("CUDA0", 0),),
    "absurd": (FakeGpu("CUDA0", 24 * GIB, 1 << 62),),
    "no flash": (FakeGpu("CUDA0", 24 * GIB, denied=("FLASH_ATTN_EXT",)),),
}


def command(gpus: Sequence[FakeGpu], module: str = "localllm.engine.dryrun") -> list[str]:
    """A command line that runs `module`, or a file, in a process that has these devices."""
    return [sys.executable, "-P", "-X", "utf8", str(Path(__file__)), json.dumps([asdict(gpu) for gpu in gpus]), module]


# ggml-backend-impl.h


def _function(result: Any, *arguments: Any) -> Any:
    return c.CFUNCTYPE(result, *arguments)


_P = c.c_void_p
_Name = _function(_P, _P)
_Size = _function(c.c_size_t, _P)
_Pointer = _function(_P, _P)
_Alloc = _function(_P, _P, c.c_size_t)
_AllocSize = _function(c.c_size_t, _P, _P)
_Is = _function(c.c_bool, _P, _P)
_IsHost = _function(c.c_bool, _P)
_Init = _function(_P, _P, c.c_char_p)
_Free = _function(None, _P)
_Kind = _function(c.c_int, _P)
_Compute = _function(c.c_int, _P, _P)
_Item = _function(_P, _P, c.c_size_t)
_Memory = _function(None, _P, c.POINTER(c.c_size_t), c.POINTER(c.c_size_t))


class _Tensor(c.Structure):
    _fields_ = [
        ("type", c.c_int),
        ("buffer", _P),
        ("ne", c.c_int64 * 4),
        ("nb", c.c_size_t * 4),
        ("op", c.c_int),
        ("op_params", c.c_int32 * 16),
        ("flags", c.c_int32),
        ("src", _P * 10),
        ("view_src", _P),
        ("view_offs", c.c_size_t),
    ]


class _BufferType(c.Structure):
    _fields_ = [
        ("get_name", _Name),
        ("alloc_buffer", _Alloc),
        ("get_alignment", _Size),
        ("get_max_size", _P),
        ("get_alloc_size", _AllocSize),
        ("is_host", _IsHost),
        ("device", _P),
        ("context", _P),
    ]


class _Backend(c.Structure):
    _fields_ = [
        ("guid", _P),
        ("get_name", _Name),
        ("free", _Free),
        ("async_copies", _P * 5),
        ("synchronize", _Free),
        ("graph_plans", _P * 4),
        ("graph_compute", _Compute),
        ("events", _P * 2),
        ("graph_optimize", _P),
        ("device", _P),
        ("context", _P),
    ]


class _Caps(c.Structure):
    _fields_ = [(name, c.c_bool) for name in ("async_", "host_buffer", "buffer_from_host_ptr", "events", "mmap_support")]


class _Props(c.Structure):
    _fields_ = [
        ("name", c.c_char_p),
        ("description", c.c_char_p),
        ("memory_free", c.c_size_t),
        ("memory_total", c.c_size_t),
        ("type", c.c_int),
        ("device_id", c.c_char_p),
        ("caps", _Caps),
    ]


_GetProps = _function(None, _P, c.POINTER(_Props))


class _Device(c.Structure):
    _fields_ = [
        ("get_name", _Name),
        ("get_description", _Name),
        ("get_memory", _Memory),
        ("get_type", _Kind),
        ("get_props", _GetProps),
        ("init_backend", _Init),
        ("get_buffer_type", _Pointer),
        ("get_host_buffer_type", _Pointer),
        ("buffer_from_host_ptr", _P),
        ("supports_op", _Is),
        ("supports_buft", _Is),
        ("offload_op", _Is),
        ("events", _P * 3),
        ("reg", _P),
        ("context", _P),
    ]


class _Registry(c.Structure):
    _fields_ = [
        ("api_version", c.c_int),
        ("get_name", _Name),
        ("get_device_count", _Size),
        ("get_device", _Item),
        ("get_proc_address", _P),
        ("context", _P),
    ]


class _Buffer(c.Structure):
    _fields_ = [
        ("free_buffer", _Free),
        ("get_base", _P),
        ("tensors", _P * 7),
        ("clear", _function(None, _P, c.c_uint8)),
        ("reset", _P),
        ("buft", _P),
    ]


_GPU, _IGPU = 1, 2
_F16_BYTES = 2


class _Ggml:
    """The functions of ggml that a device calls itself."""

    def __init__(self) -> None:
        from localllm.llama.lib import raw

        self.nbytes = raw.ggml_nbytes
        self.nbytes.restype, self.nbytes.argtypes = c.c_size_t, [_P]
        self.nrows = raw.ggml_nrows
        self.nrows.restype, self.nrows.argtypes = c.c_int64, [_P]
        self.nelements = raw.ggml_nelements
        self.nelements.restype, self.nelements.argtypes = c.c_int64, [_P]
        self.row_size = raw.ggml_row_size
        self.row_size.restype, self.row_size.argtypes = c.c_size_t, [c.c_int, c.c_int64]
        self.is_quantized = raw.ggml_is_quantized
        self.is_quantized.restype, self.is_quantized.argtypes = c.c_bool, [c.c_int]
        self.cpu_buffer_type = raw.ggml_backend_cpu_buffer_type
        self.cpu_buffer_type.restype, self.cpu_buffer_type.argtypes = _P, []
        self.buffer_from_ptr = raw.ggml_backend_cpu_buffer_from_ptr
        self.buffer_from_ptr.restype, self.buffer_from_ptr.argtypes = _P, [_P, c.c_size_t]
        self.register = raw.ggml_backend_device_register
        self.register.restype, self.register.argtypes = None, [_P]
        raw.ggml_op_name.restype, raw.ggml_op_name.argtypes = c.c_char_p, [c.c_int]
        self.ops: dict[str, int] = {}
        while (name := raw.ggml_op_name(len(self.ops)).decode()) != "X":
            self.ops[name] = len(self.ops)
            if name == "GLU":
                break


_kept: list[Any] = []
"""What C holds pointers to."""


def _keep(value: Any) -> Any:
    _kept.append(value)
    return value


def _named(text: str) -> Any:
    """A function that tells a name."""
    address = c.addressof(_keep(c.create_string_buffer(text.encode())))
    return _Name(lambda _: address)


def register(gpus: Sequence[FakeGpu]) -> None:
    """Add the devices to this process, before any model is loaded."""
    import llama_cpp

    if llama_cpp.__version__ != VERSION:
        raise SystemExit(f"fake GPUs know the structures of llama-cpp-python {VERSION}, this is {llama_cpp.__version__}")
    ggml = _Ggml()
    registries: dict[str, _Registry] = {}
    hosts: dict[str, _BufferType] = {}
    for gpu in gpus:
        device = _keep(_Device())
        if gpu.backend not in registries:
            registries[gpu.backend] = _registry(gpu.backend)
            hosts[gpu.backend] = _host_buffer_type(ggml, gpu, device)
        device.reg = c.addressof(registries[gpu.backend])
        _describe(device, gpu)
        _equip(device, ggml, gpu, hosts[gpu.backend])
        ggml.register(c.addressof(device))


def _registry(backend: str) -> _Registry:
    return _keep(_Registry(API_VERSION, _named(backend), _Size(lambda _: 0), _Item(lambda _, i: 0)))


def _describe(device: _Device, gpu: FakeGpu) -> None:
    """What it says about itself."""
    name, description = gpu.name.encode(), gpu.description.encode()
    free = gpu.total_bytes if gpu.free_bytes < 0 else gpu.free_bytes
    kind = _IGPU if gpu.kind == "igpu" else _GPU

    def memory(_: int, free_out: Any, total_out: Any) -> None:
        free_out[0], total_out[0] = free, gpu.total_bytes

    def props(_: int, out: Any) -> None:
        p = out[0]
        p.name, p.description, p.memory_free, p.memory_total = name, description, free, gpu.total_bytes
        p.type, p.device_id = kind, None
        p.caps = _Caps(gpu.pipeline, gpu.pinned, False, gpu.pipeline, gpu.kind == "gpu")

    device.get_name, device.get_description = _named(gpu.name), _named(gpu.description)
    device.get_memory = _Memory(memory)
    device.get_type = _Kind(lambda _: kind)
    device.get_props = _GetProps(props)


def _equip(device: _Device, ggml: _Ggml, gpu: FakeGpu, host: _BufferType) -> None:
    """Its buffers and what it computes."""
    own = _buffer_type(ggml, gpu, device)
    here = c.addressof(own)
    denied = {ggml.ops[op] for op in gpu.denied}
    rows_in_third = {ggml.ops[op] for op in ("MUL_MAT_ID", "ROPE", "ROPE_BACK")}
    get_rows, mul_mat = ggml.ops["GET_ROWS"], ggml.ops["MUL_MAT"]

    def supports(_: int, op: int) -> bool:
        return _Tensor.from_address(op).op not in denied

    def offloads(_: int, op: int) -> bool:
        tensor = _Tensor.from_address(op)
        if tensor.op == get_rows:
            return False
        if tensor.op == mul_mat:
            return tensor.ne[1] >= OFFLOAD_ROWS
        return (tensor.ne[2] if tensor.op in rows_in_third else ggml.nrows(op)) >= OFFLOAD_ROWS

    guid = _keep((c.c_uint8 * 16)(*gpu.name.encode()[:16]))

    def backend(_: int, __: bytes) -> int:
        made = _keep(_Backend())
        made.guid, made.device = c.addressof(guid), c.addressof(device)
        made.get_name = device.get_name
        made.free = _Free(lambda _: None)
        made.synchronize = _Free(lambda _: None)
        made.graph_compute = _Compute(lambda _, graph: -1)
        return c.addressof(made)

    device.init_backend = _Init(backend)
    device.get_buffer_type = _Pointer(lambda _: here)
    if gpu.pinned:
        device.get_host_buffer_type = _Pointer(lambda _: c.addressof(host))
    device.supports_op = _Is(supports if denied else lambda _, op: True)
    device.supports_buft = _Is(lambda _, buft: buft == here)
    device.offload_op = _Is(offloads)


def _allocate(ggml: _Ggml) -> Any:
    """Address space that says it is the device's: recurrent states and outputs are allocated even in a dry run."""

    def allocate(buffer_type: int, size: int) -> int:
        space = mmap.mmap(-1, size)
        start = c.c_char.from_buffer(space)
        address = ggml.buffer_from_ptr(c.addressof(start), size)
        buffer = _Buffer.from_address(address)
        buffer.buft = buffer_type
        del start

        def free(_: int) -> None:
            space.close()

        # new pages are zero, and clearing them would take RAM
        clear = type(buffer.clear)(lambda _, value: None)
        buffer.free_buffer, buffer.clear = _keep(_Free(free)), _keep(clear)
        return address

    return _Alloc(allocate)


def _buffer_type(ggml: _Ggml, gpu: FakeGpu, device: _Device) -> _BufferType:
    flash, f16 = ggml.ops["FLASH_ATTN_EXT"], 1

    def size(_: int, address: int) -> int:
        tensor = _Tensor.from_address(address)
        n = ggml.nbytes(address)
        if gpu.pads_rows and ggml.is_quantized(tensor.type) and (rest := tensor.ne[0] % ROW_PADDING):
            n += ggml.row_size(tensor.type, ROW_PADDING - rest)
        if tensor.op == flash and _Tensor.from_address(tensor.src[0]).ne[1] > 2:
            # the kernel for large batches reads keys and values as f16
            k, v = (_Tensor.from_address(tensor.src[i]) for i in (1, 2))
            same = v.view_src and (v.view_src == tensor.src[1] or (v.view_src == k.view_src and v.view_offs == k.view_offs))
            for i, cache in ((1, k), (2, v)):
                if cache.type != f16 and not (i == 2 and same):
                    n += -n % 128 + _F16_BYTES * ggml.nelements(tensor.src[i])
        return n

    made = _keep(_BufferType())
    made.get_name, made.alloc_buffer, made.get_alloc_size = _named(gpu.name), _allocate(ggml), _AllocSize(size)
    made.get_alignment = _Size(lambda _: gpu.alignment)
    made.device = c.addressof(device)
    return made


def _host_buffer_type(ggml: _Ggml, gpu: FakeGpu, device: _Device) -> _BufferType:
    """Pinned memory of the host: the CPU buffer type under another name."""
    cpu = _BufferType.from_address(ggml.cpu_buffer_type())
    made = _keep(_BufferType())
    made.get_name, made.alloc_buffer = _named(f"{gpu.backend}_Host"), _allocate(ggml)
    made.get_alignment, made.is_host = cpu.get_alignment, cpu.is_host
    made.get_alloc_size = cpu.get_alloc_size
    made.device = c.addressof(device)
    return made


def main(gpus: str, module: str) -> None:
    register([FakeGpu(**{**gpu, "denied": tuple(gpu["denied"])}) for gpu in json.loads(gpus)])
    sys.argv = [module]
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
