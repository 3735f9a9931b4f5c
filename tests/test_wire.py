from __future__ import annotations

import dataclasses
import io
import math
import os
import threading
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm import wire
from localllm.engine.config import EngineConfig
from localllm.errors import InvalidRequest, UsageError
from localllm.types import (
    Delta,
    Done,
    Event,
    Failed,
    Finish,
    Loading,
    Message,
    Prefill,
    Queued,
    Request,
    Sampling,
    Timings,
    TokenLogprob,
    ToolCall,
    Usage,
)

EVENTS: list[Event] = [
    Queued(2),
    Loading("weights", 0.5),
    Prefill(10, 20, 5),
    Delta(0, "héllo\n\u2028\x00 🎈 \ud800", tokens=(1, 2), logprobs=(TokenLogprob(1, (104,), -0.5, ((1, (104,), -0.5), (2, (), -3.0))),)),
    Delta(3, "", "reasoning"),
    ToolCall(1, 0, "call_1", "weather", '{"city": "'),
    Finish(0, "tool_calls", "</s>"),
    Done(Usage(1, 2, 3, 4), Timings(itl_p95_ms=1.25)),
    Failed({"class": "EngineDied", "message": "gone", "hint": "", "details": {"last_words": ["a"]}}),
]


def over_the_wire(value: Any) -> Any:
    line = wire.encode({"value": value})
    assert line.count(b"\n") == 1
    assert line.isascii()
    return wire.parse(line)["value"]


@pytest.mark.parametrize("event", EVENTS, ids=lambda e: e.type)
def test_an_event_comes_back_as_it_was(event: Event) -> None:
    back = wire.decode_event(over_the_wire(event))
    assert back == event
    assert type(back) is type(event)


def test_every_event_class_has_a_type_that_the_wire_knows() -> None:
    assert {type(event) for event in EVENTS} == set(Event.__args__)


def test_defaults_stay_at_home() -> None:
    assert over_the_wire(Delta(0, "a")) == {"index": 0, "text": "a", "type": "delta"}
    assert over_the_wire(Request(prompt="a")) == {"prompt": "a"}


def test_a_full_request_comes_back_as_it_was() -> None:
    request = Request(
        messages=(
            Message("user", ({"type": "text", "text": "a"}, {"type": "text", "text": "b"})),
            Message("assistant", None, tool_calls=({"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},)),
            Message("tool", "42", tool_call_id="1"),
        ),
        sampling=Sampling(
            temperature=1, stop=("a", "b"), logit_bias=((5, -math.inf), (6, 1.5)), json_schema=MappingProxyType({"type": "object"})
        ),
        tools=({"type": "function"},),
        tool_choice={"type": "function", "function": {"name": "f"}},
        template_kwargs={"enable_thinking": False},
        deadline_ms=5,
        n=2,
        priority="batch",
        id="x",
    )
    back = wire.decode(Request, over_the_wire(request))
    assert back == request
    assert back.sampling.logit_bias == ((5, -math.inf), (6, 1.5))
    assert isinstance(back.messages[0].content, tuple)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
requests = st.builds(
    Request,
    prompt=st.text(st.characters(), max_size=50),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0, 5),
        seed=st.integers(-1, 2**32),
        stop=st.lists(st.text(min_size=1), max_size=3).map(tuple),
        logit_bias=st.lists(st.tuples(st.integers(0, 10**6), st.floats(allow_nan=False)), max_size=3).map(tuple),
        json_schema=st.none() | st.dictionaries(st.text(), json_values, max_size=3),
    ),
    template_kwargs=st.dictionaries(st.text(), json_values, max_size=3),
    n=st.integers(1, 64),
    session=st.text(max_size=5),
)


@given(requests)
def test_any_request_comes_back_as_it_was(request: Request) -> None:
    assert wire.decode(Request, over_the_wire(request)) == request


def test_a_configuration_comes_back_as_it_was() -> None:
    config = EngineConfig("/models/ä.gguf", n_ctx=4096, type_k="q8_0", flash_attn="on")
    assert wire.decode(EngineConfig, over_the_wire(config)) == config


@pytest.mark.parametrize(
    "data,names",
    [
        ({"prompt": "a", "promt": "b"}, "promt: unknown field"),
        ({"prompt": "a", "sampling": {"temprature": 1}}, "sampling.temprature: unknown field"),
        ({"prompt": "a", "sampling": {"top_k": "many"}}, "sampling.top_k: wanted an integer, got 'many'"),
        ({"prompt": "a", "sampling": {"top_k": True}}, "sampling.top_k: wanted an integer"),
        ({"prompt": "a", "sampling": {"stop": "x"}}, "sampling.stop: wanted an array"),
        ({"prompt": "a", "sampling": {"logit_bias": [[1, 2, 3]]}}, "sampling.logit_bias: wanted an array of 2"),
        ({"prompt": "a", "priority": "high"}, "priority: wanted one of 'interactive', 'batch'"),
        ({"messages": [{"content": "a"}]}, "messages.role: missing"),
        ({"prompt": 1}, "prompt: wanted text, got 1; or wanted null"),
        ([], "wanted an object"),
    ],
)
def test_a_field_that_does_not_fit_is_named(data: Any, names: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire.decode(Request, data)
    assert names in caught.value.message


def test_a_value_checks_itself_when_it_arrives() -> None:
    with pytest.raises(InvalidRequest, match="temperature is -1"):
        wire.decode(Request, {"prompt": "a", "sampling": {"temperature": -1}})
    with pytest.raises(UsageError, match="n_seq is 0"):
        wire.decode(EngineConfig, {"model_path": "a", "n_seq": 0})


@pytest.mark.parametrize("data", [{}, {"type": "unheard"}, {"type": 5}, [], None])
def test_what_is_no_event_is_an_error(data: Any) -> None:
    with pytest.raises(InvalidRequest, match="not an event"):
        wire.decode_event(data)


@pytest.mark.parametrize("line", [b"", b"\n", b"{", b"[]\n", b"\xff\n", b"1\n", b"[" * 100_000])
def test_what_is_no_object_is_an_error(line: bytes) -> None:
    with pytest.raises(InvalidRequest):
        wire.parse(line)


def test_what_json_cannot_say_is_an_error() -> None:
    with pytest.raises(InvalidRequest, match="object cannot be written as JSON"):
        wire.encode({"a": object()})


def test_nesting_too_deep_is_an_error() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        wire.encode(deep)
    while deep:  # taken apart by hand: the interpreter would do it recursively
        deep = deep["a"]


def test_a_line_beyond_the_bound_is_an_error_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_LINE_BYTES", 100)
    with pytest.raises(InvalidRequest, match="more than 100"):
        wire.encode({"a": "x" * 100})
    pipe = io.BytesIO(b"before\n" + b"x" * 101 + b"\n" + b"y" * 99 + b"\n" + b"z" * 5000)
    before, first, between, second = wire.read_lines(pipe)
    assert (before, between) == (b"before\n", b"y" * 99 + b"\n")
    assert isinstance(first, InvalidRequest)
    assert isinstance(second, InvalidRequest)


def test_lines_of_many_threads_stay_whole_and_in_order() -> None:
    receiving, sending = os.pipe()
    writer = wire.LineWriter(sending, "test")

    def send(thread: int) -> None:
        for n in range(500):
            writer.put(wire.encode({"thread": thread, "n": n, "pad": "x" * n}))

    threads = [threading.Thread(target=send, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    with open(receiving, "rb") as pipe:
        closing = threading.Thread(target=lambda: ([thread.join() for thread in threads], writer.close()))
        closing.start()
        seen: dict[int, list[int]] = {t: [] for t in range(4)}
        for line in pipe:
            message = wire.parse(line)
            seen[message["thread"]].append(message["n"])
        closing.join()
    assert seen == {t: list(range(500)) for t in range(4)}


def test_lines_that_gathered_leave_in_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    receiving, sending = os.pipe()
    writes: list[bytes] = []
    entered, release = threading.Event(), threading.Event()

    def write(fd: int, data: Any) -> int:
        writes.append(bytes(data))
        entered.set()
        assert release.wait(10)
        return len(data)

    monkeypatch.setattr(wire.os, "write", write)
    writer = wire.LineWriter(sending, "test")
    writer.put(b"a\n")
    assert entered.wait(10)
    for line in (b"b\n", b"c\n", b"d\n"):
        writer.put(line)
    release.set()
    writer.close()
    os.close(receiving)
    assert writes == [b"a\n", b"b\nc\nd\n"]


def test_writing_to_a_broken_pipe_is_no_trouble() -> None:
    receiving, sending = os.pipe()
    writer = wire.LineWriter(sending, "test")
    os.close(receiving)
    writer.put(b"a\n")
    writer.put(b"b\n")
    writer.close(10)
    writer.put(b"c\n")


def test_all_fields_of_the_crossing_types_have_a_decoder() -> None:
    for kind in (Request, EngineConfig, *Event.__args__):
        assert dataclasses.is_dataclass(kind)
        assert wire._decoder(kind)
