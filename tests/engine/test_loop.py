"""The step loop on the real demo model: right tokens, fair order, clean endings."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from localllm.engine.sequence import PROMOTE_AFTER_S, Job
from localllm.errors import EngineError, Overloaded
from localllm.llama.context import NoRoom
from localllm.types import Sampling

from .conftest import Bench, Recorder, bare_greedy

ENDLESS = {"end_tokens": frozenset[int]()}


def noise(seed: int, n: int) -> list[int]:
    """Tokens that no other prompt begins with."""
    r = random.Random(seed)
    return [r.randrange(4, 2000) for _ in range(n)]


def test_greedy_text_equals_the_bare_loop_token_by_token(bench: Bench) -> None:
    prompt = bench.chat("Tell me a story.")
    assert bench.run(prompt, max_tokens=300, **ENDLESS).tokens[0] == bare_greedy(bench.model, prompt, 300)


def test_the_same_seed_gives_the_same_text_alone_and_beside_seven_others(bench: Bench) -> None:
    # the CPU backend sums a row in another order when other rows are in the batch, so only a text
    # whose choices are not near-ties is the same to the token: short answers of the demo are
    sampling = Sampling(temperature=0.8)
    prompt = bench.chat("What is the capital of France?")
    alone = bench.run(prompt, sampling=sampling, seed=7).tokens[0]
    others = [bench.start(bench.chat(f"What is {i} + {i}?"), sampling=sampling, seed=i) for i in range(7)]
    beside = bench.run(prompt, sampling=sampling, seed=7).tokens[0]
    assert beside == alone
    assert all(other.wait().reasons == {0: "stop"} for other in others)


def test_a_second_turn_prefills_only_the_new_text(bench: Bench) -> None:
    first = bench.chat("What is the capital of France?")
    answer = bench.run(first).tokens[0]
    second = (
        first + answer + bench.model.tokenize("\n<|im_start|>user\nAnd of Italy?<|im_end|>\n<|im_start|>assistant\n", parse_special=True)
    )
    timings = bench.run(second).timings
    # all but the end token, which is sampled and never decoded
    assert timings.cache_n == len(first) + len(answer) - 1
    assert timings.prompt_n == len(second) - timings.cache_n


def test_simultaneous_requests_compute_a_shared_prefix_once(bench: Bench) -> None:
    shared = noise(1, 500)
    jobs = [bench.start(shared + noise(10 + i, 10), max_tokens=4) for i in range(8)]
    computed = [job.wait().timings.prompt_n for job in jobs]
    assert sum(computed) <= 510 + 7 * 10
    assert sum(1 for n in computed if n > 10) == 1


def test_choices_share_their_prompt_and_differ_by_seed(bench: Bench) -> None:
    prompt = noise(3, 100)
    job = bench.run(prompt, n=4, sampling=Sampling(temperature=1.5), max_tokens=12, **ENDLESS)
    assert len({tuple(tokens) for tokens in job.tokens.values()}) > 1
    assert job.reasons == dict.fromkeys(range(4), "length")
    assert job.timings.predicted_n == 48


def test_a_reused_prefix_gives_the_logits_of_a_fresh_prefill(make_bench: Callable[..., Bench]) -> None:
    prompt, other = noise(4, 300), noise(5, 40)
    fresh = make_bench().run(prompt + other, logprobs=5, max_tokens=1).scores[0]
    bench = make_bench()
    bench.run(prompt + noise(6, 40))
    reused = bench.run(prompt + other, logprobs=5, max_tokens=1)
    assert reused.timings.cache_n == 300
    assert abs(reused.scores[0].logprob - fresh.logprob) < 0.05
    assert {t for t, _ in reused.scores[0].top[:3]} == {t for t, _ in fresh.top[:3]}


def test_a_long_prompt_does_not_stall_running_streams(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(step_target_ms=1.0)
    # fix the cost so that the machine's speed does not decide: 1 ms a row leaves the smallest chunk
    bench.loop.cost.record = lambda *_: None
    bench.loop.cost.row_ms = 1.0
    started, during = threading.Event(), []
    stream, long = Recorder(), Recorder()
    stream.on_token = lambda n: started.set() if n == 3 else None
    long.on_prefill = lambda done: during.append(len(stream.tokens[0]))
    bench.loop.submit(bench.job(bench.chat("Tell me a story."), stream, max_tokens=200, **ENDLESS))
    assert started.wait(60)
    bench.loop.submit(bench.job(noise(7, 640), long, max_tokens=1))
    long.wait()
    stream.wait()
    assert len(during) >= 640 // 16
    assert all(later > before for before, later in zip(during[:-1], during[1:], strict=True))


def test_a_short_prompt_overtakes_a_long_one(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    order: list[str] = []
    long, short = Recorder(), Recorder()
    long.on_token = lambda n: order.append("long")
    short.on_token = lambda n: order.append("short")
    submitted = threading.Event()

    def on_long(done: int) -> None:
        if not submitted.is_set():
            submitted.set()
            bench.loop.submit(bench.job(noise(9, 20), short, max_tokens=1))

    long.on_prefill = on_long
    bench.loop.submit(bench.job(noise(8, 900), long, max_tokens=1))
    long.wait()
    short.wait()
    assert order == ["short", "long"]


def test_interactive_goes_before_batch_and_earlier_deadlines_first(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(n_running=1)
    ended: list[str] = []
    gate = threading.Event()
    blocker = Recorder()
    blocker.on_token = lambda n: gate.wait(60) and None
    bench.loop.submit(bench.job(noise(1, 20), blocker, max_tokens=2, **ENDLESS))
    waiting: list[Recorder] = []
    for name, settings in (
        ("batch", {"priority": "batch"}),
        ("late", {"deadline_s": 2e9}),
        ("soon", {"deadline_s": 1e9}),
        ("none", {}),
    ):
        listener = Recorder()
        listener.on_token = lambda n, name=name: ended.append(name)
        bench.loop.submit(bench.job(noise(len(waiting) + 50, 20), listener, max_tokens=1, **settings))
        waiting.append(listener)
    gate.set()
    for listener in waiting:
        listener.wait()
    assert ended == ["soon", "late", "none", "batch"]
    assert waiting[0].positions[0] >= 1


def test_a_batch_request_that_waited_long_is_promoted() -> None:
    job = Job(prompt=[1], samplers=[], listener=Recorder(), priority="batch", submitted_s=100.0)
    assert job.order(101.0)[0] == 1
    assert job.order(101.0 + PROMOTE_AFTER_S)[0] == 0


def test_cancelling_in_prefill_stops_within_a_step_and_harms_nobody(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(n_ctx=8192)
    other = bench.start(bench.chat("What is the capital of France?"))
    listener = Recorder()
    job = bench.job(noise(11, 1000), listener)
    listener.on_prefill = lambda done: bench.loop.cancel(job) if len(listener.prefills) == 1 else None
    bench.loop.submit(job)
    listener.wait()
    assert listener.reasons == {0: "cancelled"}
    assert len(listener.prefills) <= 2
    assert other.wait().reasons == {0: "stop"}


def test_when_the_leader_is_cancelled_its_followers_compute_for_themselves(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    shared = noise(12, 900)
    leader = Recorder()
    job = bench.job([*shared, 5], leader)
    leader.on_prefill = lambda done: bench.loop.cancel(job)
    bench.loop.submit(job)
    followers = [bench.start([*shared, 6 + i], max_tokens=3, **ENDLESS) for i in range(3)]
    assert leader.wait().reasons == {0: "cancelled"}
    assert all(len(f.wait().tokens[0]) == 3 for f in followers)


def test_a_stop_string_ends_at_the_token_that_completes_it(bench: Bench) -> None:
    prompt = bench.chat("What is the capital of France?")
    job = bench.run(prompt, stop_bytes=(b"tal of F",))
    text = b"".join(map(bench.model.piece, job.tokens[0]))
    assert b"tal of F" in text
    assert b"tal of F" not in b"".join(map(bench.model.piece, job.tokens[0][:-1]))
    assert job.reasons == {0: "stop"}


def test_the_context_ends_an_answer_with_length(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(n_ctx_seq=128)
    job = bench.run(noise(13, 100), max_tokens=-1, **ENDLESS)
    assert job.reasons == {0: "length"}
    assert 100 + len(job.tokens[0]) == 128


def test_context_shift_goes_on_and_keeps_the_beginning(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(n_ctx_seq=128)
    job = bench.run(noise(14, 100), max_tokens=200, context_shift=True, n_keep=10, **ENDLESS)
    assert len(job.tokens[0]) == 200
    assert job.reasons == {0: "length"}


def test_no_tokens_asked_for_means_prompt_only(bench: Bench) -> None:
    job = bench.run(noise(15, 50), max_tokens=0)
    assert job.tokens == {}
    assert job.reasons == {0: "length"}


def test_timings_are_finite_even_for_one_token(bench: Bench) -> None:
    timings = bench.run(noise(16, 20), max_tokens=1).timings
    assert timings.predicted_n == 1
    assert timings.predicted_per_second == 0.0
    assert timings.prompt_per_second > 0
    assert timings.ttft_ms >= timings.prompt_ms > 0


def test_a_full_queue_refuses_and_goes_on(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(n_running=1, max_queue=1)
    gate, runs = threading.Event(), threading.Event()
    first = Recorder()

    def hold(n: int) -> None:
        runs.set()
        gate.wait(60)

    first.on_token = hold
    # two tokens: it still runs when the others are looked at
    bench.loop.submit(bench.job(noise(1, 20), first, max_tokens=2))
    assert runs.wait(60)
    others = [bench.start(noise(20 + i, 20), max_tokens=1) for i in range(4)]
    gate.set()
    errors = [other.wait().error for other in others]
    assert errors[0] is None
    assert all(isinstance(error, Overloaded) for error in errors[1:])
    assert first.wait().error is None


def test_a_failing_decode_fails_its_requests_only(bench: Bench) -> None:
    decode, calls = bench.context.decode, []

    def broken(n: int) -> None:
        calls.append(n)
        if len(calls) == 1:
            raise EngineError("the backend failed")
        decode(n)

    bench.context.decode = broken
    assert isinstance(bench.run(noise(17, 30)).error, EngineError)
    assert bench.run(bench.chat("What is the capital of France?")).reasons == {0: "stop"}
    assert bench.pool.used == bench.pool.trie.size


def test_no_room_evicts_then_preempts_and_everything_is_answered(bench: Bench) -> None:
    decode, calls = bench.context.decode, []

    def tight(n: int) -> None:
        calls.append(n)
        if len(calls) % 5 == 0:
            raise NoRoom("no free KV cells")
        decode(n)

    bench.context.decode = tight
    jobs = [bench.start(noise(30 + i, 60), max_tokens=10, **ENDLESS) for i in range(6)]
    assert all(len(job.wait().tokens[0]) == 10 for job in jobs)


def test_random_load_on_a_tiny_cache_loses_nobody(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(n_ctx=1024, n_running=6, n_resident=4)
    r = random.Random(1)
    jobs: list[tuple[Recorder, Job, int]] = []
    for i in range(60):
        shared = bench.chat(f"What is {r.randrange(3)} + {r.randrange(3)}?")
        prompt = shared + noise(i % 7, r.randrange(3)) if r.random() < 0.5 else [0, *noise(i, r.choice([5, 50, 200, 600]))]
        n, listener = r.choice([1, 1, 3]), Recorder()
        limit = r.choice([1, 10, 60, 150])
        job = bench.job(prompt, listener, n=n, max_tokens=limit, **({} if r.random() < 0.8 else ENDLESS))
        bench.loop.submit(job)
        jobs.append((listener, job, n))
        if r.random() < 0.15:
            bench.loop.cancel(r.choice(jobs)[1])
    for listener, _, n in jobs:
        listener.wait()
        assert listener.error is None
        assert len(listener.reasons) == n
    assert bench.loop.do(lambda: (bench.pool.used, bench.pool.trie.size)).result() == (bench.pool.trie.size,) * 2
    assert bench.pool.available == bench.context.n_ctx - bench.pool.used
