"""From runs to a report: medians, spreads, ratios, goals. Pure; how it looks is table.py's business."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

from localllm.bench.case import Run
from localllm.bench.plan import Comparison, Plan, Source, Workload
from localllm.bench.rounds import Record

BUSY_PERCENT = 10.0
"""From here on other programs' use of the CPU is worth a warning."""
BEYOND_BOUND = 1.03
FIGURES = tuple(field.name for field in fields(Run))


@dataclass(frozen=True, slots=True)
class ArmResult:
    """An arm under a workload, over all rounds."""

    name: str
    workload: Workload
    runs: tuple[Run, ...]

    def values(self, figure: str) -> list[float]:
        """What the rounds found; empty where it cannot be seen."""
        return [value for run in self.runs if (value := getattr(run, figure)) is not None]

    def median(self, figure: str) -> float | None:
        values = self.values(figure)
        return median(values) if values else None

    def to_json(self) -> dict[str, Any]:
        w = self.workload
        return {
            "name": self.name,
            "workload": w.name,
            "concurrency": w.streams,
            "n_prompt": w.n_prompt,
            "n_gen": w.n_gen,
            "n_shared": w.n_shared,
            **{figure: self.median(figure) for figure in FIGURES},
            "runs": [asdict(run) for run in self.runs],
        }


@dataclass(frozen=True, slots=True)
class Compared:
    """A comparison's value in each round."""

    comparison: Comparison
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; None without one."""
        goal = self.comparison.goal
        return goal.met(self.median, self.low, self.high) if goal else None

    def to_json(self) -> dict[str, Any]:
        return {"name": self.comparison.name, "median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Report:
    model: dict[str, Any]
    machine: dict[str, Any]
    arms: tuple[ArmResult, ...]
    compared: tuple[Compared, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """design.md's bench JSON; `goals` are the comparisons that have one."""
        return {
            "model": self.model,
            "machine": self.machine,
            "arms": [arm.to_json() for arm in self.arms],
            "ratios": [c.to_json() for c in self.compared if c.comparison.under],
            "goals": [
                {"name": c.comparison.name, "wanted": str(c.comparison.goal), "median": c.median, "met": c.met}
                for c in self.compared
                if c.comparison.goal
            ],
            "warnings": list(self.warnings),
        }


def make_report(plan: Plan, records: Sequence[Record], *, model: dict[str, Any], machine: dict[str, Any]) -> Report:
    """Put the runs of a plan together; a comparison without runs is left out."""
    found = {(r.arm, r.workload, r.round): r.run for r in records}
    rounds = sorted({r.round for r in records})
    arms = tuple(
        ArmResult(name, workload, tuple(found[key] for n in rounds if (key := (name, workload.name, n)) in found))
        for workload in plan.workloads
        for name in workload.arms
    )

    def figure(source: Source, n: int) -> float | None:
        run = found.get((source.arm, source.workload, n))
        return getattr(run, source.field) if run else None

    found_out = (Compared(c, _values(c, rounds, figure)) for c in plan.comparisons)
    compared = tuple(c for c in found_out if c.values)
    return Report(model, machine, tuple(arm for arm in arms if arm.runs), compared, _warnings(machine, compared))


def _warnings(machine: dict[str, Any], compared: tuple[Compared, ...]) -> tuple[str, ...]:
    """What makes the figures doubtful."""
    out: list[str] = []
    if (busy := machine["busy_percent"]) >= BUSY_PERCENT:
        out.append(f"other programs used {busy:.0f} % of the CPU: these figures say little; measure again on an idle machine")
    for c in compared:
        under = c.comparison.under
        if under and under.arm == "bare" and under.field == "decode_tps" and c.median > BEYOND_BOUND:
            out.append(f"{c.comparison.name}: {c.median:.2f} is above the bound, so something slowed the bare loop; this is no win")
    return tuple(out)


def _values(comparison: Comparison, rounds: list[int], figure: Callable[[Source, int], float | None]) -> tuple[float, ...]:
    """Round by round, so that what a round suffered cancels out."""
    out: list[float] = []
    for n in rounds:
        over = figure(comparison.over, n)
        under = 1.0 if comparison.under is None else figure(comparison.under, n)
        if over is not None and under:
            out.append(over / under)
    return tuple(out)
