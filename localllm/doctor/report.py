"""Everything `localllm doctor` looks at, in one value. Creates nothing, and stays off the network unless told to try it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from localllm import __version__
from localllm.doctor.cards import Card, find_cards
from localllm.doctor.engine import judge_cpu, judge_engine
from localllm.doctor.environment import judge_catalog, judge_permissions, judge_settings, judge_terminal, judge_variables, models_folder
from localllm.doctor.finding import Finding, worst
from localllm.doctor.hub import Ask, Reach, judge_reach, reach
from localllm.doctor.memory import judge_memory
from localllm.doctor.storage import Disk, judge_disks, judge_partials, mounts, read_disks
from localllm.doctor.system import System
from localllm.hardware import Memory
from localllm.hardware.cpu import cpu_name
from localllm.hardware.machine import is_wsl
from localllm.hardware.memory import read_memory
from localllm.probe import Engine, ask_engine, probe_command


@dataclass(frozen=True, slots=True)
class Report:
    """What was found. `to_json` is the stable form."""

    system: Mapping[str, Any]
    engine: Engine
    cards: tuple[Card, ...]
    memory: Memory
    disk: tuple[Disk, ...]
    hub: Reach
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Nothing worse than a warning."""
        return worst(self.findings) != "problem"

    def of(self, area: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.area == area]

    def to_json(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "healthy": self.healthy,
            "system": dict(self.system),
            "build": self.engine.to_json(),
            "devices": [dict(device) for device in self.engine.devices],
            "cards": [{**asdict(card), "backends": list(card.backends)} for card in self.cards],
            "memory": asdict(self.memory),
            "disk": [disk.to_json() for disk in self.disk],
            "hub": self.hub.to_json(),
            "findings": [finding.to_json() for finding in self.findings],
        }


def examine(
    system: System,
    *,
    network: bool = False,
    probe: Sequence[str] | None = None,
    ask: Ask | None = None,
    encoding: str | None = None,
) -> Report:
    """Look at everything; `network` allows one request to the Hub. Takes as long as llama.cpp takes to load.

    `probe` is the command that asks the engine, `ask` the request, `encoding` that of stdout; tests hand in their own.
    """
    settings, findings = judge_settings(system)
    models = models_folder(system, settings)
    engine = ask_engine(probe or probe_command(system.python), system.env)
    cards = find_cards(system)
    memory, odd = read_memory(system.sources)
    disks = read_disks(system, models, mounts())
    hub = reach(system.env, settings, network, ask)
    findings += judge_engine(system, engine, cards, settings.n_gpu_layers)
    findings += judge_cpu(system)
    findings += judge_memory(memory, odd)
    findings += judge_disks(disks)
    findings += judge_partials(models)
    findings += judge_reach(hub, system.env)
    findings += judge_catalog(system)
    findings += judge_permissions(system)
    findings += judge_variables(system)
    findings += judge_terminal(system, encoding)
    about = {
        "os": platform.platform(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "arch": system.sources.arch,
        "cpu": cpu_name(system.sources),
        "wsl": is_wsl(system.sources),
        "config_file": str(system.directories.config_file),
        "models": str(models),
    }
    return Report(about, engine, tuple(cards), memory, tuple(disks), hub, tuple(findings))
