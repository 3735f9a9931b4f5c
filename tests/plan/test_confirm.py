"""A plan with a dry run's bytes, the dry run being told here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from localllm.gguf import Header
from localllm.hardware import Hardware
from localllm.plan.choose import plan_load
from localllm.plan.compute import ComputeModel
from localllm.plan.confirm import confirm
from localllm.plan.footprint import Footprint
from localllm.plan.loadplan import LoadPlan
from localllm.plan.spec import CPU, Wishes
from localllm.rows import Row
from tests import sparse_models
from tests.plan.machines import GIB, MIB, gpu, header, machine


@cache
def model(name: str) -> Header:
    return header(sparse_models.MODELS[name]())


def confirmed(
    hardware: Hardware, wishes: Wishes, rows: Callable[[LoadPlan, Footprint], Iterable[Row]]
) -> tuple[LoadPlan, ComputeModel, list[LoadPlan]]:
    """The confirmed plan, and every plan that was asked about."""
    asked: list[LoadPlan] = []
    first = ComputeModel(Footprint(model("llama-8b"), hardware.devices, cpu_features=hardware.cpu_features))

    def ask(plan: LoadPlan) -> Iterable[Row]:
        asked.append(plan)
        return rows(plan, first.footprint)

    def plan_with(compute: ComputeModel) -> LoadPlan:
        return plan_load(model("llama-8b"), hardware, wishes, compute=compute, others=False)

    found, compute = confirm(plan_with, first, ask)
    return found, compute, asked


def told(plan: LoadPlan, footprint: Footprint, compute_bytes: int, *, more_weights: int = 0) -> list[Row]:
    """llama.cpp's rows: the formulas' weights and caches, compute buffers as given."""
    weights, kv = footprint.weights(plan.shape), footprint.kv(plan.shape)
    return [
        Row(name, name, name == CPU, weights.on(name) + (more_weights if name == "CUDA0" else 0), kv.on(name), compute_bytes)
        for name in ("CUDA0", CPU)
    ]


def test_a_dry_run_confirms_the_bytes() -> None:
    found, compute, asked = confirmed(machine(gpu()), Wishes(n_ctx=8192), lambda plan, footprint: told(plan, footprint, 100 * MIB))
    assert len(asked) == 1
    assert found.confirmed
    assert found.doubt == ""
    assert found.drift == ()
    assert found.device("CUDA0").compute_bytes == 100 * MIB
    assert found.device("CUDA0").weights_bytes == asked[0].device("CUDA0").weights_bytes
    assert compute.amount(found.shape).exact
    assert "confirmed by a dry run" in found.notes[0]
    assert not any("to be confirmed" in note for note in found.notes)


def test_buffers_larger_than_estimated_lead_to_another_plan() -> None:
    hardware = machine(gpu(total=6 * GIB))
    found, _, asked = confirmed(hardware, Wishes(n_ctx=8192), lambda plan, footprint: told(plan, footprint, 900 * MIB))
    assert len(asked) > 1
    assert found.shape != asked[0].shape
    card = found.device("CUDA0")
    assert card.room_bytes is not None
    assert card.planned_bytes <= card.room_bytes


def test_drift_is_shown_and_the_dry_run_is_believed() -> None:
    found, _, _ = confirmed(
        machine(gpu()), Wishes(n_ctx=8192), lambda plan, footprint: told(plan, footprint, 100 * MIB, more_weights=5 * MIB)
    )
    (drift,) = found.drift
    assert (drift.device, drift.part, drift.dry_run_bytes - drift.formula_bytes) == ("CUDA0", "weights", 5 * MIB)
    assert found.device("CUDA0").weights_bytes == drift.dry_run_bytes
    assert any("differs from the formulas" in note for note in found.notes)
    assert found.to_json()["drift"][0]["device"] == "CUDA0"


def test_drift_beyond_the_room_gives_something_up() -> None:
    hardware = machine(gpu(total=6 * GIB))
    found, _, asked = confirmed(hardware, Wishes(), lambda plan, footprint: told(plan, footprint, 150 * MIB, more_weights=500 * MIB))
    assert len(asked) > 1
    card = found.device("CUDA0")
    assert card.room_bytes is not None
    assert card.planned_bytes <= card.room_bytes


def test_a_build_that_tells_only_compute_buffers_is_no_drift() -> None:
    def rows(plan: LoadPlan, footprint: Footprint) -> Iterable[Row]:
        return [Row("CUDA0", "CUDA0", False, compute_bytes=100 * MIB), Row(CPU, CPU, True, compute_bytes=50 * MIB)]

    found, _, _ = confirmed(machine(gpu()), Wishes(n_ctx=8192), rows)
    assert found.drift == ()
    assert found.device("CUDA0").weights_bytes > 4 * GIB
