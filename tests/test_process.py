"""The parent's side, with a fake engine in a real process; tests/test_process_model.py does it with a model."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from localllm import child, wire
from localllm.child import obituary, spawn
from localllm.engine.config import EngineConfig
from localllm.errors import ContextExceeded, EngineDied, EngineError, InvalidRequest, LocalLLMError, ModelError
from localllm.process import EngineProcess
from localllm.types import Delta, Done, Event, Failed, Finish, Loading, Prefill, Request
from tests.fakes import FAKE_WORKER

WAIT_S = 30
CONFIG = EngineConfig("fake.gguf", n_ctx=64)
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
T = TypeVar("T")


async def soon(awaitable: Awaitable[T]) -> T:
    return await asyncio.wait_for(awaitable, WAIT_S)


async def answer(engine: EngineProcess, prompt: str) -> list[Event]:
    async with asyncio.timeout(WAIT_S), engine.stream(Request(prompt=prompt)) as events:
        return [event async for event in events]


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def failure(events: list[Event]) -> LocalLLMError:
    assert [type(e) for e in events if isinstance(e, (Done, Failed))] == [Failed]
    assert isinstance(events[-1], Failed)
    return LocalLLMError.from_json(dict(events[-1].error))


async def first(events: AsyncIterator[Event], kind: type[T]) -> T:
    async with asyncio.timeout(WAIT_S):
        async for event in events:
            if isinstance(event, kind):
                return event
    raise AssertionError(f"no {kind.__name__} came")


async def no_streams(engine: EngineProcess) -> None:
    """Ask until no stream runs in the child."""
    while await engine.call("streams"):
        pass


def wait_gone(pid: int) -> None:
    """Poll until a process that is not our child is gone or a zombie that only init can take away."""
    deadline = time.monotonic() + WAIT_S
    while psutil.pid_exists(pid):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.01)


@pytest.fixture
async def engine() -> AsyncIterator[EngineProcess]:
    engine = await soon(EngineProcess.start(CONFIG, command=FAKE_WORKER))
    yield engine
    await soon(engine.close())


async def test_starting_tells_progress_and_what_was_loaded() -> None:
    told: list[Loading] = []
    engine = await soon(EngineProcess.start(CONFIG, told.append, command=FAKE_WORKER))
    assert told == [Loading("weights", 0.0), Loading("weights", 0.5), Loading("weights", 1.0)]
    assert engine.info == {"model_path": "fake.gguf", "n_ctx": 64, "pid": engine.pid}
    await soon(engine.close())
    assert engine.pid is None


async def test_a_model_that_does_not_load_raises_its_own_error_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    spawned: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(child, "spawn", lambda command: spawned.append(process := spawn(command)) or process)
    with pytest.raises(ModelError, match=r"broken\.gguf is not a GGUF file") as caught:
        await soon(EngineProcess.start(EngineConfig("broken.gguf"), command=FAKE_WORKER))
    assert (caught.value.hint, caught.value.details) == ("download it again", {"path": "broken.gguf"})
    assert [process.returncode for process in spawned] == [0]


async def test_a_load_that_kills_the_child_says_so() -> None:
    with pytest.raises(EngineDied) as caught:
        await soon(EngineProcess.start(EngineConfig("crash.gguf"), command=FAKE_WORKER))
    if sys.platform != "win32":
        assert "was killed by SIGABRT: ggml.c:1: GGML_ASSERT(false) failed" in caught.value.message
        assert caught.value.details["exit_code"] == -signal.SIGABRT
    assert "ggml.c:1: GGML_ASSERT(false) failed" in caught.value.details["last_words"]


async def test_a_command_that_does_not_start_says_so() -> None:
    with pytest.raises(EngineDied, match="does not start"):
        await soon(EngineProcess.start(CONFIG, command=["/no/such/program"]))
    with pytest.raises(EngineDied, match="exit code 3: goodbye"):
        await soon(EngineProcess.start(CONFIG, command=[sys.executable, "-c", "import os; os.write(2, b'goodbye'); os._exit(3)"]))


async def test_another_protocol_is_refused() -> None:
    code = """import json, sys; print(json.dumps({"type": "hello", "protocol": 99}), flush=True); sys.stdin.read()"""
    with pytest.raises(EngineDied, match=f"it speaks protocol 99, not {wire.PROTOCOL}"):
        await soon(EngineProcess.start(CONFIG, command=[sys.executable, "-c", code]))


async def test_lines_that_make_no_sense_are_logged_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    code = """if True:
        import json, sys
        print("noise"); print('{"id": 1, "type": "events"}'); print('{"id": 9, "type": "result"}'); print('{"id": [], "type": "error"}')
        load = json.loads(sys.stdin.readline())
        print(json.dumps({"id": load["id"], "type": "loaded", "value": {"a": 1}}), flush=True)
        sys.stdin.read()
    """
    engine = await soon(EngineProcess.start(CONFIG, command=[sys.executable, "-c", code]))
    assert engine.info == {"a": 1}
    assert "a line from the worker makes no sense" in caplog.text
    with engine._child._lock:  # the child reads stdin to its end, and shutdown is only a line to it
        engine._child._out.close()
    await soon(engine.close())


async def test_cancelling_a_start_kills_the_child() -> None:
    loading = asyncio.Event()
    spawned: list[int] = []

    def on_event(event: Loading) -> None:
        loading.set()

    starting = asyncio.create_task(EngineProcess.start(EngineConfig("endless.gguf"), on_event, command=FAKE_WORKER))
    await soon(loading.wait())
    spawned = [p.pid for p in psutil.Process().children() if FAKE_WORKER[-1] in p.cmdline()]
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(starting)
    assert len(spawned) == 1
    assert not psutil.pid_exists(spawned[0])


async def test_an_answer_arrives_and_ends_once(engine: EngineProcess) -> None:
    events = await answer(engine, "one two three")
    assert text(events) == "one two three"
    assert isinstance(events[0], Prefill)
    assert isinstance(events[-1], Done)
    assert sum(isinstance(e, (Done, Failed)) for e in events) == 1


async def test_many_streams_at_once_keep_apart(engine: EngineProcess) -> None:
    prompts = [f"stream {n} " + "x " * n for n in range(16)]
    assert [text(events) for events in await asyncio.gather(*(answer(engine, p) for p in prompts))] == prompts


async def test_leaving_a_stream_cancels_it_in_the_child(engine: EngineProcess) -> None:
    async with engine.stream(Request(prompt="forever")) as events:
        await first(events, Delta)
        assert await soon(engine.call("streams")) == 1
    await soon(no_streams(engine))
    with pytest.raises(StopAsyncIteration):
        await soon(anext(events))


async def test_cancelling_the_consumer_cancels_the_stream(engine: EngineProcess) -> None:
    reading = asyncio.Event()

    async def consume() -> None:
        async with engine.stream(Request(prompt="forever")) as events:
            async for _ in events:
                reading.set()

    task = asyncio.create_task(consume())
    await soon(reading.wait())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(task)
    await soon(no_streams(engine))


async def test_leaving_before_anything_was_sent_is_fine(engine: EngineProcess) -> None:
    async with engine.stream(Request(prompt="forever")):
        pass
    assert await soon(engine.call("streams")) == 0


async def test_a_slow_consumer_holds_up_nobody_and_misses_nothing(engine: EngineProcess) -> None:
    async with engine.stream(Request(prompt="flood")) as events:
        await first(events, Delta)
        # The flood is not read, and another stream still runs to its end.
        assert text(await answer(engine, "one two")) == "one two"
        await soon(no_streams(engine))
        async with asyncio.timeout(WAIT_S):
            rest = [event async for event in events]
    assert text(rest).split()[-3:] == ["4997", "4998", "4999"]
    assert isinstance(rest[-1], Done)
    assert len(rest) < 2500


async def test_an_error_of_the_engine_ends_the_stream_and_the_engine_lives_on(engine: EngineProcess) -> None:
    pid = engine.pid
    error = failure(await answer(engine, "too long"))
    assert isinstance(error, ContextExceeded)
    assert error.details == {"n_prompt_tokens": 5000, "n_ctx": 1024}
    assert isinstance(failure(await answer(engine, "fail")), EngineError)
    assert "object cannot be written as JSON" in failure(await answer(engine, "unwritable")).message
    assert text(await answer(engine, "still here")) == "still here"
    assert engine.pid == pid


async def test_calls_answer_or_raise(engine: EngineProcess) -> None:
    assert await soon(engine.call("tokenize", text="hi")) == [104, 105]
    with pytest.raises(InvalidRequest, match="no operation 'dance'"):
        await soon(engine.call("dance"))
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        await soon(engine.call("bug"))
    with pytest.raises(InvalidRequest, match="cannot be written as JSON"):
        await soon(engine.call("tokenize", text=object()))


async def test_a_call_that_is_given_up_harms_nobody(engine: EngineProcess) -> None:
    waiting = asyncio.create_task(engine.call("wait"))
    assert await soon(engine.call("tokenize", text="a")) == [97]
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(waiting)
    assert await soon(engine.call("tokenize", text="a")) == [97]


async def test_a_request_too_large_fails_and_the_engine_lives_on(engine: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_LINE_BYTES", 1000)
    error = failure(await answer(engine, "x" * 1000))
    assert isinstance(error, InvalidRequest)
    assert "more than 1,000" in error.message
    assert text(await answer(engine, "small")) == "small"


@posix
async def test_a_killed_child_fails_its_streams_and_calls_and_the_next_request_restarts_it(engine: EngineProcess) -> None:
    pid = engine.pid
    assert pid is not None
    async with engine.stream(Request(prompt="forever")) as one, engine.stream(Request(prompt="forever")) as two:
        await first(one, Delta)
        await first(two, Delta)
        call = asyncio.create_task(engine.call("wait"))
        assert await soon(engine.call("tokenize", text="a")) == [97]
        os.kill(pid, signal.SIGKILL)
        for stream in (one, two):
            error = LocalLLMError.from_json(dict((await first(stream, Failed)).error))
            assert isinstance(error, EngineDied)
            assert error.message == f"the worker process {pid} was killed by SIGKILL"
            assert "restarts" in error.hint
            with pytest.raises(StopAsyncIteration):
                await soon(anext(stream))
        with pytest.raises(EngineDied, match="SIGKILL"):
            await soon(call)
    assert engine.pid is None
    events = await answer(engine, "back again")
    assert isinstance(events[0], Loading)
    assert text(events) == "back again"
    assert isinstance(events[-1], Done)
    assert engine.pid not in (None, pid)


@posix
async def test_many_requests_after_a_death_share_one_restart(engine: EngineProcess) -> None:
    assert isinstance(failure(await answer(engine, "killed")), EngineDied)
    answers = await asyncio.gather(*(answer(engine, f"number {n}") for n in range(8)), engine.call("tokenize", text="a"))
    assert [text(a) for a in answers[:-1]] == [f"number {n}" for n in range(8)]
    assert len([p for p in psutil.Process().children() if FAKE_WORKER[-1] in p.cmdline()]) == 1


async def test_the_last_words_of_an_assertion_are_in_the_error(engine: EngineProcess) -> None:
    error = failure(await answer(engine, "abort"))
    assert isinstance(error, EngineDied)
    assert error.message.endswith(": ggml.c:1: GGML_ASSERT(false) failed")


async def test_a_thread_of_the_engine_that_dies_takes_the_worker_along_and_nobody_waits_forever(engine: EngineProcess) -> None:
    error = failure(await answer(engine, "bug"))
    assert isinstance(error, EngineDied)
    assert error.message.endswith("ended with exit code 1: ZeroDivisionError: a bug")
    assert text(await answer(engine, "back again")) == "back again"


async def test_a_restart_that_fails_fails_the_request(engine: EngineProcess) -> None:
    failure(await answer(engine, "abort"))
    engine.config = EngineConfig("broken.gguf")
    assert isinstance(failure(await answer(engine, "a")), ModelError)
    with pytest.raises(ModelError):
        await soon(engine.call("tokenize", text="a"))
    engine.config = CONFIG
    assert text(await answer(engine, "well again")) == "well again"


async def test_restart_starts_another_process(engine: EngineProcess) -> None:
    pid = engine.pid
    told: list[Loading] = []
    await soon(engine.restart(told.append))
    assert engine.pid not in (None, pid)
    assert told[-1] == Loading("weights", 1.0)


async def test_closing_fails_what_is_in_flight_and_can_be_done_twice(engine: EngineProcess) -> None:
    async with engine.stream(Request(prompt="forever")) as events:
        await first(events, Delta)
        await soon(engine.close())
        async with asyncio.timeout(WAIT_S):
            rest = [event async for event in events]
    assert isinstance(rest[-1], Failed) or (isinstance(rest[-2], Finish) and rest[-2].reason == "cancelled")
    await soon(engine.close())
    assert isinstance(failure(await answer(engine, "a")), EngineDied)
    with pytest.raises(EngineDied, match="unloaded"):
        await soon(engine.call("tokenize", text="a"))


async def test_closing_while_a_restart_loads_fails_the_waiting_request(engine: EngineProcess) -> None:
    failure(await answer(engine, "abort"))
    engine.config = EngineConfig("endless.gguf")
    async with engine.stream(Request(prompt="a")) as events:
        await first(events, Loading)
        await soon(engine.close())
        error = LocalLLMError.from_json(dict((await first(events, Failed)).error))
    assert "unloaded" in error.message


@posix
async def test_a_child_that_does_not_listen_is_killed(engine: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "SHUTDOWN_S", 0.05)
    monkeypatch.setattr(child, "TERMINATE_S", 0.05)
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await soon(engine.close())
    wait_gone(pid)


async def test_the_child_s_log_arrives_with_its_levels(engine: EngineProcess, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "localllm.worker")
    assert text(await answer(engine, "noise")) == "noise after"
    await soon(engine.close())
    assert ("localllm.worker", logging.INFO, "not a line of the protocol") in caplog.record_tuples
    assert ("localllm.fake", logging.WARNING, "it is noisy: very") in caplog.record_tuples


@pytest.mark.parametrize(
    "code,words,message",
    [
        (-11, ["INFO a", "Fatal Python error: Segfault", "  File x"], "was killed by SIGSEGV: Fatal Python error: Segfault"),
        (-6, ["ERROR a", "b.c: assert", "Fatal Python error: Aborted", "  File x"], "was killed by SIGABRT: b.c: assert"),
        (1, ["Traceback", "ImportError: no libcuda", ""], "ended with exit code 1: ImportError: no libcuda"),
        (-9, ["INFO llama: loaded"], "was killed by SIGKILL"),
        (-99, [], "was killed by signal 99"),
        (0, [], "ended with exit code 0"),
    ],
)
@posix
def test_an_obituary_says_how_and_what_came_last(code: int, words: list[str], message: str) -> None:
    error = obituary(7, code, words)
    assert error.message == f"the worker process 7 {message}"
    assert error.details == {"last_words": words, "exit_code": code}
    assert ("memory" in error.hint) == (code == -9)


PARENT = """
import asyncio, signal, sys
from localllm.engine.config import EngineConfig
from localllm.process import EngineProcess
from localllm.types import Request

async def main():
    engine = await EngineProcess.start(EngineConfig("fake.gguf"), command=sys.argv[1:])
    interrupted = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
    async with engine.stream(Request(prompt="forever")) as events:
        await anext(events)
        print(engine.pid, flush=True)
        await interrupted.wait()
        await anext(events)
    print(engine.pid, await engine.call("tokenize", text="a"), flush=True)
    await engine.close()

asyncio.run(main())
"""


@pytest.fixture
def parent() -> Any:
    """A parent in a process group of its own, as a shell makes for a foreground job; it has printed its child's pid."""
    root = str(Path(child.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, *FAKE_WORKER],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
        env={**os.environ, "PYTHONPATH": root},
    )
    with process:
        yield process
        process.kill()


@posix
def test_ctrl_c_in_the_terminal_does_not_kill_the_child(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout
    pid = int(parent.stdout.readline())
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.stdout.readline() == f"{pid} [97]\n"
    assert parent.wait(WAIT_S) == 0
    wait_gone(pid)


@posix
def test_a_killed_parent_leaves_no_orphan(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    wait_gone(pid)
