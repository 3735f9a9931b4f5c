"""A worker process with the real engine and the demo model in it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from localllm.engine.config import EngineConfig
from localllm.errors import ContextExceeded, EngineDied, InvalidRequest, LocalLLMError, ModelError
from localllm.process import EngineProcess
from localllm.types import Delta, Done, Event, Failed, Finish, Loading, Message, Request, Sampling

WAIT_S = 60
GREEDY = Sampling(temperature=0, max_tokens=60)
ENDLESS = Request(prompt="Once upon a time", sampling=Sampling(temperature=0, ignore_eos=True))


def ask(question: str, sampling: Sampling = GREEDY) -> Request:
    return Request(messages=(Message("user", question),), sampling=sampling)


async def answer(engine: EngineProcess, request: Request) -> list[Event]:
    async with asyncio.timeout(WAIT_S), engine.stream(request) as events:
        return [event async for event in events]


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta) and event.channel == "answer")


async def first_delta(events: AsyncIterator[Event]) -> Delta:
    async with asyncio.timeout(WAIT_S):
        async for event in events:
            if isinstance(event, Delta):
                return event
    raise AssertionError("the stream ended without text")


async def kill(engine: EngineProcess) -> None:
    """Kill the worker and wait until its death is noticed."""
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(WAIT_S):
        while engine.pid == pid:
            await asyncio.sleep(0)


async def start(path: Path, **config: int) -> EngineProcess:
    return await asyncio.wait_for(EngineProcess.start(EngineConfig(str(path), n_threads=2, **config)), WAIT_S)


@pytest.fixture
async def engine(demo_large: Path) -> AsyncIterator[EngineProcess]:
    engine = await start(demo_large)
    yield engine
    await asyncio.wait_for(engine.close(), WAIT_S)


async def test_the_demo_answers_from_its_own_process(engine: EngineProcess) -> None:
    assert engine.pid not in (None, os.getpid())
    assert engine.info["n_vocab"] == 2048
    events = await answer(engine, ask("What is the capital of France?"))
    assert "Paris" in text(events)
    assert isinstance(events[-1], Done)
    assert events[-1].usage.completion_tokens > 0
    assert events[-1].timings.predicted_per_second > 0
    assert sum(isinstance(e, (Done, Failed)) for e in events) == 1


async def test_two_streams_at_once_say_what_each_says_alone(engine: EngineProcess) -> None:
    questions = ["What is the capital of France?", "What is 2 + 3?"]
    alone = [text(await answer(engine, ask(q))) for q in questions]
    assert [text(events) for events in await asyncio.gather(*(answer(engine, ask(q)) for q in questions))] == alone
    assert all(alone)


async def test_tokens_survive_the_way_there_and_back(engine: EngineProcess) -> None:
    tokens = await engine.call("tokenize", text="Grüße, 42!")
    assert await engine.call("detokenize", tokens=tokens) == "Grüße, 42!"


async def test_leaving_a_stream_frees_its_place(engine: EngineProcess) -> None:
    async with engine.stream(ENDLESS) as events:
        await first_delta(events)
        assert (await engine.call("slots"))["running"] == 1
    async with asyncio.timeout(WAIT_S):
        while (await engine.call("slots"))["running"]:
            pass


async def test_a_prompt_beyond_the_context_fails_and_the_engine_lives_on(engine: EngineProcess) -> None:
    [failed] = await answer(engine, Request(prompt="word " * 5000))
    assert isinstance(failed, Failed)
    assert isinstance(LocalLLMError.from_json(dict(failed.error)), ContextExceeded)
    assert text(await answer(engine, ask("What is 2 + 3?")))
    with pytest.raises(InvalidRequest):
        await engine.call("dance")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
async def test_a_worker_killed_mid_answer_fails_it_and_the_next_request_is_answered(engine: EngineProcess) -> None:
    pid = engine.pid
    assert pid is not None
    async with engine.stream(ENDLESS) as events:
        await first_delta(events)
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(WAIT_S):
            rest = [event async for event in events]
    assert isinstance(rest[-1], Failed)
    error = LocalLLMError.from_json(dict(rest[-1].error))
    assert isinstance(error, EngineDied)
    assert "SIGKILL" in error.message
    events = await answer(engine, ask("What is the capital of France?"))
    assert isinstance(events[0], Loading)
    assert "Paris" in text(events)
    assert engine.pid != pid


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
async def test_an_interrupt_in_the_middle_of_an_answer_changes_nothing(engine: EngineProcess) -> None:
    request = ask("What is the capital of France?")
    alone = text(await answer(engine, request))
    assert engine.pid is not None
    async with asyncio.timeout(WAIT_S), engine.stream(request) as events:
        begin = await first_delta(events)
        os.kill(engine.pid, signal.SIGINT)
        rest = [event async for event in events]
    assert text([begin, *rest]) == alone
    assert [e.reason for e in rest if isinstance(e, Finish)] == ["stop"]


@pytest.mark.parametrize("damage", ["empty", "noise", "truncated header", "truncated weights"])
async def test_a_file_that_is_no_model_is_a_model_error(damage: str, demo_small: Path, tmp_path: Path) -> None:
    whole = demo_small.read_bytes()
    content = {"empty": b"", "noise": b"GGUF" + os.urandom(4096), "truncated header": whole[:5000], "truncated weights": whole[:-5000]}
    path = tmp_path / "broken.gguf"
    path.write_bytes(content[damage])
    with pytest.raises(ModelError) as caught:
        await start(path)
    assert "broken.gguf" in caught.value.message
    assert caught.value.hint


async def test_a_file_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LocalLLMError, match=r"absent\.gguf"):
        await start(tmp_path / "absent.gguf")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
async def test_a_saved_chat_goes_on_from_its_state_after_the_worker_was_killed(demo_large: Path, tmp_path: Path) -> None:
    config = EngineConfig(str(demo_large), n_threads=2, state_dir=str(tmp_path / "state"))
    engine = await asyncio.wait_for(EngineProcess.start(config), WAIT_S)
    chat = [Message("system", "You are a helpful assistant. " * 40)]
    questions = ["What is the capital of France?", "And of Italy?", "What is 2 + 3?", "Thank you!"]
    for question in questions:
        if question == questions[-1]:
            await kill(engine)
        chat.append(Message("user", question))
        events = await answer(engine, Request(messages=tuple(chat), sampling=GREEDY, session="chat"))
        assert isinstance(events[-1], Done), events[-1]
        chat.append(Message("assistant", text(events)))
    timings = events[-1].timings
    assert timings.cache_n >= 0.9 * (timings.cache_n + timings.prompt_n)
    await asyncio.wait_for(engine.close(), WAIT_S)
