from __future__ import annotations

import asyncio
import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.inbox import Inbox, merge
from localllm.types import Delta, Done, Event, Failed, Finish, Loading, Prefill, Queued, Timings, TokenLogprob, ToolCall, Usage

DONE = Done(Usage(), Timings())


async def read(inbox: Inbox) -> list[Event]:
    async with asyncio.timeout(10):
        return [event async for event in inbox]


@pytest.mark.parametrize(
    "before,after,both",
    [
        (Delta(0, "a", tokens=(1,)), Delta(0, "b", tokens=(2, 3)), Delta(0, "ab", tokens=(1, 2, 3))),
        (
            Delta(0, "a", logprobs=(TokenLogprob(1, (97,), -1.0),)),
            Delta(0, "b", logprobs=(TokenLogprob(2, (98,), -2.0),)),
            Delta(0, "ab", logprobs=(TokenLogprob(1, (97,), -1.0), TokenLogprob(2, (98,), -2.0))),
        ),
        (Delta(0, "a"), Delta(1, "b"), None),
        (Delta(0, "a"), Delta(0, "b", "reasoning"), None),
        (ToolCall(0, 1, "id", "name", "{"), ToolCall(0, 1, "id", "", "}"), ToolCall(0, 1, "id", "name", "{}")),
        (ToolCall(0, 1, "id", "name", "{"), ToolCall(0, 2, "other", "name", ""), None),
        (Prefill(1, 9, 0), Prefill(5, 9, 0), Prefill(5, 9, 0)),
        (Queued(2), Queued(1), Queued(1)),
        (Queued(1), Prefill(1, 9, 0), None),
        (Loading("weights", 0.1), Loading("weights", 0.2), Loading("weights", 0.2)),
        (Loading("weights", 1.0), Loading("context", 0.0), None),
        (Finish(0, "stop"), Finish(0, "stop"), None),
        (Delta(0, "a"), DONE, None),
    ],
)
def test_what_merges(before: Event, after: Event, both: Event | None) -> None:
    assert merge(before, after) == both


channels = st.sampled_from(["answer", "reasoning"])
deltas = st.builds(Delta, st.integers(0, 2), st.text(max_size=3), channels, st.lists(st.integers(0, 9), max_size=2).map(tuple))
calls = st.builds(ToolCall, st.integers(0, 2), st.integers(0, 1), st.just("id"), st.just(""), st.text(max_size=3))


def story(events: list[Event], choice: int) -> list[tuple[str, ...]]:
    """What a choice says, joined where neither channel nor call changes."""
    said: list[tuple[str, str]] = []
    for event in events:
        match event:
            case Delta(index=index) if index == choice:
                said.append((event.channel, event.text))
            case ToolCall(choice=index) if index == choice:
                said.append((f"call {event.index}", event.arguments_delta))
            case _:
                pass
    return [(where, "".join(text for _, text in parts)) for where, parts in itertools.groupby(said, lambda part: part[0])]


@given(st.lists(st.lists(deltas | calls, max_size=6), max_size=6), st.booleans())
def test_merging_loses_nothing_and_keeps_each_choice_in_order(batches: list[list[Event]], slow: bool) -> None:
    async def run() -> list[Event]:
        inbox = Inbox()
        reading = asyncio.create_task(read(inbox))
        for batch in batches:
            inbox.push(batch)
            if not slow:
                await asyncio.sleep(0)
        inbox.push([DONE])
        return await reading

    sent = list(itertools.chain(*batches))
    got = asyncio.run(run())
    assert got[-1] == DONE
    for choice in range(3):
        assert story(got, choice) == story(sent, choice)
        tokens = [[t for e in events if isinstance(e, Delta) and e.index == choice for t in e.tokens] for events in (got, sent)]
        assert tokens[0] == tokens[1]


async def test_waiting_text_of_many_choices_takes_one_event_each() -> None:
    inbox = Inbox()
    for n in range(1000):
        inbox.push([Delta(choice, f"{n} ", tokens=(n,)) for choice in range(8)])
    inbox.push([Finish(choice, "stop") for choice in range(8)] + [DONE])
    events = await read(inbox)
    assert [type(e) for e in events] == [Delta] * 8 + [Finish] * 8 + [Done]
    assert all(event.tokens == tuple(range(1000)) for event in events if isinstance(event, Delta))


async def test_events_of_another_thread_arrive() -> None:
    inbox = Inbox()

    def push() -> None:
        for n in range(1000):
            inbox.push([Delta(0, str(n % 10))])
        inbox.push([DONE])

    thread = threading.Thread(target=push)
    thread.start()
    events = await read(inbox)
    thread.join()
    assert "".join(e.text for e in events if isinstance(e, Delta)) == "0123456789" * 100


@pytest.mark.parametrize("end", [DONE, Failed({"message": "x"})])
async def test_nothing_comes_after_the_end(end: Event) -> None:
    inbox = Inbox()
    inbox.push([Delta(0, "a"), end])
    assert await read(inbox) == [Delta(0, "a"), end]
    inbox.push([Delta(0, "b"), end])
    assert await read(inbox) == []


async def test_closing_ends_a_reader_that_waits() -> None:
    inbox = Inbox()
    reading = asyncio.create_task(read(inbox))
    await asyncio.sleep(0)
    inbox.close()
    assert await reading == []
    inbox.push([DONE])
    assert await read(inbox) == []


def test_a_push_after_the_loop_is_closed_is_no_trouble() -> None:
    async def make() -> Inbox:
        return Inbox()

    inbox = asyncio.run(make())
    inbox.push([DONE])
