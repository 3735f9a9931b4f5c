"""One thing that the doctor found: what, how bad, and what to do. Knows nothing of where findings come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Level = Literal["ok", "info", "warning", "problem"]
"""`problem`: something does not work or is left unused; `warning`: it works, at a cost or a risk; `info`: good to know."""
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True, slots=True)
class Finding:
    """Programs go by `id`, which never changes its meaning; people read the rest."""

    id: str
    level: Level
    area: str
    """The line of the screen it belongs to: engine, cards, memory, disk, hub, settings, …"""
    title: str
    detail: str = ""
    fix: str = ""
    """A command to paste, or a sentence; empty where nothing needs to be done."""
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Level:
    """The highest level among `findings`, `ok` without any."""
    return LEVELS[max((LEVELS.index(finding.level) for finding in findings), default=0)]
