"""The words of a plan: every figure is the plan's own."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from localllm.gguf import Header
from localllm.hardware import Hardware
from localllm.plan import explain
from localllm.plan.choose import plan_load
from localllm.plan.loadplan import LoadPlan
from localllm.plan.spec import CPU, Resident, Wishes
from tests import sparse_models
from tests.plan.machines import GIB, MIB, gpu, header, machine, pair


@cache
def model(name: str) -> Header:
    return header(sparse_models.MODELS[name]())


def plan(name: str, hardware: Hardware, **wishes: Any) -> LoadPlan:
    return plan_load(model(name), hardware, Wishes(**wishes))


def said(found: LoadPlan, *words: str) -> str:
    """The one reason with all these words."""
    matching = [reason for reason in found.reasons if all(word in reason for word in words)]
    assert len(matching) == 1, (words, found.reasons)
    return matching[0]


@pytest.mark.parametrize(
    "n_bytes, text", [(0, "0 KiB"), (1536, "2 KiB"), (5 * MIB, "5 MiB"), (GIB, "1.0 GiB"), (int(22.66 * GIB), "22.7 GiB")]
)
def test_sizes(n_bytes: int, text: str) -> None:
    assert explain.size(n_bytes) == text


@pytest.mark.parametrize("n_ctx, text", [(8192, "8k"), (131_072, "128k"), (40_960, "40k"), (1000, "1,000"), (8200, "8,200")])
def test_contexts(n_ctx: int, text: str) -> None:
    assert explain.tokens(n_ctx) == text


def test_speeds() -> None:
    assert explain.speed(None) == ""
    assert explain.speed((32.0, 50.0)) == "about 40 tokens/s"
    assert explain.speed((2.0, 8.0)) == "about 4.0 tokens/s"


def test_the_first_reason_is_where_the_layers_are() -> None:
    found = plan("llama-8b", machine(gpu()))
    card = found.device("CUDA0")
    assert found.reasons[0] == (
        f"All 33 layers on CUDA0 (NVIDIA Test): {explain.size(card.planned_bytes)} of the {explain.size(card.room_bytes or 0)} "
        "that may be taken there."
    )
    assert "no single one holds them" in plan("llama-70b", pair(24 * GIB, 24 * GIB)).reasons[0]
    partly = plan("llama-8b", machine(gpu(total=4 * GIB)))
    assert partly.reasons[0].startswith(f"{partly.shape.n_gpu_layers} of 33 layers on the GPU")
    assert "all of them would take" in partly.reasons[0]
    assert "as you asked" in plan("llama-8b", machine(gpu()), n_gpu_layers=0).reasons[0]


def test_the_context_is_explained() -> None:
    assert "as you asked" in said(plan("llama-8b", machine(gpu()), n_ctx=4096), "Context of 4,096")
    assert "grown from 8,192" in said(plan("llama-8b", machine(gpu())), "Context of")
    assert "by default" in said(plan("llama-8b", machine(gpu(total=6 * GIB))), "Context of 8,192")
    assert "instead of 8,192" in said(plan("llama-8b", machine(gpu(total=4 * GIB))), "context of")


def test_everything_given_up_is_among_the_reasons() -> None:
    found = plan("llama-8b", machine(gpu(total=4 * GIB)))
    for sentence in found.given_up[:-1]:
        assert any(reason.lower().startswith(sentence.lower()) for reason in found.reasons)
    assert f"{33 - found.shape.n_gpu_layers} of 33 layers are on the CPU" == found.given_up[-1]
    cache_sizes = said(found, "KV cache is kept in q8_0")
    assert explain.size(sum(device.kv_bytes for device in found.devices)) in cache_sizes


def test_windows_are_worth_a_sentence() -> None:
    assert "less KV cache" in said(plan("gemma3-12b", machine(gpu()), n_ctx=32_768), "sliding window")
    assert not any("sliding" in reason for reason in plan("gemma3-12b", machine(gpu()), n_ctx=32_768, swa_full=True).reasons)


def test_memory_that_must_stay_and_memory_that_may_go_are_told_apart() -> None:
    found = plan("llama-8b", machine(ram=16 * GIB))
    ram = found.device(CPU)
    sentence = said(found, "In RAM", "must stay")
    assert explain.size(ram.anonymous_bytes) in sentence
    assert explain.size(ram.mapped_bytes) in sentence
    assert not any("must stay" in reason for reason in plan("llama-8b", machine(gpu())).reasons)


def test_what_is_kept_out_of_the_budget() -> None:
    found = plan("llama-8b", machine(gpu(display=True)), gpu_memory={"all": 6 * GIB}, others=(Resident("CUDA0", GIB, "other"),))
    sentence = said(found, "CUDA0 has 24.0 GiB free")
    for words in ("320 MiB for CUDA itself", "737 MiB for the screen", "1.0 GiB for models", "you allow 6.0 GiB"):
        assert words in sentence


def test_speed_is_told_with_what_it_is_made_of() -> None:
    found = plan("llama-8b", machine())
    assert found.decode_tps is not None
    sentence = said(found, "tokens/s")
    assert f"{found.decode_tps[0]:.1f} to {found.decode_tps[1]:.1f} tokens/s" in sentence
    assert "on the CPU" in sentence
    unknown = plan("llama-8b", machine(gpu()))
    assert any("after the first answer" in note for note in unknown.notes)


def test_alternatives_say_what_differs() -> None:
    found = plan("llama-8b", machine(gpu(total=8 * GIB)))
    assert [other.summary for other in found.alternatives] == ["32k context with q8_0 KV"]
    assert explain.flags(found.alternatives[0].wishes) == "-c 32768 --kv q8_0"
    assert explain.flags({"n_ctx": 4096, "type_k": "f16", "type_v": "q8_0", "n_gpu_layers": 3}) == "-c 4096 -ctk f16 -ctv q8_0 -ngl 3"
    on_cpu = plan("llama-8b", machine(ram=8 * GIB))
    assert all("tokens/s" in other.summary for other in on_cpu.alternatives)


def test_a_draft_of_another_vocabulary_is_warned_of() -> None:
    from dataclasses import replace

    target = replace(model("llama-8b"), vocab_hash="a")
    same, other = (replace(model("llama-1b"), vocab_hash=vocab_hash) for vocab_hash in "ab")
    assert not any("vocabulary" in w for w in plan_load(target, machine(gpu()), Wishes(draft=same)).warnings)
    assert any("vocabulary" in w for w in plan_load(target, machine(gpu()), Wishes(draft=other)).warnings)


def test_the_json_is_plain_and_complete() -> None:
    found = plan("qwen3-30b-a3b", machine(gpu(total=12 * GIB)), draft=model("qwen3-0.6b"))
    data = found.to_json()
    contract = "n_gpu_layers tensor_split n_ctx type_k type_v n_batch n_ubatch n_seq_max n_threads overrides draft devices decode_tps"
    assert set(contract.split()) | {"reasons", "warnings", "alternatives"} <= data.keys()
    per_device = "name kind total_bytes free_bytes weights_bytes kv_bytes compute_bytes draft_bytes reserve_bytes other_bytes"
    assert all(set(per_device.split()) <= device.keys() for device in data["devices"])
    assert [device["name"] for device in data["devices"]] == ["CUDA0", "CPU"]
    assert data["overrides"] == [list(pair) for pair in found.shape.overrides]
