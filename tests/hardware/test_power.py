"""Battery or mains, from recorded supplies."""

from __future__ import annotations

from pathlib import Path

import pytest

from localllm.hardware.power import on_battery
from localllm.hardware.windows import WindowsReadings
from tests.hardware.recorded import ON_AC, ON_BATTERY, linux, mac


def supplies(**each: dict[str, str]) -> dict[str, str]:
    return {f"sys/class/power_supply/{name}/{key}": f"{value}\n" for name, keys in each.items() for key, value in keys.items()}


def battery(status: str, **more: str) -> dict[str, str]:
    return {"type": "Battery", "status": status, **more}


MOUSE = battery("Discharging", scope="Device")


@pytest.mark.parametrize(
    "files, expected",
    [
        pytest.param(supplies(BAT0=battery("Discharging"), AC={"type": "Mains", "online": "0"}), True, id="unplugged"),
        pytest.param(supplies(BAT0=battery("Charging"), AC={"type": "Mains", "online": "1"}), False, id="plugged in"),
        pytest.param(supplies(BAT0=battery("Discharging"), AC={"type": "Mains", "online": "1"}), False, id="a weak charger"),
        pytest.param(supplies(BAT0=battery("Full"), usb={"type": "USB", "online": "1"}), False, id="USB-C"),
        pytest.param(supplies(BAT0=battery("Discharging"), usb={"type": "USB", "online": "0"}), True, id="USB-C unplugged"),
        pytest.param(supplies(BAT0=battery("Not charging")), False, id="held at 80 %"),
        pytest.param(supplies(BAT0=battery("Unknown")), None, id="the battery does not know"),
        pytest.param(supplies(hid=MOUSE), False, id="a desktop with a mouse"),
        pytest.param(supplies(hid=MOUSE, AC={"type": "Mains", "online": "1"}), False, id="mains and a mouse"),
        pytest.param({"sys/class/power_supply/.keep": ""}, False, id="a desktop"),
        pytest.param({}, None, id="no such folder"),
    ],
)
def test_linux(tmp_path: Path, files: dict[str, str], expected: bool | None) -> None:
    assert on_battery(linux(tmp_path, files)) is expected


@pytest.mark.parametrize(
    "text, expected", [(ON_AC, False), (ON_BATTERY, True), ("Now drawing from 'UPS Power'\n", True), ("", None), ("x'", None)]
)
def test_macos(tmp_path: Path, text: str, expected: bool | None) -> None:
    assert on_battery(mac(tmp_path, pmset=text)) is expected


@pytest.mark.parametrize("line, expected", [(0, True), (1, False), (255, None), (None, None)])
def test_windows(tmp_path: Path, line: int | None, expected: bool | None) -> None:
    assert on_battery(linux(tmp_path, {}, os="windows", windows=WindowsReadings(ac_line=line))) is expected


def test_another_system(tmp_path: Path) -> None:
    assert on_battery(linux(tmp_path, supplies(BAT0=battery("Discharging")), os="plan9")) is None
