"""`localllm hardware` as typed, and its screen for machines that are not at hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from localllm.cli.hardware import ENGINE_DEAD, hardware, show
from localllm.hardware import Device, Hardware, Memory, bandwidth
from localllm.probe import Engine
from tests.hardware.recorded import GIB

app = typer.Typer()
app.command()(hardware)

DESKTOP = Hardware(
    os="linux",
    arch="x86_64",
    cpu_name="AMD Ryzen 9 7950X 16-Core Processor",
    physical_cores=16,
    logical_cores=32,
    cpu_features=("avx2", "avx512f"),
    ram=Memory(64 * GIB, 48 * GIB),
    devices=(
        Device("CUDA0", "NVIDIA GeForce RTX 4090", "gpu", "CUDA", "0000:01:00.0", 24 * GIB, 22 * GIB, False, True, ("llama.cpp", "NVML")),
        Device("CUDA1", "NVIDIA [bold]\x1b[31m", "gpu", "CUDA", "", None, None, False, None, ("llama.cpp",)),
        Device("Vulkan2", "AMD Radeon Graphics", "igpu", "Vulkan", "0000:6c:00.0", 32 * GIB, None, True, False, ("llama.cpp",)),
    ),
    on_battery=False,
    bandwidth_bytes_per_s=62.13e9,
    wsl=False,
    warnings=("llama.cpp: Vulkan2 makes no sense",),
)


def screen(found: Hardware, encoding: str = "utf-8") -> list[str]:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    show(found, Console(file=out, width=80, highlight=False, emoji=False))
    out.seek(0)
    return [line.rstrip() for line in out.read().splitlines()]


def test_the_screen_of_a_desktop() -> None:
    assert screen(DESKTOP) == [
        "AMD Ryzen 9 7950X 16-Core Processor",
        "Linux x86_64 · on mains",
        "16 cores to decode on, of 32 logical · memory reads at 62.1 GB/s",
        "avx2 avx512f",
        "",
        "RAM      ███████░░░░░░░░░░░░░░░░░░░░░   48.0 GiB available of 64.0 GiB",
        "CUDA0    ██░░░░░░░░░░░░░░░░░░░░░░░░░░   22.0 GiB free of 24.0 GiB",
        "         NVIDIA GeForce RTX 4090 · 0000:01:00.0 · screen · llama.cpp, NVML",
        "CUDA1    memory unknown",
        "         NVIDIA [bold]␛[31m · llama.cpp",
        "Vulkan2  32.0 GiB, free memory unknown",
        "         AMD Radeon Graphics · 0000:6c:00.0 · shares the RAM · llama.cpp",
        "warning: llama.cpp: Vulkan2 makes no sense",
    ]


def test_the_screen_of_a_container() -> None:
    ram = Memory(64 * GIB, 0, 8 * GIB, "memory.max of the control group job")
    found = Hardware("linux", "x86_64", "Xeon", 1, 8, (), ram, (), None, None, True, cpu_quota=1.5)
    assert screen(found) == [
        "Xeon",
        "Linux x86_64 under WSL · power unknown",
        "1 core to decode on, of 8 logical (CPU quota 1.5) · memory bandwidth unknown",
        "",
        "RAM  ████████████████████████████    0.0 GiB available of 8.0 GiB",
        "     of 64.0 GiB in the machine, limited by memory.max of the control group job",
        "no graphics card that the engine can use: models run on the processor",
    ]


def test_an_old_terminal_gets_plain_characters() -> None:
    ram = next(line for line in screen(DESKTOP, "ascii") if line.startswith("RAM"))
    assert "#######....................." in ram


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """What the probe child says, first and only; and a bandwidth that costs nothing."""
    said = [Engine(devices=())]
    monkeypatch.setattr("localllm.probe.ask_engine", lambda *_: said[0])
    rates = iter([10e9, 20e9])
    monkeypatch.setattr(bandwidth, "measure", lambda *_: next(rates))
    return said


def test_json(engine: list[Engine], home: Path) -> None:
    ran = CliRunner().invoke(app, ["--json"])
    found = json.loads(ran.stdout)
    assert ran.exit_code == 0
    assert list(found) == list(Hardware.__dataclass_fields__)
    assert found["bandwidth_bytes_per_s"] == 10e9
    assert isinstance(found["ram"]["total_bytes"], int)
    assert (home / "state" / "bandwidth.json").is_file()


def test_bandwidth_is_measured_once_or_on_request(engine: list[Engine]) -> None:
    runs = [json.loads(CliRunner().invoke(app, ["--json", *more]).stdout) for more in ([], [], ["--measure"], [])]
    assert [found["bandwidth_bytes_per_s"] for found in runs] == [10e9, 10e9, 20e9, 20e9]


def test_an_engine_that_does_not_start_is_a_warning(engine: list[Engine]) -> None:
    engine[0] = Engine(death="illegal-instruction")
    ran = CliRunner().invoke(app, ["--json"])
    assert ran.exit_code == 0
    assert json.loads(ran.stdout)["warnings"] == [ENGINE_DEAD]
    words = " ".join(CliRunner().invoke(app, []).stdout.split())
    assert f"warning: {ENGINE_DEAD}" in words
    assert "no graphics card" not in words
