"""One answer: how it is asked for, the events of its stream folded together, and the loop that shows them and obeys Ctrl-C.

Knows nothing of options, files or conversations.
"""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from localllm.cli.output import Screen
from localllm.errors import LocalLLMError
from localllm.types import Backend, Delta, Done, Event, Failed, Finish, Message, Request, Sampling, Timings, ToolCall, Usage


@dataclass(frozen=True, slots=True)
class Manner:
    """How to answer, apart from what is asked."""

    sampling: Sampling
    thinking: bool | None = None
    """None leaves it to the model's template."""
    context_shift: bool = False

    def request(self, **what: Any) -> Request:
        """A request for `what`: messages and session, or prompt."""
        kwargs = {} if self.thinking is None else {"enable_thinking": self.thinking}
        ident = uuid.uuid4().hex
        return Request(**what, sampling=self.sampling, template_kwargs=kwargs, context_shift=self.context_shift, id=ident)


class Answer:
    """What came of a request so far."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, str]] = {}
        self.finish_reason = ""
        self.usage = Usage()
        self.timings: Timings | None = None
        """None until the engine reported."""
        self.error: LocalLLMError | None = None
        self.interrupted = False
        """By Ctrl-C."""

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def tool_calls(self) -> tuple[dict[str, Any], ...]:
        """In the OpenAI shape."""
        return tuple(
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for _, call in sorted(self._calls.items())
        )

    def add(self, event: Event) -> None:
        match event:
            case Delta(channel="reasoning", text=text):
                self._reasoning.append(text)
            case Delta(text=text):
                self._text.append(text)
            case ToolCall(index=index, id=id, name=name, arguments_delta=arguments):
                call = self._calls.setdefault(index, {"id": id, "name": name, "arguments": ""})
                call["arguments"] += arguments
            case Finish(reason=reason):
                self.finish_reason = reason
            case Done(usage=usage, timings=timings):
                self.usage, self.timings = usage, timings
            case Failed(error=error):
                self.error = LocalLLMError.from_json(dict(error))
            case _:
                pass

    def message(self) -> Message:
        """The answer as a turn of the conversation."""
        return Message("assistant", self.text, reasoning_content=self.reasoning, tool_calls=self.tool_calls)

    def to_json(self, model: str) -> dict[str, Any]:
        """The stable shape of `run --json`."""
        return {
            "model": model,
            "answer": self.text,
            "reasoning": self.reasoning,
            "tool_calls": list(self.tool_calls),
            "finish_reason": self.finish_reason,
            "route": {"model": model, "tier": None, "why": []},
            "timings": asdict(self.timings or Timings()),
            "usage": asdict(self.usage),
        }


@contextmanager
def on_interrupt(callback: Callable[[], object]) -> Generator[None]:
    """Call `callback` in the running loop for each Ctrl-C, instead of raising KeyboardInterrupt."""
    loop = asyncio.get_running_loop()

    # signal.signal and not loop.add_signal_handler, which Windows does not have.
    def handle(_: int, __: FrameType | None) -> None:
        loop.call_soon_threadsafe(callback)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


async def stream_answer(backend: Backend, request: Request, screen: Screen) -> Answer:
    """Show `request` being answered; an error of the engine is in the result, beside the text that came before it.

    The first Ctrl-C asks the engine to stop, so that it still reports its timings; the second does not wait for it.
    A reader of stdout that goes away counts as the first. The request must carry an `id`.
    """
    answer = Answer()
    task = asyncio.current_task()
    assert task is not None
    asking: asyncio.Future[None] | None = None

    async def ask_to_stop() -> None:
        try:
            await backend.call("cancel", id=request.id)
        except LocalLLMError:
            task.cancel()

    def stop() -> None:
        nonlocal asking
        if asking is None:
            asking = asyncio.ensure_future(ask_to_stop())
        else:
            task.cancel()

    def interrupt() -> None:
        answer.interrupted = True
        stop()

    with on_interrupt(interrupt):
        try:
            async with backend.stream(request) as events:
                async for event in events:
                    answer.add(event)
                    try:
                        screen.show(event)
                    except BrokenPipeError:
                        stop()
        except asyncio.CancelledError:
            if asking is None:
                raise
            task.uncancel()
            answer.finish_reason = "cancelled"
        finally:
            if asking is not None:
                asking.cancel()
    return answer
