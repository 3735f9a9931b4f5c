"""The engine under what nobody should do to it: odd moments, odd numbers, many threads; each request ends exactly once."""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from localllm.engine.config import EngineConfig
from localllm.engine.engine import Engine
from localllm.engine.output import Answer, ChoiceText, Output
from localllm.engine.sequence import PROMOTE_AFTER_S, Job
from localllm.engine.store import StateStore
from localllm.errors import EngineError, LocalLLMError
from localllm.llama.context import NoRoom
from localllm.types import Delta, Done, Event, Failed, Finish, Message, Prefill, Request, Sampling

from .conftest import WAIT_S, Bench, Recorder

ENDLESS: dict[str, Any] = {"end_tokens": frozenset[int]()}
CAPITAL = (Message("user", "What is the capital of France?"),)
FOREVER = Request(messages=CAPITAL, sampling=Sampling(temperature=0, ignore_eos=True), context_shift=True)
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def noise(seed: int, n: int) -> list[int]:
    """Tokens that no other prompt begins with."""
    r = random.Random(seed)
    return [r.randrange(4, 2000) for _ in range(n)]


class Sink:
    """Collects the events of one request; nothing may come after its end."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.events: list[Event] = []
        self.cancelled = False
        self._ended = threading.Event()

    def __call__(self, events: list[Event]) -> None:
        self.events += events
        if any(isinstance(event, (Done, Failed)) for event in events):
            self._ended.set()

    def wait(self) -> list[Event]:
        assert self._ended.wait(WAIT_S), "the request did not end"
        return self.events

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, Delta))

    def check(self) -> None:
        """One end, one Finish a choice and nothing after either; sane figures; no stop string in the text."""
        *before, last = self.events
        request = self.request
        assert not any(isinstance(e, (Done, Failed)) for e in before)
        assert isinstance(last, (Done, Failed))
        finished: list[int] = []
        for event in before:
            if isinstance(event, Finish):
                assert event.reason != "cancelled" or self.cancelled
                finished.append(event.index)
            elif isinstance(event, Delta):
                assert event.index not in finished
                assert request.logprobs < 0 or len(event.tokens) == len(event.logprobs)
        for index in range(request.n):
            text = "".join(e.text for e in before if isinstance(e, Delta) and e.index == index)
            assert not any(stop in text for stop in request.sampling.stop)
        if isinstance(last, Failed):
            return
        assert sorted(finished) == list(range(request.n))
        timings, usage = last.timings, last.usage
        for field in fields(timings):
            value = getattr(timings, field.name)
            assert value >= 0, field.name
            assert math.isfinite(value), field.name
        assert timings.ttft_ms >= timings.prompt_ms - 1e-6
        assert timings.predicted_n == usage.completion_tokens
        assert timings.cache_n + timings.prompt_n == usage.prompt_tokens
        assert request.cache or request.n > 1 or not usage.cached_tokens
        if request.sampling.max_tokens >= 0:
            assert timings.predicted_n <= request.n * request.sampling.max_tokens
        told = [i for i, e in enumerate(before) if isinstance(e, Prefill)]
        assert all(p.cached <= p.done <= p.total for p in before if isinstance(p, Prefill))
        assert not any(isinstance(e, Delta) for e in before[: max(told, default=0)])


def audit(engine: Engine | Bench) -> None:
    """Nothing runs, nothing is promised, and llama.cpp holds exactly what the books say."""

    def look() -> None:
        loop, pool, context = engine.loop, engine.pool, engine.context
        assert not loop.running
        assert not loop.waiting
        assert pool.available == context.n_ctx - pool.used
        held = [slot for slot in range(context.n_seq) if pool.length(slot)]
        assert len(held) == pool.n_resident
        for slot in range(context.n_seq):
            assert context.span(slot)[1] == (pool.length(slot) - 1 if slot in held else -1)

    engine.loop.do(look).result()


# the step loop


def test_a_cancel_may_come_before_its_job(bench: Bench) -> None:
    listener = Recorder()
    job = bench.job(noise(1, 20), listener)
    bench.loop.cancel(job)
    bench.loop.submit(job)
    listener.wait()
    bench.run(noise(2, 20))
    assert listener.reasons == {0: "cancelled"}
    assert listener.tokens == {}
    assert listener.endings == 1
    audit(bench)


def test_cancelling_twice_and_after_the_end_is_harmless(bench: Bench) -> None:
    listener = Recorder()
    job = bench.job(noise(1, 20), listener, n=3, **ENDLESS)
    listener.on_token = lambda n: [bench.loop.cancel(job) for _ in range(2)] and None
    bench.loop.submit(job)
    listener.wait()
    bench.loop.cancel(job)
    audit(bench)
    assert listener.endings == 1
    assert listener.reasons == dict.fromkeys(range(3), "cancelled")


def test_closing_fails_what_runs_and_waits(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(n_running=2)
    gate = threading.Event()
    first = Recorder()
    first.on_token = lambda n: gate.wait(WAIT_S) and None
    bench.loop.submit(bench.job(noise(1, 20), first, max_tokens=50, **ENDLESS))
    others = [bench.start(noise(2 + i, 20), n=1 + i % 2, max_tokens=50, **ENDLESS) for i in range(5)]
    closing = threading.Thread(target=bench.loop.close)
    closing.start()
    gate.set()
    closing.join()
    for listener in (first, *others):
        assert isinstance(listener.wait().error, EngineError)
    assert bench.pool.used == bench.pool.n_resident == 0


def preempt_at(bench: Bench, job: Job, listener: Recorder, n: int, then: Callable[[], None] = lambda: None) -> None:
    """Send the job's first sequence back to the queue after its `n`-th token, then do something else."""

    def on_token(count: int) -> None:
        if count == n:
            bench.loop.do(lambda: bench.loop.admission.requeue(job.sequences[0]))
            then()

    listener.on_token = on_token


def test_a_preempted_answer_goes_on_where_it_was(bench: Bench) -> None:
    prompt = bench.chat("Tell me a story.")
    alone = bench.run(prompt, max_tokens=40, **ENDLESS).tokens
    listener = Recorder()
    job = bench.job(prompt, listener, max_tokens=40, **ENDLESS)
    preempt_at(bench, job, listener, 20)
    bench.loop.submit(job)
    assert listener.wait().tokens == alone
    # computing again what was told before is not progress
    assert max(listener.prefills) == len(prompt)
    assert listener.timings.cache_n + listener.timings.prompt_n == len(prompt)
    audit(bench)


def test_a_request_without_cache_leaves_nothing_even_when_preempted(bench: Bench) -> None:
    listener = Recorder()
    job = bench.job(noise(1, 100), listener, max_tokens=10, cache=False, **ENDLESS)
    preempt_at(bench, job, listener, 5)
    bench.loop.submit(job)
    assert len(listener.wait().tokens[0]) == 10
    audit(bench)
    assert bench.pool.used == 0
    assert bench.store.used_bytes == 0


def test_a_follower_of_a_resumed_answer_does_not_wait_for_its_end(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(step_target_ms=1.0)
    # steps of 16 rows, so that 97 tokens leave one for a decode step
    bench.loop.cost.record = lambda *_: None
    bench.loop.cost.row_ms = 1e3
    order: list[str] = []
    prompt, leader, follower = noise(1, 80), Recorder(), Recorder()
    job = bench.job(prompt, leader, max_tokens=60, cache=False, **ENDLESS)

    def follow() -> None:
        tokens = [*prompt, *leader.tokens[0], *noise(2, 40)]
        bench.loop.submit(bench.job(tokens, follower, max_tokens=1, **ENDLESS))

    preempt_at(bench, job, leader, 17, follow)
    follower.on_token = lambda n: order.append("follower")
    leader.finished = lambda sequence, reason: order.append("leader")
    bench.loop.submit(job)
    leader.wait()
    follower.wait()
    assert order == ["follower", "leader"]
    assert follower.timings.cache_n == 96
    audit(bench)


def test_two_that_do_not_fit_together_run_one_after_the_other(bench: Bench) -> None:
    decode = bench.context.decode

    def one_at_a_time(n: int) -> None:
        if len(set(bench.context.sequences[:n].tolist())) > 1:
            raise NoRoom("no free KV cells")
        decode(n)

    bench.context.decode = one_at_a_time
    first, second = Recorder(), Recorder()
    jobs = [bench.job(noise(i, 60), listener, max_tokens=10, **ENDLESS) for i, listener in enumerate((first, second))]
    bench.loop.do(lambda: [bench.loop.submit(job) for job in jobs])
    assert len(first.wait().tokens[0]) == len(second.wait().tokens[0]) == 10


def test_an_interactive_request_without_deadline_is_not_starved_by_deadlines() -> None:
    job = Job(prompt=[1], samplers=[], listener=Recorder(), submitted_s=100.0)
    pressing = Job(prompt=[1], samplers=[], listener=Recorder(), deadline_s=101.0 + PROMOTE_AFTER_S, submitted_s=101.0 + PROMOTE_AFTER_S)
    assert job.order(110.0) > pressing.order(110.0)
    assert job.order(101.0 + PROMOTE_AFTER_S) < pressing.order(101.0 + PROMOTE_AFTER_S)


def test_a_prompt_without_answer_has_its_time(bench: Bench) -> None:
    timings = bench.run(noise(1, 50), max_tokens=0).timings
    assert timings.ttft_ms >= timings.prompt_ms > 0
    assert timings.prompt_per_second > 0
    assert timings.predicted_n == timings.predicted_ms == 0


def test_a_state_that_cannot_be_copied_costs_the_state_not_the_answer(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def broken(slot: int) -> Any:
        raise MemoryError

    bench.pool.entry = broken
    job = bench.run(noise(1, 100), session="chat", max_tokens=3, **ENDLESS)
    assert job.reasons == {0: "length"}
    assert job.entries == []
    assert "could not be copied" in caplog.text
    audit(bench)


def test_a_session_cancelled_before_its_first_token_is_not_saved_empty(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(step_target_ms=1.0)
    bench.loop.cost.record = lambda *_: None
    bench.loop.cost.row_ms = 1e3
    prompt, leader, follower = noise(1, 300), Recorder(), Recorder()
    job = bench.job([*prompt, 5], follower, session="chat")

    def on_prefill(done: int) -> None:
        if len(leader.prefills) == 1:
            bench.loop.submit(job)
        elif len(leader.prefills) == 3:
            bench.loop.cancel(job)

    leader.on_prefill = on_prefill
    bench.loop.submit(bench.job(prompt, leader, max_tokens=1))
    assert follower.wait().reasons == {0: "cancelled"}
    assert follower.entries == []
    leader.wait()
    audit(bench)


def test_samplers_are_freed_when_their_sequence_ends(bench: Bench) -> None:
    # jobs and sequences name each other, so the collector would free megabytes of C memory late
    listener = Recorder()
    job = bench.job(noise(1, 20), listener, n=2, max_tokens=2, **ENDLESS)
    bench.loop.submit(job)
    listener.wait()
    assert [sampler.chain for sampler in job.samplers] == [None, None]


def test_choices_that_end_at_different_times_and_ways(bench: Bench) -> None:
    limits: dict[str, Any] = {"max_tokens": 40, "stop_bytes": (b".",)}
    job = bench.run(bench.chat("Tell me a story."), n=6, sampling=Sampling(temperature=1.5), session="x", **limits)
    assert len(job.reasons) == 6
    assert len({len(tokens) for tokens in job.tokens.values()}) > 1
    assert len(job.entries) == 1
    audit(bench)


def test_shifting_beside_others_that_share_the_prompt(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(n_ctx_seq=128, n_running=6)
    prompt = noise(1, 90)
    alone = make_bench(n_ctx_seq=128).run(prompt, max_tokens=20, **ENDLESS).tokens[0]
    shifting = [bench.start(prompt, n=2, max_tokens=150, context_shift=True, n_keep=20, **ENDLESS) for _ in range(2)]
    others = [bench.start(prompt, max_tokens=20, **ENDLESS) for _ in range(4)]
    for job in others:
        assert job.wait().tokens[0][:5] == alone[:5]
    for job in shifting:
        assert [len(tokens) for tokens in job.wait().tokens.values()] == [150, 150]
    audit(bench)


# sampling


@pytest.mark.parametrize(
    "sampling",
    [
        {"grammar": "root ::= [a]*", "logit_bias": ((5, math.inf),)},
        {"grammar": 'root ::= "a"+', "repeat_penalty": -1.0},
        {"grammar": 'root ::= "ab"', "temperature": 1e-45},
        {"grammar": 'root ::= "ab"', "ignore_eos": True},
        {"grammar": 'root ::= "ab"', "mirostat": 2},
        {"grammar": "root ::= !<[5]>"},
        {"logit_bias": tuple((i, -math.inf) for i in range(2048))},
        {"logit_bias": ((5, math.nan),)},
        {"repeat_penalty": 1.1, "repeat_last_n": 2**31 - 1},
        {"dry_multiplier": 1.0, "dry_penalty_last_n": 2**31 - 1, "dry_sequence_breakers": ("", "\ud800", "x" * 500)},
        {"temperature": 1e300, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1e-45},
        {"top_k": 1, "min_keep": 500, "typical_p": math.nan, "top_n_sigma": math.nan},
        {"mirostat": 1, "mirostat_tau": math.nan},
    ],
    ids=str,
)
def test_extreme_sampling_ends_the_answer_and_not_the_process(engine: Engine, sampling: dict[str, Any]) -> None:
    sink = Sink(Request(messages=CAPITAL, sampling=Sampling(**{"max_tokens": 12, **sampling})))
    engine.submit(sink.request, sink)
    sink.wait()
    sink.check()


def test_the_whole_context_is_penalised_when_asked(bench: Bench) -> None:
    # past 64 tokens, where the default window would have forgotten the first
    sampling = Sampling(temperature=0, presence_penalty=1e6, repeat_last_n=-1)
    tokens = bench.run(noise(1, 20), sampling=sampling, max_tokens=150, **ENDLESS).tokens[0]
    assert len(set(tokens)) == 150


def test_dry_is_on_by_its_multiplier_alone(bench: Bench) -> None:
    prompt = bench.chat("Tell me a story.")

    def repeats(**sampling: float) -> int:
        tokens = bench.run(prompt, sampling=Sampling(temperature=0, **sampling), max_tokens=200, **ENDLESS).tokens[0]
        threes = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
        return len(threes) - len(set(threes))

    assert repeats() > repeats(dry_multiplier=100.0)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 2, 2**40])
async def test_a_seed_gives_the_same_text_again_and_other_choices_other_text(engine: Engine, seed: int) -> None:
    # without cache both compute the same batches, so that not even rounding differs
    sampling = Sampling(temperature=1.5, seed=seed, max_tokens=12, ignore_eos=True)
    request = Request(prompt="Once upon a time", n=2, sampling=sampling, cache=False)
    texts: list[list[str]] = []
    for _ in range(2):
        sink = Sink(request)
        engine.submit(request, sink)
        events = sink.wait()
        texts.append(["".join(e.text for e in events if isinstance(e, Delta) and e.index == i) for i in range(2)])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


# text and events


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = load()
    yield engine
    engine.shutdown()


def load(size: str = "small", **config: Any) -> Engine:
    path = Path(__file__).parents[2] / f"localllm/demo/demo-{size}-q8_0.gguf"
    return Engine.load(EngineConfig(str(path), **{"n_threads": 2, "n_ctx": 1024, "n_seq": 4, "n_resident": 3, **config}))


def ask(engine: Engine, **request: Any) -> Sink:
    sink = Sink(Request(**request))
    engine.submit(sink.request, sink)
    sink.wait()
    sink.check()
    return sink


@pytest.mark.parametrize(
    "stop, text",
    [(("€",), "a"), (("b€",), "a€"), (("z", "€c"), "a€b"), (("c", "b€c"), "a€"), (("nowhere",), "a€b€c")],
)
def test_stop_strings_of_many_bytes_and_tokens(engine: Engine, stop: tuple[str, ...], text: str) -> None:
    sink = ask(engine, messages=CAPITAL, sampling=Sampling(grammar='root ::= "a€b€c"', stop=stop), logprobs=1)
    assert sink.text == text
    (finish,) = (e for e in sink.events if isinstance(e, Finish))
    assert finish.reason == "stop"
    assert finish.stop_text == (stop[-1] if text != "a€b€c" else "")


def test_a_stop_string_inside_reasoning_ends_the_answer(engine: Engine) -> None:
    grammar = 'root ::= "<think>one two three</think>four"'
    sink = ask(engine, messages=CAPITAL, sampling=Sampling(grammar=grammar, stop=("two",)))
    assert sink.text.strip() == "one"
    assert all(e.channel == "reasoning" for e in sink.events if isinstance(e, Delta) and e.text)
    assert sink.events[-2] == Finish(0, "stop", "two")


def test_text_that_waits_comes_before_a_failure() -> None:
    class Bytes:
        def piece(self, token: int) -> bytes:
            return b"word "

        text = piece

    entered, gate = threading.Event(), threading.Event()
    output = Output(StateStore("x", ram_bytes=0), ThreadPoolExecutor(1))

    def hold(events: list[Event]) -> None:
        entered.set()
        gate.wait(WAIT_S)

    Answer(output, hold, []).queued(Job([1], [], Recorder()), 1)
    assert entered.wait(WAIT_S)
    sink = Sink(Request(prompt="x"))
    answer = Answer(output, sink, [ChoiceText(0, Bytes(), (), None)])
    job = Job([1], [], Recorder())
    job.samplers.append(None)  # type: ignore[arg-type]
    job.__post_init__()
    answer.token(job.sequences[0], 5, None)
    answer.failed(job, EngineError("gone"))
    gate.set()
    output.close()
    assert [type(e) for e in sink.events] == [Delta, Failed]


def test_an_answer_whose_text_cannot_be_read_fails_once_and_stops(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ChoiceText, *_: object) -> None:
        raise RuntimeError("no such dialect")

    monkeypatch.setattr(ChoiceText, "push", broken)
    sink = Sink(FOREVER)
    engine.submit(FOREVER, sink)
    assert isinstance(sink.wait()[-1], Failed)
    for _ in range(5000):  # one step each
        if not engine.loop.do(lambda: engine.loop.running).result():
            break
    assert not engine.loop.running
    sink.check()


def test_a_sink_that_raises_harms_only_itself(engine: Engine) -> None:
    def bad(events: list[Event]) -> None:
        raise RuntimeError("the client is gone")

    engine.submit(Request(messages=CAPITAL, sampling=Sampling(max_tokens=5)), bad)
    assert isinstance(ask(engine, messages=CAPITAL, sampling=Sampling(max_tokens=5)).events[-1], Done)


# lifetimes


async def test_leaving_a_stream_while_its_prompt_is_prepared_cancels_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, gate, jobs = threading.Event(), threading.Event(), list[Job]()
    prepare = engine.preparer.job

    def slow(*arguments: Any) -> Job:
        entered.set()
        gate.wait(WAIT_S)
        jobs.append(prepare(*arguments))
        return jobs[0]

    monkeypatch.setattr(engine.preparer, "job", slow)

    async def listen() -> None:
        async with engine.stream(FOREVER) as events:
            async for _ in events:
                pass

    task = asyncio.create_task(listen())
    await asyncio.to_thread(entered.wait, WAIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    async with asyncio.timeout(WAIT_S):
        while not (jobs and jobs[0].over):
            await asyncio.sleep(0)
    audit(engine)


async def test_an_id_used_twice_names_the_one_that_came_last(engine: Engine) -> None:
    first = Sink(Request(messages=CAPITAL, sampling=Sampling(max_tokens=300, ignore_eos=True), id="same"))
    handle = engine.submit(first.request, first)
    second = Sink(Request(messages=CAPITAL, sampling=Sampling(ignore_eos=True), context_shift=True, id="same"))
    engine.submit(second.request, second)
    handle.cancel()
    first.wait()
    assert await engine.call("cancel", id="same")
    second.cancelled = True
    second.wait()
    assert not await engine.call("cancel", id="same")


async def test_a_closed_engine_refuses_and_does_not_crash_or_hang(tmp_path: Path) -> None:
    engine = load(state_dir=str(tmp_path))
    sinks = [
        Sink(Request(messages=CAPITAL, sampling=Sampling(max_tokens=m), n=n, session=s))
        for m in (5, 300)
        for n in (1, 3)
        for s in ("", "a")
    ]
    for sink in sinks:
        engine.submit(sink.request, sink)
    await asyncio.gather(engine.close(), engine.close())
    for sink in sinks:
        sink.wait()
        sink.check()
    late = Sink(FOREVER)
    handle = engine.submit(FOREVER, late)
    (failed,) = late.wait()
    assert isinstance(failed, Failed)
    assert LocalLLMError.from_json(dict(failed.error)).hint
    handle.cancel()
    for op, args in (("slots", {}), ("tokenize", {"text": "a"}), ("count", {"messages": [{"role": "user", "content": "a"}]})):
        with pytest.raises(EngineError, match="closed"):
            await engine.call(op, **args)


def test_closing_waits_for_a_request_that_is_being_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load()
    entered, gate = threading.Event(), threading.Event()
    prepare = engine.preparer.job

    def slow(*arguments: Any) -> Job:
        entered.set()
        gate.wait(WAIT_S)
        return prepare(*arguments)

    monkeypatch.setattr(engine.preparer, "job", slow)
    sink = Sink(FOREVER)
    with ThreadPoolExecutor(2) as pool:
        submitted = pool.submit(engine.submit, FOREVER, sink)
        assert entered.wait(WAIT_S)
        closed = pool.submit(engine.shutdown)
        while not engine._closed:
            pass
        gate.set()
        submitted.result()
        closed.result()
    assert isinstance(sink.wait()[-1], Failed)
    sink.check()


# sizes


@pytest.mark.parametrize(
    "config",
    [
        {"n_ctx": 32, "n_seq": 1, "n_resident": 0},
        {"n_ctx": 300, "n_seq": 2, "n_resident": 0, "n_batch": 1, "n_ubatch": 1},
        {"n_ctx": 256, "n_seq": 20, "n_resident": 20, "n_batch": 64},
        {"n_ctx": 512, "type_k": "q4_0", "type_v": "q4_0", "cache_ram_bytes": 0},
    ],
    ids=str,
)
def test_a_prompt_that_leaves_room_for_one_token_gets_one(config: dict[str, Any]) -> None:
    engine = load(**config)
    try:
        full = ask(engine, tokens=tuple(noise(1, engine.n_ctx - 1)), sampling=Sampling(temperature=0, ignore_eos=True))
        assert full.events[-2] == Finish(0, "length")
        done = full.events[-1]
        assert isinstance(done, Done)
        assert done.usage.completion_tokens == 1
        again = ask(engine, tokens=tuple(noise(1, engine.n_ctx - 1)), sampling=Sampling(max_tokens=1)).events[-1]
        assert isinstance(again, Done)
        assert again.usage.cached_tokens == engine.n_ctx - 2
        refused = ask(engine, tokens=tuple(noise(1, engine.n_ctx))).events[-1]
        assert isinstance(refused, Failed)
        assert refused.error["class"] == "ContextExceeded"
        audit(engine)
    finally:
        engine.shutdown()


def test_a_session_is_restored_into_a_context_of_another_size(tmp_path: Path) -> None:
    tokens = tuple(noise(1, 200))
    for n_ctx, cached in ((1024, 0), (512, 199), (256, 199)):
        engine = load(state_dir=str(tmp_path), n_ctx=n_ctx)
        done = ask(engine, tokens=tokens, sampling=Sampling(temperature=0, max_tokens=5), session="chat").events[-1]
        engine.shutdown()
        assert isinstance(done, Done)
        assert done.usage.cached_tokens == cached


# many threads


def random_request(r: random.Random) -> Request:
    sampling: dict[str, Any] = {
        "temperature": r.choice([0.0, 0.8, 1.5]),
        "seed": r.choice([-1, 0, 5]),
        "max_tokens": r.choice([0, 1, 5, 30, 80]),
        "stop": r.choice([(), (), ("e",), ("is", "the "), ("€",)]),
        "ignore_eos": r.random() < 0.2,
    }
    if r.random() < 0.2:
        sampling |= {"repeat_penalty": 1.2, "repeat_last_n": -1, "dry_multiplier": 1.0}
    request: dict[str, Any] = {
        "n": r.choice([1, 1, 1, 2, 5]),
        "logprobs": r.choice([-1, -1, 0, 3]),
        "cache": r.random() > 0.2,
        "priority": r.choice(["interactive", "batch"]),
        "deadline_ms": r.choice([None, None, 10.0, 1000.0]),
        "session": r.choice(["", "", "a", "b"]),
        "context_shift": r.random() < 0.2,
        "n_keep": r.choice([0, 5, -1]),
        "id": r.choice(["", f"id{r.randrange(100)}"]),
    }
    match r.randrange(6):
        case 0 | 1:
            request["messages"] = (
                Message("user", r.choice(["What is the capital of France?", "Tell me a story.", "hi " * r.randrange(1, 100)])),
            )
        case 2:
            request |= {"messages": CAPITAL, "tools": (TOOL,), "tool_choice": r.choice(["auto", "required"])}
        case 3:
            request["messages"] = CAPITAL
            sampling |= {"json_schema": NUMBER, "ignore_eos": False}
        case _:
            request["tokens"] = (*[7] * r.choice([1, 2, 100, 300]), *noise(r.randrange(50), r.choice([0, 1, 30, 200, 500])))
    return Request(sampling=Sampling(**sampling), **request)


def storm(engine: Engine, seed: int, *, threads: int, requests: int) -> list[Sink]:
    """Many threads that submit, wait and cancel at random."""

    def client(number: int) -> list[Sink]:
        r = random.Random(f"{seed} {number}")
        sinks: list[Sink] = []
        handles: list[Any] = []
        for _ in range(requests):
            sinks.append(Sink(random_request(r)))
            handles.append(engine.submit(sinks[-1].request, sinks[-1]))
            if r.random() < 0.2:
                victim = r.choice([-1, r.randrange(len(sinks))])
                sinks[victim].cancelled = True
                handles[victim].cancel()
            if r.random() < 0.25:
                sinks[-1].wait()
        return sinks

    with ThreadPoolExecutor(threads) as pool:
        return [sink for sinks in pool.map(client, range(threads)) for sink in sinks]


def test_a_storm_of_requests_ends_each_once(tmp_path: Path) -> None:
    engine = load(state_dir=str(tmp_path))
    sinks = storm(engine, 1, threads=8, requests=6)
    for sink in sinks:
        sink.wait()
        sink.check()
    audit(engine)
    assert engine._named == {}
    engine.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"n_ctx": 256, "n_seq": 1, "n_resident": 0},
        {"n_ctx": 600, "n_seq": 8, "n_resident": 2, "cache_ram_bytes": 0, "max_queue": 20},
        {"n_ctx": 1024, "n_seq": 8, "n_resident": 24, "type_k": "q8_0", "type_v": "q4_0"},
        {"n_ctx": 2048, "n_seq": 6, "n_resident": 6, "size": "large", "step_target_ms": 1.0},
    ],
    ids=str,
)
def test_storms_in_every_size(tmp_path: Path, config: dict[str, Any]) -> None:
    engine = load(state_dir=str(tmp_path), **config)
    for sink in storm(engine, len(config), threads=8, requests=10):
        sink.wait()
        sink.check()
    audit(engine)
    engine.shutdown()


def test_a_storm_with_preemptions_and_full_caches(tmp_path: Path) -> None:
    engine = load(state_dir=str(tmp_path))
    loop, decode, r = engine.loop, engine.context.decode, random.Random(1)

    def rough(n: int) -> None:
        if r.random() < 0.05 and (len(loop.running) > 1 or engine.pool.n_resident):
            raise NoRoom("no free KV cells")
        decode(n)
        if r.random() < 0.1:
            victim = r.choice(loop.running)
            loop.do(lambda: loop.admission.requeue(victim) if victim in loop.running else None)

    engine.context.decode = rough
    for sink in storm(engine, 2, threads=8, requests=6):
        assert isinstance(sink.wait()[-1], Done)
        sink.check()
    audit(engine)
    engine.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_closing_in_a_storm_ends_each_once(tmp_path: Path, seed: int) -> None:
    engine = load(state_dir=str(tmp_path))
    closing = threading.Timer(0.3, engine.shutdown)
    closing.start()
    sinks = storm(engine, seed, threads=8, requests=15)
    closing.join()
    for sink in sinks:
        sink.cancelled = True
        sink.wait()
        sink.check()
    assert any(isinstance(sink.events[-1], Failed) for sink in sinks)


@pytest.mark.slow
def test_greedy_answers_are_right_in_a_storm() -> None:
    engine = load("large", n_ctx=700)
    questions = [f"What is the capital of {country}?" for country in ("France", "Italy", "Spain")]
    alone = {q: ask(engine, messages=(Message("user", q),), sampling=Sampling(temperature=0)).text for q in questions}
    with ThreadPoolExecutor(1) as pool:
        weather = pool.submit(storm, engine, 5, threads=4, requests=10)
        for i in range(20):
            q = questions[i % 3]
            assert ask(engine, messages=(Message("user", q),), sampling=Sampling(temperature=0)).text == alone[q]
        for sink in weather.result():
            sink.wait()
            sink.check()
    number = ask(engine, messages=CAPITAL, sampling=Sampling(json_schema=NUMBER, max_tokens=40))
    assert isinstance(json.loads(number.text)["n"], int)
    audit(engine)
    engine.shutdown()
