"""One choice of one request in flight: its tokens, where its KV cache stands, how it ends.

A sequence always has `tokens[n_past:]` still to compute; while decoding that is the one token
sampled last. So prefill, decode and resuming after a preemption are the same thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from localllm.engine.store import Entry
from localllm.errors import LocalLLMError
from localllm.llama.sampling import Sampler
from localllm.types import FinishReason, Priority, Timings

PROMOTE_AFTER_S = 30.0
"""A request that waited this long counts as interactive and as due: nothing starves."""


class Listener(Protocol):
    """Who hears of a job's progress; called on the step thread, so it must be quick and never raise."""

    def queued(self, job: Job, position: int) -> None: ...
    def prefilled(self, job: Job, done: int, cached: int) -> None: ...
    def token(self, sequence: Sequence, token: int, score: TokenScore | None) -> None: ...
    def finished(self, sequence: Sequence, reason: FinishReason) -> None: ...
    def save(self, job: Job, entry: Entry) -> None: ...
    def done(self, job: Job, timings: Timings) -> None: ...
    def failed(self, job: Job, error: LocalLLMError) -> None: ...


@dataclass(frozen=True, slots=True)
class TokenScore:
    """Natural-log probability of the sampled token and of the likeliest alternatives (id, logprob)."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class Job:
    """A request as the step loop sees it: token ids, samplers, limits; one sequence per choice."""

    prompt: list[int]
    samplers: list[Sampler]
    listener: Listener
    max_tokens: int = -1
    end_tokens: frozenset[int] = frozenset()
    stop_bytes: tuple[bytes, ...] = ()
    piece: Callable[[int], bytes] | None = None
    logprobs: int = -1
    priority: Priority = "interactive"
    deadline_s: float = float("inf")
    """On the engine's clock."""
    cache: bool = True
    marks: tuple[int, ...] = ()
    """Prompt positions where a later prompt is likely to part from this one (message starts)."""
    session: str = ""
    context_shift: bool = False
    n_keep: int = 0
    submitted_s: float = 0.0
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    n_cached: int = 0
    n_predicted: int = 0
    intervals_ms: list[float] = field(default_factory=list[float])
    sequences: list[Sequence] = field(default_factory=list["Sequence"])
    open_sequences: int = 0
    position: int = 0
    over: bool = False

    def __post_init__(self) -> None:
        self.sequences = [Sequence(self, i, sampler) for i, sampler in enumerate(self.samplers)]
        self.open_sequences = len(self.sequences)

    def order(self, now: float) -> tuple[int, float, float]:
        """Sorts waiting jobs: class, then deadline, then arrival."""
        promoted_s = self.submitted_s + PROMOTE_AFTER_S
        if now > promoted_s:
            return (0, min(self.deadline_s, promoted_s), self.submitted_s)
        return (0 if self.priority == "interactive" else 1, self.deadline_s, self.submitted_s)

    def timings(self) -> Timings:
        """The whole job's figures, from the step loop's clock."""
        n_prompt = len(self.prompt) - self.n_cached
        prompt_s = max(0.0, self.first_token_s - self.admitted_s)
        predicted_s = max(0.0, self.last_token_s - self.first_token_s)
        steps = self.n_predicted - len(self.sequences)
        ranked = sorted(self.intervals_ms)
        return Timings(
            cache_n=self.n_cached,
            prompt_n=n_prompt,
            prompt_ms=prompt_s * 1e3,
            prompt_per_second=n_prompt / prompt_s if prompt_s > 0 else 0.0,
            predicted_n=self.n_predicted,
            predicted_ms=predicted_s * 1e3,
            predicted_per_second=steps / predicted_s if steps > 0 and predicted_s > 0 else 0.0,
            queue_ms=max(0.0, self.admitted_s - self.submitted_s) * 1e3,
            ttft_ms=max(0.0, self.first_token_s - self.submitted_s) * 1e3,
            itl_p50_ms=ranked[len(ranked) // 2] if ranked else 0.0,
            itl_p95_ms=ranked[min(len(ranked) - 1, len(ranked) * 95 // 100)] if ranked else 0.0,
        )


class Sequence:
    """Choice `index` of `job`, in KV slot `slot` once admitted."""

    __slots__ = (
        "finished",
        "following",
        "index",
        "job",
        "last_s",
        "n_out",
        "n_past",
        "pauses",
        "sampler",
        "slot",
        "tail",
        "tokens",
        "until",
    )

    def __init__(self, job: Job, index: int, sampler: Sampler) -> None:
        self.job = job
        self.index = index
        self.sampler = sampler
        self.tokens = list(job.prompt)
        self.n_out = 0
        """Tokens sampled so far."""
        self.n_past = 0
        """Leading tokens whose KV is in the cache."""
        self.slot = -1
        self.until = 0
        """Cells promised: n_past may grow to this."""
        self.following: tuple[Sequence, int] | None = None
        """Another sequence that is computing a shared prefix of this length: wait for it, then share."""
        self.pauses: list[int] = []
        """Positions where prefill stops for a moment, to take a checkpoint or serve a follower; ascending."""
        self.last_s = 0.0
        self.tail = b""
        self.finished = False

    @property
    def pending(self) -> int:
        """Tokens whose KV is not computed yet."""
        return len(self.tokens) - self.n_past

    @property
    def decoding(self) -> bool:
        """Whether only the token sampled last is left to compute."""
        return self.n_out > 0 and len(self.tokens) - self.n_past == 1
