"""Plan, load, compare, remember: with the demo model and real workers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localllm import loading
from localllm.errors import DoesNotFit, EngineDied, EngineError, ModelError
from localllm.hardware import detect
from localllm.loading import Loaded, Machine, load, look, make_plan, ran_out, remember_speed, running
from localllm.plan import history
from localllm.plan.loadplan import LoadPlan
from localllm.plan.spec import Wishes
from localllm.process import EngineProcess

GIB = 1 << 30
SMALL = Wishes(n_ctx=512, n_seq=1, n_resident=1)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def machine(available_bytes: int) -> Machine:
    """This one with another amount of free RAM."""
    hardware = detect([])
    return Machine(replace(hardware, ram=replace(hardware.ram, available_bytes=available_bytes)), "test")


@pytest.mark.slow
async def test_what_was_planned_is_what_is_taken(demo_large: Path, state: Path) -> None:
    planned = make_plan(demo_large, SMALL, state)
    assert planned.plan.confirmed
    loaded = await load(planned)
    try:
        device = planned.plan.device("CPU")
        row = loaded.actual["CPU"]
        assert (device.kv_bytes, device.anonymous_bytes) == (row.kv_bytes, row.anonymous_bytes)
        (listed,) = running(state)
        assert listed["devices"][0]["planned_bytes"] == listed["devices"][0]["actual_bytes"]
        assert listed["rss_bytes"] > 0
        known, warnings = history.load(state, planned.machine.build)
        assert not warnings
        assert len(known.residuals) == 1
    finally:
        await loaded.close()
    assert running(state) == []


@pytest.mark.slow
def test_a_second_plan_asks_nobody(demo_large: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_plan(demo_large, SMALL, state)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(loading, "dry_run", never)
    monkeypatch.setattr(loading, "ask_engine", never)
    assert make_plan(demo_large, SMALL, state).plan.devices[-1].planned_bytes == first.plan.devices[-1].planned_bytes
    with pytest.raises(AssertionError, match="asked again"):
        make_plan(demo_large, replace(SMALL, n_ctx=768), state)


@pytest.mark.slow
def test_another_engine_is_asked_again(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = look(state).build
    assert build
    kept = state / "engine.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "stamp": "another", "build": "old"}))
    assert look(state).build == build


def test_a_dry_run_that_fails_leaves_the_formulas_and_a_warning(demo_large: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise EngineError("the dry run hangs")

    monkeypatch.setattr(loading, "dry_run", broken)
    plan = make_plan(demo_large, SMALL, state, machine=machine(8 * GIB)).plan
    assert not plan.confirmed
    assert "the dry run hangs" in plan.warnings[0]


class Worker:
    """A worker that has loaded something."""

    pid = None
    info: dict[str, Any] = {}

    async def close(self) -> None:
        pass


def failing(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> list[Any]:
    """Loads fail with `errors`, one after the other, then succeed; returns their configs."""
    left, configs = list(errors), list[Any]()

    async def start(config: Any, on_event: Any = None) -> Any:
        configs.append(config)
        if left:
            raise left.pop(0)
        return Worker()

    monkeypatch.setattr(EngineProcess, "start", start)
    return configs


KILLED = EngineDied("the worker process 7 was killed by SIGKILL", exit_code=-9)


async def test_a_load_that_runs_out_of_memory_steps_down_and_says_so(
    demo_large: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = make_plan(demo_large, Wishes(), state, machine=machine(8 * GIB), dry=False)
    lower = replace(planned.plan, shape=replace(planned.plan.shape, n_ctx=256), reasons=("it takes less",))
    monkeypatch.setattr(LoadPlan, "step_down", lambda self, reason: lower)
    configs = failing(monkeypatch, KILLED)
    steps: list[LoadPlan] = []
    loaded = await load(planned, on_step=steps.append)
    assert [config.n_ctx for config in configs] == [planned.plan.shape.n_ctx, 256]
    assert loaded.planned.plan is lower
    assert steps == [lower]


async def test_with_strict_nothing_is_given_up(demo_large: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = make_plan(demo_large, Wishes(strict=True), state, machine=machine(8 * GIB), dry=False)
    failing(monkeypatch, KILLED)
    with pytest.raises(DoesNotFit, match="--strict"):
        await load(planned)


async def test_any_other_failure_is_raised_as_it_is(demo_large: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = make_plan(demo_large, Wishes(), state, machine=machine(8 * GIB), dry=False)
    configs = failing(monkeypatch, ModelError("the file is damaged"))
    with pytest.raises(ModelError, match="damaged"):
        await load(planned)
    assert len(configs) == 1


@pytest.mark.parametrize(
    "error, expected",
    [
        (KILLED, True),
        (ModelError("x cannot be loaded: unable to allocate CUDA0 buffer"), True),
        (EngineDied("it ended", exit_code=-6, last_words=["ggml: CUDA error: out of memory"]), True),
        (DoesNotFit("llama.cpp could not create a context of 8 cells: failed"), True),
        (EngineDied("it ended", exit_code=-11, last_words=["Segmentation fault"]), False),
        (ModelError("unknown architecture"), False),
    ],
)
def test_out_of_memory_is_recognised(error: Any, expected: bool) -> None:
    assert ran_out(error) is expected


async def test_an_answer_teaches_the_speed(demo_large: Path, state: Path) -> None:
    planned = make_plan(demo_large, SMALL, state, machine=machine(8 * GIB), dry=False)
    loaded = Loaded(Worker(), planned, ())  # type: ignore[arg-type]
    await asyncio.to_thread(remember_speed, loaded, 50.0, 8)
    assert not history.load(state, "test")[0].runs
    remember_speed(loaded, 50.0, 200)
    low, high = make_plan(demo_large, SMALL, state, machine=machine(8 * GIB), dry=False).plan.decode_tps or (0.0, 0.0)
    assert low < 50 < high < 60


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(demo_large: Path, state: Path) -> None:
    with pytest.raises(DoesNotFit) as caught:
        make_plan(demo_large, Wishes(), state, machine=machine(1 << 20), dry=False)
    assert "MiB" in str(caught.value)
    assert caught.value.exit_code == 4


def test_notes_of_processes_that_are_gone_are_removed(state: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder = state / "loaded"
    folder.mkdir(parents=True)
    (folder / "1.json").write_text(json.dumps({"pid": ended.pid, "started": 1.0}))
    (folder / "2.json").write_text("not JSON")
    assert running(state) == []
    assert not (folder / "1.json").exists()
