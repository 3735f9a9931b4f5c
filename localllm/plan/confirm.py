"""A plan with a dry run's bytes in the place of the formulas': what is shown is what llama.cpp itself will allocate.

Pure but for `ask`, which is the caller's way to a dry run. A dry run may say that the buffers were estimated too large or too
small; then the plan is made again with what it said, and asked about again if it changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from localllm.plan.compute import ComputeModel, Sample
from localllm.plan.explain import TO_CONFIRM
from localllm.plan.loadplan import DevicePlan, Drift, LoadPlan
from localllm.rows import Row, by_device

ROUNDS = 3
"""Dry runs at most; nearly always one is enough, as estimates are on the safe side."""


def confirm(
    plan_with: Callable[[ComputeModel], LoadPlan], compute: ComputeModel, ask: Callable[[LoadPlan], Iterable[Row]]
) -> tuple[LoadPlan, ComputeModel]:
    """The plan that `plan_with` makes once `ask` has told what it takes, and the compute model that knows it, for the next plan.

    Raises what the two raise.
    """
    plan = plan_with(compute)
    for _ in range(ROUNDS):
        rows = by_device(ask(plan))
        compute = compute.with_samples(Sample(plan.shape, {name: row.compute_bytes for name, row in rows.items()}))
        again = plan_with(compute)
        drift = _drift(again, compute, rows)
        if again.shape == plan.shape:
            confirmed = _with_bytes(again, compute, rows, drift)
            over = {device.name: _over(device) for device in confirmed.devices if _over(device)}
            if not over or again.again is None:
                return confirmed, compute
            # The formulas were wrong by more than the room that was left: plan for less.
            lower = again.again({name: again.device(name).planned_bytes - n_bytes for name, n_bytes in over.items()})
            if lower is None:
                return confirmed, compute
            again = lower
        plan = again
    return plan, compute


def _drift(plan: LoadPlan, compute: ComputeModel, rows: dict[str, Row]) -> tuple[Drift, ...]:
    """Weights and caches that are not as the formulas say; they should be, to the byte."""
    weights, kv = compute.footprint.weights(plan.shape), compute.footprint.kv(plan.shape)
    if not any(row.weights_bytes for row in rows.values()):  # a build that tells only compute buffers
        return ()
    found: list[Drift] = []
    for name in dict.fromkeys((*weights.by_device, *kv.by_device, *rows)):
        row = rows.get(name) or Row(name, name, False)
        found += [Drift(name, "weights", weights.on(name), row.weights_bytes)] if weights.on(name) != row.weights_bytes else []
        found += [Drift(name, "kv", kv.on(name), row.kv_bytes)] if kv.on(name) != row.kv_bytes else []
    return tuple(found)


def _with_bytes(plan: LoadPlan, compute: ComputeModel, rows: dict[str, Row], drift: tuple[Drift, ...]) -> LoadPlan:
    # Adapters and projectors are no part of the dry run, so differences are added and nothing is replaced.
    changes = {(each.device, each.part): each.dry_run_bytes - each.formula_bytes for each in drift}
    repacked = compute.footprint.repacked_bytes(plan.shape)

    def exact(device: DevicePlan) -> DevicePlan:
        weights = device.weights_bytes + changes.get((device.name, "weights"), 0)
        mapped = rows[device.name].mapped_bytes if device.name in rows and device.mapped_bytes else device.mapped_bytes
        kv = device.kv_bytes + changes.get((device.name, "kv"), 0)
        return replace(device, weights_bytes=weights, kv_bytes=kv, mapped_bytes=min(mapped, max(weights - repacked, 0)))

    note = "every byte is confirmed by a dry run" if not plan.draft else "the model's bytes are confirmed by a dry run, the draft's are not"
    said = (note, *(f"a dry run differs from the formulas: {each}" for each in drift))
    kept = tuple(each for each in plan.notes if not each.startswith(TO_CONFIRM))
    return replace(plan, devices=tuple(map(exact, plan.devices)), notes=(*said, *kept), doubt="", confirmed=True, drift=drift)


def _over(device: DevicePlan) -> int:
    """Bytes beyond a device's room."""
    return 0 if device.room_bytes is None else max(0, device.planned_bytes - device.room_bytes)
