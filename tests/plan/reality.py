"""What llama.cpp says a shape takes, beside what the formulas say: sparse models, fake GPUs, dry runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localllm.dry import dry_runs
from localllm.engine.config import EngineConfig
from localllm.gguf import read_model
from localllm.hardware import Device, this_machine
from localllm.hardware.cpu import cpu_features
from localllm.plan.footprint import Footprint
from localllm.plan.spec import CPU, Shape
from localllm.rows import Row, by_device
from tests import fake_gpu, sparse_models
from tests.fake_gpu import FakeGpu

FEATURES = cpu_features(this_machine())
Asked = Mapping[str, Any]
"""Keyword arguments of Architecture.shape and of EngineConfig alike."""


@dataclass(frozen=True)
class Measured:
    """One shape, and its dry run's rows summed by device."""

    asked: Asked
    shape: Shape
    rows: tuple[Row, ...]

    @property
    def by_device(self) -> dict[str, Row]:
        return by_device(self.rows)

    def compute(self) -> dict[str, int]:
        return {name: row.compute_bytes for name, row in self.by_device.items()}


def device(gpu: FakeGpu) -> Device:
    """A fake GPU as hardware sees it."""
    free = gpu.total_bytes if gpu.free_bytes < 0 else gpu.free_bytes
    kind = "igpu" if gpu.kind == "igpu" else "gpu"
    return Device(gpu.name, gpu.description, kind, gpu.backend, "", gpu.total_bytes, free, kind == "igpu", None, ("llama.cpp",))


def footprint(path: Path, gpus: Sequence[FakeGpu] = ()) -> Footprint:
    return Footprint(read_model(path), [device(gpu) for gpu in gpus], cpu_features=FEATURES)


def config(path: Path, asked: Asked) -> EngineConfig:
    """One request and no residents, unless asked for more; weights are allocated, not mapped."""
    return EngineConfig(str(path), **({"n_seq": 1, "n_resident": 0, "n_threads": 1, "load_mode": "none"} | dict(asked)))


def measure(path: Path, cases: Iterable[Asked], gpus: Sequence[FakeGpu] = ()) -> tuple[Footprint, list[Measured]]:
    """Dry runs of all cases that llama.cpp accepts."""
    model = footprint(path, gpus)
    shapes = [(asked, model.architecture.shape(**asked)) for asked in cases]
    shapes = [(asked, shape) for asked, shape in shapes if not model.refusal(shape)]
    command = fake_gpu.command(gpus, "localllm.engine.dryrun") if gpus else ()
    runs = dry_runs([config(path, asked) for asked, _ in shapes], timeout_s=240, command=command)
    return model, [Measured(asked, shape, run.rows) for (asked, shape), run in zip(shapes, runs, strict=True)]


def differences(model: Footprint, measured: Iterable[Measured]) -> list[tuple[Asked, str, Mapping[str, tuple[int, int]]]]:
    """(case, device, what -> (real, formula)) for every size that the formulas get wrong by a byte."""
    wrong: list[tuple[Asked, str, Mapping[str, tuple[int, int]]]] = []
    for each in measured:
        shape, rows = each.shape, each.by_device
        weights, kv, output = model.weights(shape), model.kv(shape), model.output(shape)
        for name in (*(device.name for device in model.devices), CPU):
            row = rows.get(name) or Row(name, name, name == CPU)
            pairs = {
                "weights": (row.weights_bytes, weights.on(name)),
                "kv": (row.kv_bytes, kv.on(name)),
                "output": (row.output_bytes, output.on(name)),
            }
            if name == CPU:
                real = sum(part.weights_bytes for part in each.rows if part.buffer == "CPU_REPACK")
                pairs["repacked"] = (real, model.repacked_bytes(shape))
            bad = {what: pair for what, pair in pairs.items() if pair[0] != pair[1]}
            if bad:
                wrong.append((each.asked, name, bad))
    return wrong


def write(model: sparse_models.Sparse, folder: Path) -> Path:
    """The model's file; tests of one session share a folder."""
    return sparse_models.write(model, folder / f"{model.architecture}.gguf")
