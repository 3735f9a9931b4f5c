"""The processor's name, instructions and cache, from recorded outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from localllm.hardware.cpu import cpu_features, cpu_name, last_level_cache_bytes
from localllm.hardware.windows import WindowsReadings
from tests.hardware.recorded import MIB, linux, mac

X86 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD Ryzen 9 7950X 16-Core Processor\x20\x20
flags\t\t: fpu sse4_2 avx f16c fma avx2 bmi2 avx512f avx512bw avx512_vnni sha_ni

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
RASPBERRY = (
    "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 asimdhp asimddp\n\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"
)


def test_x86(tmp_path: Path) -> None:
    machine = linux(tmp_path, {"proc/cpuinfo": X86})
    assert cpu_name(machine) == "AMD Ryzen 9 7950X 16-Core Processor"
    assert cpu_features(machine) == ("sse4_2", "avx", "f16c", "fma", "bmi2", "avx2", "avx512f", "avx512bw", "avx512_vnni")


def test_arm_boards(tmp_path: Path) -> None:
    machine = linux(tmp_path, {"proc/cpuinfo": RASPBERRY}, arch="aarch64")
    assert cpu_name(machine) == "Raspberry Pi 5 Model B Rev 1.0"
    assert cpu_features(machine) == ("neon", "fp16", "dotprod")
    server = linux(tmp_path / "b", {"proc/cpuinfo": "", "proc/device-tree/model": "NVIDIA Jetson AGX Orin\0"}, arch="aarch64")
    assert cpu_name(server) == "NVIDIA Jetson AGX Orin"


def test_apple(tmp_path: Path) -> None:
    assert cpu_name(mac(tmp_path)) == "Apple M3 Max"
    assert cpu_features(mac(tmp_path)) == ("neon", "fp16", "dotprod", "i8mm", "bf16")
    assert last_level_cache_bytes(mac(tmp_path)) == 0, "the cache that all its parts share is not told"


def test_an_intel_mac(tmp_path: Path) -> None:
    text = "machdep.cpu.brand_string: Intel(R) Core(TM) i9-9880H CPU @ 2.30GHz\nhw.l3cachesize: 16777216\n"
    text += "machdep.cpu.features: FPU SSE4.2 AVX1.0 FMA F16C\nmachdep.cpu.leaf7_features: BMI1 AVX2 BMI2\n"
    machine = mac(tmp_path, sysctl=text, arch="x86_64")
    assert cpu_name(machine) == "Intel(R) Core(TM) i9-9880H CPU @ 2.30GHz"
    assert cpu_features(machine) == ("sse4_2", "avx", "f16c", "fma", "bmi2", "avx2")
    assert last_level_cache_bytes(machine) == 16 * MIB


def test_windows(tmp_path: Path) -> None:
    readings = WindowsReadings(cpu_name="12th Gen Intel(R) Core(TM) i7-1260P", features=frozenset({"avx2", "avx"}))
    machine = linux(tmp_path, {}, os="windows", arch="amd64", windows=readings)
    assert cpu_name(machine) == "12th Gen Intel(R) Core(TM) i7-1260P"
    assert cpu_features(machine) == ("avx", "avx2")


@pytest.mark.parametrize("system", ["linux", "windows", "darwin", "plan9"])
def test_a_silent_system_has_an_architecture(tmp_path: Path, system: str) -> None:
    machine = linux(tmp_path, {}, os=system, arch="riscv64")
    assert cpu_name(machine) == "riscv64"
    assert cpu_features(machine) == ()
    assert last_level_cache_bytes(machine) == 0


def test_caches_of_chiplets_add_up(tmp_path: Path) -> None:
    files: dict[str, str] = {}
    for cpu in range(16):
        shared = "0-7" if cpu < 8 else "8-15"
        levels = [(1, "Data", "32K", str(cpu)), (1, "Instruction", "32K", str(cpu)), (2, "Unified", "1024K", str(cpu))]
        for index, (level, kind, size, cpus) in enumerate([*levels, (3, "Unified", "32768K", shared)]):
            folder = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            files |= {f"{folder}/level": f"{level}\n", f"{folder}/type": kind, f"{folder}/size": size, f"{folder}/shared_cpu_list": cpus}
    assert last_level_cache_bytes(linux(tmp_path, files, cpus=16)) == 64 * MIB
    assert last_level_cache_bytes(linux(tmp_path, {}, cpus=4)) == 32 * MIB, "pinned to one chiplet"
