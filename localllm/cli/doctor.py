"""`localllm doctor`: a short screen, or JSON. What is looked at and what it means, localllm/doctor/ knows.

Exit code 0 when there is no problem (warnings are none), else 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localllm import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from localllm.doctor.finding import Finding, Level
    from localllm.doctor.report import Report

GIB = 1 << 30
_STYLES: dict[Level, str] = {"ok": "green", "info": "dim", "warning": "yellow", "problem": "bold red"}
_MARKS: dict[Level, str] = {"ok": "✓", "info": "·", "warning": "!", "problem": "✗"}
_ASCII: dict[Level, str] = {"ok": "+", "info": "-", "warning": "!", "problem": "x"}


def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Prove that this machine needs no network; reads every model.")] = False,
    network: Annotated[bool, typer.Option("--network", help="Try to reach the Hub; without this, nothing is sent.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look for what is wrong with this machine and installation, and say how to put it right.

    Ends with exit code 1 when there is a problem, with 0 otherwise.
    """
    from localllm.doctor.system import System
    from localllm.errors import UsageError

    if offline and network:
        raise UsageError("--offline and --network exclude each other", hint="choose one")
    raise typer.Exit(_prove(System.here(), as_json) if offline else _examine(System.here(), network, as_json))


def _examine(system: Any, network: bool, as_json: bool) -> int:
    import json

    from localllm.doctor.report import examine

    report = examine(system, network=network, encoding=sys.stdout.encoding)
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        show(report, system.env)
    return 0 if report.healthy else 1


def _prove(system: Any, as_json: bool) -> int:
    import json

    from localllm.doctor.offline import Proof, prove

    screen, progress = _console(), _console(stderr=True)
    steps: list[Finding] = []
    with progress.status("", spinner="line") if sys.stderr.isatty() else _Silence() as status:
        for step in prove(system, status.update):
            steps.append(step)
            if not as_json:
                _step(screen, step)
    proof = Proof(tuple(steps))
    if as_json:
        print(json.dumps(proof.to_json(), indent=2))
    else:
        screen.print()
        if proof.proven:
            screen.print("This machine needs no network.", style="bold green")
        else:
            screen.print("Not proven: see above.", style="bold red")
    return 0 if proof.proven else 1


class _Silence:
    """A status line for those who do not look."""

    def __enter__(self) -> _Silence:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, text: str) -> None: ...


def show(report: Report, env: Mapping[str, str], console: Console | None = None) -> None:
    """Print the screen: one line per area, then what is wrong, the worst last, where the eye is."""
    from localllm.doctor.finding import LEVELS, worst

    console = console or _console()
    console.print(_spell(console, f"localllm {__version__} · Python {report.system['python']} · {report.system['os']}"), style="dim")
    console.print()
    for area, text, known in _areas(report, env):
        level = worst(report.of(area))
        # An information is no blemish; only what nobody asked about has no tick.
        level = ("ok" if known else "info") if level in ("ok", "info") else level
        _line(console, level, f"{area:<9} {text}")
    for level in LEVELS:
        for finding in report.findings:
            if finding.level == level:
                console.print()
                _finding(console, finding)
    counts = [(level, sum(finding.level == level for finding in report.findings)) for level in ("problem", "warning")]
    said = ", ".join(f"{n} {level}{'' if n == 1 else 's'}" for level, n in counts if n)
    console.print()
    console.print(said or "Nothing is wrong.", style=_STYLES[worst(report.findings)] if said else "green")


def _areas(report: Report, env: Mapping[str, str]) -> Iterable[tuple[str, str, bool]]:
    """(area, what there is, whether it was looked at) of each line."""
    from localllm.doctor.environment import short

    engine, memory, hub = report.engine, report.memory, report.hub
    yield "engine", f"llama-cpp-python {engine.version} · {', '.join(engine.backends)}" if not engine.death else "does not load", True
    if not engine.death:
        yield "devices", " · ".join(_device(device) for device in engine.devices) or "none", True
    if report.cards:
        yield "cards", " · ".join(f"{card.name} ({card.driver or 'no driver'})" for card in report.cards), True
    limit = f" · limited to {_gib(memory.limit_bytes)}" if memory.limit_bytes is not None else ""
    yield "memory", f"{_gib(memory.available_bytes)} of {_gib(memory.total_bytes)} free{limit}", memory.available_bytes is not None
    for disk in report.disk[:1]:
        kind = f" · {disk.type}" if disk.type else ""
        yield "disk", f"{_gib(disk.free_bytes)} free for models{kind} · {short(disk.path, env)}", True
    if hub.offline:
        yield "hub", f"offline, by {' and '.join(hub.offline_by)}", True
    elif not hub.asked:
        yield "hub", f"not asked; --network tries {hub.endpoint}", False
    elif hub.reachable:
        yield "hub", f"{hub.endpoint} answers in {hub.milliseconds:.0f} ms", True
    else:
        yield "hub", f"{hub.endpoint} does not answer", True
    yield "settings", short(report.system["config_file"], env), True


def _device(device: Mapping[str, Any]) -> str:
    name = str(device["description"]).strip() or str(device["name"])
    if device["kind"] == "cpu":
        return name
    return f"{name}, {_gib(device['free_bytes'])} of {_gib(device['total_bytes'])} free"


def _gib(size_bytes: int | None) -> str:
    return "?" if size_bytes is None else f"{size_bytes / GIB:.1f} GiB"


def _finding(console: Console, finding: Finding) -> None:
    """The finding in full, with its id for those who search for it."""
    import textwrap

    _line(console, finding.level, finding.title, finding.id)
    style = "dim" if finding.level == "info" else ""
    for line in finding.detail.splitlines():
        # Paths and hosts stay whole, to be copied.
        text = textwrap.fill(
            line, console.width - 1, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        console.print(_spell(console, text), style=style, markup=False, soft_wrap=True)
    if finding.fix:
        console.print(_spell(console, f"  → {finding.fix}"), style=style or "cyan", markup=False, soft_wrap=True)


def _step(console: Console, step: Finding) -> None:
    if step.level == "ok":
        _line(console, step.level, step.title)
    else:
        _finding(console, step)


def _line(console: Console, level: Level, text: str, ident: str = "") -> None:
    from rich.text import Text

    marks = _MARKS if _speaks_unicode(console) else _ASCII
    line = Text(marks[level], _STYLES[level]).append(f" {_spell(console, text)}", "dim" if level == "info" else "")
    console.print(line.append(f"  {ident}", "dim") if ident else line, overflow="fold")


def _spell(console: Console, text: str) -> str:
    """`text` with our own signs as this terminal can show them, and control characters of others (file names, logs) disarmed."""
    from localllm.cli.visible import visible

    text = visible(text)
    return text if _speaks_unicode(console) else text.replace("·", "-").replace("→", "->")


def _speaks_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    from localllm.errors import ConfigError
    from localllm.settings import load_settings

    try:
        color = load_settings().color
    except ConfigError:  # the doctor must be able to say so
        color = True
    return Console(stderr=stderr, highlight=False, emoji=False, no_color=None if color else True)
