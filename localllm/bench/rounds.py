"""Running a plan: one process per arm, all loaded at once, one of them working at a time.

Every round runs every workload on every arm, and the order of the arms rotates: what drifts, such as
the clock of the CPU or somebody else's load, hits all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from localllm import wire
from localllm.bench import arm as arms
from localllm.bench import served
from localllm.bench.case import Case, Run
from localllm.bench.plan import Plan, Workload
from localllm.bench.prompts import prose
from localllm.engine.config import EngineConfig
from localllm.errors import UsageError
from localllm.process import EngineProcess

WARM_UP_TOKENS = 8

Report = Callable[[str], None]
"""Called with a line about what happens now."""


@dataclass(frozen=True, slots=True)
class Record:
    """One run: which arm did what, in which round."""

    arm: str
    workload: str
    round: int
    run: Run


class Arms:
    """The loaded arms of a plan."""

    def __init__(self, processes: dict[str, EngineProcess]) -> None:
        self._processes = processes

    @property
    def info(self) -> dict[str, Any]:
        """What the engine reports of itself and its model."""
        return self._processes["worker"].info

    async def run(self, arm: str, case: Case) -> Run:
        process = self._processes[arm]
        if arm != "worker":
            return wire.decode(Run, await process.call("measure", case=case))
        run = await served.measure(process, case)
        return replace(run, rss_bytes=arms.rss_bytes(process.pid))

    async def case(self, workload: Workload, key: str) -> Case:
        """A case of `workload` with new prompts; the same for the same `key`."""
        shared = await self._tokens(f"{key} shared", workload.n_shared)
        own = [await self._tokens(f"{key} {i}", workload.n_prompt - workload.n_shared) for i in range(workload.streams)]
        return Case(tuple((*shared, *tokens) for tokens in own), workload.n_gen)

    async def _tokens(self, seed: str, n: int) -> list[int]:
        # a word is at least one token
        tokens: list[int] = await self._processes["worker"].call("tokenize", text=prose(seed, n), add_special=False)
        return tokens[:n]


async def run_plan(plan: Plan, config: EngineConfig, repeats: int, report: Report) -> tuple[dict[str, Any], list[Record]]:
    """Load every arm, run `repeats` rounds; returns the engine's own report and the runs.

    Cancelled after a complete round, it returns the complete ones. Raises UsageError when a workload
    does not fit the context.
    """
    processes: dict[str, EngineProcess] = {}
    try:
        for name in plan.arms:
            report(f"loading {name}")
            processes[name] = await EngineProcess.start(config, command=None if name == "worker" else arms.command(name))
        loaded = Arms(processes)
        _check(plan, loaded.info)
        return loaded.info, await _rounds(plan, loaded, repeats, report)
    finally:
        await asyncio.gather(*(process.close() for process in processes.values()))


async def _rounds(plan: Plan, loaded: Arms, repeats: int, report: Report) -> list[Record]:
    records: list[Record] = []
    for name in plan.arms:
        report(f"warming up {name}")
        workload = next(w for w in plan.workloads if name in w.arms)
        # a workload of its own size, so that buffers, page tables and the engine's own estimates are there
        await loaded.run(name, await loaded.case(replace(workload, n_gen=min(workload.n_gen, WARM_UP_TOKENS)), "warm-up"))
    for number in range(repeats):
        done = len(records)
        try:
            for workload in plan.workloads:
                case = await loaded.case(workload, f"{number} {workload.name}")
                turn = number % len(workload.arms)
                for name in (*workload.arms[turn:], *workload.arms[:turn]):
                    report(f"round {number + 1} of {repeats}: {workload.name}, {name}")
                    records.append(Record(name, workload.name, number, await loaded.run(name, case)))
        except asyncio.CancelledError:
            if not done:
                raise
            report(f"interrupted: what follows are the {number} complete rounds")
            return records[:done]
    return records


def _check(plan: Plan, info: dict[str, Any]) -> None:
    n_ctx, n_cells = int(info["n_ctx"]), int(info["n_cells"])
    for workload in plan.workloads:
        if (wanted := workload.n_prompt + workload.n_gen) > n_ctx:
            raise UsageError(
                f"{workload.name}: a request of {wanted:,} tokens does not fit the context of {n_ctx:,}",
                hint="use smaller -p and -n, or a larger -c where the model allows it",
            )
        if workload.cells > n_cells:
            raise UsageError(
                f"{workload.name}: {workload.cells:,} tokens do not fit the KV cache of {n_cells:,}",
                hint=f"use -c {workload.cells} or more, fewer streams, or smaller -p and -n",
            )
