"""Cards are found in the files that drivers show; the trees are cut from real machines."""

from __future__ import annotations

import pytest

from localllm.doctor.cards import Card, find_cards
from tests.doctor.machines import Machine

VERSION = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)\n"
)
OPEN_VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build  (dvs-builder@U22)\n"
INFORMATION = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 0\nGPU UUID: \t GPU-????????\nVideo BIOS: \t 96.00.74.00.01\n"
NVIDIA = {
    "proc/driver/nvidia/version": VERSION,
    "proc/driver/nvidia/gpus/0000:04:00.0/information": INFORMATION,
    "dev/nvidia0": "",
    "dev/nvidiactl": "",
}


def drm(card: str, vendor: str, driver: str, **more: str) -> dict[str, str]:
    here = f"sys/class/drm/{card}/device"
    files = {f"{here}/vendor": vendor + "\n", f"{here}/class": "0x030000\n", f"{here}/uevent": f"DRIVER={driver}\nPCI_CLASS=30000\n"}
    return {**files, **{f"{here}/{name}": text + "\n" for name, text in more.items()}, "dev/dri/renderD128": ""}


NO_DRIVER = {name: text for name, text in drm("card0", "0x10de", "").items() if "uevent" not in name}


@pytest.mark.parametrize(
    "files, cards",
    [
        pytest.param({}, [], id="none"),
        pytest.param(NVIDIA, [Card("NVIDIA", "NVIDIA H100 80GB HBM3", "550.54.15", True, False)], id="nvidia"),
        pytest.param(
            {"proc/driver/nvidia/version": OPEN_VERSION, "dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidia-uvm": ""},
            [Card("NVIDIA", "NVIDIA GPU", "570.133.20", True, False)] * 2,
            id="two, open driver, no names",
        ),
        pytest.param(
            {"proc/driver/nvidia/version": VERSION},
            [Card("NVIDIA", "NVIDIA GPU", "550.54.15", False, False)],
            id="a container without the card",
        ),
        pytest.param(
            {**NVIDIA, **drm("card1", "0x10de", "nvidia")},
            [Card("NVIDIA", "NVIDIA H100 80GB HBM3", "550.54.15", True, False)],
            id="seen twice",
        ),
        pytest.param(drm("card0", "0x10de", "nouveau"), [Card("NVIDIA", "NVIDIA GPU", "nouveau", False, False)], id="nouveau"),
        pytest.param(NO_DRIVER, [Card("NVIDIA", "NVIDIA GPU", "", False, False)], id="no driver"),
        pytest.param(
            drm("card0", "0x1002", "amdgpu", mem_info_vram_total=str(24 << 30)),
            [Card("AMD", "AMD GPU", "amdgpu", True, False)],
            id="amd",
        ),
        pytest.param(
            drm("card0", "0x1002", "amdgpu", mem_info_vram_total=str(512 << 20)),
            [Card("AMD", "AMD GPU", "amdgpu", True, True)],
            id="amd, integrated",
        ),
        pytest.param(
            {**drm("card0", "0x8086", "i915"), **drm("card1", "0x1002", "amdgpu", mem_info_vram_total=str(16 << 30))},
            [Card("Intel", "Intel GPU", "i915", True, True), Card("AMD", "AMD GPU", "amdgpu", True, False)],
            id="two vendors",
        ),
        pytest.param({**drm("card0", "0x8086", "i915"), "sys/class/drm/card0-eDP-1/device/vendor": "0x8086\n"}, 1, id="connectors"),
        pytest.param(drm("card0", "0x1a03", "ast"), [], id="the screen of a server's management"),
        pytest.param(drm("card0", "0x1af4", "virtio-pci"), [], id="virtual"),
        pytest.param(
            {"dev/dxg": "", "usr/lib/wsl/lib/libcuda.so.1": ""},
            [Card("NVIDIA", "NVIDIA GPU (through WSL)", "present", True, False)],
            id="wsl",
        ),
        pytest.param({"dev/dxg": ""}, [], id="wsl without nvidia"),
    ],
)
def test_linux(machine: Machine, files: dict[str, str], cards: list[Card] | int) -> None:
    found = find_cards(machine(files))
    assert (len(found) if isinstance(cards, int) else found) == cards


@pytest.mark.parametrize(
    "os, arch, files, vendors",
    [
        ("darwin", "arm64", {}, ["Apple"]),
        ("darwin", "x86_64", {}, []),
        ("windows", "amd64", {}, []),
        ("windows", "amd64", {"Windows/System32/nvcuda.dll": ""}, ["NVIDIA"]),
        ("windows", "amd64", {"Windows/System32/amdhip64.dll": "", "Windows/System32/amdhip64_6.dll": ""}, ["AMD"]),
        ("windows", "amd64", {"Windows/System32/amdhip64_6.dll": "", "Windows/System32/nvcuda.dll": ""}, ["NVIDIA", "AMD"]),
    ],
)
def test_other_systems(machine: Machine, os: str, arch: str, files: dict[str, str], vendors: list[str]) -> None:
    found = find_cards(machine(files, os=os, arch=arch))
    assert [card.vendor for card in found] == vendors
    assert all(card.usable for card in found)
