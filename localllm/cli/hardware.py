"""`localllm hardware`: what this machine has for models, as a small screen or as JSON.

Knows how it looks; what is true, localllm.hardware knows. The engine is asked in a child process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from localllm.hardware import Device, Hardware, Memory
    from localllm.hardware.machine import Measure

GIB = 1 << 30
BAR_WIDTH = 28
ENGINE_DEAD = "the engine does not start, so what it can use is unknown: localllm doctor says why"
FULL, ALMOST_FULL = 0.95, 0.8
"""Shares in use from which a bar turns red, or yellow."""


def hardware(
    measure: Annotated[bool, typer.Option("--measure", help="Measure the memory bandwidth again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show cores, memory and graphics cards as the engine sees them."""
    import dataclasses
    import json

    found = look("always" if measure else "missing")
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    from rich.console import Console

    from localllm.settings import load_settings

    show(found, Console(highlight=False, emoji=False, no_color=None if load_settings().color else True))


def show(found: Hardware, console: Console) -> None:
    """Print the screen; it fits 80 columns."""
    from rich.table import Table
    from rich.text import Text

    from localllm.cli.output import visible

    console.print(Text(visible(found.cpu_name), style="bold"))
    for line in _machine(found):
        console.print(Text(visible(line)))
    if found.cpu_features:
        console.print(Text(" ".join(found.cpu_features), style="dim"))
    console.print()
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    ascii_only = console.options.ascii_only
    table.add_row("RAM", _ram(found.ram, ascii_only))
    if found.ram.limit_bytes is not None and found.ram.total_bytes is not None:
        origin = visible(f"of {_gib(found.ram.total_bytes)} in the machine, limited by {found.ram.limit_origin}")
        table.add_row("", Text(origin, style="dim"))
    for device in found.devices:
        free, total = device.free_bytes, device.total_bytes
        table.add_row(Text(visible(device.name)), _amount(free, total, "free", ascii_only))
        table.add_row("", Text(visible(_about(device)), style="dim"))
    console.print(table)
    if not found.devices and ENGINE_DEAD not in found.warnings:
        console.print("no graphics card that the engine can use: models run on the processor", style="dim")
    for warning in found.warnings:
        console.print(Text(visible(f"warning: {warning}"), style="yellow"))


def look(measure: Measure = "never") -> Hardware:
    """This machine with the engine's devices; an engine that does not start is a warning, the rest is still worth seeing."""
    import dataclasses

    from localllm.hardware import detect
    from localllm.paths import directories
    from localllm.probe import ask_engine

    engine = ask_engine()
    devices = None if engine.death else engine.devices
    found = detect(devices, state=directories().state, measure=measure)
    return dataclasses.replace(found, warnings=(*found.warnings, ENGINE_DEAD)) if engine.death else found


def _machine(found: Hardware) -> list[str]:
    cores = f"{found.physical_cores} core{'' if found.physical_cores == 1 else 's'} to decode on, of {found.logical_cores} logical"
    if found.cpu_quota is not None:
        cores += f" (CPU quota {found.cpu_quota:g})"
    system = {"linux": "Linux", "darwin": "macOS", "windows": "Windows"}.get(found.os, found.os)
    power = {True: "on battery", False: "on mains", None: "power unknown"}[found.on_battery]
    rate = found.bandwidth_bytes_per_s
    speed = "memory bandwidth unknown" if rate is None else f"memory reads at {rate / 1e9:.{0 if rate >= 1e11 else 1}f} GB/s"
    where = f"{system} {found.arch}{' under WSL' if found.wsl else ''}"
    return [f"{where} · {power}", f"{cores} · {speed}"]


def _ram(memory: Memory, ascii_only: bool) -> Text:
    return _amount(
        memory.available_bytes, memory.total_bytes if memory.limit_bytes is None else memory.limit_bytes, "available", ascii_only
    )


def _amount(free: int | None, total: int | None, word: str, ascii_only: bool) -> Text:
    """A bar of what is in use, and the figures."""
    from rich.text import Text

    if total is None:
        return Text("memory unknown", style="yellow")
    if free is None:
        return Text(f"{_gib(total)}, {word} memory unknown", style="yellow")
    in_use = min(1.0, max(0.0, 1 - free / total)) if total else 1.0
    filled = round(in_use * BAR_WIDTH)
    style = "red" if in_use >= FULL else "yellow" if in_use >= ALMOST_FULL else "green"
    full, empty = ("#", ".") if ascii_only else ("█", "░")
    return Text.assemble((full * filled, style), (empty * (BAR_WIDTH - filled), "dim"), f"  {_gib(free):>9} {word} of {_gib(total)}")


def _about(device: Device) -> str:
    parts = [device.description]
    parts += [device.pci] if device.pci else []
    parts += ["shares the RAM"] if device.shared_with_ram else []
    parts += ["screen"] if device.display else []
    return " · ".join([*parts, ", ".join(device.sources)])


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.1f} GiB"
