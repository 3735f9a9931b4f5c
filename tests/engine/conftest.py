"""A step loop on the demo model, and a listener that writes everything down."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from localllm.engine.kv import KVPool
from localllm.engine.loop import StepLoop
from localllm.engine.sequence import Job, Sequence, TokenScore
from localllm.engine.store import Entry, StateStore
from localllm.errors import LocalLLMError
from localllm.llama.context import Context, ContextParams
from localllm.llama.model import Model
from localllm.llama.sampling import Sampler
from localllm.types import FinishReason, Sampling, Timings

WAIT_S = 60.0


class Recorder:
    """A listener; `wait()` returns when the job has ended."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.scores: list[TokenScore] = []
        self.reasons: dict[int, FinishReason] = {}
        self.positions: list[int] = []
        self.prefills: list[int] = []
        self.entries: list[Entry] = []
        self.timings = Timings()
        self.error: LocalLLMError | None = None
        self.endings = 0
        self.on_token: Callable[[int], None] = lambda n: None
        self.on_prefill: Callable[[int], None] = lambda done: None
        self._ended = threading.Event()

    def queued(self, job: Job, position: int) -> None:
        self.positions.append(position)

    def prefilled(self, job: Job, done: int, cached: int) -> None:
        self.prefills.append(done)
        self.on_prefill(done)

    def token(self, sequence: Sequence, token: int, score: TokenScore | None) -> None:
        self.tokens.setdefault(sequence.index, []).append(token)
        if score is not None:
            self.scores.append(score)
        self.on_token(len(self.tokens[sequence.index]))

    def finished(self, sequence: Sequence, reason: FinishReason) -> None:
        assert sequence.index not in self.reasons
        self.reasons[sequence.index] = reason

    def save(self, job: Job, entry: Entry) -> None:
        self.entries.append(entry)

    def done(self, job: Job, timings: Timings) -> None:
        self.timings = timings
        self._end()

    def failed(self, job: Job, error: LocalLLMError) -> None:
        self.error = error
        self._end()

    def _end(self) -> None:
        self.endings += 1
        self._ended.set()

    def wait(self) -> Recorder:
        assert self._ended.wait(WAIT_S), "the job did not end"
        assert self.endings == 1
        return self


class Bench:
    """A model, a context of `n_ctx` cells and its step loop."""

    def __init__(self, model: Model, *, n_ctx: int = 4096, n_running: int = 8, n_resident: int = 8, **loop: Any) -> None:
        self.model = model
        self.context = Context(model, ContextParams(n_ctx=n_ctx, n_seq=n_running + n_resident, n_threads=2, n_outputs=n_running))
        self.store = StateStore("test", ram_bytes=loop.pop("ram_bytes", 1 << 26))
        self.pool = KVPool(self.context, self.store, n_swa=model.n_swa)
        settings = {"n_ctx_seq": min(n_ctx, model.n_ctx_train), "step_target_ms": 100.0, "max_queue": 1000, **loop}
        self.loop = StepLoop(self.context, self.pool, n_running=n_running, **settings)

    def job(self, prompt: list[int], listener: Recorder, *, n: int = 1, sampling: Sampling | None = None, seed: int = 1, **job: Any) -> Job:
        s = sampling or Sampling(temperature=0)
        samplers = [Sampler(self.model, s, seed=seed + i) for i in range(n)]
        settings = {"max_tokens": 16, "end_tokens": self.model.end_tokens, "piece": self.model.piece, **job}
        return Job(prompt=prompt, samplers=samplers, listener=listener, **settings)

    def start(self, prompt: list[int], **job: Any) -> Recorder:
        listener = Recorder()
        self.loop.submit(self.job(prompt, listener, **job))
        return listener

    def run(self, prompt: list[int], **job: Any) -> Recorder:
        return self.start(prompt, **job).wait()

    def chat(self, *turns: str) -> list[int]:
        roles = ("user", "assistant")
        text = "".join(f"<|im_start|>{roles[i % 2]}\n{turn}<|im_end|>\n" for i, turn in enumerate(turns))
        return self.model.tokenize(f"{text}<|im_start|>assistant\n", add_special=True, parse_special=True)

    def close(self) -> None:
        self.loop.close()
        self.context.close()


@pytest.fixture(scope="session")
def demo(request: pytest.FixtureRequest) -> Iterator[Model]:
    model = Model(str(Path(__file__).parents[2] / "localllm/demo/demo-large-q8_0.gguf"))
    yield model
    model.close()


@pytest.fixture
def bench(demo: Model) -> Iterator[Bench]:
    bench = Bench(demo)
    yield bench
    bench.close()


@pytest.fixture
def make_bench(demo: Model) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**settings: Any) -> Bench:
        made.append(Bench(demo, **settings))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


def bare_greedy(model: Model, prompt: list[int], n: int) -> list[int]:
    """What llama.cpp itself says: one decode, one sample, nothing else."""
    context = Context(model, ContextParams(n_ctx=1024, n_threads=2))
    sampler = Sampler(model, Sampling(temperature=0), seed=1)
    context.tokens[: len(prompt)] = prompt
    context.positions[: len(prompt)] = range(len(prompt))
    context.outputs[: len(prompt)] = 0
    context.outputs[len(prompt) - 1] = 1
    context.decode(len(prompt))
    out = [sampler.sample(context, len(prompt) - 1)]
    context.outputs[0] = 1
    while len(out) < n:
        context.tokens[0] = out[-1]
        context.positions[0] = len(prompt) + len(out) - 1
        context.decode(1)
        out.append(sampler.sample(context, 0))
    context.close()
    return out
