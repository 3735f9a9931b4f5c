"""From sampled token ids to events: bytes, text, stop strings, channels, tool calls.

The step thread only enqueues; one output thread turns tokens into text and hands each request's
events to its sink. When tokens come faster than once in 20 ms they travel together; when they come
slower, the thread wakes once for each, since every wake-up takes a core from the computation.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue
from typing import Protocol

from localllm.engine.sequence import Job, Sequence, TokenScore
from localllm.engine.store import Entry, StateStore
from localllm.errors import EngineError, LocalLLMError
from localllm.prompt.parse import CallArguments, CallStart, OutputParser, Piece, Text
from localllm.prompt.stream import StopMatcher, Utf8Stream
from localllm.types import (
    Channel,
    Delta,
    Done,
    Event,
    Failed,
    Finish,
    FinishReason,
    Prefill,
    Queued,
    Timings,
    TokenLogprob,
    ToolCall,
    Usage,
)

logger = logging.getLogger("localllm.engine")

clock = time.perf_counter

Sink = Callable[[list[Event]], None]
"""Takes the events of one request, in order: on the output thread, or on the caller's for a request that is refused."""

FLUSH_S = 0.020


class Vocabulary(Protocol):
    """Bytes of tokens: `piece` of any, `text` as a reader should see it (hidden control tokens are empty)."""

    def piece(self, token: int) -> bytes: ...
    def text(self, token: int) -> bytes: ...


class ChoiceText:
    """The text of one choice as it grows."""

    def __init__(self, index: int, vocabulary: Vocabulary, stops: tuple[str, ...], parser: OutputParser | None) -> None:
        self.index = index
        self.reasoning_tokens = 0
        self.events: list[Event] = []
        """Where events go; all choices of an answer share one list."""
        self._vocabulary = vocabulary
        self._utf8 = Utf8Stream()
        self._stops = StopMatcher(stops)
        self._parser = parser
        self._stopped: str | None = None
        self._channel: Channel = "answer"
        self._call_ids: dict[int, str] = {}
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def push(self, token: int, score: TokenScore | None) -> None:
        """Add a token; its text waits for `flush`."""
        self._tokens.append(token)
        if score is not None:
            raw = self._vocabulary.piece
            top = tuple((t, tuple(raw(t)), p) for t, p in score.top)
            self._logprobs.append(TokenLogprob(token, tuple(raw(token)), score.logprob, top))
        if self._stopped is None:
            text = self._utf8.push(self._vocabulary.text(token))
            if text:
                self._feed(text)
        if self._channel == "reasoning":
            self.reasoning_tokens += 1

    def finish(self, reason: FinishReason) -> None:
        """Let out what was held back, then say how the choice ended."""
        if self._stopped is None:
            self._feed(self._utf8.flush())
        if self._stopped is None:
            text, self._stopped = self._stops.flush()
            self._parse(text)
        if self._parser is not None:
            self._take_pieces(self._parser.finish())
        self._flush(ids=True)
        if self._call_ids and reason == "stop":
            reason = "tool_calls"
        self.events.append(Finish(self.index, reason, self._stopped or ""))

    def flush(self) -> None:
        """Make an event of the text since the last one; ids without text wait for the next text."""
        self._flush(ids=False)

    def _feed(self, text: str) -> None:
        safe, self._stopped = self._stops.push(text)
        self._parse(safe)

    def _parse(self, text: str) -> None:
        if not text:
            return
        if self._parser is None:
            self._text.append(text)
        else:
            self._take_pieces(self._parser.feed(text))

    def _take_pieces(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            match piece:
                case CallStart(index=index, name=name):
                    self.flush()
                    self._call_ids[index] = f"call_{secrets.token_hex(12)}"
                    self.events.append(ToolCall(self.index, index, self._call_ids[index], name, ""))
                case CallArguments(index=index, delta=delta):
                    self.flush()
                    self.events.append(ToolCall(self.index, index, self._call_ids[index], "", delta))
                case Text(channel=channel, text=text):
                    if channel != self._channel:
                        self.flush()
                        self._channel = channel
                    self._text.append(text)

    def _flush(self, *, ids: bool) -> None:
        if self._text or (ids and self._tokens):
            self.events.append(Delta(self.index, "".join(self._text), self._channel, tuple(self._tokens), tuple(self._logprobs)))
            self._text, self._tokens, self._logprobs = [], [], []


class Output:
    """The output thread and its queue."""

    def __init__(self, store: StateStore, saver: Executor) -> None:
        self.store = store
        self.saver = saver
        self._queue: SimpleQueue[tuple[Answer, Callable[[], None]] | None] = SimpleQueue()
        self._urgent = threading.Event()
        self._thread = threading.Thread(target=self._run, name="localllm-output", daemon=True)
        self._thread.start()

    def put(self, answer: Answer, action: Callable[[], None], *, urgent: bool = True) -> None:
        """Run `action` on the output thread, then give the answer's events to its sink."""
        self._queue.put((answer, action))
        if urgent:
            self._urgent.set()

    def close(self) -> None:
        """Deliver what is queued and end the thread."""
        self._queue.put(None)
        self._urgent.set()
        self._thread.join()

    def _run(self) -> None:
        delivered_s = 0.0
        while (item := self._queue.get()) is not None:
            if (early_s := delivered_s + FLUSH_S - clock()) > 0:
                self._urgent.wait(early_s)
            self._urgent.clear()
            touched: dict[Answer, None] = {}
            while item is not None:
                answer, action = item
                answer.apply(action)
                touched[answer] = None
                try:
                    item = self._queue.get_nowait()
                except Empty:
                    break
            for answer in touched:
                answer.deliver()
            if item is None:
                return
            delivered_s = clock()


class Answer:
    """Listens to one job on the step thread and speaks to its sink on the output thread."""

    def __init__(self, output: Output, sink: Sink, choices: list[ChoiceText]) -> None:
        self._output = output
        self._sink = sink
        self._choices = choices
        self._events: list[Event] = []
        for choice in choices:
            choice.events = self._events
        self._saving: Future[bool] | None = None
        self._broken = False

    # on the step thread

    def queued(self, job: Job, position: int) -> None:
        self._output.put(self, lambda: self._events.append(Queued(position)))

    def prefilled(self, job: Job, done: int, cached: int) -> None:
        self._output.put(self, lambda: self._events.append(Prefill(done, len(job.prompt), cached)), urgent=False)

    def token(self, sequence: Sequence, token: int, score: TokenScore | None) -> None:
        choice = self._choices[sequence.index]
        if token not in sequence.job.end_tokens:
            self._output.put(self, lambda: choice.push(token, score), urgent=sequence.n_out == 1)

    def finished(self, sequence: Sequence, reason: FinishReason) -> None:
        choice = self._choices[sequence.index]
        self._output.put(self, lambda: choice.finish(reason))

    def save(self, job: Job, entry: Entry) -> None:
        self._saving = self._output.saver.submit(self._output.store.save_session, job.session, entry)

    def done(self, job: Job, timings: Timings) -> None:
        def end() -> None:
            reasoning = sum(choice.reasoning_tokens for choice in self._choices)
            usage = Usage(len(job.prompt), job.n_cached, job.n_predicted, reasoning)
            self._events.append(Done(usage, timings))

        if self._saving is None:
            self._output.put(self, end)
        else:
            # a session is promised to be on disk when Done arrives
            self._saving.add_done_callback(lambda _: self._output.put(self, end))

    def failed(self, job: Job, error: LocalLLMError) -> None:
        def end() -> None:
            # text that waits for company comes before the end, not after
            for choice in self._choices:
                choice.flush()
            self._events.append(Failed(error.to_json()))

        self._output.put(self, end)

    # on the output thread

    def apply(self, action: Callable[[], None]) -> None:
        """Run one action; an error in it ends this answer only."""
        if self._broken:
            return
        try:
            action()
        except Exception as error:
            logger.exception("turning tokens into text failed")
            self._broken = True
            failure = EngineError(f"the answer could not be read: {error!r}", hint="this is a bug in localllm; please report it")
            self._events.append(Failed(failure.to_json()))

    def deliver(self) -> None:
        """Give the sink what has come up."""
        if not self._broken:
            for choice in self._choices:
                choice.flush()
        events = self._events[:]
        self._events.clear()
        if not events:
            return
        try:
            self._sink(events)
        except Exception:
            logger.exception("a request's sink failed")
