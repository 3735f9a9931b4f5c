"""Prefix reuse through the step loop, on every kind of memory: nothing is computed twice, nothing comes out different.

The models (tests/tiny_models.py) have random f32 weights and run here with an f32 KV cache and without flash
attention, so rounding moves a logit by less than 1e-4, where one token more or less in the context moves it by
0.3 and more. So each token of a greedy answer must be within 1e-3 of the likeliest after a fresh prefill of all before it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from localllm.engine.kv import Cut, KVPool
from localllm.engine.loop import StepLoop
from localllm.engine.store import StateStore
from localllm.llama.context import Context, ContextParams
from localllm.llama.model import Model
from tests.tiny_models import KINDS, WINDOW

from .conftest import Bench, Recorder

CUTS = {"plain": Cut.ANY, "hybrid": Cut.NONE, "recurrent": Cut.NONE, "window": Cut.WINDOW}
EXACT: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
CLOSE = 1e-3
ENDLESS: dict[str, Any] = {"end_tokens": frozenset[int]()}


class TinyBench(Bench):
    """A step loop whose numerics are exact to about 1e-4 of a logit."""

    def __init__(self, model: Model, *, n_ctx: int = 2048, n_running: int = 8, n_resident: int = 8, **loop: Any) -> None:
        self.model = model
        self.context = Context(
            model, ContextParams(n_ctx=n_ctx, n_seq=n_running + n_resident, n_batch=128, n_ubatch=128, n_outputs=n_running, **EXACT)
        )
        self.store = StateStore("test", ram_bytes=loop.pop("ram_bytes", 1 << 26))
        self.pool = KVPool(self.context, self.store, n_swa=model.n_swa)
        settings = {"n_ctx_seq": n_ctx, "step_target_ms": 100.0, "max_queue": 1000, **loop}
        self.loop = StepLoop(self.context, self.pool, n_running=n_running, **settings)


class Reference:
    """A context of its own that computes every text from the start."""

    def __init__(self, model: Model) -> None:
        self.context = Context(model, ContextParams(n_ctx=2048, n_batch=128, n_ubatch=128, n_outputs=128, **EXACT))

    def logits(self, tokens: list[int], start: int) -> npt.NDArray[np.float32]:
        """A fresh prefill: the logits after each of tokens[start:], shape (rows, n_vocab)."""
        c = self.context
        c.clear()
        rows: list[npt.NDArray[np.float32]] = []
        for at in range(0, len(tokens), c.n_batch):
            part = tokens[at : at + c.n_batch]
            n = len(part)
            c.tokens[:n], c.positions[:n], c.sequences[:n] = part, range(at, at + n), 0
            c.outputs[:n] = [at + i >= start for i in range(n)]
            c.decode(n)
            rows += [c.logits(i).copy() for i in range(n) if c.outputs[i]]
        return np.stack(rows)

    def check(self, prompt: list[int], text: list[int]) -> None:
        """`text` must be the greedy text after `prompt`: each token the likeliest after all before it."""
        logits = self.logits(prompt + text[:-1], len(prompt) - 1)
        behind = logits.max(axis=1) - logits[np.arange(len(text)), text]
        assert behind.max() < CLOSE, f"token {int(behind.argmax())} of the answer is not the model's choice"


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(str(KINDS[kind](tmp_path_factory.mktemp("models") / f"{kind}.gguf")), n_gpu_layers=0)
    yield model
    model.close()


@pytest.fixture(scope="module")
def reference(model: Model) -> Iterator[Reference]:
    reference = Reference(model)
    yield reference
    reference.context.close()


@pytest.fixture
def make(model: Model) -> Iterator[Callable[..., TinyBench]]:
    made: list[TinyBench] = []

    def make(**settings: Any) -> TinyBench:
        made.append(TinyBench(model, **settings))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


def words(seed: int, n: int) -> list[int]:
    r = random.Random(seed)
    return [r.randrange(256) for _ in range(n)]


def test_the_kind_of_memory_is_found_by_trying(kind: str, model: Model, make: Callable[..., TinyBench]) -> None:
    assert make().pool.cut is CUTS[kind]
    assert model.n_swa == (WINDOW if kind == "window" else 0)
    assert (model.is_hybrid, model.is_recurrent) == (kind == "hybrid", kind == "recurrent")


def test_the_text_depends_on_the_whole_context(kind: str, reference: Reference) -> None:
    # else the tests below could not fail; the window model sees the beginning through its full layers
    prompt = words(1, 100)
    last = reference.logits(prompt, 99)
    for i in (0, 50, 98):
        changed = [*prompt[:i], (prompt[i] + 1) % 256, *prompt[i + 1 :]]
        assert np.abs(reference.logits(changed, 99) - last).max() > 100 * CLOSE
    with pytest.raises(AssertionError, match="not the model's choice"):
        reference.check(prompt, words(2, 5))


@pytest.mark.parametrize("n_prompt", [20, 100, 400])
def test_a_second_turn_computes_only_the_new_text(make: Callable[..., TinyBench], reference: Reference, n_prompt: int) -> None:
    bench = make()
    first = words(2, n_prompt)
    answer = bench.run(first, max_tokens=40, **ENDLESS).tokens[0]
    reference.check(first, answer)
    second = first + answer + words(3, 20)
    turn = bench.run(second, max_tokens=40, **ENDLESS)
    # the answer's last token was sampled and never decoded
    assert turn.timings.cache_n == len(first) + len(answer) - 1
    reference.check(second, turn.tokens[0])
    third = second + turn.tokens[0] + words(4, 3)
    turn = bench.run(third, max_tokens=40, **ENDLESS)
    assert turn.timings.cache_n == len(third) - 4
    reference.check(third, turn.tokens[0])


def test_the_same_prompt_again_computes_one_token(make: Callable[..., TinyBench], reference: Reference) -> None:
    bench = make()
    prompt = words(5, 150)
    for again in (False, True, True):
        job = bench.run(prompt, max_tokens=50, **ENDLESS)
        assert job.timings.cache_n == (149 if again else 0)
        reference.check(prompt, job.tokens[0])


def test_a_prompt_that_parts_at_a_mark_goes_on_from_there(make: Callable[..., TinyBench], reference: Reference) -> None:
    bench = make()
    system = words(6, 90)
    bench.run(system + words(7, 60), marks=(90,), max_tokens=40, **ENDLESS)
    for seed in (8, 9):
        prompt = system + words(seed, 60)
        job = bench.run(prompt, marks=(90,), max_tokens=30, **ENDLESS)
        assert job.timings.cache_n == 90
        reference.check(prompt, job.tokens[0])


def test_an_answer_that_comes_back_changed_goes_on_from_the_prompts_end(make: Callable[..., TinyBench], reference: Reference) -> None:
    # as a template does that leaves the reasoning of earlier turns out
    bench = make()
    first = words(10, 100)
    answer = bench.run(first, max_tokens=60, **ENDLESS).tokens[0]
    second = first + answer[40:] + words(11, 20)
    job = bench.run(second, marks=(100,), max_tokens=30, **ENDLESS)
    # the checkpoint is one token before the end of the prompt
    assert job.timings.cache_n in (99, 100)
    reference.check(second, job.tokens[0])


def test_a_prompt_that_parts_without_a_mark_starts_afresh_where_it_must(
    kind: str, make: Callable[..., TinyBench], reference: Reference
) -> None:
    bench = make()
    common = words(12, 90)
    bench.run(common + words(13, 60), max_tokens=40, **ENDLESS)
    prompt = common + words(14, 60)
    job = bench.run(prompt, max_tokens=30, **ENDLESS)
    if kind == "plain":
        assert job.timings.cache_n == 90
    elif kind != "window":
        assert job.timings.cache_n == 0
    reference.check(prompt, job.tokens[0])


def test_simultaneous_requests_compute_a_shared_prefix_once(make: Callable[..., TinyBench], reference: Reference) -> None:
    bench = make()
    shared = words(15, 300)
    prompts = [shared + words(20 + i, 10 + i) for i in range(8)]
    jobs = [bench.start(prompt, max_tokens=30, **ENDLESS) for prompt in prompts]
    computed = [job.wait().timings.prompt_n for job in jobs]
    assert sum(computed) == 300 + sum(10 + i for i in range(8))
    for prompt, job in zip(prompts, jobs, strict=True):
        reference.check(prompt, job.tokens[0])


def test_choices_share_their_prompt(make: Callable[..., TinyBench], reference: Reference) -> None:
    job = make().run(words(30, 120), n=4, max_tokens=30, **ENDLESS)
    for text in job.tokens.values():
        reference.check(words(30, 120), text)


def test_an_evicted_sequence_comes_back_from_the_store(make: Callable[..., TinyBench], reference: Reference) -> None:
    bench = make(n_ctx=512, n_running=2, n_resident=2)
    first = words(31, 150)
    answer = bench.run(first, marks=(100,), max_tokens=30, **ENDLESS).tokens[0]
    for seed in (32, 33):
        bench.run(words(seed, 250), max_tokens=100, **ENDLESS)
    assert bench.store.used_bytes > 0
    assert bench.loop.do(lambda: bench.pool.best(first, 150)).result().slot == -1
    second = first + answer + words(34, 10)
    job = bench.run(second, max_tokens=30, **ENDLESS)
    assert job.timings.cache_n == 179
    reference.check(second, job.tokens[0])
    for seed in (35, 36):
        bench.run(words(seed, 250), max_tokens=100, **ENDLESS)
    # an earlier point of a stored sequence is reached through the checkpoints stored with it
    job = bench.run([*first[:100], *words(37, 30)], max_tokens=30, **ENDLESS)
    assert job.timings.cache_n == 100
    reference.check([*first[:100], *words(37, 30)], job.tokens[0])


def test_a_saved_session_goes_on_in_another_process(make: Callable[..., TinyBench], reference: Reference) -> None:
    first = words(38, 150)
    turn = make().run(first, session="chat", max_tokens=30, **ENDLESS)
    (entry,) = turn.entries
    assert entry.tokens == first + turn.tokens[0][:-1]
    bench = make()
    bench.store.put(entry)
    second = first + turn.tokens[0] + words(39, 10)
    job = bench.run(second, max_tokens=30, **ENDLESS)
    assert job.timings.cache_n == len(entry.tokens)
    reference.check(second, job.tokens[0])
    # the prompt's own checkpoint is in the entry too
    other = make()
    other.store.put(entry)
    again = other.run(first, max_tokens=30, **ENDLESS)
    assert again.timings.cache_n == 149
    assert again.tokens == turn.tokens


def test_a_cancelled_prefill_is_not_wasted(make: Callable[..., TinyBench], reference: Reference) -> None:
    bench = make()
    prompt = words(40, 400)
    listener = Recorder()
    job = bench.job(prompt, listener, marks=(100, 200))

    def on_prefill(done: int) -> None:
        if done >= 200:
            bench.loop.cancel(job)

    listener.on_prefill = on_prefill
    bench.loop.submit(job)
    assert listener.wait().reasons == {0: "cancelled"}
    again = bench.run(prompt, max_tokens=30, **ENDLESS)
    assert again.timings.cache_n >= 200
    reference.check(prompt, again.tokens[0])


def test_context_shift_is_exact(make: Callable[..., TinyBench], reference: Reference) -> None:
    bench = make(n_ctx=512, n_ctx_seq=96)
    prompt = words(41, 70)
    text = bench.run(prompt, max_tokens=90, context_shift=True, n_keep=10, **ENDLESS).tokens[0]
    tokens, done = prompt, 0
    while done < 90:
        part = text[done : done + 96 - len(tokens)]
        reference.check(tokens, part)
        tokens, done = tokens + part, done + len(part)
        tokens = tokens[:10] + tokens[10 + (len(tokens) - 10) // 2 :]


@pytest.mark.parametrize("seed", range(3))
def test_under_pressure_every_text_is_the_models_own(make: Callable[..., TinyBench], reference: Reference, seed: int) -> None:
    r = random.Random(seed)
    bench = make(n_ctx=600, n_running=4, n_resident=3, ram_bytes=r.choice([0, 1 << 20, 1 << 26]), n_ctx_seq=400)
    parts = [words(50 + i, r.choice([10, 40, 80])) for i in range(5)]
    jobs: list[tuple[list[int], Any]] = []
    for _ in range(30):
        chosen = [r.choice(parts) for _ in range(r.randrange(1, 5))]
        prompt = [t for part in chosen for t in part]
        marks = tuple(sum(map(len, chosen[:i])) for i in range(1, len(chosen)))
        job = bench.start(prompt, marks=marks, n=r.choice([1, 1, 2]), max_tokens=r.choice([1, 12, 40, 200]), **ENDLESS)
        jobs.append((prompt, job))
        if r.random() < 0.3:
            jobs[r.randrange(len(jobs))][1].wait()
    for prompt, job in jobs:
        assert job.wait().error is None
        for text in job.tokens.values():
            reference.check(prompt, text)
    assert bench.loop.do(lambda: bench.pool.available).result() >= 0
