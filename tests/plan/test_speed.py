"""Predicted tokens per second: bytes from the header, rates from this machine."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from localllm.gguf import Header
from localllm.hardware import Hardware
from localllm.plan import architecture
from localllm.plan.history import History, Run
from localllm.plan.placement import place
from localllm.plan.spec import CPU
from localllm.plan.speed import Reads, Speeds, cpu_key, device_key, typical_past, weight_kind
from localllm.plan.weights import experts_on_cpu
from tests import sparse_models
from tests.plan.machines import GIB, gpu, header, machine, metal


@cache
def model(name: str) -> Header:
    return header(sparse_models.MODELS[name]())


def reads(name: str, n_gpu_layers: int = 0, n_cpu_moe: int = 0) -> dict[str, float]:
    facts = architecture.read(model(name))
    placement = place(facts.n_layers, n_gpu_layers, ["CUDA0"] if n_gpu_layers else [], ())
    return Reads(model(name), facts).by_device(placement, experts_on_cpu(n_cpu_moe))


def speeds(hardware: Hardware, history: History | None = None, *, kind: str = "k", model: str = "", threads: int = 8) -> Speeds:
    return Speeds(hardware, history or History(), kind, threads, model)


def run(read_bytes: dict[str, int], tokens_per_s: float, *, model: str = "m", kind: str = "k", threads: int = 8) -> Run:
    return Run(model, "b1", threads, kind, read_bytes, tokens_per_s)


def test_a_dense_model_reads_all_but_its_embedding() -> None:
    whole = model("llama-8b")
    embedding = next(tensor.n_bytes for tensor in whole.tensors if tensor.name == "token_embd.weight")
    assert reads("llama-8b") == {CPU: whole.weights_bytes - embedding}


def test_an_embedding_that_is_the_output_as_well_is_read_once() -> None:
    assert reads("llama-1b") == {CPU: model("llama-1b").weights_bytes}


def test_experts_are_read_as_far_as_they_are_used() -> None:
    moe = model("qwen3-30b-a3b")
    experts = sum(tensor.n_bytes for tensor in moe.tensors if "_exps." in tensor.name)
    embedding = next(tensor.n_bytes for tensor in moe.tensors if tensor.name == "token_embd.weight")
    (read,) = reads("qwen3-30b-a3b").values()
    assert read == pytest.approx(moe.weights_bytes - embedding - experts * 120 / 128)


def test_every_byte_is_read_by_the_device_that_has_it() -> None:
    (whole,) = reads("qwen3-30b-a3b").values()
    for n_gpu_layers, n_cpu_moe in ((49, 0), (49, 10), (30, 0), (30, 25), (1, 48)):
        split = reads("qwen3-30b-a3b", n_gpu_layers, n_cpu_moe)
        assert sum(split.values()) == pytest.approx(whole)
    assert reads("qwen3-30b-a3b", 49) == {"CUDA0": pytest.approx(whole)}
    # The experts that a token uses, of the layers that were moved.
    moved = sum(t.n_bytes for t in model("qwen3-30b-a3b").tensors if "_exps." in t.name and int(t.name.split(".")[1]) < 10)
    assert reads("qwen3-30b-a3b", 49, 10)[CPU] == pytest.approx(moved * 8 / 128)


def test_the_kind_of_a_model_is_that_of_most_of_its_bytes() -> None:
    assert weight_kind(model("llama-8b")) == "k"
    assert weight_kind(model("gpt-oss-20b")) == "fp4"
    assert weight_kind(header(sparse_models.llama(4, kind="Q8_0"))) == "q8"
    assert weight_kind(header(sparse_models.llama(4, kind="F16"))) == "float"
    assert weight_kind(header(sparse_models.llama(4, kind="Q4_0"))) == "legacy"
    assert weight_kind(header(sparse_models.llama(4, kind="IQ3_S"))) == "iq"


def test_the_processor_is_bounded_by_its_bandwidth() -> None:
    found = speeds(machine(bandwidth=40e9)).tokens_per_s({CPU: 4e9}, 32)
    assert found is not None
    low, high = found
    assert 0 < low < high <= 10.0


def test_more_bytes_are_never_faster_and_more_bandwidth_never_slower() -> None:
    last = float("inf"), float("inf")
    for n_bytes in (1e6, 1e8, 1e9, 5e9, 4e10):
        found = speeds(machine(bandwidth=40e9)).tokens_per_s({CPU: n_bytes}, 32)
        assert found is not None
        assert found[0] < last[0]
        assert found[1] < last[1]
        last = found
    slow, fast = (speeds(machine(bandwidth=rate)).tokens_per_s({CPU: 1e9}, 32) for rate in (20e9, 80e9))
    assert slow is not None
    assert fast is not None
    assert slow[0] < fast[0]


def test_a_card_that_was_never_measured_has_no_speed() -> None:
    hardware = machine(gpu())
    assert speeds(hardware).tokens_per_s({"CUDA0": 4e9}, 32) is None
    assert speeds(hardware).tokens_per_s({"CUDA0": 1e9, CPU: 3e9}, 32) is None
    assert speeds(machine(bandwidth=None)).tokens_per_s({CPU: 4e9}, 32) is None
    assert speeds(hardware).tokens_per_s({}, 32) is None


def test_graphics_that_share_the_ram_are_estimated_from_it_widely() -> None:
    hardware = machine(metal(24 * GIB, 24 * GIB), bandwidth=60e9)
    found = speeds(hardware).tokens_per_s({"MTL0": 4e9}, 32)
    assert found is not None
    assert found[1] > 5 * found[0]


def test_a_run_on_the_card_calibrates_it() -> None:
    hardware = machine(gpu())
    key = device_key(hardware.devices[0])
    history = History().with_run(run({key: 4 * GIB}, 100.0))
    found = speeds(hardware, history).tokens_per_s({"CUDA0": 2 * GIB}, 32)
    assert found is not None
    low, high = found
    assert low < 200 < high
    assert high < 2 * low
    wider = speeds(hardware, history, kind="q8").tokens_per_s({"CUDA0": 2 * GIB}, 32)
    assert wider is not None
    assert wider[1] / wider[0] > high / low


def test_a_run_of_this_model_in_this_place_counts_most() -> None:
    hardware = machine(gpu())
    card, cpu = device_key(hardware.devices[0]), cpu_key(hardware)
    history = History().with_run(run({card: 3 * GIB, cpu: GIB}, 20.0, model="mine"))
    found = speeds(hardware, history, model="mine").tokens_per_s({"CUDA0": 3 * GIB, CPU: GIB}, 32)
    assert found is not None
    assert found == pytest.approx((18.4, 21.6))
    assert speeds(hardware, history, model="other").tokens_per_s({"CUDA0": 3 * GIB, CPU: GIB}, 32) is None
    # Another placement is another thing.
    assert speeds(hardware, history, model="mine").tokens_per_s({"CUDA0": GIB, CPU: 3 * GIB}, 32) is None


def test_a_run_on_other_threads_says_nothing_of_the_processor() -> None:
    hardware = machine(bandwidth=None)
    history = History().with_run(run({cpu_key(hardware): GIB}, 20.0, threads=2))
    assert speeds(hardware, history).tokens_per_s({CPU: GIB}, 32) is None
    assert speeds(hardware, history, threads=2).tokens_per_s({CPU: GIB}, 32) is not None


def test_two_equal_cards_share_what_was_measured_of_one() -> None:
    hardware = machine(gpu(0), gpu(1))
    history = History().with_run(run({device_key(hardware.devices[0]): 4 * GIB}, 100.0))
    one = speeds(hardware, history).tokens_per_s({"CUDA0": 4 * GIB}, 32)
    both = speeds(hardware, history).tokens_per_s({"CUDA0": 2 * GIB, "CUDA1": 2 * GIB}, 32)
    assert one == both  # layers run one after the other


def test_the_cache_of_a_chat_is_reckoned_with() -> None:
    assert typical_past(512) == 256
    assert typical_past(131_072) == 2048


def test_a_lower_rate_among_several_runs_lowers_the_range() -> None:
    hardware = machine(gpu())
    key = device_key(hardware.devices[0])
    one = History().with_run(run({key: GIB}, 100.0))
    two = one.with_run(run({key: GIB}, 50.0, model="other"))
    before, after = (speeds(hardware, history).tokens_per_s({"CUDA0": GIB}, 32) for history in (one, two))
    assert before is not None
    assert after is not None
    assert after[0] < before[0]
    assert after[1] == before[1]


def test_an_embedding_of_a_prediction_head_is_not_read() -> None:
    facts = architecture.read(model("llama-8b"))
    with_head = replace(facts, n_trunk=facts.n_layers - 1)
    placement = place(facts.n_layers, 0, [], ())
    (all_layers,) = Reads(model("llama-8b"), facts).by_device(placement).values()
    (fewer,) = Reads(model("llama-8b"), with_head).by_device(placement).values()
    assert fewer < all_layers
