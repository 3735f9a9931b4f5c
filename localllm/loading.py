"""From a model file to a loaded engine: machine, plan, dry run, load, and what the truth was.

The one place that puts these together, for every front end. What fits is plan/'s to say and llama.cpp's to confirm; how a worker
lives is process.py's business.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from localllm.dry import dry_run
from localllm.engine.config import EngineConfig
from localllm.errors import DoesNotFit, EngineDied, EngineError, LocalLLMError, ModelError
from localllm.files import write_atomic
from localllm.gguf import Header, read_model
from localllm.hardware import Hardware, detect
from localllm.hardware.machine import Measure
from localllm.plan import history
from localllm.plan.choose import plan_load
from localllm.plan.compute import ComputeModel
from localllm.plan.confirm import confirm
from localllm.plan.footprint import Footprint
from localllm.plan.history import Residual, Run
from localllm.plan.loadplan import LoadPlan
from localllm.plan.question import OtherQuant
from localllm.plan.spec import CPU, Wishes
from localllm.plan.speed import Reads, keys, typical_past, weight_kind
from localllm.probe import Engine, ask_engine
from localllm.process import EngineProcess, OnLoading
from localllm.rows import Row, by_device

SCHEMA = 1
MOST_REMEMBERED = 64
LOADED = "loaded"
"""Folder of the state directory with a note for each loaded model."""
ENOUGH_TOKENS = 32
"""A shorter answer says little about speed."""
NO_MEMORY = ("out of memory", "failed to allocate", "unable to allocate", "cannot allocate", "std::bad_alloc", "could not create a context")
"""How llama.cpp, the backends and the C++ library say it."""

log = logging.getLogger("localllm.loading")


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine as a plan needs it."""

    hardware: Hardware
    build: str
    """Of llama.cpp; empty when the engine does not start."""
    problem: str = ""
    """Why nothing is known of the engine's devices."""


@dataclass(frozen=True)
class Planned:
    """A model file and how it will be loaded."""

    path: Path
    header: Header
    machine: Machine
    plan: LoadPlan
    state: Path
    """The directory that remembers loads and speeds."""

    @property
    def key(self) -> str:
        return header_key(self.header)


@dataclass(frozen=True)
class Loaded:
    """An engine that runs, with what was planned for it and what it took."""

    engine: EngineProcess
    planned: Planned
    rows: tuple[Row, ...]
    """llama.cpp's own account of what is allocated."""

    @property
    def actual(self) -> dict[str, Row]:
        """The same by device."""
        return by_device(self.rows)

    async def close(self) -> None:
        """End the worker, and take the model off the list."""
        self._note.unlink(missing_ok=True)
        await self.engine.close()

    def announce(self) -> None:
        """Put the model on the list that `ps` shows; a list that cannot be written is no reason not to run."""
        with suppress(OSError, psutil.Error):
            self._note.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._note, json.dumps({**self.to_json(), "started": _started(self.engine.pid)}).encode())

    @property
    def _note(self) -> Path:
        return self.planned.state / LOADED / f"{self.engine.pid}.json"

    def to_json(self) -> dict[str, Any]:
        """What `ps` shows."""
        actual = self.actual
        devices = [
            {
                "name": device.name,
                "planned_bytes": device.anonymous_bytes,
                "actual_bytes": actual[device.name].anonymous_bytes if device.name in actual else 0,
                "mapped_bytes": device.mapped_bytes,
            }
            for device in self.planned.plan.devices
            if device.planned_bytes or device.name in actual
        ]
        return {
            "pid": self.engine.pid,
            "model": self.planned.header.name or self.planned.path.name,
            "path": str(self.planned.path),
            "n_ctx": self.planned.plan.shape.n_ctx,
            "n_gpu_layers": self.planned.plan.shape.n_gpu_layers,
            "devices": devices,
        }


def look(state: Path, measure: Measure = "never") -> Machine:
    """This machine with the engine's devices. An engine that can only use the CPU is asked once and remembered."""
    engine = _engine(state / "engine.json")
    if engine.death:
        problem = "the engine does not start, so what it can use is unknown: localllm doctor says why"
        found = detect(None, state=state, measure=measure)
        return Machine(replace(found, warnings=(*found.warnings, problem)), "", problem)
    return Machine(detect(engine.devices, state=state, measure=measure), engine.build)


def make_plan(
    path: Path,
    wishes: Wishes,
    state: Path,
    *,
    machine: Machine | None = None,
    header: Header | None = None,
    quants: Sequence[OtherQuant] = (),
    dry: bool = True,
) -> Planned:
    """How to load the model at `path`, confirmed by a dry run. With a `header`, the file need not be here yet.

    Raises ModelError for an unusable file, DoesNotFit with the numbers, UsageError for wishes that make no sense.
    """
    header = header or read_model(path)
    machine = machine or look(state, "missing")
    known, warnings = history.load(state, machine.build)
    for warning in warnings:
        log.warning("%s", warning)
    key = header_key(header)

    def plan_with(compute: ComputeModel) -> LoadPlan:
        return plan_load(header, machine.hardware, wishes, history=known, model=key, quants=quants, compute=compute)

    def ask(plan: LoadPlan) -> tuple[Row, ...]:
        config = plan.engine_config(path)
        return _remembered(state / "dry_runs.json", _dry_key(key, config, machine), lambda: dry_run(config, header).rows)

    compute = ComputeModel(Footprint(header, machine.hardware.devices, cpu_features=machine.hardware.cpu_features))
    if not dry:
        return Planned(path, header, machine, plan_with(compute), state)
    try:
        plan, _ = confirm(plan_with, compute, ask)
    except EngineError as error:
        plan = plan_with(compute)
        plan = replace(plan, warnings=(f"not confirmed: {error.message}", *plan.warnings))
    for drift in plan.drift:
        log.warning("plan and dry run of %s differ: %s", path.name, drift)
    return Planned(path, header, machine, plan, state)


async def load(
    planned: Planned,
    options: Mapping[str, Any] | None = None,
    *,
    on_event: OnLoading | None = None,
    on_step: Callable[[LoadPlan], None] | None = None,
) -> Loaded:
    """Load as planned; `options` are the fields of EngineConfig that a plan leaves open.

    When memory runs out all the same, the worker dies and the next plan takes a step down; `on_step` is told. Raises DoesNotFit when
    nothing is left to give up or the user wished that nothing is, else what the load raises.
    """
    plan = planned.plan
    while True:
        try:
            engine = await EngineProcess.start(plan.engine_config(planned.path, **(options or {})), on_event)
            break
        except (DoesNotFit, ModelError, EngineDied, EngineError) as error:
            if not ran_out(error):
                raise
            lower = await asyncio.to_thread(plan.step_down, error.message)
            if lower is None:
                why = "with --strict nothing is given up" if plan.again is None else "nothing is left to give up"
                raise DoesNotFit(f"{planned.path.name} ran out of memory, and {why}: {error.message}", hint=error.hint) from error
            plan = lower
            log.warning("%s", plan.reasons[0])
            if on_step is not None:
                on_step(plan)
    loaded = Loaded(engine, replace(planned, plan=plan), tuple(Row(**row) for row in engine.info.get("memory", ())))
    await asyncio.to_thread(_remember_memory, loaded)
    loaded.announce()
    return loaded


def running(state: Path) -> list[dict[str, Any]]:
    """The models that this user's processes have loaded, as `Loaded.to_json` tells them; notes of processes that are gone are removed."""
    models: list[dict[str, Any]] = []
    for note in sorted((state / LOADED).glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            model: dict[str, Any] = json.loads(note.read_bytes())
            if _started(int(model["pid"])) == model["started"]:
                models.append({**model, "rss_bytes": _rss_bytes(int(model["pid"]))})
            else:
                note.unlink(missing_ok=True)
    return models


def ran_out(error: LocalLLMError) -> bool:
    """Whether a load failed for want of memory."""
    if isinstance(error, EngineDied) and error.details.get("exit_code") == -9:  # the kernel's choice
        return True
    said = " ".join([error.message, *map(str, error.details.get("last_words", ()))]).lower()
    return any(words in said for words in NO_MEMORY)


def remember_speed(loaded: Loaded, tokens_per_s: float, n_tokens: int) -> None:
    """Keep what one answer, decoded alone, told of this machine's speed; the next plan predicts with it."""
    if n_tokens < ENOUGH_TOKENS or tokens_per_s <= 0:
        return
    planned = loaded.planned
    hardware, shape = planned.machine.hardware, planned.plan.shape
    footprint = Footprint(planned.header, hardware.devices)
    read = Reads(planned.header, footprint.architecture).by_device(footprint.placement(shape), shape.overrides)
    for name, n_bytes in footprint.kv_read_bytes(shape, min(n_tokens, typical_past(shape.n_ctx))).items():
        read[name] = read.get(name, 0.0) + n_bytes
    names = keys(hardware)
    by_key: dict[str, int] = {}
    for name, n_bytes in read.items():
        if n_bytes:
            by_key[names[name]] = by_key.get(names[name], 0) + int(n_bytes)
    run = Run(planned.key, planned.machine.build, shape.n_threads, weight_kind(planned.header), by_key, tokens_per_s)
    _edit_history(planned, lambda known: known.with_run(run))


def header_key(header: Header) -> str:
    """Names a model by what its header says: the same for every copy of a file."""
    digest = hashlib.sha256()
    for key in sorted(header.metadata):
        value = header.metadata[key]
        digest.update(f"{key}={getattr(value, 'sha256', value)!r}\n".encode("utf-8", "replace"))
    for tensor in header.tensors:
        digest.update(f"{tensor.name} {tensor.shape} {tensor.type}\n".encode("utf-8", "replace"))
    return digest.hexdigest()[:32]


def _remember_memory(loaded: Loaded) -> None:
    """Keep what the worker takes beyond the buffers that llama.cpp counts."""
    planned = loaded.planned
    own = _anonymous_bytes(loaded.engine.pid)
    cpu = loaded.actual.get(CPU)
    if own is None or cpu is None:
        return
    # compute buffers are touched, and so counted by the system, only once a batch fills them
    counted = cpu.anonymous_bytes - cpu.compute_bytes - cpu.output_bytes
    residual = Residual(keys(planned.machine.hardware)[CPU], planned.machine.build, max(0, own - counted))
    _edit_history(planned, lambda known: known.with_residual(residual))


def _edit_history(planned: Planned, change: Callable[[history.History], history.History]) -> None:
    from filelock import FileLock, Timeout

    planned.state.mkdir(parents=True, exist_ok=True)
    # what cannot be kept is measured again the next time
    with suppress(OSError, Timeout), FileLock(planned.state / "plans.json.lock", timeout=2):
        known, _ = history.load(planned.state, planned.machine.build)
        history.save(planned.state, change(known))


def _started(pid: int | None) -> float:
    """When a process began, which tells it from a later one of the same number; 0 for none."""
    try:
        return psutil.Process(pid).create_time() if pid else 0.0
    except psutil.Error:
        return 0.0


def _rss_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _anonymous_bytes(pid: int | None) -> int | None:
    """Memory of a process that no file backs; None where the system does not tell."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return None


def _engine(file: Path) -> Engine:
    """The engine's devices. Of a build for the CPU alone nothing can change, so its answer is kept."""
    stamp = _engine_stamp()
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        kept = json.loads(file.read_bytes())
        if stamp and kept["schema"] == SCHEMA and kept["stamp"] == stamp:
            return Engine(build=str(kept["build"]), backends=("CPU",))
    engine = ask_engine()
    if stamp and engine.backends == ("CPU",):
        with suppress(OSError):
            write_atomic(file, json.dumps({"schema": SCHEMA, "stamp": stamp, "build": engine.build}).encode())
    return engine


def _engine_stamp() -> str:
    """Changes when another llama.cpp is installed; empty when there is none."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return ""
    folder = Path(spec.origin).parent / "lib"
    with suppress(OSError):
        return " ".join(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in sorted(folder.iterdir()))
    return ""


def _dry_key(key: str, config: EngineConfig, machine: Machine) -> str:
    """Everything that the outcome of a dry run depends on; how much memory is free does not matter to it."""
    devices = [(device.name, device.description, device.total_bytes) for device in machine.hardware.devices]
    told = {name: value for name, value in asdict(config).items() if name != "model_path"}
    text = json.dumps([SCHEMA, key, told, machine.build, devices], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _remembered(file: Path, key: str, ask: Callable[[], tuple[Row, ...]]) -> tuple[Row, ...]:
    """The rows of an earlier dry run of the very same load, else those of a new one."""
    kept: dict[str, Any] = {}
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = json.loads(file.read_bytes())
        kept = dict(content["dry_runs"]) if content["schema"] == SCHEMA else {}
        if key in kept:
            return tuple(Row(**row) for row in kept[key])
    rows = ask()
    kept.pop(key, None)
    newest = [*kept.items(), (key, [asdict(row) for row in rows])][-MOST_REMEMBERED:]
    with suppress(OSError):
        write_atomic(file, json.dumps({"schema": SCHEMA, "dry_runs": dict(newest)}).encode())
    return rows
