"""What drivers report of cards: NVML through a stub of pynvml, amdgpu and screens through recorded sysfs trees."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.hardware.cards import Card, pci_id
from localllm.hardware.drm import drm_cards
from localllm.hardware.nvidia import nvidia_cards
from tests.hardware.recorded import GIB, MIB, FakeCard, FakeNvml, drm_card, tree


@pytest.mark.parametrize(
    "text, expected",
    [
        ("00000000:01:00.0", "0000:01:00.0"),
        ("0000:C1:00.0", "0000:c1:00.0"),
        ("01:00.0", "0000:01:00.0"),
        ("0001:00:00", "0001:00:00.0"),
        ("10000:e1:00.0", "10000:e1:00.0"),
        ("", ""),
        ("GPU-0", ""),
        ("0000:01:00.0:extra", ""),
    ],
)
def test_bus_ids(text: str, expected: str) -> None:
    assert pci_id(text) == expected


@given(st.text(alphabet="0123456789abcdefABCDEF:. ", max_size=20))
def test_a_bus_id_is_stable(text: str) -> None:
    assert pci_id(pci_id(text)) == pci_id(text)


def test_a_card() -> None:
    nvml = FakeNvml([FakeCard()])
    cards, warnings = nvidia_cards(nvml)
    assert cards == [
        Card(
            name="NVIDIA GeForce RTX 4090",
            pci="0000:01:00.0",
            total_bytes=24564 * MIB,
            free_bytes=(24564 - 1024 - 450) * MIB,
            source="NVML",
            vendor="NVIDIA",
            display=True,
            uuid="GPU-0b1c",
        )
    ]
    assert not warnings
    assert nvml.running == 0, "NVML was shut down"


def test_an_old_driver_answers_the_first_version() -> None:
    assert nvidia_cards(FakeNvml([FakeCard()], knows_v2=False)) == nvidia_cards(FakeNvml([FakeCard()]))
    assert nvidia_cards(FakeNvml([FakeCard()], nvmlMemory_v2=None)) == nvidia_cards(FakeNvml([FakeCard()]))


@pytest.mark.parametrize("nvml", [None, FakeNvml(driver=False), FakeNvml([])])
def test_no_module_no_driver_no_card(nvml: FakeNvml | None) -> None:
    assert nvidia_cards(nvml) == ([], ())


def test_shared_memory_is_not_supported_and_unknown() -> None:
    orin = FakeCard(name="Orin (nvgpu)", silent=("memory", "display", "pci"))
    [card], warnings = nvidia_cards(FakeNvml([orin]))
    assert (card.total_bytes, card.free_bytes, card.display, card.pci) == (None, None, None, "")
    assert not warnings


def test_a_card_that_fell_off_the_bus_hides_no_other() -> None:
    cards, warnings = nvidia_cards(FakeNvml([None, FakeCard()]))
    assert [card.name for card in cards] == ["NVIDIA GeForce RTX 4090"]
    assert warnings == ("NVIDIA card 0 does not answer",)


def test_mig_shows_its_slices() -> None:
    parts = (
        FakeCard(name="NVIDIA A100-SXM4-40GB MIG 1g.5gb", total=4864 * MIB, used=64 * MIB, reserved=0, uuid="MIG-1"),
        None,
        FakeCard(name="NVIDIA A100-SXM4-40GB MIG 3g.20gb", total=19968 * MIB, used=0, reserved=0, uuid="MIG-3", silent=("pci",)),
    )
    cards, _ = nvidia_cards(FakeNvml([FakeCard(name="NVIDIA A100-SXM4-40GB", bus="00000000:81:00.0", slices=parts)]))
    assert [(card.uuid, card.pci, card.total_bytes, card.slice) for card in cards] == [
        ("MIG-1", "0000:81:00.0", 4864 * MIB, True),
        ("MIG-3", "0000:81:00.0", 19968 * MIB, True),
    ]


def test_mig_that_is_on_and_not_divided_shows_the_card() -> None:
    [card], _ = nvidia_cards(FakeNvml([FakeCard(silent=("mig",))]))
    assert not card.slice


@pytest.mark.parametrize("total, used", [(0, 0), (2**63, 0), (8 * GIB, -GIB)])
def test_absurd_readings_are_unknown(total: int, used: int) -> None:
    [card], _ = nvidia_cards(FakeNvml([FakeCard(total=total, used=used, reserved=0)]))
    assert card.free_bytes is None


RX_7900 = drm_card(
    1,
    "0000:03:00.0",
    vram=(24 * GIB, GIB),
    gtt=(32 * GIB, 0),
    vram_vendor="samsung",
    product="Radeon RX 7900 XTX",
    screens={"DP-1": "connected"},
)
STRIX_HALO = drm_card(
    0, "0000:c3:00.0", vram=(4 * GIB, GIB), gtt=(96 * GIB, 2 * GIB), screens={"eDP-1": "connected", "DP-1": "disconnected"}
)


def test_a_radeon_has_memory_of_its_own(tmp_path: Path) -> None:
    [card], warnings = drm_cards(tree(tmp_path, RX_7900), 20 * GIB)
    assert card == Card(
        name="Radeon RX 7900 XTX",
        pci="0000:03:00.0",
        total_bytes=24 * GIB,
        free_bytes=23 * GIB,
        source="sysfs",
        vendor="AMD",
        display=True,
    )
    assert not warnings


@pytest.mark.parametrize(
    "available, free",
    [
        pytest.param(120 * GIB, 97 * GIB, id="3 of the carve-out and 94 of the GTT"),
        pytest.param(20 * GIB, 23 * GIB, id="RAM is shorter than the GTT"),
        pytest.param(None, None, id="RAM unknown"),
    ],
)
def test_an_apu_has_its_carve_out_and_ram(tmp_path: Path, available: int | None, free: int | None) -> None:
    [card], _ = drm_cards(tree(tmp_path, STRIX_HALO), available)
    assert card.shared_with_ram
    assert (card.total_bytes, card.free_bytes, card.own_free_bytes) == (100 * GIB, free, 3 * GIB)


@pytest.mark.parametrize(
    "vram, gtt, vendor, shared",
    [
        pytest.param(512 * MIB, 16 * GIB, "", True, id="usual APU"),
        pytest.param(4 * GIB, 96 * GIB, "", True, id="Strix Halo"),
        pytest.param(4 * GIB, 16 * GIB, "micron", False, id="a small card names its chips"),
        pytest.param(4 * GIB, 15 * GIB, "", False, id="GTT below four times"),
        pytest.param(512 * MIB, 7 * GIB, "", False, id="small GTT"),
        pytest.param(96 * GIB, 16 * GIB, "", False, id="a carve-out as large as a card"),
    ],
)
def test_the_apu_rule(tmp_path: Path, vram: int, gtt: int, vendor: str, shared: bool) -> None:
    [card], _ = drm_cards(tree(tmp_path, drm_card(0, "0000:c3:00.0", vram=(vram, 0), gtt=(gtt, 0), vram_vendor=vendor)), 10 * GIB)
    assert card.shared_with_ram is shared


def test_other_makers_have_screens_but_no_memory(tmp_path: Path) -> None:
    files = {
        **drm_card(0, "0000:00:02.0", vendor="0x8086", screens={"HDMI-A-1": "disconnected"}),
        **drm_card(1, "0000:01:00.0", vendor="0x10de"),
        **drm_card(2, "0000:02:00.0", vendor="0x1a03"),  # a server's ASPEED
        "sys/class/drm/renderD128/dev": "226:128\n",
        "sys/class/drm/version": "drm 1.1.0 20060810\n",
    }
    cards, _ = drm_cards(tree(tmp_path, files), GIB)
    assert [(card.vendor, card.pci, card.display, card.total_bytes) for card in cards] == [
        ("Intel", "0000:00:02.0", False, None),
        ("NVIDIA", "0000:01:00.0", None, None),
    ]


@pytest.mark.parametrize("vram, total, warned", [((0, 0), None, False), ((8 * GIB, 9 * GIB), 8 * GIB, True), ((1 << 60, 0), None, True)])
def test_absurd_sysfs_readings_are_unknown(tmp_path: Path, vram: tuple[int, int], total: int | None, warned: bool) -> None:
    [card], warnings = drm_cards(tree(tmp_path, drm_card(0, "0000:03:00.0", vram=vram, vram_vendor="samsung")), GIB)
    assert (card.total_bytes, card.free_bytes) == (total, None)
    assert bool(warnings) == warned


def test_no_drm_at_all(tmp_path: Path) -> None:
    assert drm_cards(tmp_path, GIB) == ([], ())
