"""Compute buffers: within 1 % wherever no doubt is left, on the safe side where nothing was sampled, and exact where it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from localllm.plan.compute import ESTIMATED, FLAT, OTHER_LAYERS, ComputeModel, Sample
from localllm.plan.footprint import Footprint
from localllm.plan.peaks import tokens
from localllm.plan.spec import CPU, Shape
from localllm.plan.weights import experts_on_cpu
from tests import sparse_models
from tests.fake_gpu import MACHINES, RTX_24, FakeGpu
from tests.plan.reality import Asked, Measured, footprint, measure, write
from tests.plan.test_footprint import TABLE
from tests.sparse_models import Sparse

CONTEXTS = (1024, 2048, 4096, 8192, 12_288, 24_576, 32_768, 65_536, 131_072)
SMALL_BYTES = 64 << 10
WHOLE: dict[str, tuple[tuple[FakeGpu, ...], Asked]] = {
    "on a card": ((RTX_24,), {}),
    "in q8_0": ((RTX_24,), {"type_k": "q8_0", "type_v": "q8_0"}),
    "four sequences": ((RTX_24,), {"n_seq": 4}),
    "many residents": ((RTX_24,), {"n_seq": 8, "n_resident": 24}),
    "small batches": ((RTX_24,), {"n_ubatch": 128}),
    "without flash attention": ((RTX_24,), {"flash_attn": "off"}),
    "experts on the cpu": ((RTX_24,), {"overrides": experts_on_cpu(3)}),
    "on two cards": (MACHINES["24+24"], {"tensor_split": (1.0, 1.0)}),
    "on two cards without flash attention": (MACHINES["24+24"], {"tensor_split": (1.0, 1.0), "flash_attn": "off"}),
    "on the cpu": ((), {"n_gpu_layers": 0}),
    "on the cpu in q4_0": ((), {"n_gpu_layers": 0, "type_k": "q4_0", "type_v": "q4_0"}),
    "on the cpu without flash attention": ((), {"n_gpu_layers": 0, "flash_attn": "off"}),
}
PARTIAL: tuple[Asked, ...] = (
    {"n_gpu_layers": 9},
    {"n_gpu_layers": 1},
    {"n_gpu_layers": 0},
    {"n_gpu_layers": 9, "type_k": "q8_0", "type_v": "q8_0"},
)


def sampled(model: Footprint, measured: list[Measured], *contexts: int) -> ComputeModel:
    """One that knows the dry runs of these contexts."""
    return ComputeModel(model, [Sample(each.shape, each.compute()) for each in measured if each.shape.n_ctx in contexts])


def errors(model: ComputeModel, measured: list[Measured]) -> list[tuple[int, str, float, str]]:
    """(context, device, relative error, doubt) of every prediction."""
    return [
        (each.shape.n_ctx, name, (amount.on(name) - real) / real, amount.doubt)
        for each in measured
        for amount in [model.amount(each.shape)]
        for name, real in each.compute().items()
        if real > SMALL_BYTES
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("what", WHOLE)
def test_two_dry_runs_tell_all_contexts(name: str, what: str, tmp_path: Path) -> None:
    gpus, asked = WHOLE[what]
    model, measured = measure(write(TABLE[name](), tmp_path), [{"n_ctx": n_ctx, **asked} for n_ctx in CONTEXTS], gpus)
    for contexts in ((1024, 131_072), (4096, 65_536), (8192, 32_768)):
        found = errors(sampled(model, measured, *contexts), measured)
        assert [each for each in found if not each[3] and abs(each[2]) > 0.01] == []
    between = errors(sampled(model, measured, 1024, 131_072), measured)
    # latent attention takes detours that no line describes; experts' copies and the mask hide each other
    if name != "deepseek2" and "experts" not in what:
        assert [each for each in between if each[3]] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_estimates_are_enough_and_not_much_more(name: str, tmp_path: Path) -> None:
    path = write(TABLE[name](), tmp_path)
    machines: dict[tuple[FakeGpu, ...], list[Asked]] = {}
    for gpus, asked in WHOLE.values():
        machines.setdefault(gpus, []).append(asked)
    machines[RTX_24,] += PARTIAL
    for gpus, every in machines.items():
        model, measured = measure(path, [{"n_ctx": n_ctx, **asked} for asked in every for n_ctx in (1024, 8192, 131_072)], gpus)
        compute = ComputeModel(model)
        for each in measured:
            amount = compute.amount(each.shape)
            assert amount.doubt == ESTIMATED
            for device, real in each.compute().items():
                assert amount.on(device) >= real, (each.asked, device)
                whole = each.shape.n_gpu_layers > model.architecture.n_layers and not each.shape.overrides
                # copies of what lies on the CPU are hard to foresee; host memory is plenty beside a card
                if device != CPU or not gpus:
                    assert amount.on(device) <= real * (2 if whole or not gpus else 3) + (16 << 20), (each.asked, device)


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_with_layers_on_the_cpu_only_a_dry_run_is_believed(name: str, tmp_path: Path) -> None:
    model, measured = measure(write(TABLE[name](), tmp_path), [{"n_ctx": n, "n_gpu_layers": 9} for n in (4096, 8192, 16_384)], [RTX_24])
    compute = sampled(model, measured, 4096, 16_384)
    assert [compute.amount(each.shape).exact for each in measured] == [True, False, True]
    guess, real = compute.amount(measured[1].shape), measured[1].compute()
    assert guess.on("CUDA0") >= real["CUDA0"] * 0.9
    assert abs(guess.on(CPU) - real[CPU]) <= real[CPU] * 0.01


def llama(folder: Path) -> Footprint:
    return footprint(write(sparse_models.llama_8b(), folder), [RTX_24])


def shape(model: Footprint, n_ctx: int = 8192, **more: object) -> Shape:
    return model.architecture.shape(n_ctx, **more)


def test_a_sample_is_the_answer_for_its_shape(tmp_path: Path) -> None:
    model = llama(tmp_path)
    known = shape(model, n_seq=3)
    compute = ComputeModel(model, [Sample(known, {"CUDA0": 123, CPU: 45})])
    assert compute.amount(known).by_device == {"CUDA0": 123, CPU: 45}
    assert compute.amount(known).exact
    assert compute.amount(replace(known, n_threads=7, load_mode="none")).exact, "neither changes the graph"
    assert compute.amount(replace(known, n_outputs=9)).doubt == ESTIMATED


def test_samples_of_other_layers_are_better_than_none(tmp_path: Path) -> None:
    model = llama(tmp_path)
    compute = ComputeModel(model).with_samples(Sample(shape(model, n_gpu_layers=9), {"CUDA0": 200 << 20, CPU: 30 << 20}))
    amount = compute.amount(shape(model, n_gpu_layers=15))
    assert OTHER_LAYERS in amount.doubt
    assert 200 << 20 <= amount.on("CUDA0") <= 220 << 20
    assert compute.amount(shape(model)).doubt == ESTIMATED, "a model that lies on the card as a whole is another thing"


def test_a_device_that_had_nothing_to_do_is_estimated(tmp_path: Path) -> None:
    model = footprint(write(sparse_models.llama_8b(), tmp_path), MACHINES["24+24"])
    first, both = ((1.0, 0.0), (1.0, 1.0))
    compute = ComputeModel(model, [Sample(shape(model, tensor_split=first), {"CUDA0": 100 << 20, CPU: 20 << 20})])
    amount = compute.amount(shape(model, tensor_split=both))
    assert amount.on("CUDA1") == compute.estimate(shape(model, tensor_split=both)).on("CUDA1") > 0


def test_many_rows_of_logits_are_a_floor(tmp_path: Path) -> None:
    path = write(sparse_models.gemma3_1b(), tmp_path)
    model, measured = measure(path, [{"n_ctx": n, "n_seq": 8, "n_draft": 8} for n in (2048, 16_384, 131_072)], [RTX_24])
    compute = sampled(model, measured, 2048, 131_072)
    guess = compute.amount(measured[1].shape)
    assert FLAT in guess.doubt
    assert guess.on("CUDA0") >= measured[1].compute()["CUDA0"] >= 4 * 262_144 * 72


def test_what_is_worth_a_dry_run(tmp_path: Path) -> None:
    model = llama(tmp_path)
    compute = ComputeModel(model)
    worth = compute.worth_sampling(shape(model), 131_072)
    assert [each.n_ctx for each in worth] == [1024, 131_072]
    assert {replace(each, n_ctx=0) for each in worth} == {replace(shape(model), n_ctx=0)}
    assert [each.n_ctx for each in compute.worth_sampling(shape(model), 512)] == [512]


@pytest.mark.parametrize("make", [sparse_models.llama_8b, sparse_models.qwen3_30b_a3b, sparse_models.gemma3_12b, sparse_models.qwen35_08b])
def test_estimates_grow_with_context_batch_and_sequences(make: Callable[[], Sparse], tmp_path: Path) -> None:
    model = footprint(write(make(), tmp_path), [RTX_24])
    compute = ComputeModel(model)

    def sizes(shapes: list[Shape]) -> list[int]:
        return [compute.estimate(each).total_bytes for each in shapes]

    by_context = sizes([shape(model, n) for n in range(1024, 200_000, 9_984)])
    by_batch = sizes([shape(model, n_ubatch=n) for n in (32, 64, 128, 256, 512)])
    by_sequence = sizes([shape(model, n_seq=n) for n in (1, 2, 4, 8, 16)])
    for grown in (by_context, by_batch, by_sequence):
        assert grown == sorted(grown)


def test_graphs_have_whole_rows_for_every_sequence(tmp_path: Path) -> None:
    model = llama(tmp_path)
    assert tokens(shape(model)) == 512
    assert tokens(shape(model, n_seq=12)) == 516
    assert tokens(shape(model, 256)) == 256
