"""llama.cpp's devices against the drivers' cards: who is who, whose reading counts, what stays unknown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.hardware import Device, Memory
from localllm.hardware.cards import Card
from localllm.hardware.devices import find_devices, metal_working_set_bytes
from tests.hardware.recorded import CPU, GIB, MIB, probed

RAM = Memory(64 * GIB, 40 * GIB)
PCI = "0000:01:00.0"


def card(**changes: Any) -> Card:
    facts: dict[str, Any] = {"name": "NVIDIA GeForce RTX 4090", "pci": PCI, "total_bytes": 24564 * MIB, "free_bytes": 22000 * MIB}
    return Card(**{**facts, "source": "NVML", "vendor": "NVIDIA", "display": True, **changes})


def find(probe: Sequence[dict[str, Any]], cards: Sequence[Card] = (), **more: Any) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    facts: dict[str, Any] = {"memory": RAM, "arch": "x86_64", "env": {}, **more}
    return find_devices(probe, cards, **facts)


def only(probe: dict[str, Any], cards: Sequence[Card] = (), **more: Any) -> Device:
    (device,), _ = find([CPU, probe], cards, **more)
    return device


def test_the_lower_reading_counts() -> None:
    device = only(probed(device_id=PCI), [card()])
    assert device == Device(
        name="CUDA0",
        description="NVIDIA GeForce RTX 4090",
        kind="gpu",
        backend="CUDA",
        pci=PCI,
        total_bytes=24210 * MIB,
        free_bytes=22000 * MIB,
        shared_with_ram=False,
        display=True,
        sources=("llama.cpp", "NVML"),
    )
    assert only(probed(device_id=PCI, free=100), [card()]).free_bytes == 100


def test_cards_are_told_apart_by_bus_id_not_by_order() -> None:
    # CUDA puts the fastest first, NVML goes by bus
    cards = [card(pci="0000:01:00.0", free_bytes=GIB), card(pci="0000:41:00.0", free_bytes=2 * GIB)]
    probe = [probed("CUDA0", device_id="0000:41:00.0"), probed("CUDA1", device_id="0000:01:00.0")]
    devices, warnings = find(probe, cards)
    assert [device.free_bytes for device in devices] == [2 * GIB, GIB]
    assert not warnings


@pytest.mark.parametrize(
    "description, cards, free",
    [
        pytest.param("NVIDIA GeForce RTX 4090", [card()], 22000 * MIB, id="by name"),
        pytest.param("NVIDIA GeForce RTX 4090", [card(), card(name="NVIDIA T400", pci="", free_bytes=1)], 22000 * MIB, id="by name of two"),
        pytest.param("GeForce RTX 4090 (WSL)", [card()], 22000 * MIB, id="by maker"),
        pytest.param("AMD Radeon RX 7900", [card()], 23000 * MIB, id="another maker"),
        pytest.param("NVIDIA GeForce RTX 4090", [card(), card(pci="0000:02:00.0")], 23000 * MIB, id="two alike: nobody knows which"),
    ],
)
def test_without_a_bus_id(description: str, cards: list[Card], free: int) -> None:
    assert only(probed(description=description), cards).free_bytes == free


def test_two_devices_without_a_bus_id_share_no_card() -> None:
    devices, warnings = find([probed("CUDA0"), probed("CUDA1")], [card(), card(pci="0000:02:00.0")])
    assert [device.sources for device in devices] == [("llama.cpp",), ("llama.cpp",)]
    assert not warnings, "they are in use, whichever they are"


def test_a_card_offered_twice_is_listed_once() -> None:
    devices, _ = find([probed("CUDA0", device_id=PCI), probed("Vulkan0", device_id=PCI)], [card()])
    assert [device.name for device in devices] == ["CUDA0"]


@pytest.mark.parametrize(
    "name, backend",
    [
        ("CUDA3", "CUDA"),
        ("ROCm0", "HIP"),
        ("MTL0", "Metal"),
        ("Metal", "Metal"),
        ("Vulkan12", "Vulkan"),
        ("SYCL0", "SYCL"),
        ("RPC0[10.0.0.2:50052]", "RPC"),
    ],
)
def test_backends(name: str, backend: str) -> None:
    assert only(probed(name, description="a card")).backend == backend


def test_the_cpu_and_its_helpers_are_no_devices() -> None:
    assert find([CPU, probed("BLAS", kind="accel"), probed("?", kind="unknown"), {}]) == ((), ())


# --- unknown and absurd -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "total, free, expected, warned",
    [
        pytest.param(0, 0, (None, None), False, id="zero of zero"),
        pytest.param(8 * GIB, 9 * GIB, (8 * GIB, None), True, id="more free than there is"),
        pytest.param(1 << 62, 1 << 61, (None, None), True, id="absurd"),
        pytest.param(8 * GIB, 0, (8 * GIB, 0), False, id="full"),
        pytest.param(None, None, (None, None), False, id="nothing"),
        pytest.param("8 GiB", 1.5, (None, None), False, id="no numbers"),
    ],
)
def test_unknown_stays_unknown(total: Any, free: Any, expected: tuple[int | None, int | None], warned: bool) -> None:
    (device,), warnings = find([probed(total=total, free=free)])
    assert (device.total_bytes, device.free_bytes) == expected
    assert bool(warnings) == warned
    assert all("CUDA0" in warning for warning in warnings)


def test_the_driver_knows_what_llama_does_not() -> None:
    assert only(probed(total=0, free=0, device_id=PCI), [card()]).free_bytes == 22000 * MIB


def test_llama_knows_what_the_driver_does_not() -> None:
    device = only(probed(device_id=PCI), [card(total_bytes=None, free_bytes=None)])
    assert (device.free_bytes, device.sources) == (23000 * MIB, ("llama.cpp",))


def test_unified_memory_switched_on_by_hand_reports_ram_as_free() -> None:
    # GGML_CUDA_ENABLE_UNIFIED_MEMORY: free is MemAvailable, total is the card's
    assert only(probed(device_id=PCI, free=60 * GIB), [card()]).free_bytes == 22000 * MIB


NUMBER = st.one_of(st.none(), st.integers(-(2**65), 2**65), st.integers(0, 2**36), st.floats(), st.text(max_size=3))
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "name": st.one_of(st.none(), st.sampled_from(["CUDA0", "MTL0", "Vulkan0", "0", ""]), st.integers()),
        "description": st.one_of(st.none(), st.sampled_from(["AMD Radeon", "NVIDIA", "Intel(R) Arc", ""])),
        "kind": st.sampled_from(["gpu", "igpu", "cpu", "accel", None, 3]),
        "total_bytes": NUMBER,
        "free_bytes": NUMBER,
        "device_id": st.sampled_from([None, "", PCI, "0000:02:00.0", "nonsense"]),
    },
)
SIZE = st.none() | st.integers(0, 2**40)


@st.composite
def memories(draw: st.DrawFn) -> tuple[int | None, int | None]:
    total = draw(SIZE)
    return total, None if total is None else draw(st.none() | st.integers(0, total))


@st.composite
def cards_of_a_machine(draw: st.DrawFn) -> list[Card]:
    cards: list[Card] = []
    for vendor, pci in draw(
        st.lists(st.tuples(st.sampled_from(["NVIDIA", "AMD", "Intel"]), st.sampled_from([PCI, "0000:02:00.0", ""])), max_size=4)
    ):
        total, free = draw(memories())
        shared, divided = draw(st.booleans()), draw(st.booleans())
        cards.append(Card(vendor, pci, total or None, free if total else None, "driver", vendor, shared_with_ram=shared, slice=divided))
    return cards


@given(st.lists(ENTRY, max_size=4), cards_of_a_machine(), memories(), st.sampled_from(["x86_64", "arm64"]))
def test_whatever_is_reported_devices_make_sense(
    probe: list[dict[str, Any]], cards: list[Card], ram: tuple[int | None, int | None], arch: str
) -> None:
    memory = Memory(ram[0] or None, ram[1] if ram[0] else None)
    devices, warnings = find(probe, cards, memory=memory, arch=arch)
    assert (devices, warnings) == find(probe, cards, memory=memory, arch=arch)
    assert len({device.pci for device in devices if device.pci}) == len([device for device in devices if device.pci])
    for device in devices:
        assert device.total_bytes is None or 0 < device.total_bytes <= 1 << 50
        assert device.free_bytes is None or device.free_bytes >= 0
        if device.free_bytes is not None and device.total_bytes is not None:
            assert device.free_bytes <= device.total_bytes


# --- memory shared with RAM -------------------------------------------------------------------------------------------


def test_an_igpu_has_no_more_than_ram() -> None:
    iris = probed("Vulkan0", description="Intel(R) Iris(R) Xe Graphics (TGL GT2)", kind="igpu", total=62 * GIB, free=60 * GIB)
    device = only(iris)
    assert device.shared_with_ram
    assert (device.total_bytes, device.free_bytes) == (62 * GIB, 40 * GIB)
    assert only(iris, memory=Memory(64 * GIB, None)).free_bytes == 60 * GIB, "RAM unknown: its own reading is all there is"


APU = {"name": "AMD graphics", "pci": "0000:c3:00.0", "source": "sysfs", "vendor": "AMD"}
STRIX = probed("ROCm0", description="AMD Radeon Graphics", kind="igpu", total=120 * GIB, free=119 * GIB, device_id="0000:c3:00.0")


def test_an_apu_has_its_carve_out_besides_ram() -> None:
    # the driver: 4 GiB carve-out, 3 free, and a GTT of 96 GiB, of which RAM leaves 40
    apu = card(**APU, total_bytes=100 * GIB, free_bytes=43 * GIB, shared_with_ram=True, own_free_bytes=3 * GIB)
    device = only(STRIX, [apu])
    assert device.shared_with_ram
    assert (device.total_bytes, device.free_bytes) == (100 * GIB, 43 * GIB)


def test_a_large_carve_out_is_memory_of_its_own() -> None:
    # 128 GiB machine, 96 set aside by the firmware: what is left of RAM does not bound it
    device = only(STRIX, [card(**APU, total_bytes=96 * GIB, free_bytes=95 * GIB)], memory=Memory(31 * GIB, 20 * GIB))
    assert not device.shared_with_ram
    assert device.free_bytes == 95 * GIB


def test_jetson_shares_ram_and_nvml_knows_nothing() -> None:
    orin = probed("CUDA0", description="Orin", kind="igpu", total=61 * GIB, free=55 * GIB)
    device = only(orin, [card(name="Orin (nvgpu)", pci="", total_bytes=None, free_bytes=None)])
    assert device.shared_with_ram
    assert device.free_bytes == 40 * GIB


METAL = probed("MTL0", description="Apple M3 Max", total=48 * GIB, free=48 * GIB)


def test_metal_shares_ram() -> None:
    device = only(METAL, arch="arm64")
    assert device.backend == "Metal"
    assert device.shared_with_ram
    assert (device.total_bytes, device.free_bytes) == (48 * GIB, 40 * GIB), "other programs hold the rest, which Metal does not say"
    assert device.sources == ("llama.cpp",)


def test_metal_that_does_not_tell_is_estimated() -> None:
    device = only(probed("MTL0", description="Apple M2", total=0, free=0), arch="arm64", memory=Memory(16 * GIB, 9 * GIB))
    assert (device.total_bytes, device.free_bytes) == (16 * GIB * 2 // 3, 9 * GIB)
    assert device.sources == ("llama.cpp", "estimated")
    limited = only(probed("MTL0", total=0, free=0), arch="arm64", memory=Memory(16 * GIB, 9 * GIB), wired_limit_bytes=6 * GIB)
    assert (limited.total_bytes, limited.free_bytes) == (6 * GIB, 6 * GIB)


def test_metal_without_any_memory_reading_is_unknown() -> None:
    device = only(probed("MTL0", total=0, free=0), arch="arm64", memory=Memory(None, None))
    assert (device.total_bytes, device.free_bytes) == (None, None)


def test_a_card_in_an_intel_mac_has_its_own_memory() -> None:
    radeon = only(probed("MTL0", description="AMD Radeon Pro 5500M", total=8 * GIB, free=8 * GIB), memory=Memory(16 * GIB, 4 * GIB))
    assert not radeon.shared_with_ram
    assert radeon.free_bytes == 8 * GIB
    assert only(probed("MTL0", description="Intel(R) UHD Graphics 630", total=2 * GIB, free=2 * GIB)).shared_with_ram


@pytest.mark.parametrize(
    "gib, limit_mib, seen_mib",
    [(8, 0, 5461), (16, 0, 10922.67), (32, 0, 21845.34), (64, 0, 49152), (128, 0, 110100), (128, 114688, 114688), (64, 131072, 65536)],
)
def test_the_working_set_is_never_above_what_was_seen(gib: int, limit_mib: int, seen_mib: float) -> None:
    estimate = metal_working_set_bytes(gib * GIB, limit_mib * MIB) / MIB
    assert estimate <= seen_mib + 1
    assert estimate >= 0.85 * seen_mib


# --- slices and unused cards ------------------------------------------------------------------------------------------


SLICES = [card(free_bytes=GIB, total_bytes=5 * GIB, uuid="MIG-aa-1", slice=True), card(free_bytes=19 * GIB, uuid="MIG-bb-2", slice=True)]


@pytest.mark.parametrize(
    "cards, visible, free",
    [
        pytest.param(SLICES[:1], "", GIB, id="one slice"),
        pytest.param(SLICES, "MIG-bb-2", 19 * GIB, id="the chosen one"),
        pytest.param(SLICES, "MIG-aa", GIB, id="by the start of its name"),
        pytest.param(SLICES, "", 4 * GIB, id="nobody knows which"),
        pytest.param(SLICES, "0", 4 * GIB, id="chosen by number"),
    ],
)
def test_mig(cards: list[Card], visible: str, free: int) -> None:
    device = only(probed(device_id=PCI, total=4 * GIB, free=4 * GIB), cards, env={"CUDA_VISIBLE_DEVICES": visible})
    assert device.free_bytes == min(free, 4 * GIB)


DRM = card(name="NVIDIA graphics 0000:01:00.0", source="sysfs", total_bytes=None, free_bytes=None, display=True)


def test_two_witnesses_of_one_card() -> None:
    device = only(probed(device_id=PCI), [card(display=None), DRM])
    assert device.display is True
    assert (device.free_bytes, device.sources) == (22000 * MIB, ("llama.cpp", "NVML"))


@pytest.mark.parametrize(
    "cards, env, warned",
    [
        pytest.param([card(), DRM], {}, 1, id="a card seen twice is missed once"),
        pytest.param([card(vendor="AMD", source="sysfs")], {}, 1, id="a Radeon"),
        pytest.param([card(vendor="AMD", source="sysfs", total_bytes=512 * MIB)], {}, 0, id="small"),
        pytest.param([card(vendor="Intel", source="sysfs", total_bytes=None)], {}, 0, id="the processor's own"),
        pytest.param([card()], {"CUDA_VISIBLE_DEVICES": "-1"}, 0, id="hidden on purpose"),
        pytest.param([card()], {"CUDA_VISIBLE_DEVICES": ""}, 0, id="hidden by an empty list"),
    ],
)
def test_a_card_that_the_engine_does_not_use(cards: list[Card], env: dict[str, str], warned: int) -> None:
    _, warnings = find([CPU], cards, env=env)
    assert len(warnings) == warned
    assert all("NVIDIA GeForce RTX 4090" in warning for warning in warnings)
