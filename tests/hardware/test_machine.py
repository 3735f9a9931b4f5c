"""Whole recorded machines through `detect`; and this machine, whatever it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from localllm.hardware import Hardware, Memory, bandwidth, detect, this_machine
from localllm.hardware.windows import WindowsReadings
from tests.hardware.recorded import (
    CPU,
    GIB,
    M3_MAX,
    MIB,
    ON_BATTERY,
    FakeCard,
    FakeNvml,
    core_record,
    drm_card,
    linux,
    mac,
    meminfo,
    probed,
    siblings,
)

SIXTEEN_CORES = siblings(*[f"{cpu},{cpu + 16}" for cpu in range(16)])
RYZEN = {
    **SIXTEEN_CORES,
    "proc/cpuinfo": "model name\t: AMD Ryzen 9 7950X 16-Core Processor\nflags\t\t: sse4_2 avx2 fma\n",
    "proc/meminfo": meminfo(64 << 20, 50 << 20),
    "proc/self/cgroup": "0::/user.slice\n",
    "proc/sys/kernel/osrelease": "6.12.9-arch1-1\n",
    "sys/class/power_supply/.keep": "",
    **drm_card(0, "0000:01:00.0", vendor="0x10de", screens={"DP-1": "connected"}),
    **drm_card(1, "0000:6c:00.0", vram=(512 * MIB, 100 * MIB), gtt=(31 * GIB, GIB), screens={"HDMI-A-1": "disconnected"}),
}
RTX = probed(device_id="0000:01:00.0")
RAPHAEL = probed("Vulkan1", description="AMD Radeon Graphics", kind="igpu", total=32 * GIB, free=31 * GIB, device_id="0000:6c:00.0")


def test_a_desktop_with_two_makers(tmp_path: Path) -> None:
    found = detect([CPU, RTX, RAPHAEL], sources=linux(tmp_path, RYZEN, cpus=32, nvml=lambda: FakeNvml([FakeCard(display=0)])))
    cuda, vulkan = found.devices
    assert (cuda.name, cuda.free_bytes, cuda.display, cuda.sources) == ("CUDA0", 23000 * MIB, True, ("llama.cpp", "NVML"))
    # the driver: 412 MiB of the carve-out, 30 GiB of the GTT; llama.cpp says 31
    assert (vulkan.name, vulkan.free_bytes, vulkan.shared_with_ram, vulkan.display) == ("Vulkan1", 30 * GIB + 412 * MIB, True, False)
    rest = dataclasses.replace(found, devices=())
    assert rest == Hardware(
        os="linux",
        arch="x86_64",
        cpu_name="AMD Ryzen 9 7950X 16-Core Processor",
        physical_cores=16,
        logical_cores=32,
        cpu_features=("sse4_2", "fma", "avx2"),
        ram=Memory(64 * GIB, 50 * GIB),
        devices=(),
        on_battery=False,
        bandwidth_bytes_per_s=None,
        wsl=False,
    )


def test_nobody_asked_the_engine(tmp_path: Path) -> None:
    def must_not() -> Any:
        raise AssertionError("the drivers' cards matter only beside the engine's")

    found = detect(sources=linux(tmp_path, RYZEN, cpus=32, nvml=must_not))
    assert found.devices == ()
    assert found.warnings == ()


def test_an_engine_that_uses_no_card(tmp_path: Path) -> None:
    found = detect([CPU], sources=linux(tmp_path, RYZEN, cpus=32, nvml=lambda: FakeNvml([FakeCard()])))
    assert found.devices == ()
    assert [warning.partition(" is there")[0] for warning in found.warnings] == ["NVIDIA GeForce RTX 4090", "AMD graphics 0000:6c:00.0"]


def test_a_container(tmp_path: Path) -> None:
    files = {
        **RYZEN,
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/cpu.max": "350000 100000\n",
        "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory.stat": f"inactive_file {GIB}\nactive_file {GIB}\n",
    }
    found = detect([CPU, RAPHAEL], sources=linux(tmp_path, files, cpus=32, env={"CUDA_VISIBLE_DEVICES": ""}))
    assert (found.physical_cores, found.cpu_quota) == (3, 3.5)
    assert found.ram == Memory(64 * GIB, 7 * GIB, 8 * GIB, "memory.max of the container")
    assert found.devices[0].free_bytes == 7 * GIB + 412 * MIB, "RAM that the container may not have, its graphics may not either"


def test_a_mac_on_battery(tmp_path: Path) -> None:
    metal = probed("MTL0", description="Apple M3 Max", total=48 * GIB, free=48 * GIB)
    found = detect([metal], sources=mac(tmp_path, pmset=ON_BATTERY))
    assert (found.os, found.cpu_name, found.physical_cores, found.on_battery) == ("darwin", "Apple M3 Max", 12, True)
    assert found.ram == Memory(64 * GIB, 1409024 * 16384)
    assert found.devices[0].free_bytes == 1409024 * 16384
    assert found.warnings == ()


def test_a_mac_whose_wired_limit_is_above_its_memory(tmp_path: Path) -> None:
    metal = probed("MTL0", description="Apple M3 Max", total=96 * GIB, free=96 * GIB)
    found = detect([metal], sources=mac(tmp_path, sysctl=M3_MAX.replace("wired_limit_mb: 0", "wired_limit_mb: 98304")))
    assert "iogpu.wired_limit_mb allows the GPU 96 GiB" in found.warnings[0]
    assert found.devices[0].free_bytes == 1409024 * 16384


def test_wsl(tmp_path: Path) -> None:
    files = {"proc/sys/kernel/osrelease": "5.15.167.4-microsoft-standard-WSL2\n", "proc/meminfo": meminfo(16 << 20, 15 << 20)}
    found = detect([RTX], sources=linux(tmp_path, files, nvml=lambda: FakeNvml([FakeCard()])))
    assert found.wsl
    assert "under WSL" in found.warnings[0]
    assert detect([], sources=linux(tmp_path, files)).warnings == (), "without a card there is nothing to warn of"


def test_windows(tmp_path: Path) -> None:
    readings = WindowsReadings(
        total_bytes=32 * GIB,
        available_bytes=20 * GIB,
        commit_available_bytes=40 * GIB,
        cores=core_record(0b11) + core_record(0b1100),
        affinity_mask=0b1111,
        ac_line=0,
        cpu_name="AMD Ryzen 7",
        features=frozenset({"avx2"}),
    )
    nvml = FakeNvml([FakeCard()])
    found = detect([RTX], sources=linux(tmp_path, {}, os="windows", arch="amd64", windows=readings, nvml=lambda: nvml))
    assert dataclasses.replace(found, devices=()) == Hardware(
        os="windows",
        arch="amd64",
        cpu_name="AMD Ryzen 7",
        physical_cores=2,
        logical_cores=8,
        cpu_features=("avx2",),
        ram=Memory(32 * GIB, 20 * GIB),
        devices=(),
        on_battery=True,
        bandwidth_bytes_per_s=None,
        wsl=False,
    )
    assert found.devices[0].sources == ("llama.cpp", "NVML")


@pytest.mark.parametrize("system", ["linux", "darwin", "windows", "freebsd"])
def test_a_machine_that_says_nothing(tmp_path: Path, system: str) -> None:
    found = detect([], sources=linux(tmp_path, {}, os=system, arch="riscv64", cpus=4))
    assert found == Hardware(system, "riscv64", "riscv64", 4, 4, (), Memory(None, None), (), None, None, False)


def test_bandwidth_is_never_measured_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def measure(n_threads: int, n_bytes: int) -> float:
        measured.append(n_threads)
        return 50e9 + len(measured)

    monkeypatch.setattr(bandwidth, "measure", measure)
    machine, state = linux(tmp_path / "machine", RYZEN, cpus=32), tmp_path / "state"
    assert detect(sources=machine, state=state).bandwidth_bytes_per_s is None
    assert detect(sources=machine, measure="missing").bandwidth_bytes_per_s == 50e9 + 1, "nowhere to keep it"
    assert detect(sources=machine, state=state, measure="missing").bandwidth_bytes_per_s == 50e9 + 2
    assert detect(sources=machine, state=state, measure="missing").bandwidth_bytes_per_s == 50e9 + 2
    assert detect(sources=machine, state=state).bandwidth_bytes_per_s == 50e9 + 2
    assert detect(sources=machine, state=state, measure="always").bandwidth_bytes_per_s == 50e9 + 3
    pinned = dataclasses.replace(machine, affinity=frozenset({0, 16}))
    assert detect(sources=pinned, state=state).bandwidth_bytes_per_s is None, "one core reads at another rate"
    assert measured == [16] * 3


def test_a_measurement_that_cannot_be_made_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = linux(tmp_path / "machine", RYZEN, cpus=32)
    monkeypatch.setattr(bandwidth, "measure", lambda *_: 50e9)
    (tmp_path / "file").write_text("no directory")
    assert detect(sources=machine, state=tmp_path / "file", measure="missing").bandwidth_bytes_per_s == 50e9

    def no_memory(*_: int) -> float:
        raise MemoryError

    monkeypatch.setattr(bandwidth, "measure", no_memory)
    assert detect(sources=machine, measure="missing").bandwidth_bytes_per_s is None


def test_this_machine() -> None:
    sources = this_machine()
    found = detect([], sources=sources)
    assert found.physical_cores >= 1
    assert found.logical_cores >= found.physical_cores
    assert found.ram.total_bytes is not None
    assert found.ram.available_bytes is not None
    assert 0 < found.ram.available_bytes <= found.ram.total_bytes
    assert found.cpu_name
    assert found.bandwidth_bytes_per_s is None
    assert json.loads(json.dumps(dataclasses.asdict(found)))["ram"]["total_bytes"] == found.ram.total_bytes
    assert sources.run(["/no/such/program"]) == ""
