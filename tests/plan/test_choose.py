"""What is given up, in which order, and what is said when nothing helps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from localllm.engine.config import EngineConfig
from localllm.errors import DoesNotFit, UsageError
from localllm.gguf import Header
from localllm.hardware import Hardware
from localllm.plan.budget import DISPLAY_BYTES, OVERHEAD_BYTES, PROCESS_BYTES, SYSTEM_BYTES
from localllm.plan.choose import plan_load
from localllm.plan.compute import ComputeModel
from localllm.plan.history import History, Residual, Run
from localllm.plan.ladder import FLOOR_CELLS, larger_contexts
from localllm.plan.loadplan import LoadPlan
from localllm.plan.question import OtherQuant
from localllm.plan.spec import CPU, Resident, Wishes
from localllm.plan.speed import device_key
from tests import sparse_models
from tests.plan.machines import GIB, MIB, gpu, header, igpu, machine, metal, pair


@cache
def model(name: str) -> Header:
    return header(sparse_models.MODELS[name]())


def plan(name: str, hardware: Hardware, **wishes: Any) -> LoadPlan:
    return plan_load(model(name), hardware, Wishes(**wishes), others=False)


def rungs(found: LoadPlan, most_layers: int) -> list[str]:
    """What a plan gave up, heaviest last."""
    shape = found.shape
    return [
        name
        for name, gone in (
            ("micro-batch", shape.n_ubatch < 512),
            ("experts", bool(shape.overrides)),
            ("context", shape.n_ctx < 8192),
            ("kv", shape.type_k == "q8_0"),
            ("layers", shape.n_gpu_layers < most_layers),
        )
        if gone
    ]


def appearance(name: str, most_layers: int) -> list[str]:
    """In which order sacrifices appear while the card shrinks."""
    seen: list[str] = []
    for size in range(20 * GIB, GIB, -128 * MIB):
        seen += [rung for rung in rungs(plan(name, machine(gpu(total=size))), most_layers) if rung not in seen]
    return seen


def test_a_card_with_room_holds_everything_and_nothing_is_given_up() -> None:
    found = plan("llama-8b", machine(gpu()))
    assert (found.shape.n_gpu_layers, found.shape.split_mode, found.shape.main_gpu) == (33, "none", 0)
    assert found.given_up == ()
    assert found.device("CUDA0").n_layers == 33
    assert "All 33 layers on CUDA0" in found.reasons[0]


@pytest.mark.slow
def test_a_dense_model_on_a_shrinking_card() -> None:
    assert appearance("llama-8b", 33) == ["micro-batch", "context", "kv", "layers"]


@pytest.mark.slow
def test_a_mixture_of_experts_on_a_shrinking_card() -> None:
    assert appearance("qwen3-30b-a3b", 49)[:2] == ["micro-batch", "experts"]


def test_no_layer_leaves_the_card_that_lighter_sacrifices_could_keep() -> None:
    for size in range(2 * GIB, 5 * GIB, 256 * MIB):
        hardware = machine(gpu(total=size))
        found = plan("llama-8b", hardware)
        if found.shape.n_gpu_layers < 33:
            smallest = {"n_ctx": FLOOR_CELLS, "type_k": "q8_0", "type_v": "q8_0", "n_ubatch": 128, "n_seq": 1, "n_resident": 0}
            with pytest.raises(DoesNotFit):
                plan("llama-8b", hardware, **smallest, n_gpu_layers=found.shape.n_gpu_layers + 1)


def test_a_sacrifice_that_keeps_no_layer_is_not_made() -> None:
    for size in range(2 * GIB, 5 * GIB, 256 * MIB):
        hardware = machine(gpu(total=size))
        found = plan("llama-8b", hardware)
        if found.shape.type_k == "q8_0":
            smaller = {"n_ctx": FLOOR_CELLS, "type_k": "f16", "type_v": "f16", "n_ubatch": 128, "n_seq": 1, "n_resident": 0}
            with pytest.raises(DoesNotFit):
                plan("llama-8b", hardware, **smaller, n_gpu_layers=found.shape.n_gpu_layers)


def test_the_experts_of_the_first_layers_go_first() -> None:
    found = plan("qwen3-30b-a3b", machine(gpu(total=12 * GIB)))
    assert found.shape.n_gpu_layers == 49
    assert len(found.shape.overrides) == 1
    pattern, buffer = found.shape.overrides[0]
    assert buffer == CPU
    assert pattern.startswith(r"blk\.(0|1|2|")
    assert "experts of the first" in found.given_up[0]
    assert found.shape.n_ctx == 8192


def test_the_users_overrides_come_before_the_planners() -> None:
    mine = (r"blk\.47\.ffn_down_exps", CPU)
    found = plan("qwen3-30b-a3b", machine(gpu(total=12 * GIB)), overrides=(mine,))
    assert found.shape.overrides[0] == mine
    assert len(found.shape.overrides) == 2


def test_a_second_card_is_used_before_anything_is_given_up() -> None:
    found = plan("llama-70b", pair(24 * GIB, 24 * GIB))
    assert (found.shape.split_mode, sum(found.shape.tensor_split)) == ("layer", 81)
    assert found.given_up == ()
    assert abs(found.shape.tensor_split[0] - found.shape.tensor_split[1]) <= 2  # evenly, as both have the same room


def test_one_card_is_enough_where_it_is() -> None:
    found = plan("llama-8b", pair(12 * GIB, 24 * GIB))
    assert (found.shape.split_mode, found.shape.main_gpu) == ("none", 1)
    assert found.device("CUDA0").planned_bytes == 0


def test_unequal_cards_are_filled_as_far_as_each_goes() -> None:
    found = plan("llama-70b", pair(24 * GIB, 12 * GIB))
    first, second = found.device("CUDA0"), found.device("CUDA1")
    assert first.n_layers > 1.5 * second.n_layers > 0
    assert found.shape.n_gpu_layers == first.n_layers + second.n_layers < 81


def test_the_draft_model_goes_before_layers_do() -> None:
    draft = model("llama-1b")
    roomy = plan("llama-8b", machine(gpu(total=8 * GIB)), draft=draft)
    assert roomy.draft is not None
    assert roomy.draft.devices == ("CUDA0",)
    assert roomy.device("CUDA0").draft_bytes > GIB // 2
    tight = plan("llama-8b", machine(gpu(total=5400 * MIB)), draft=draft)
    assert tight.draft is None
    assert tight.shape.n_gpu_layers == 33
    assert "the draft model stays out" in tight.given_up


def test_a_stated_context_is_a_promise() -> None:
    for n_ctx in (8192, 32_768, 65_536):
        found = plan("llama-8b", machine(gpu(total=6 * GIB)), n_ctx=n_ctx)
        assert found.shape.n_ctx == n_ctx
    assert found.shape.n_gpu_layers < 33


def test_without_a_card_everything_is_in_ram() -> None:
    found = plan("llama-8b", machine(ram=16 * GIB))
    ram = found.device(CPU)
    assert (found.shape.n_gpu_layers, ram.n_layers) == (0, 33)
    assert 0 < ram.mapped_bytes < ram.weights_bytes
    assert ram.anonymous_bytes + ram.mapped_bytes == ram.planned_bytes
    assert "no graphics card" in found.reasons[0]
    assert found.decode_tps is not None


@pytest.mark.parametrize("total, free", [(None, None), (8 * GIB, None)])
def test_a_card_of_unknown_memory_is_left_alone(total: int | None, free: int | None) -> None:
    unknown = machine(gpu(total=total, free=free))
    found = plan("llama-1b", unknown)
    assert (found.shape.n_gpu_layers, found.shape.split_mode, found.shape.main_gpu) == (0, "none", -1)
    assert any("CUDA0" in warning and "not known" in warning for warning in found.warnings)
    # … unless the user says how much there is, or insists.
    assert plan("llama-1b", unknown, gpu_memory={"CUDA0": 4 * GIB}).shape.n_gpu_layers == 17
    insisted = plan("llama-1b", unknown, n_gpu_layers=-1)
    assert insisted.shape.n_gpu_layers == 17
    assert any("not checked" in warning for warning in insisted.warnings)


def test_unknown_ram_is_not_checked_and_said_so() -> None:
    found = plan("llama-8b", machine(ram=None, available=None))
    assert any("RAM" in warning for warning in found.warnings)
    assert found.shape.n_ctx == 8192  # it does not grow into the unknown


def test_a_card_that_holds_nothing_takes_no_part() -> None:
    found = plan("llama-8b", machine(gpu(total=340 * MIB)))
    assert (found.shape.n_gpu_layers, found.shape.main_gpu) == (0, -1)
    assert "not one layer fits on CUDA0" in found.reasons[0]


def test_memory_that_is_ram_is_counted_once() -> None:
    # The card alone would hold the model, and so would the RAM; both together are one memory.
    for hardware in (machine(metal(12 * GIB, 12 * GIB), ram=16 * GIB), machine(igpu(12 * GIB, 12 * GIB), ram=16 * GIB)):
        found = plan("llama-8b", hardware, n_ctx=32_768)
        assert sum(device.planned_bytes for device in found.devices) <= 16 * GIB - SYSTEM_BYTES - PROCESS_BYTES
    with pytest.raises(DoesNotFit) as refusal:
        plan("llama-8b", machine(metal(12 * GIB, 12 * GIB), ram=16 * GIB), n_ctx=131_072, type_k="f16", type_v="f16")
    assert "RAM" in refusal.value.details["missing_bytes"]


def test_the_carve_out_of_integrated_graphics_is_room_beside_the_ram() -> None:
    alone = machine(igpu(4 * GIB, 4 * GIB), ram=4 * GIB)
    beside = machine(igpu(8 * GIB, 6 * GIB), ram=4 * GIB)
    with pytest.raises(DoesNotFit):
        plan("llama-8b", alone, n_ctx=4096)
    assert plan("llama-8b", beside, n_ctx=4096).shape.n_gpu_layers > 0


def test_a_limit_is_kept() -> None:
    for wishes in ({"gpu_memory": {"all": 3 * GIB}}, {"gpu_memory": {"0": 3 * GIB}}, {"gpu_memory": {"all": GIB, "CUDA0": 3 * GIB}}):
        found = plan("llama-8b", machine(gpu()), **wishes)
        assert 2 * GIB < found.device("CUDA0").planned_bytes <= 3 * GIB
    with pytest.raises(UsageError, match="no device CUDA7"):
        plan("llama-8b", machine(gpu()), gpu_memory={"CUDA7": GIB})


def test_what_stays_free() -> None:
    card = plan("llama-8b", machine(gpu(display=True))).device("CUDA0")
    assert card.overhead_bytes == OVERHEAD_BYTES["CUDA"]
    assert card.reserve_bytes == int(24 * GIB * 0.03)
    assert plan("llama-8b", machine(gpu(total=12 * GIB, display=True))).device("CUDA0").reserve_bytes == DISPLAY_BYTES
    assert plan("llama-8b", machine(gpu()), reserve_bytes=2 * GIB).device("CUDA0").reserve_bytes == 2 * GIB
    others = (Resident("CUDA0", 5 * GIB, "qwen3:8b"),)
    card = plan("llama-8b", machine(gpu(free=20 * GIB)), others=others).device("CUDA0")
    assert card.other_bytes == 9 * GIB
    assert card.room_bytes == 15 * GIB - OVERHEAD_BYTES["CUDA"]


def test_what_a_load_took_beside_its_buffers_counts_the_next_time() -> None:
    hardware = machine(gpu())
    history = History().with_residual(Residual(device_key(hardware.devices[0]), "b1", GIB))
    found = plan_load(model("llama-8b"), hardware, history=history, others=False)
    assert found.device("CUDA0").overhead_bytes == GIB
    other_build = replace(history, build="b2")
    found = plan_load(model("llama-8b"), hardware, history=other_build, others=False)
    assert found.device("CUDA0").overhead_bytes == OVERHEAD_BYTES["CUDA"]


def test_an_automatic_context_grows_into_memory_that_would_lie_idle() -> None:
    contexts = [plan("llama-8b", machine(gpu(total=size * GIB))).shape.n_ctx for size in (6, 8, 12, 24, 80)]
    assert contexts == sorted(contexts)
    assert contexts[0] == 8192
    assert contexts[-1] == 131_072
    assert plan("llama-8b", machine(gpu(total=80 * GIB)), n_ctx=8192).shape.n_ctx == 8192
    assert plan("llama-8b", machine(gpu(total=4 * GIB))).shape.n_ctx >= FLOOR_CELLS


def test_a_context_grows_less_into_ram() -> None:
    assert plan("llama-8b", machine(ram=512 * GIB)).shape.n_ctx == 32_768
    assert plan("llama-1b", machine(ram=16 * GIB)).shape.n_ctx == 32_768
    assert plan("llama-8b", machine(ram=16 * GIB)).shape.n_ctx == 16_384
    assert plan("llama-8b", machine(ram=512 * GIB), n_ctx=131_072).shape.n_ctx == 131_072


def test_a_context_grows_in_doublings_up_to_the_trained_length() -> None:
    class Trained:
        n_ctx_train = 40_960

    assert larger_contexts(Trained, 8192) == [16_384, 32_768, 40_960]  # type: ignore[arg-type]
    assert larger_contexts(Trained, 40_960) == []  # type: ignore[arg-type]


def test_few_finished_chats_are_kept_where_each_has_a_window_or_a_state() -> None:
    roomy = machine(gpu(total=80 * GIB))
    assert plan("llama-8b", roomy).n_resident == 24
    assert plan("gemma3-12b", roomy).n_resident == 4
    assert plan("qwen35-0.8b", roomy).n_resident == 4
    assert plan("gemma3-12b", roomy, n_resident=24).n_resident == 24


def test_a_short_trained_length_is_never_exceeded_unasked() -> None:
    short = header(sparse_models.llama(16, 2048, 32, 8, 64, 8192, n_ctx=2048))
    found = plan_load(short, machine(gpu()), Wishes(n_seq=1), others=False)
    assert found.shape.n_ctx == 2048
    asked = plan_load(short, machine(gpu()), Wishes(n_seq=1, n_ctx=8192), others=False)
    assert any("trained for 2,048" in warning for warning in asked.warnings)


def test_strict_refuses_instead_of_giving_up() -> None:
    assert plan("llama-8b", machine(gpu()), strict=True).given_up == ()
    with pytest.raises(DoesNotFit) as refusal:
        plan("llama-8b", machine(gpu(total=4 * GIB)), strict=True)
    assert "CUDA0" in refusal.value.message
    assert "--strict" in refusal.value.hint


def test_a_refusal_says_which_wish_is_too_large_and_what_would_fit() -> None:
    with pytest.raises(DoesNotFit) as refusal:
        plan("llama-8b", machine(ram=8 * GIB), n_ctx=131_072)
    assert refusal.value.details["wishes"] == ["n_ctx"]
    n_ctx = int(refusal.value.hint.removeprefix("-c ").split()[0])
    assert plan("llama-8b", machine(ram=8 * GIB), n_ctx=n_ctx).shape.n_ctx == n_ctx
    with pytest.raises(DoesNotFit):
        plan("llama-8b", machine(ram=8 * GIB), n_ctx=n_ctx + 256)


def test_a_refusal_of_too_many_layers() -> None:
    small = machine(gpu(total=4 * GIB))
    with pytest.raises(DoesNotFit) as refusal:
        plan("llama-8b", small, n_gpu_layers=-1)
    assert refusal.value.details["wishes"] == ["n_gpu_layers"]
    assert refusal.value.details["missing_bytes"].keys() == {"CUDA0"}
    n = int(refusal.value.hint.removeprefix("-ngl ").split()[0])
    assert plan("llama-8b", small, n_gpu_layers=n).shape.n_gpu_layers == n
    with pytest.raises(DoesNotFit):
        plan("llama-8b", small, n_gpu_layers=n + 1)


def test_a_refusal_offers_the_largest_file_that_fits() -> None:
    quants = (OtherQuant("Q3_K_M", 4 * GIB), OtherQuant("IQ2_M", 2900 * MIB), OtherQuant("IQ1_S", 2 * GIB), OtherQuant("Q8_0", 9 * GIB))
    with pytest.raises(DoesNotFit) as refusal:
        plan_load(model("llama-8b"), machine(ram=4608 * MIB), quants=quants)
    assert refusal.value.details["would_fit"] == ["IQ2_M", "IQ1_S"]
    assert "IQ2_M (2.8 GiB) would fit" in refusal.value.hint
    assert refusal.value.exit_code == 4


def test_a_smaller_file_is_offered_where_layers_stay_behind() -> None:
    quants = (OtherQuant("Q2_K", 3 * GIB, "someone/llama:Q2_K"), OtherQuant("IQ1_S", 2 * GIB))
    found = plan_load(model("llama-8b"), machine(gpu(total=4 * GIB)), quants=quants)
    assert found.shape.n_gpu_layers < 33
    first = found.alternatives[0]
    assert (first.quant, first.size_bytes, first.reference) == ("Q2_K", 3 * GIB, "someone/llama:Q2_K")
    assert "all layers on the GPU" in first.summary


def test_wishes_that_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="flash attention"):
        plan("llama-8b", machine(gpu()), type_v="q8_0", flash_attn="off")
    with pytest.raises(UsageError, match="buffer CUDA5"):
        plan("llama-8b", machine(gpu()), overrides=((r"blk\.1\.", "CUDA5"),))
    with pytest.raises(UsageError, match="regular expression"):
        plan("llama-8b", machine(gpu()), overrides=((r"blk(", CPU),))


def test_a_cache_is_not_quantised_without_flash_attention_nor_where_heads_do_not_fit_its_blocks() -> None:
    found = plan("llama-8b", machine(gpu(total=4 * GIB)), flash_attn="off")
    assert found.shape.type_v == "f16"
    odd = header(sparse_models.llama(32, 3200, 32, 8, 100, 8640))
    found = plan_load(odd, machine(gpu(total=2 * GIB)), others=False)
    assert found.shape.n_gpu_layers < 33
    assert found.shape.type_k == "f16"


def test_keys_that_are_values_get_one_type() -> None:
    found = plan("deepseek2-lite", machine(gpu(total=12 * GIB)), type_k="q8_0")
    assert (found.shape.type_k, found.shape.type_v) == ("q8_0", "q8_0")


def test_a_fixed_split_is_taken_as_it_is() -> None:
    found = plan("llama-8b", pair(24 * GIB, 24 * GIB), tensor_split=(3.0, 1.0))
    assert found.shape.tensor_split == (3.0, 1.0)
    assert found.device("CUDA0").n_layers > 2 * found.device("CUDA1").n_layers
    assert plan("llama-8b", pair(24 * GIB, 24 * GIB), tensor_split=(1.0,)).shape.tensor_split == (1.0, 0.0)
    assert plan("llama-8b", pair(24 * GIB, 12 * GIB), main_gpu=1).shape.main_gpu == 1


def test_a_mapped_file_may_exceed_the_ram_when_the_user_says_so() -> None:
    small = machine(ram=4 * GIB)
    with pytest.raises(DoesNotFit):
        plan("llama-8b", small, n_ctx=512, n_seq=1, n_resident=0)
    unrepacked = replace(small, cpu_features=("sse4_2",))
    found = plan_load(model("llama-8b"), unrepacked, Wishes(load_mode="mmap", n_ctx=512, n_seq=1, n_resident=0), others=False)
    assert any("read from disk again" in warning for warning in found.warnings)


def test_stepping_down_after_running_out_of_memory() -> None:
    found: LoadPlan | None = plan("llama-8b", machine(gpu(total=6 * GIB)))
    seen: list[str] = []
    while found is not None:
        seen += [each for each in rungs(found, 33) if each not in seen]
        lower = found.step_down("cudaMalloc failed: out of memory")
        if lower is not None:
            spared = "CUDA0" if found.device("CUDA0").planned_bytes else CPU
            assert lower.device(spared).planned_bytes < found.device(spared).planned_bytes
            assert lower.reasons[0].startswith("The load before ran out of memory")
        found = lower
    assert seen == ["micro-batch", "context", "kv", "layers"]


def test_a_step_down_spares_the_card_that_was_named() -> None:
    found = plan("llama-70b", pair(24 * GIB, 24 * GIB))
    lower = found.step_down("CUDA1: out of memory")
    assert lower is not None
    assert lower.device("CUDA1").planned_bytes < found.device("CUDA1").planned_bytes
    assert lower.shape.n_gpu_layers == 81  # the other card has room for what moves


def test_a_plan_is_what_the_engine_is_told() -> None:
    found = plan("qwen3-30b-a3b", machine(gpu(total=12 * GIB)), n_seq=2, n_threads=5)
    config = found.engine_config("/models/x.gguf", state_dir="/tmp/kv")
    assert isinstance(config, EngineConfig)
    assert (config.model_path, config.state_dir, config.n_seq, config.n_threads) == ("/models/x.gguf", "/tmp/kv", 2, 5)
    for name in ("n_ctx", "n_gpu_layers", "split_mode", "main_gpu", "overrides", "type_k", "type_v", "n_ubatch", "tensor_split"):
        assert getattr(config, name) == getattr(found.shape, name)


def test_what_was_measured_makes_the_next_plan_better() -> None:
    hardware = machine(gpu())
    first = plan("llama-8b", hardware)
    assert first.decode_tps is None
    card = device_key(hardware.devices[0])
    history = History().with_run(Run("sha", "b1", first.shape.n_threads, "k", {card: first.device("CUDA0").read_bytes}, 80.0))
    history = history.with_residual(Residual(card, "b1", 700 * MIB))
    second = plan_load(model("llama-8b"), hardware, history=history, model="sha", others=False)
    assert second.device("CUDA0").overhead_bytes == 700 * MIB
    assert second.decode_tps is not None
    assert second.decode_tps[0] < 80 < second.decode_tps[1]
    other = plan_load(model("qwen3-8b"), hardware, history=history, others=False)
    assert other.decode_tps is not None


def test_fewer_sequences_where_a_batch_is_too_small_for_them() -> None:
    found = plan("gemma3-12b", machine(gpu()), n_ubatch=6)
    assert found.shape.n_ubatch == 6
    assert found.n_seq + found.n_resident <= 6
    with pytest.raises(UsageError, match="sequences"):
        plan("gemma3-12b", machine(gpu()), n_ubatch=6, n_seq=8)


def test_planning_is_a_few_dozen_looks_at_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    original = ComputeModel.amount

    def counted(self: ComputeModel, shape: Any) -> Any:
        nonlocal looks
        looks += 1
        return original(self, shape)

    monkeypatch.setattr(ComputeModel, "amount", counted)
    for name, hardware in (
        ("llama-8b", machine(gpu(total=4 * GIB))),
        ("qwen3-30b-a3b", machine(gpu(total=6 * GIB))),
        ("llama-70b", pair(24 * GIB, 12 * GIB)),
    ):
        looks = 0
        plan_load(model(name), hardware)
        assert looks < 250
