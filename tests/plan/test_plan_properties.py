"""What holds for every plan, whatever the model, the machine and the wishes."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from localllm.errors import DoesNotFit, UsageError
from localllm.gguf import Header
from localllm.hardware import Hardware
from localllm.plan.budget import budgets
from localllm.plan.choose import plan_load
from localllm.plan.compute import ComputeModel
from localllm.plan.footprint import Footprint
from localllm.plan.loadplan import LoadPlan
from localllm.plan.spec import Wishes
from tests import sparse_models
from tests.plan.machines import GIB, MIB, gpu, header, igpu, machine, metal

pytestmark = pytest.mark.slow

MODELS = ("llama-1b", "llama-8b", "qwen3-30b-a3b", "gemma3-12b", "deepseek2-lite", "qwen35-0.8b", "gpt-oss-20b", "llama-70b")
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@cache
def model(name: str) -> Header:
    return header(sparse_models.MODELS[name]())


names = st.sampled_from(MODELS)
"""Not the headers: nobody wants to read one in a failure."""
sizes = st.sampled_from([2, 4, 6, 8, 12, 16, 24, 48]).map(lambda gib: gib * GIB)


@st.composite
def machines(draw: st.DrawFn) -> Hardware:
    """From a small laptop to a workstation: no card, one, equal and unequal pairs, three, graphics that share the RAM, unknown ones."""
    ram = draw(st.sampled_from([8, 16, 32, 64, 128])) * GIB
    available = draw(st.integers(ram // 4, ram))
    kind = draw(st.sampled_from(["none", "one", "pair", "three", "metal", "igpu", "unknown"]))
    match kind:
        case "none":
            devices = ()
        case "one" | "pair" | "three":
            count = {"one": 1, "pair": 2, "three": 3}[kind]
            totals = [draw(sizes) for _ in range(count)]
            devices = tuple(gpu(i, total, draw(st.integers(0, total)), display=draw(st.booleans())) for i, total in enumerate(totals))
        case "metal":
            devices = (metal(ram * 3 // 4, min(ram * 3 // 4, available)),)
        case "igpu":
            devices = (igpu(ram // 2, min(ram // 2, available)),)
        case _:
            devices = (gpu(0, draw(st.sampled_from([None, 8 * GIB])), None),)
    return machine(*devices, ram=ram, available=available)


@st.composite
def wishes(draw: st.DrawFn) -> Wishes:
    """Any part of what a user can fix."""
    values: dict[str, Any] = {}

    def maybe(name: str, strategy: st.SearchStrategy[Any]) -> None:
        if draw(st.integers(0, 3)) == 0:
            values[name] = draw(strategy)

    maybe("n_ctx", st.sampled_from([512, 4096, 8192, 32_768, 131_072]))
    maybe("n_gpu_layers", st.sampled_from([-1, 0, 1, 7, 20, 999]))
    maybe("n_seq", st.sampled_from([1, 2, 4, 16]))
    maybe("n_resident", st.sampled_from([0, 3, 24]))
    maybe("n_ubatch", st.sampled_from([64, 512, 1024]))
    maybe("n_threads", st.integers(1, 32))
    maybe("n_cpu_moe", st.sampled_from([0, 3, 999]))
    maybe("swa_full", st.booleans())
    if draw(st.integers(0, 3)) == 0:
        values["type_k"] = values["type_v"] = draw(st.sampled_from(["f16", "q8_0", "q4_0"]))
    return Wishes(**values)


def plan(header: Header, hardware: Hardware, wishes: Wishes | None = None) -> LoadPlan:
    """A plan; machines that cannot have one are not what a property is about."""
    try:
        return plan_load(header, hardware, wishes, others=False)
    except (DoesNotFit, UsageError):
        assume(False)
        raise AssertionError from None


def as_fixed(found: LoadPlan, **changes: Any) -> Wishes:
    """All that a plan chose, as wishes."""
    shape = found.shape
    values: dict[str, Any] = {
        "n_ctx": shape.n_ctx,
        "n_gpu_layers": shape.n_gpu_layers,
        "type_k": shape.type_k,
        "type_v": shape.type_v,
        "n_seq": found.n_seq,
        "n_resident": found.n_resident,
        "n_ubatch": shape.n_ubatch,
        "swa_full": shape.swa_full,
        "overrides": shape.overrides,
        "n_cpu_moe": 0,
    }
    return Wishes(**{**values, **changes})


@quick
@given(names, machines(), wishes())
def test_no_memory_is_planned_beyond_its_budget(name: str, hardware: Hardware, wishes: Wishes) -> None:
    header = model(name)
    found = plan(header, hardware, wishes)
    rooms = budgets(hardware, wishes)
    planned = {device.name: device.planned_bytes for device in found.devices}
    assert rooms.shortfalls(planned) == {}
    for device in found.devices:
        if device.room_bytes is not None and device.free_bytes is not None:
            assert device.planned_bytes + device.overhead_bytes + device.reserve_bytes <= device.free_bytes or not device.planned_bytes
        assert device.mapped_bytes <= device.weights_bytes


@quick
@given(names, machines(), wishes())
def test_what_the_user_fixed_stays(name: str, hardware: Hardware, wishes: Wishes) -> None:
    header = model(name)
    found = plan(header, hardware, wishes)
    shape = found.shape
    if wishes.n_ctx is not None:
        assert shape.n_ctx == wishes.n_ctx
    if wishes.n_gpu_layers is not None:
        most = header.n_layers + 1
        assert shape.n_gpu_layers == (most if wishes.n_gpu_layers < 0 else min(wishes.n_gpu_layers, most))
    for each in ("type_k", "type_v", "n_threads", "swa_full"):
        if getattr(wishes, each) is not None:
            assert getattr(shape, each) == getattr(wishes, each)
    if wishes.n_ubatch is not None:
        assert shape.n_ubatch == min(wishes.n_ubatch, shape.n_batch)
    if wishes.n_seq is not None:
        assert found.n_seq == wishes.n_seq
    if wishes.n_resident is not None:
        assert found.n_resident == wishes.n_resident
    if wishes.n_cpu_moe == 0:
        assert shape.overrides == ()


@quick
@given(names, machines(), wishes())
def test_plans_are_deterministic(name: str, hardware: Hardware, wishes: Wishes) -> None:
    header = model(name)
    one = plan(header, hardware, wishes)
    compute = ComputeModel(Footprint(header, hardware.devices, cpu_features=hardware.cpu_features))
    assert plan_load(header, hardware, wishes, others=False) == one
    # … also when a screen keeps the footprint, with all it remembers, from plan to plan.
    with suppress(DoesNotFit, UsageError):
        plan_load(header, hardware, Wishes(n_ctx=256), compute=compute, others=False)
    assert plan_load(header, hardware, wishes, compute=compute, others=False) == one
    assert json.loads(json.dumps(one.to_json())) == one.to_json()


@quick
@given(names, st.lists(st.floats(0.05, 0.9), min_size=1, max_size=3), wishes())
def test_no_card_is_left_with_room_for_another_layer(name: str, fractions: list[float], wishes: Wishes) -> None:
    header = model(name)
    # Together the cards are too small for the model, and mostly large enough for a part of it.
    totals = [GIB + int(header.weights_bytes * fraction / len(fractions)) for fraction in fractions]
    hardware = machine(*(gpu(i, total) for i, total in enumerate(totals)), ram=256 * GIB)
    found = plan(header, hardware, replace(wishes, n_gpu_layers=None, n_cpu_moe=0))
    most = header.n_layers + 1
    assume(0 < found.shape.n_gpu_layers < most)
    with pytest.raises(DoesNotFit):
        plan_load(header, hardware, as_fixed(found, n_gpu_layers=found.shape.n_gpu_layers + 1), others=False)
    layer = largest_layer_bytes(header, hardware, found)
    for device in found.devices:
        if device.n_layers and device.kind == "gpu":
            assert device.room_bytes is not None
            assert device.room_bytes - device.planned_bytes < layer


def largest_layer_bytes(header: Header, hardware: Hardware, found: LoadPlan) -> int:
    """Weights and cache of the largest layer, or of the output."""
    footprint = Footprint(header, hardware.devices, cpu_features=hardware.cpu_features)
    shapes = [replace(found.shape, n_gpu_layers=n, split_mode="none", main_gpu=0, tensor_split=()) for n in range(header.n_layers + 2)]
    on_card = [footprint.weights(shape).on("CUDA0") + footprint.kv(shape).on("CUDA0") for shape in shapes]
    return max(more - less for less, more in zip(on_card, on_card[1:], strict=False))


@quick
@given(names, machines(), st.integers(1, 24))
def test_more_memory_on_the_card_never_means_fewer_layers(name: str, hardware: Hardware, more_gib: int) -> None:
    header = model(name)
    cards = [device for device in hardware.devices if device.kind == "gpu" and not device.shared_with_ram and device.free_bytes is not None]
    assume(cards)
    small = plan(header, hardware)
    first = cards[0]
    more = more_gib * GIB
    larger = replace(first, total_bytes=(first.total_bytes or 0) + more, free_bytes=(first.free_bytes or 0) + more, display=False)
    grown = replace(hardware, devices=tuple(larger if device is first else device for device in hardware.devices))
    assert plan(header, grown).shape.n_gpu_layers >= small.shape.n_gpu_layers


@quick
@given(names, machines(), st.sampled_from([1024, 4096, 16_384]))
def test_a_longer_context_takes_more_and_leaves_no_more_layers_on_the_card(name: str, hardware: Hardware, n_ctx: int) -> None:
    header = model(name)
    short = plan(header, hardware, Wishes(n_ctx=n_ctx))
    long = plan(header, hardware, Wishes(n_ctx=2 * n_ctx))
    assert long.shape.n_gpu_layers <= short.shape.n_gpu_layers
    if replace(long.shape, n_ctx=short.shape.n_ctx) == short.shape:
        assert sum(d.kv_bytes for d in long.devices) >= sum(d.kv_bytes for d in short.devices)
        assert sum(d.planned_bytes for d in long.devices) >= sum(d.planned_bytes for d in short.devices)


@quick
@given(names, machines(), wishes())
def test_a_refusal_names_every_memory_that_is_short_and_the_bytes(name: str, hardware: Hardware, wishes: Wishes) -> None:
    header = model(name)
    refusal = None
    try:
        plan_load(header, hardware, replace(wishes, reserve_bytes=8 * GIB, n_ctx=131_072), others=False)
    except UsageError:
        assume(False)
    except DoesNotFit as error:
        refusal = error
    assume(refusal is not None)
    assert refusal is not None
    missing = refusal.details["missing_bytes"]
    assert missing
    for pool, n_bytes in missing.items():
        assert n_bytes > 0
        assert pool in refusal.message
        assert f"({n_bytes:,} bytes)" in refusal.message
    assert "would fit" in refusal.hint


@quick
@given(names, machines(), wishes())
def test_stepping_down_takes_less_until_nothing_is_left(name: str, hardware: Hardware, wishes: Wishes) -> None:
    header = model(name)
    found: LoadPlan | None = plan(header, hardware, wishes)
    for _ in range(200):
        assert found is not None
        lower = found.step_down("CUDA error: out of memory")
        if lower is None:
            break
        spared = [device for device in found.devices if device.kind != "cpu" and device.planned_bytes] or [found.devices[-1]]
        for device in spared:
            assert lower.device(device.name).planned_bytes <= device.planned_bytes - min(device.planned_bytes, 256 * MIB)
        if wishes.n_ctx:
            assert lower.shape.n_ctx == found.shape.n_ctx
        assert "out of memory" in lower.reasons[0]
        found = lower
    else:
        pytest.fail("it steps down for ever")


@quick
@given(names, machines(), wishes())
def test_strict_gives_up_nothing(name: str, hardware: Hardware, wishes: Wishes) -> None:
    header = model(name)
    found = plan(header, hardware, replace(wishes, strict=True))
    words = " ".join(found.given_up)
    assert "context" not in words
    assert "KV" not in words
    assert "CPU" not in words
    assert found.step_down("out of memory") is None


@settings(parent=quick, max_examples=25)
@given(names, machines())
def test_an_alternative_is_what_its_wishes_lead_to(name: str, hardware: Hardware) -> None:
    header = model(name)
    try:
        found = plan_load(header, hardware)
    except DoesNotFit:
        assume(False)
        return
    for other in found.alternatives:
        led = plan_load(header, hardware, Wishes(**other.wishes), others=False)
        assert (led.shape.n_ctx, led.shape.n_gpu_layers, led.shape.type_k) == (other.n_ctx, other.n_gpu_layers, other.type_k)
        assert (led.shape.n_ctx, led.shape.type_k, led.shape.n_gpu_layers) != (
            found.shape.n_ctx,
            found.shape.type_k,
            found.shape.n_gpu_layers,
        )
