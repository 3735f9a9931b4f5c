"""Events on their way from the thread that reads them to one consumer in an event loop.

It knows how to hand over without either side waiting for the other, and which events can be told
as one. Where events come from it does not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from localllm.types import Delta, Done, Event, Failed, Loading, Prefill, Queued, ToolCall


class Inbox(AsyncIterator[Event]):
    """An iterator over pushed events; it ends after Done or Failed, or once it is closed.

    For a slow consumer new events merge into waiting ones, so that memory is bounded by the text
    and not by the number of tokens.
    """

    def __init__(self) -> None:
        """Belongs to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._lock = threading.Lock()
        self._pushed: list[Event] = []
        self._last: dict[int, int] = {}
        self._taken: deque[Event] = deque()
        self._ended = False

    def push(self, events: Sequence[Event]) -> None:
        """Hand over `events`, from any thread, without waiting."""
        with self._lock:
            wake = not self._pushed
            for event in events:
                self._add(event)
        if wake:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
                self._loop.call_soon_threadsafe(self._news.set)

    def close(self) -> None:
        """End the iterator; for its consumer to call."""
        self._ended = True
        self._taken.clear()
        self._news.set()

    async def __anext__(self) -> Event:
        while not self._taken and not self._ended:
            await self._news.wait()
            self._news.clear()
            with self._lock:
                self._taken.extend(self._pushed)
                self._pushed.clear()
                self._last.clear()
        if self._ended:
            raise StopAsyncIteration
        event = self._taken.popleft()
        self._ended = isinstance(event, (Done, Failed))
        return event

    def _add(self, event: Event) -> None:
        """Append `event`, or merge it into the last waiting event of its choice; order matters only within one."""
        choice = _choice(event)
        at = self._last.get(choice)
        if at is not None and (merged := merge(self._pushed[at], event)) is not None:
            self._pushed[at] = merged
        else:
            self._last[choice] = len(self._pushed)
            self._pushed.append(event)


def merge(before: Event, after: Event) -> Event | None:
    """One event that says what the two say, or None: text of one choice and channel is joined, progress is replaced."""
    match before, after:
        case Delta(), Delta() if (before.index, before.channel) == (after.index, after.channel):
            text, tokens, logprobs = before.text + after.text, before.tokens + after.tokens, before.logprobs + after.logprobs
            return Delta(before.index, text, before.channel, tokens, logprobs)
        case ToolCall(), ToolCall() if (before.choice, before.index) == (after.choice, after.index):
            return replace(before, arguments_delta=before.arguments_delta + after.arguments_delta)
        case (Queued(), Queued()) | (Prefill(), Prefill()):
            return after
        case Loading(), Loading() if before.stage == after.stage:
            return after
        case _:
            return None


def _choice(event: Event) -> int:
    """The choice an event belongs to; -1 for the stream as a whole."""
    match event:
        case Delta(index=choice) | ToolCall(choice=choice):
            return choice
        case _:
            return -1
