"""The values that cross every boundary: what is asked (Request) and what comes back (events).

All are frozen; all turn into plain JSON and back (`wire.py`). Names and defaults of sampling are
llama-server's. Times are milliseconds, sizes are bytes, token counts are plain integers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from localllm.errors import InvalidRequest

Channel = Literal["answer", "reasoning"]
Priority = Literal["interactive", "batch"]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
JSON = Mapping[str, Any]

MAX_CHOICES = 64


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, in the OpenAI shape that chat templates expect.

    `content` is text or a list of parts (`{"type": "text", "text": …}`); `tool_calls` holds
    `{"id", "type": "function", "function": {"name", "arguments"}}`.
    """

    role: str
    content: str | tuple[JSON, ...] | None = ""
    reasoning_content: str = ""
    tool_calls: tuple[JSON, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    def for_template(self) -> dict[str, Any]:
        """As a template sees it: empty optional fields are absent."""
        content = self.content if isinstance(self.content, str) or self.content is None else [dict(p) for p in self.content]
        out: dict[str, Any] = {"role": self.role, "content": content}
        for key in ("reasoning_content", "tool_call_id", "name"):
            if value := getattr(self, key):
                out[key] = value
        if self.tool_calls:
            out["tool_calls"] = [dict(call) for call in self.tool_calls]
        return out


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen and when to stop: llama-server's names, defaults and order."""

    temperature: float = 0.8
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    top_n_sigma: float = -1.0
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int = -1
    """-1 draws one; 0 is a seed like any other."""
    max_tokens: int = -1
    """-1 means until the model stops or the context is full."""
    min_keep: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias); -inf forbids."""
    grammar: str = ""
    json_schema: JSON | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, message: str, hint: str) -> None:
            if not ok:
                raise InvalidRequest(message, hint=hint)

        check(self.temperature >= 0, f"temperature is {self.temperature}", "use 0 (greedy) or more")
        check(0 <= self.top_p <= 1, f"top_p is {self.top_p}", "use a number from 0 to 1")
        check(0 <= self.min_p <= 1, f"min_p is {self.min_p}", "use a number from 0 to 1")
        check(self.repeat_last_n >= -1, f"repeat_last_n is {self.repeat_last_n}", "use -1 (whole context), 0 (off) or more")
        check(self.dry_penalty_last_n >= -1, f"dry_penalty_last_n is {self.dry_penalty_last_n}", "use -1, 0 or more")
        check(self.max_tokens >= -1, f"max_tokens is {self.max_tokens}", "use -1 (no limit), 0 (prompt only) or more")
        check(self.mirostat in (0, 1, 2), f"mirostat is {self.mirostat}", "use 0 (off), 1 or 2")
        check(not (self.grammar and self.json_schema is not None), "both grammar and json_schema are given", "give one of them")
        check(all(self.stop), "a stop string is empty", "leave it out")


@dataclass(frozen=True, slots=True)
class Request:
    """One generation: exactly one of `messages`, `prompt`, `tokens`, and how to answer it."""

    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    tokens: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    tools: tuple[JSON, ...] = ()
    tool_choice: str | JSON = "auto"
    parallel_tool_calls: bool = True
    response_format: JSON | None = None
    template_kwargs: JSON = field(default_factory=dict[str, Any])
    n: int = 1
    logprobs: int = -1
    """How many alternatives to report with each token; -1 reports none, 0 the token's own."""
    priority: Priority = "interactive"
    deadline_ms: float | None = None
    """Wanted time to the first token, counted from submission; orders the queue, never drops."""
    cache: bool = True
    draft: Literal["auto", "none"] = "auto"
    session: str = ""
    """Key of a saved KV state; the state is on disk when `Done` arrives."""
    adapter: str = ""
    context_shift: bool = False
    n_keep: int = 0
    id: str = ""

    def __post_init__(self) -> None:
        given = (bool(self.messages), self.prompt is not None, bool(self.tokens))
        if sum(given) != 1:
            raise InvalidRequest("a request needs exactly one of messages, prompt and tokens", hint="give one, and not empty")
        if not 1 <= self.n <= MAX_CHOICES:
            raise InvalidRequest(f"n is {self.n}", hint=f"use 1 to {MAX_CHOICES}")
        if self.deadline_ms is not None and not self.deadline_ms >= 0:
            raise InvalidRequest(f"deadline_ms is {self.deadline_ms}", hint="use milliseconds from now")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token with its log-probability under the unmodified logits, and its best alternatives."""

    id: int
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[tuple[int, tuple[int, ...], float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """The engine's own clock, named as llama-server names it.

    `predicted_n` counts all tokens of all choices; rates are over the steps between the first and
    the last token, 0.0 when there is one token; never NaN.
    """

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    prompt_per_second: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0
    predicted_per_second: float = 0.0
    draft_n: int = 0
    draft_n_accepted: int = 0
    queue_ms: float = 0.0
    ttft_ms: float = 0.0
    itl_p50_ms: float = 0.0
    itl_p95_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Queued:
    """Waiting for room; `position` 1 is next."""

    position: int
    type: Literal["queued"] = "queued"


@dataclass(frozen=True, slots=True)
class Loading:
    stage: str
    fraction: float
    type: Literal["loading"] = "loading"


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompt tokens in the KV cache so far: `done` of `total`, of which `cached` were there before."""

    done: int
    total: int
    cached: int
    type: Literal["prefill"] = "prefill"


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of choice `index`; `tokens` are the ids behind it (a held-back stop string may delay text)."""

    index: int
    text: str
    channel: Channel = "answer"
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    type: Literal["delta"] = "delta"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Part of tool call number `index` of choice `choice`: the first part names it, later ones extend the arguments."""

    choice: int
    index: int
    id: str
    name: str
    arguments_delta: str
    type: Literal["tool_call"] = "tool_call"


@dataclass(frozen=True, slots=True)
class Finish:
    index: int
    reason: FinishReason
    stop_text: str = ""
    type: Literal["finish"] = "finish"


@dataclass(frozen=True, slots=True)
class Done:
    usage: Usage
    timings: Timings
    type: Literal["done"] = "done"


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a stream that could not finish; `error` is `LocalLLMError.to_json()`."""

    error: JSON
    type: Literal["failed"] = "failed"


Event = Queued | Loading | Prefill | Delta | ToolCall | Finish | Done | Failed


class Backend(Protocol):
    """One loaded model, wherever it runs: in this process, in a child, on another machine."""

    def stream(self, request: Request) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Run `request`; leaving the context cancels it. Exactly one Done or Failed ends the iterator."""
        ...

    async def call(self, op: str, **args: Any) -> Any:
        """A short operation beside generation: tokenize, detokenize, template, count, props, slots, cache_clear."""
        ...

    async def close(self) -> None: ...
