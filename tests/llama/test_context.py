"""The context: what would abort the process is an exception, what fails leaves the cache as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from localllm.errors import DoesNotFit, EngineError
from localllm.llama import lib
from localllm.llama.context import PARTIAL, BatchError, Context, ContextParams, NoRoom
from localllm.llama.model import Model
from tests.tiny_models import KINDS, WINDOW

TOLERANCE = 2e-3
Make = Callable[..., Context]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    folder = tmp_path_factory.mktemp("models")
    models = {kind: Model(str(write(folder / f"{kind}.gguf")), n_gpu_layers=0) for kind, write in KINDS.items()}
    yield models
    for model in models.values():
        model.close()


@pytest.fixture
def make(models: dict[str, Model]) -> Iterator[Make]:
    made: list[Context] = []

    def make(kind: str = "plain", **params: Any) -> Context:
        settings = {"n_ctx": 256, "n_batch": 64, "n_ubatch": 64, "type_k": "f32", "type_v": "f32", "flash_attn": "off", **params}
        made.append(Context(models[kind], ContextParams(**settings)))
        return made[-1]

    yield make
    for context in made:
        context.close()


def fill(context: Context, tokens: list[int], start: int = 0, seq: int = 0) -> int:
    """Write one sequence's rows, the last with an output; returns their number."""
    n = len(tokens)
    context.tokens[:n], context.positions[:n], context.sequences[:n] = tokens, range(start, start + n), seq
    context.outputs[:n] = 0
    context.outputs[n - 1] = 1
    return n


def feed(context: Context, tokens: list[int], start: int = 0, seq: int = 0) -> npt.NDArray[np.float32]:
    """Decode in batches; a copy of the last logits."""
    n = 0
    for at in range(0, len(tokens), context.n_batch):
        n = fill(context, tokens[at : at + context.n_batch], start + at, seq)
        context.decode(n)
    return context.logits(n - 1).copy()


def text(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, n).tolist()


def close(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> bool:
    return float(np.abs(a - b).max()) < TOLERANCE


def test_one_output_row_too_many_is_an_error_and_the_context_lives_on(make: Make) -> None:
    context = make(n_outputs=2, n_seq=2)
    want = feed(context, text(3))
    context.clear()
    n = fill(context, text(3))
    context.outputs[:n] = 1
    with pytest.raises(BatchError, match="3 rows ask for logits, the context holds 2"):
        context.decode(n)
    assert context.span(0) == (-1, -1)
    assert close(feed(context, text(3)), want)


def test_every_row_may_ask_for_logits_where_the_context_was_made_for_it(make: Make) -> None:
    context = make(n_outputs=64)
    n = fill(context, text(64))
    context.outputs[:n] = 1
    context.decode(n)
    rows = [context.logits(i).copy() for i in range(n)]
    context.clear()
    assert close(feed(context, text(64)[:40]), rows[39])


@pytest.mark.parametrize("n", [-1, 0, 65])
def test_a_batch_of_no_or_too_many_rows_is_an_error(make: Make, n: int) -> None:
    with pytest.raises(BatchError, match=f"a batch of {n} rows"):
        make().decode(n)


@pytest.mark.parametrize("what, value", [("tokens", 100_000), ("tokens", -1), ("sequences", 2), ("sequences", -1), ("positions", 7)])
def test_a_row_that_llama_cpp_refuses_is_an_error_that_says_why(make: Make, what: str, value: int) -> None:
    context = make(n_seq=2)
    feed(context, text(4))
    n = fill(context, text(3, 1), start=4)
    getattr(context, what)[0] = value
    with pytest.raises(BatchError, match=r"refused the batch: \S+"):
        context.decode(n)
    assert context.span(0) == (0, 3)
    assert lib.take_errors() == ""


@pytest.mark.parametrize("kind", ["plain", "hybrid", "window"])
def test_a_full_cache_says_so_and_stays_usable(make: Make, kind: str) -> None:
    context = make(kind, n_seq=2)
    feed(context, text(200, 1), seq=1)
    feed(context, text(50))
    n = fill(context, text(10, 2), start=50)
    with pytest.raises(NoRoom):
        context.decode(n)
    assert context.span(0)[1] == 49
    assert context.remove(1)
    logits = feed(context, text(10, 2), start=50)
    context.clear()
    assert close(feed(context, text(50) + text(10, 2)), logits)


def test_no_room_leaves_no_words_for_the_next_error(make: Make) -> None:
    context = make("hybrid")
    feed(context, text(250))
    with pytest.raises(NoRoom):
        context.decode(fill(context, text(10), start=250))
    assert lib.take_errors() == ""


@pytest.mark.parametrize("row", [0, 1, 63, 1000])
def test_logits_that_nobody_asked_for_are_an_error(make: Make, row: int) -> None:
    context = make()
    context.decode(fill(context, text(3)))
    with pytest.raises(EngineError, match=f"row {row} has no logits"):
        context.logits(row)
    assert context.logits(2).shape == (context.n_vocab,)


def test_rows_of_several_sequences_do_not_see_each_other(make: Make) -> None:
    context = make(n_seq=3, n_outputs=3)
    alone = [feed(context, text(10, seed), seq=seed) for seed in range(3)]
    context.clear()
    # interleaved, in one batch
    for i in range(10):
        for seed in range(3):
            row = 3 * i + seed
            context.tokens[row], context.positions[row], context.sequences[row] = text(10, seed)[i], i, seed
            context.outputs[row] = i == 9
    context.decode(30)
    assert all(close(context.logits(27 + seed), alone[seed]) for seed in range(3))


@pytest.mark.parametrize("kind, can_cut", [("plain", True), ("hybrid", False), ("recurrent", False), ("window", True)])
def test_whether_a_suffix_can_be_dropped_is_found_by_trying(make: Make, kind: str, can_cut: bool) -> None:
    context = make(kind)
    assert context.can_cut is can_cut
    assert context.span(0) == (-1, -1)
    feed(context, text(20))
    assert context.remove(0, 19) is can_cut
    assert context.span(0)[1] == (18 if can_cut else 19)
    assert context.remove(0)
    assert context.span(0) == (-1, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_sequence_goes_its_own_way(make: Make, kind: str) -> None:
    context = make(kind, n_seq=2, n_ctx=512)
    want = [feed(context, text(100) + text(20, seed)) for seed in (1, 2) if context.remove(0)]
    context.clear()
    feed(context, text(100))
    context.share(0, 1)
    assert close(feed(context, text(20, 1), start=100, seq=0), want[0])
    assert close(feed(context, text(20, 2), start=100, seq=1), want[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_can_be_put_back_under_another_sequence(make: Make, kind: str) -> None:
    context = make(kind, n_seq=3)
    feed(context, text(100))
    state = context.state(0)
    want = feed(context, text(5, 1), start=100)
    assert context.restore(2, state)
    assert context.span(2)[1] == 99
    assert close(feed(context, text(5, 1), start=100, seq=2), want)
    other = make(kind)
    assert other.restore(0, state)
    assert close(feed(other, text(5, 1), start=100), want)


@pytest.mark.parametrize("kind", ["hybrid", "recurrent", "window"])
def test_a_partial_state_takes_a_sequence_back(make: Make, kind: str) -> None:
    context = make(kind, n_seq=2)
    feed(context, text(60))
    state = context.state(0, PARTIAL)
    want = feed(context, text(5, 1), start=60)
    feed(context, text(WINDOW + 40, 2), start=65)
    assert context.restore(0, state, PARTIAL)
    assert context.remove(0, 60)
    assert close(feed(context, text(5, 1), start=60), want)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_bytes_are_refused_and_leave_an_empty_sequence(make: Make, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    context = make(kind, n_seq=2)
    want = feed(context, text(60), seq=1)
    state = context.state(1)
    foreign = make("plain" if kind != "plain" else "window")
    feed(foreign, text(60))
    wrong = [b"", b"\0", b"x" * 100, b"\0" * len(state), state[:-1], state[:20], state[: len(state) // 2], foreign.state(0)]
    for bytes_ in wrong:
        feed(context, text(10))
        assert not context.restore(0, bytes_)
        assert context.span(0) == (-1, -1)
    assert lib.take_errors() == ""
    assert capfd.readouterr() == ("", "")
    # nobody else was harmed
    assert context.state(1) == state
    assert context.restore(0, state)
    assert close(feed(context, text(60)[-1:], start=60, seq=0), feed(context, text(60)[-1:], start=60, seq=1))
    assert want.shape == (context.n_vocab,)


def test_a_state_that_finds_no_room_is_refused(make: Make) -> None:
    context = make(n_seq=2)
    feed(context, text(150))
    state = context.state(0)
    assert not context.restore(1, state)
    assert context.span(1) == (-1, -1)
    assert context.span(0) == (0, 149)


def test_a_model_with_a_window_gets_one_micro_batch_per_batch(make: Make) -> None:
    assert make("window", n_batch=128, n_ubatch=64).n_batch == 64
    assert make("plain", n_batch=128, n_ubatch=64).n_batch == 128


def test_more_sequences_than_rows_is_an_error(make: Make) -> None:
    with pytest.raises(BatchError, match="below 65 sequences"):
        make(n_seq=65)


def test_settings_that_llama_cpp_refuses_are_an_error_that_says_why(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DoesNotFit, match="quantized V cache requires flash_attn"):
        make(type_k="q8_0", type_v="q8_0", flash_attn="off")
    assert capfd.readouterr() == ("", "")


def test_quantised_kv_decodes(demo_small: Path) -> None:
    model = Model(str(demo_small), n_gpu_layers=0)
    exact = Context(model, ContextParams(n_ctx=256))
    quantised = Context(model, ContextParams(n_ctx=256, type_k="q8_0", type_v="q8_0", flash_attn="on"))
    tokens = model.tokenize("What is the capital of France?")
    a, b = feed(exact, tokens), feed(quantised, tokens)
    assert np.corrcoef(a, b)[0, 1] > 0.99
    for thing in (exact, quantised, model):
        thing.close()


def test_closing_twice_is_harmless(make: Make) -> None:
    context = make()
    context.close()
    context.close()
