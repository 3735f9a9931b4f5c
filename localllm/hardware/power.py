"""Battery or mains."""

from __future__ import annotations

from pathlib import Path

from localllm.hardware.sources import Sources, read_text


def on_battery(sources: Sources) -> bool | None:
    """True while a battery feeds the machine, False on mains or without a battery, None when the system does not tell."""
    match sources.os:
        case "linux":
            return _linux(sources.root / "sys/class/power_supply")
        case "darwin":
            first = sources.run(["/usr/bin/pmset", "-g", "batt"]).partition("\n")[0]
            return {"AC Power": False, "Battery Power": True, "UPS Power": True}.get(first.partition("'")[2].rstrip("'"))
        case "windows" if sources.windows is not None:
            return {0: True, 1: False}.get(-1 if sources.windows.ac_line is None else sources.windows.ac_line)
        case _:
            return None


def _linux(folder: Path) -> bool | None:
    try:
        supplies = sorted(folder.iterdir())
    except OSError:
        return None
    # A mouse or a headset has a battery as well; the kernel marks those with the scope Device.
    supplies = [supply for supply in supplies if read_text(supply / "scope") != "Device"]
    kinds = {supply: read_text(supply / "type") for supply in supplies}
    batteries = [supply for supply, kind in kinds.items() if kind == "Battery"]
    online = [read_text(supply / "online") for supply, kind in kinds.items() if kind in ("Mains", "USB", "USB_C", "USB_PD", "Wireless")]
    if not batteries or "1" in online:
        return False
    states = {read_text(battery / "status") for battery in batteries}
    if "Discharging" in states:
        return True
    return False if states & {"Charging", "Full", "Not charging"} else None
