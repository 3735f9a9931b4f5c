"""The child alone, spoken to in raw lines; its engine is fake, its process and pipes are real."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from localllm import __version__, wire
from localllm.child import spawn
from localllm.engine.config import EngineConfig
from localllm.errors import UsageError
from localllm.types import Request
from localllm.worker import Stream, main
from tests.fakes import FAKE_WORKER, FakeHandle

WAIT_S = 30


class RawWorker:
    """A worker process and the lines that it wrote."""

    def __init__(self) -> None:
        self.process = spawn(FAKE_WORKER)
        assert self.process.stdin
        self.stdin = self.process.stdin
        self.lines: queue.Queue[bytes | None] = queue.Queue()
        self.stderr = b""
        self._threads = [threading.Thread(target=self._read), threading.Thread(target=self._listen)]
        for thread in self._threads:
            thread.start()

    def write(self, line: bytes) -> None:
        self.stdin.write(line)
        self.stdin.flush()

    def send(self, **message: Any) -> None:
        self.write(wire.encode(message))

    def receive(self) -> dict[str, Any]:
        line = self.lines.get(timeout=WAIT_S)
        assert line is not None, self.stderr
        return wire.parse(line)

    def events(self, ident: int) -> list[dict[str, Any]]:
        """Events of a stream up to its end; there must be nothing else in between."""
        events: list[dict[str, Any]] = []
        while not events or events[-1]["type"] not in ("done", "failed"):
            message = self.receive()
            assert (message["type"], message["id"]) == ("events", ident)
            events += message["events"]
        return events

    def load(self, model_path: str = "fake.gguf") -> dict[str, Any]:
        """Load, and return the last message of it."""
        self.send(id=1, type="load", config=EngineConfig(model_path, n_ctx=64))
        while (message := self.receive())["type"] == "events":
            pass
        return message

    def end(self) -> int:
        """Wait for the process to end by itself; its exit code."""
        code = self.process.wait(WAIT_S)
        for thread in self._threads:
            thread.join(WAIT_S)
        return code

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as pipe:
            for line in pipe:
                self.lines.put(line)
        self.lines.put(None)

    def _listen(self) -> None:
        assert self.process.stderr
        with self.process.stderr as pipe:
            self.stderr = pipe.read()


@contextmanager
def raw_worker() -> Iterator[RawWorker]:
    worker = RawWorker()
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.end()
        worker.stdin.close()


@pytest.fixture
def worker() -> Iterator[RawWorker]:
    with raw_worker() as worker:
        assert worker.receive() == {"type": "hello", "protocol": wire.PROTOCOL, "version": __version__, "pid": worker.process.pid}
        yield worker


@pytest.fixture
def loaded(worker: RawWorker) -> RawWorker:
    assert worker.load()["type"] == "loaded"
    return worker


def test_loading_reports_progress_then_what_was_loaded(worker: RawWorker) -> None:
    worker.send(id=1, type="load", config=EngineConfig("fake.gguf", n_ctx=64))
    messages = [worker.receive() for _ in range(4)]
    assert [m["events"] for m in messages[:3]] == [[{"stage": "weights", "fraction": f, "type": "loading"}] for f in (0.0, 0.5, 1.0)]
    assert messages[3] == {
        "id": 1,
        "type": "loaded",
        "value": {"model_path": "fake.gguf", "n_ctx": 64, "pid": worker.process.pid},
    }


def test_a_model_that_does_not_load_is_an_error_and_the_next_one_loads(worker: RawWorker) -> None:
    error = worker.load("broken.gguf")
    assert error["error"] == {
        "class": "ModelError",
        "message": "broken.gguf is not a GGUF file",
        "hint": "download it again",
        "details": {"path": "broken.gguf"},
    }
    assert worker.load()["type"] == "loaded"
    assert "loaded already" in worker.load()["error"]["message"]


def test_an_answer_arrives_in_order_and_ends_once(loaded: RawWorker) -> None:
    loaded.send(id=2, type="stream", request=Request(prompt="one two three"))
    events = loaded.events(2)
    assert [e["type"] for e in events] == ["prefill", "delta", "delta", "delta", "finish", "done"]
    assert "".join(e["text"] for e in events if e["type"] == "delta") == "one two three"


def test_a_request_before_the_model_fails(worker: RawWorker) -> None:
    worker.send(id=2, type="stream", request=Request(prompt="a"))
    [failed] = worker.events(2)
    assert failed["error"]["message"] == "no model is loaded"
    worker.send(id=3, type="call", op="tokenize", args={"text": "a"})
    assert worker.receive()["error"]["message"] == "no model is loaded"


@pytest.mark.parametrize(
    "line,complaint",
    [
        (b"not json\n", "a line is not JSON"),
        (b"\xff\xfe\n", "a line is not JSON"),
        (b"[1]\n", "a line is not a JSON object"),
        (b"[" * 100_000 + b"\n", "a line is not JSON"),
        (b'{"type":"stream"}\n', "a message has no id"),
        (b'{"id":5,"type":"dance"}\n', "not a message of the worker protocol: 'dance'"),
        (b'{"id":5,"type":"stream"}\n', "not a message of the worker protocol: 'stream'"),
    ],
)
def test_a_bad_line_is_an_error_and_the_worker_goes_on(loaded: RawWorker, line: bytes, complaint: str) -> None:
    loaded.write(line)
    message = loaded.receive()
    assert message["type"] == "error"
    assert complaint in message["error"]["message"]
    loaded.send(id=6, type="call", op="tokenize", args={"text": "hi"})
    assert loaded.receive() == {"id": 6, "type": "result", "value": [104, 105]}


def test_a_bad_configuration_is_an_error(worker: RawWorker) -> None:
    worker.send(id=1, type="load", config={"model": "a"})
    assert "EngineConfig: model: unknown field" in worker.receive()["error"]["message"]


def test_a_bad_request_fails_its_stream_and_names_the_field(loaded: RawWorker) -> None:
    loaded.send(id=2, type="stream", request={"prompt": "a", "sampling": {"temprature": 1}})
    [failed] = loaded.events(2)
    assert failed["error"]["class"] == "InvalidRequest"
    assert "sampling.temprature: unknown field" in failed["error"]["message"]


def test_an_error_of_the_engine_keeps_its_class_and_details(loaded: RawWorker) -> None:
    loaded.send(id=2, type="stream", request=Request(prompt="too long"))
    [failed] = loaded.events(2)
    assert failed["error"]["class"] == "ContextExceeded"
    assert failed["error"]["details"] == {"n_prompt_tokens": 5000, "n_ctx": 1024}


def test_a_bug_in_an_operation_is_an_error_with_the_traceback_in_the_log(loaded: RawWorker) -> None:
    loaded.send(id=2, type="call", op="bug", args={})
    assert "ZeroDivisionError: a bug" in loaded.receive()["error"]["message"]
    loaded.send(id=3, type="call", op="unwritable", args={})
    assert "cannot be written as JSON" in loaded.receive()["error"]["message"]
    loaded.send(id=4, type="call", op="tokenize", args=[])
    assert loaded.receive()["type"] == "error"
    loaded.send(id=5, type="shutdown")
    loaded.end()
    assert b"Traceback" in loaded.stderr


def test_cancel_ends_a_stream_and_an_unknown_one_is_ignored(loaded: RawWorker) -> None:
    loaded.send(id=2, type="stream", request=Request(prompt="forever"))
    assert loaded.receive()["id"] == 2
    loaded.send(id=77, type="cancel")
    loaded.send(id=2, type="cancel")
    events = loaded.events(2)
    assert [e["type"] for e in events[-2:]] == ["finish", "done"]
    assert events[-2]["reason"] == "cancelled"
    loaded.send(id=2, type="cancel")
    loaded.send(id=3, type="call", op="streams", args={})
    assert loaded.receive() == {"id": 3, "type": "result", "value": 0}


def test_a_cancel_that_comes_before_the_engine_has_the_request_is_kept() -> None:
    stream, cancelled = Stream(), threading.Event()
    stream.cancel()
    stream.started(FakeHandle(cancelled))
    assert cancelled.is_set()


def test_an_id_in_use_cannot_open_a_second_stream(loaded: RawWorker) -> None:
    loaded.send(id=2, type="stream", request=Request(prompt="forever"))
    loaded.send(id=2, type="stream", request=Request(prompt="a"))
    while (message := loaded.receive())["type"] == "events":
        pass
    assert "stream 2 is open already" in message["error"]["message"]


def test_what_the_engine_prints_goes_to_the_log_and_not_into_the_protocol(loaded: RawWorker) -> None:
    loaded.send(id=2, type="stream", request=Request(prompt="noise"))
    assert [e["type"] for e in loaded.events(2)] == ["prefill", "delta", "delta", "finish", "done"]
    loaded.send(id=3, type="shutdown")
    assert loaded.end() == 0
    assert b"not a line of the protocol\nnoise\n" in loaded.stderr


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "answering"])
def test_the_end_of_stdin_ends_the_worker(loaded: RawWorker, busy: bool) -> None:
    if busy:
        loaded.send(id=2, type="stream", request=Request(prompt="forever"))
        loaded.receive()
    loaded.stdin.close()
    assert loaded.end() == 0


@pytest.mark.parametrize("how", ["shutdown", "end of stdin"])
def test_the_end_stops_a_load(worker: RawWorker, how: str) -> None:
    worker.send(id=1, type="load", config=EngineConfig("endless.gguf"))
    assert worker.receive()["events"][0]["type"] == "loading"
    if how == "shutdown":
        worker.send(id=2, type="shutdown")
    else:
        worker.stdin.close()
    assert worker.end() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_does_not_touch_the_worker(loaded: RawWorker) -> None:
    os.kill(loaded.process.pid, signal.SIGINT)
    loaded.send(id=2, type="call", op="detokenize", args={"tokens": [104, 105]})
    assert loaded.receive()["value"] == "hi"
    assert os.getpgid(loaded.process.pid) != os.getpgid(0)
    assert os.getsid(loaded.process.pid) != os.getsid(0)


def test_an_unknown_role_is_an_error() -> None:
    with pytest.raises(UsageError, match="no worker has the role 'cook'"):
        main("cook")


def test_the_worker_module_starts_without_loading_llama_cpp() -> None:
    code = "import sys, localllm.worker, localllm.process; print([m for m in sys.modules if m.split('.')[0] in ('llama_cpp', 'numpy')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
