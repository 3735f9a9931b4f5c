"""`localllm run`: what lands on stdout and stderr, what reaches the engine, and what Ctrl-C leaves.

The model is a script of events; run as a program, this file is `localllm run` with such a model, for the tests on a pty.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from typer.testing import CliRunner

from localllm.cli import run as module
from localllm.cli.answer import Manner, stream_answer
from localllm.cli.chat import Chat, is_command, prompt_session, set_parameter, unquote
from localllm.cli.conversation import Conversation, load_conversation
from localllm.cli.output import Screen, statistics, visible
from localllm.engine.config import EngineConfig
from localllm.errors import ConfigError, ContextExceeded, EngineDied, InvalidRequest, LocalLLMError, NotFound, UsageError
from localllm.hardware import detect
from localllm.loading import Loaded, Machine, Planned, make_plan
from localllm.types import Delta, Done, Event, Failed, Finish, Loading, Message, Prefill, Request, Sampling, Timings, ToolCall, Usage

TIMINGS = Timings(
    cache_n=40, prompt_n=13, prompt_ms=10.8, prompt_per_second=1204.1, predicted_n=38, predicted_per_second=412.34, ttft_ms=21.2
)
MACHINE = Machine(detect([]), "")
LINE = "38 tokens · 412.3 tokens/s · TTFT 21 ms · prompt 53 tokens (40 cached) 1,204 tokens/s"
DONE = Done(Usage(53, 40, 38), TIMINGS)
STOPPED = Done(Usage(53, 40, 2), Timings(predicted_n=2, predicted_per_second=100.0))
Step = Event | Callable[[], object]


def answer(*texts: str) -> list[Step]:
    return [Prefill(13, 53, 40), *(Delta(0, text) for text in texts), Finish(0, "stop"), DONE]


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def wait() -> None:
    """A step at which the engine is busy until it is told to stop."""


class ScriptedBackend:
    """Plays one script a request. It reports on `cancel` as an engine does, unless it is `deaf`."""

    pid = None

    def __init__(self, *scripts: list[Step], deaf: bool = False) -> None:
        self.scripts = list(scripts)
        self.requests: list[Request] = []
        self.deaf = deaf
        self.closed = False
        self.left = 0
        self._stop = asyncio.Event()

    @asynccontextmanager
    async def stream(self, request: Request) -> AsyncIterator[AsyncIterator[Event]]:
        self.requests.append(request)
        self._stop = asyncio.Event()
        try:
            yield self._play(self.scripts.pop(0))
        finally:
            self.left += 1

    async def _play(self, script: list[Step]) -> AsyncIterator[Event]:
        for step in script:
            if step is wait:
                await self._stop.wait()
            elif callable(step):
                step()
                await asyncio.sleep(0)
            else:
                yield step
            if self._stop.is_set():
                yield Finish(0, "cancelled")
                yield STOPPED
                return

    async def call(self, op: str, **args: Any) -> Any:
        if op != "cancel" or self.deaf:
            raise InvalidRequest(f"unknown operation {op}")
        assert args == {"id": self.requests[-1].id}
        self._stop.set()

    async def close(self) -> None:
        self.closed = True


class Invocation:
    """`localllm run` with scripted answers, and everything that came of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.configs: list[EngineConfig] = []
        self.backend = ScriptedBackend()

        async def load(planned: Planned, options: dict[str, Any], screen: Screen) -> Loaded:
            self.configs.append(planned.plan.engine_config(planned.path, **options))
            screen.show(Loading("weights", 0.5))
            return Loaded(cast(Any, self.backend), planned, ())

        monkeypatch.setattr(module, "load", load)
        monkeypatch.setattr("localllm.loading.make_plan", partial(make_plan, dry=False, machine=MACHINE))

    def __call__(self, *args: str, stdin: str | bytes = "", script: list[Step] | None = None, deaf: bool = False) -> Any:
        self.backend = ScriptedBackend(answer("Paris", ".") if script is None else script, deaf=deaf)
        app = typer.Typer(pretty_exceptions_enable=False)
        app.command()(module.run)
        return CliRunner().invoke(app, list(args), input=stdin)

    @property
    def request(self) -> Request:
        return self.backend.requests[0]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Invocation:
    return Invocation(monkeypatch)


# One answer


def test_the_answer_goes_to_stdout_and_one_line_to_stderr(run: Invocation) -> None:
    result = run("demo", "What is the capital of France?")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Paris.\n", LINE + "\n")
    assert run.request.messages == (Message("user", "What is the capital of France?"),)
    assert run.backend.closed


def test_quiet_says_nothing_but_the_answer(run: Invocation) -> None:
    result = run("demo", "hi", "--quiet")
    assert (result.stdout, result.stderr) == ("Paris.\n", "")


def test_an_answer_that_ends_its_line_gets_no_second_end(run: Invocation) -> None:
    assert run("demo", "hi", script=answer("a\n", "b\n")).stdout == "a\nb\n"


def test_json_is_one_object_with_answer_route_timings_and_usage(run: Invocation) -> None:
    script: list[Step] = [
        Delta(0, "let me see", "reasoning"),
        Delta(0, "42"),
        ToolCall(0, 0, "call_1", "add", '{"a": 1'),
        ToolCall(0, 0, "", "", ', "b": 2}'),
        Finish(0, "tool_calls"),
        DONE,
    ]
    result = run("demo", "hi", "--json", script=script)
    out = json.loads(result.stdout)
    assert out == {
        "model": "demo",
        "answer": "42",
        "reasoning": "let me see",
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}],
        "finish_reason": "tool_calls",
        "route": {"model": "demo", "tier": None, "why": []},
        "timings": out["timings"],
        "usage": {"prompt_tokens": 53, "cached_tokens": 40, "completion_tokens": 38, "reasoning_tokens": 0},
    }
    assert out["timings"]["predicted_per_second"] == 412.34
    assert out["timings"]["draft_n_accepted"] == 0
    assert result.stderr == LINE + "\n"


def test_reasoning_never_reaches_stdout_nor_a_stderr_that_is_no_terminal(run: Invocation) -> None:
    result = run("demo", "hi", "--show-thinking", script=[Delta(0, "hmm", "reasoning"), *answer("42")])
    assert (result.stdout, result.stderr) == ("42\n", LINE + "\n")


def test_piped_answers_keep_their_control_characters(run: Invocation) -> None:
    assert run("demo", "hi", script=answer("\x1b[2J")).stdout == "\x1b[2J\n"


def test_an_engine_error_comes_after_the_text_before_it(run: Invocation) -> None:
    result = run("demo", "hi", script=[Delta(0, "Par"), Failed(EngineDied("the worker died", hint="again").to_json())])
    assert result.stdout == "Par\n"
    assert isinstance(result.exception, EngineDied)
    assert result.exception.message == "the worker died"
    assert run.backend.closed


def test_a_model_that_is_not_there_is_not_loaded(run: Invocation) -> None:
    assert isinstance(run("no-such-model", "hi").exception, NotFound)
    assert run.configs == []


def test_the_demo_model_answers_through_its_worker() -> None:
    command = [sys.executable, "-m", "localllm", "run", "demo", "What is the capital of France?", "--temp", "0"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=False)
    assert (result.returncode, result.stdout) == (0, "The capital of France is Paris.\n")
    assert re.fullmatch(r"10 tokens · [\d,.]+ tokens/s · TTFT \d+ ms · prompt 21 tokens [\d,]+ tokens/s\n", result.stderr)


# The question


@pytest.mark.parametrize(
    "args, stdin, question",
    [
        (["hi"], "", "hi"),
        (["several", "words"], "", "several words"),
        ([], "from a pipe\n", "from a pipe"),
        ([], b"\xef\xbb\xbfwindows\r\n", "windows"),
        (["summarise this:"], "line 1\n\nline 3\n", "summarise this:\n\nline 1\n\nline 3"),
        (["hi"], " \n", "hi"),
        (["--", "-5 + 3?"], "", "-5 + 3?"),
    ],
)
def test_the_question_is_the_words_and_then_the_pipe(run: Invocation, args: list[str], stdin: str | bytes, question: str) -> None:
    run("demo", *args, stdin=stdin)
    assert run.request.messages == (Message("user", question),)


@pytest.mark.parametrize(
    "args, stdin, message",
    [
        ([], "", "there is no prompt"),
        ([""], "\n", "there is no prompt"),
        ([], b"caf\xe9", "stdin is not UTF-8 text (byte 3)"),
        (["caf\udce9"], "", "the prompt is not UTF-8"),
    ],
)
def test_a_question_that_is_none_is_a_usage_error(run: Invocation, args: list[str], stdin: str | bytes, message: str) -> None:
    error = run("demo", *args, stdin=stdin).exception
    assert isinstance(error, UsageError)
    assert error.message == message
    assert error.hint
    assert run.configs == []


# The options


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], Sampling()),
        (["--temp", "0", "--top-k", "1", "--top-p", "0.5", "--min-p", "0.1"], Sampling(temperature=0, top_k=1, top_p=0.5, min_p=0.1)),
        (["--temperature", "1.5", "--repeat-penalty", "1.1", "--seed", "0"], Sampling(temperature=1.5, repeat_penalty=1.1, seed=0)),
        (["-n", "7"], Sampling(max_tokens=7)),
        (["--predict", "8"], Sampling(max_tokens=8)),
        (["--max-tokens", "9"], Sampling(max_tokens=9)),
        (["--stop", "a", "--stop", "b c"], Sampling(stop=("a", "b c"))),
        (["-l", "13=-inf", "-l", "14+2.5", "--logit-bias", "15-1"], Sampling(logit_bias=((13, float("-inf")), (14, 2.5), (15, -1.0)))),
        (["--grammar", 'root ::= "a"'], Sampling(grammar='root ::= "a"')),
        (["--json-schema", '{"type": "object"}'], Sampling(json_schema={"type": "object"})),
    ],
)
def test_sampling_options_reach_the_request(run: Invocation, args: list[str], expected: Sampling) -> None:
    run("demo", "hi", *args)
    assert run.request.sampling == expected


def test_grammar_and_schema_are_read_from_files(run: Invocation, tmp_path: Path) -> None:
    (tmp_path / "g.gbnf").write_text('root ::= "é"', encoding="utf-8")
    (tmp_path / "s.json").write_text('{"const": 1}', encoding="utf-8")
    run("demo", "hi", "--grammar-file", str(tmp_path / "g.gbnf"))
    assert run.request.sampling.grammar == 'root ::= "é"'
    run("demo", "hi", "--json-schema", f"@{tmp_path / 's.json'}")
    assert run.request.sampling.json_schema == {"const": 1}


def test_loading_options_reach_the_engine(run: Invocation, demo_large: Path) -> None:
    run("demo", "hi", "-c", "512", "-ngl", "0", "-t", "2", "-ctk", "q8_0", "-ctv", "q4_0")
    config = run.configs[0]
    assert (config.n_ctx, config.n_gpu_layers, config.n_threads, config.type_k, config.type_v) == (512, 0, 2, "q8_0", "q4_0")
    assert (config.model_path, config.n_seq, config.state_dir) == (str(demo_large), 1, "")


def test_settings_hold_where_no_flag_is_given(run: Invocation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALLLM_N_CTX", "256")
    monkeypatch.setenv("LOCALLLM_N_THREADS", "3")
    run("demo", "hi", "-c", "512")
    assert (run.configs[0].n_ctx, run.configs[0].n_threads) == (512, 3)


def test_system_think_and_context_shift_reach_the_request(run: Invocation) -> None:
    run("demo", "hi", "--system", "Be brief.", "--no-think", "--context-shift")
    assert run.request.messages == (Message("system", "Be brief."), Message("user", "hi"))
    assert run.request.template_kwargs == {"enable_thinking": False}
    assert run.request.context_shift


def test_raw_is_continued_as_it_stands(run: Invocation) -> None:
    run("demo", "--raw", stdin="Once upon a time\n")
    assert (run.request.prompt, run.request.messages) == ("Once upon a time", ())


@pytest.mark.parametrize(
    "args, kind",
    [
        (["--raw", "--system", "x"], UsageError),
        (["--raw", "--session", "x"], UsageError),
        (["--session", "../x"], UsageError),
        (["--grammar", "x", "--grammar-file", "y"], UsageError),
        (["--grammar-file", "no-such-file"], UsageError),
        (["--json-schema", "{"], UsageError),
        (["--json-schema", "[]"], UsageError),
        (["--json-schema", "@no-such-file"], UsageError),
        (["--grammar", "x", "--json-schema", "{}"], InvalidRequest),
        (["--logit-bias", "hello=1"], UsageError),
        (["--temp", "-1"], InvalidRequest),
        (["-ctk", "q9"], ConfigError),
    ],
)
def test_options_that_make_no_sense_are_errors_before_a_load(run: Invocation, args: list[str], kind: type[LocalLLMError]) -> None:
    error = run("demo", "hi", *args).exception
    assert isinstance(error, kind)
    assert error.hint
    assert run.configs == []


# Sessions


def test_a_session_goes_on_where_it_ended(run: Invocation, home: Path) -> None:
    run("demo", "first", "--session", "trip", "--system", "Be brief.", script=answer("one"))
    assert run.request.session == "trip"
    assert run.configs[0].state_dir == str(home / "cache" / "kv")
    run("demo", "second", "--session", "trip", script=answer("two"))
    assert run.request.messages == (
        Message("system", "Be brief."),
        Message("user", "first"),
        Message("assistant", "one"),
        Message("user", "second"),
    )
    assert len(load_conversation(home / "state" / "sessions", "trip").turns) == 2
    if os.name == "posix":
        assert (home / "state" / "sessions" / "trip.json").stat().st_mode & 0o077 == 0


def test_without_a_session_nothing_is_kept(run: Invocation, home: Path) -> None:
    run("demo", "hi")
    assert run.request.session == ""
    # speeds and memory of this machine are, no word of the chat
    assert {path.name for path in home.rglob("*.json")} <= {"speed.json", "plans.json", "dry_runs.json"}
    assert not any("hi" in path.read_text() or "Paris" in path.read_text() for path in home.rglob("*.*") if path.is_file())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 9, "system": "", "turns": []}', '{"schema": 1, "turns": [[{"x": 1}]]}'])
def test_a_damaged_session_is_an_error_and_is_left_alone(run: Invocation, home: Path, content: str) -> None:
    path = home / "state" / "sessions" / "trip.json"
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    error = run("demo", "hi", "--session", "trip").exception
    assert isinstance(error, LocalLLMError)
    assert str(path) in error.message
    assert path.read_text(encoding="utf-8") == content
    assert run.configs == []


def test_a_session_that_cannot_be_saved_is_an_error_after_the_answer(run: Invocation, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("localllm.cli.conversation.write_atomic", full)
    result = run("demo", "hi", "--session", "trip")
    assert result.stdout == "Paris.\n"
    assert isinstance(result.exception, LocalLLMError)
    assert result.exception.message == "cannot save the session trip: No space left on device"


# Ctrl-C and broken pipes


def test_ctrl_c_keeps_the_partial_answer_and_prints_the_statistics(run: Invocation) -> None:
    result = run("demo", "hi", "--session", "s", script=[Delta(0, "Par"), ctrl_c, wait, Delta(0, "never")])
    assert (result.exit_code, result.stdout) == (130, "Par\n")
    assert result.stderr == "2 tokens · 100.0 tokens/s · TTFT 0 ms · prompt 0 tokens\n"
    assert run.backend.closed
    run("demo", "go on", "--session", "s")
    assert run.request.messages[1] == Message("assistant", "Par")


def test_ctrl_c_leaves_an_engine_that_does_not_report(run: Invocation) -> None:
    result = run("demo", "hi", script=[Delta(0, "Par"), ctrl_c, wait], deaf=True)
    assert (result.exit_code, result.stdout) == (130, "Par\n")
    assert result.stderr == "stopped · tokens/s not reported\n"
    assert run.backend.left == 1


def test_ctrl_c_in_json_gives_the_part_that_is_there(run: Invocation) -> None:
    result = run("demo", "hi", "--json", script=[Delta(0, "Par"), ctrl_c, wait])
    assert result.exit_code == 130
    assert (json.loads(result.stdout)["answer"], json.loads(result.stdout)["finish_reason"]) == ("Par", "cancelled")


def test_ctrl_c_while_loading_is_an_interruption(run: Invocation, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []

    async def load(planned: Planned, options: dict[str, Any], screen: Screen) -> Loaded:
        try:
            ctrl_c()
            await asyncio.Event().wait()
        finally:
            ended.append(True)
        raise AssertionError

    monkeypatch.setattr(module, "load", load)
    assert run("demo", "hi").exit_code == 130
    assert ended == [True]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Closed(io.StringIO):
    """A pipe whose reader went away after `limit` characters, or a full disk."""

    def __init__(self, limit: int, error: OSError) -> None:
        super().__init__()
        self.limit, self.error = limit, error

    def write(self, text: str) -> int:
        if self.tell() + len(text) > self.limit:
            raise self.error
        return super().write(text)


async def test_a_reader_that_goes_away_stops_the_answer_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", out := Closed(4, BrokenPipeError(32, "Broken pipe")))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    backend = ScriptedBackend([Delta(0, "one\n"), Delta(0, "two\n"), wait])
    with Screen() as screen:
        result = await stream_answer(backend, Manner(Sampling()).request(prompt="x"), screen)
        screen.end_answer()
    assert (out.getvalue(), result.finish_reason, result.interrupted) == ("one\n", "cancelled", False)
    assert result.timings == STOPPED.timings


async def test_a_full_disk_under_stdout_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Closed(0, OSError(28, "No space left on device")))
    backend = ScriptedBackend(answer("one"))
    with Screen() as screen, pytest.raises(LocalLLMError, match="cannot write the answer: No space left on device"):
        await stream_answer(backend, Manner(Sampling()).request(prompt="x"), screen)
    assert backend.left == 1


# What is shown


@pytest.mark.parametrize(
    "timings, line",
    [
        (TIMINGS, LINE),
        (Timings(predicted_n=1, prompt_n=1, ttft_ms=12_345), "1 token · – tokens/s · TTFT 12.3 s · prompt 1 token"),
        (Timings(cache_n=5, predicted_n=0), "0 tokens · – tokens/s · prompt 5 tokens (5 cached)"),
        (
            Timings(predicted_n=4000, predicted_per_second=1234.56, prompt_n=7, draft_n=50, draft_n_accepted=40),
            "4,000 tokens · 1,234.6 tokens/s · TTFT 0 ms · prompt 7 tokens · drafts 40 of 50 accepted",
        ),
    ],
)
def test_statistics(timings: Timings, line: str) -> None:
    assert statistics(timings) == line


def test_control_characters_become_visible() -> None:
    assert visible("a\tb\nc\r\n") == "a\tb\nc\n"
    assert visible("\x1b]0;owned\x07\x7f\x9b2J\x00") == "␛]0;owned␇␡\ufffd2J␀"
    assert visible("naïve 日本 🙂") == "naïve 日本 🙂"


def test_a_terminal_gets_visible_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    with Screen() as screen:
        screen.show(Delta(0, "\x1b[2Jhi"))
        screen.end_answer()
    assert out.getvalue() == "␛[2Jhi\n"


def terminal_on_stderr(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Not a fixture: pytest's capture puts its own streams back when the test begins."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    return terminal


def test_a_terminal_sees_progress_thoughts_and_a_dim_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal_on_stderr(monkeypatch)
    with Screen(show_thinking=True) as screen:
        screen.show(Loading("weights", 0.4))
        screen.show(Prefill(10, 100, 0))
        screen.show(Delta(0, "[b]hmm[/b]\nwell\x1b", "reasoning"))
        screen.show(Delta(0, "42"))
        screen.statistics(TIMINGS)
    seen = stderr.getvalue()
    assert "loading weights" in seen
    assert "reading the prompt, 10 of 100 tokens" in seen
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert "[b]hmm[/b]\nwell␛\n" in plain
    assert f"\x1b[2m{LINE}\x1b[0m\n" in seen
    assert isinstance(sys.stdout, io.StringIO)
    assert sys.stdout.getvalue() == "42"


def test_hidden_thoughts_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal_on_stderr(monkeypatch)
    with Screen() as screen:
        screen.show(Delta(0, "secret", "reasoning", tokens=(1, 2)))
        screen.show(Delta(0, "42"))
    assert "thinking, 2 tokens" in stderr.getvalue()
    assert "secret" not in stderr.getvalue()


def test_no_color_means_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal_on_stderr(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    with Screen() as screen:
        screen.show(Loading("weights", 0.4))
        screen.statistics(TIMINGS)
    codes = {code for group in re.findall(r"\x1b\[([0-9;]*)m", stderr.getvalue()) for code in group.split(";")}
    assert codes <= {"", "0", "1", "2"}


# The chat


class Chatting:
    """A Chat with scripted answers, driven line by line."""

    def __init__(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], *scripts: list[Step]) -> None:
        self.backend = ScriptedBackend(*scripts)
        self.state = tmp_path / "state"
        self.chat = Chat("demo", self.backend, Screen(), Conversation(), Manner(Sampling()), self.state)
        self._capsys = capsys

    async def say(self, line: str) -> tuple[str, str]:
        """What one line brings: (stdout, stderr)."""
        await self.chat.take(line)
        return self._capsys.readouterr()

    def asked(self) -> list[str]:
        """The messages of the last request, as texts."""
        return [str(message.content) for message in self.backend.requests[-1].messages]


Chats = Callable[..., Chatting]


@pytest.fixture
def chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Chats:
    return lambda *scripts: Chatting(tmp_path, capsys, *scripts)


async def test_each_question_carries_the_turns_before_it(chats: Chats) -> None:
    chat = chats(answer("one"), answer("two"))
    assert await chat.say("first") == ("one\n", LINE + "\n")
    await chat.say('"""second\nline"""')
    assert chat.asked() == ["first", "one", "second\nline"]


async def test_ctrl_c_stops_the_answer_and_keeps_it(chats: Chats) -> None:
    chat = chats([Delta(0, "Once upon"), ctrl_c, wait], answer("a time"))
    out, err = await chat.say("tell a story")
    assert (out, err) == ("Once upon\n", "2 tokens · 100.0 tokens/s · TTFT 0 ms · prompt 0 tokens\n")
    await chat.say("go on")
    assert chat.asked() == ["tell a story", "Once upon", "go on"]


async def test_ctrl_c_before_the_answer_forgets_the_question(chats: Chats) -> None:
    chat = chats([Prefill(0, 10, 0), ctrl_c, wait], answer("ok"))
    assert "stopped before the answer began" in (await chat.say("tell a story"))[1]
    await chat.say("/retry")
    assert chat.asked() == ["tell a story"]


async def test_a_crash_mid_answer_is_reported_and_the_chat_goes_on(chats: Chats) -> None:
    died = Failed(EngineDied("the worker died", hint="send the request again").to_json())
    chat = chats(answer("one"), [Delta(0, "tw"), died], answer("three"))
    await chat.say("first")
    assert await chat.say("second") == ("tw\n", "error: the worker died\nhint: /retry starts it again and asks again\n")
    await chat.say("third")
    assert chat.asked() == ["first", "one", "second", "tw", "third"]


async def test_a_refused_question_is_not_part_of_the_conversation(chats: Chats) -> None:
    refused = Failed(ContextExceeded("the prompt is too long", hint="shorten it", n_prompt_tokens=9, n_ctx=8).to_json())
    chat = chats([refused], answer("ok"))
    _, err = await chat.say("long")
    assert err == "error: the prompt is too long\nhint: /clear starts afresh; a larger -c holds more\n"
    await chat.say("short")
    assert chat.asked() == ["short"]


async def test_retry_asks_the_last_question_again(chats: Chats) -> None:
    chat = chats(answer("one"), answer("two"), answer("zwei"))
    assert "nothing to ask again" in (await chat.say("/retry"))[1]
    await chat.say("first")
    await chat.say("second")
    await chat.say("/retry")
    assert chat.asked() == ["first", "one", "second"]
    assert [str(reply.content) for _, reply in chat.chat.conversation.turns] == ["one", "zwei"]


async def test_a_retry_that_fails_keeps_the_old_answer(chats: Chats) -> None:
    chat = chats(answer("one"), [Failed(EngineDied("the worker died").to_json())], answer("two"))
    await chat.say("first")
    await chat.say("/retry")
    await chat.say("second")
    assert chat.asked() == ["first", "one", "second"]


async def test_set_changes_the_next_request(chats: Chats) -> None:
    chat = chats(answer("one"))
    for line in ("/set parameter temperature 0", "/set parameter stop 'a b' c", "/set system Be brief.", "/set think off"):
        assert await chat.say(line) == ("", "")
    await chat.say("hi")
    request = chat.backend.requests[0]
    assert (request.sampling.temperature, request.sampling.stop) == (0.0, ("a b", "c"))
    assert request.messages[0] == Message("system", "Be brief.")
    assert request.template_kwargs == {"enable_thinking": False}
    _, err = await chat.say("/show")
    assert "temperature 0.0, stop ('a b', 'c')" in err
    assert "Be brief." in err


@pytest.mark.parametrize(
    "line, message",
    [
        ("/clera", "error: there is no /clera command\nhint: did you mean /clear?\n"),
        ("/xyzzy", "error: there is no /xyzzy command\nhint: /? lists the commands\n"),
        ("/set parameter tempertaure 1", "error: there is no parameter 'tempertaure'\nhint: did you mean temperature"),
        ("/set parameter top_k many", "error: top_k is 'many'\nhint: use a whole number\n"),
        ("/set parameter temperature -1", "error: temperature is -1.0\nhint: use 0 (greedy) or more\n"),
        ("/set nonsense", "error: cannot set nonsense\nhint: use /set parameter NAME VALUE"),
        ("/load nothing", "error: there is no session named nothing\nhint: /save NAME makes one\n"),
        ("/save", "error: '' cannot name a session\nhint:"),
    ],
)
async def test_a_command_that_makes_no_sense_names_the_next_step(chats: Chats, line: str, message: str) -> None:
    _, err = await chats().say(line)
    assert err.startswith(message)


async def test_clear_forgets_the_turns(chats: Chats) -> None:
    chat = chats(answer("one"), answer("two"))
    await chat.say("first")
    await chat.say("/clear")
    await chat.say("second")
    assert chat.asked() == ["second"]


async def test_a_saved_chat_is_loaded_and_goes_on(chats: Chats) -> None:
    chat = chats(answer("one"), answer("two"))
    await chat.say("first")
    assert chat.backend.requests[0].session == ""
    await chat.say("/save trip")
    await chat.say("second")
    assert chat.backend.requests[1].session == "trip"
    other = chats(answer("three"))
    assert (await other.say("/load trip"))[1] == "trip: 2 turns\n"
    await other.say("third")
    assert other.asked() == ["first", "one", "second", "two", "third"]
    assert "already a session" in (await chats().say("/save trip"))[1]


async def test_help_names_every_command(chats: Chats) -> None:
    _, err = await chats().say("/?")
    for name in ("/bye", "/clear", "/retry", "/set", "/show", "/save", "/load"):
        assert name in err


@pytest.mark.parametrize(
    "line, expected",
    [("/bye", True), ("  /set system x", True), ("/?", True), ("/etc/hosts: what is it?", False), ("a /bye", False), ("", False)],
)
def test_is_command(line: str, expected: bool) -> None:
    assert is_command(line) is expected


def test_unquote() -> None:
    assert unquote('  """\nfirst\n  second\n"""  ') == "first\n  second"
    assert unquote('say """hi"""') == 'say """hi"""'
    assert unquote('"""') == ""


def test_set_parameter_reads_each_kind() -> None:
    sampling = set_parameter(Sampling(), "ignore_eos", "on")
    sampling = set_parameter(sampling, "num_predict", "5")
    assert (sampling.ignore_eos, sampling.max_tokens) == (True, 5)
    with pytest.raises(UsageError):
        set_parameter(sampling, "ignore_eos", "perhaps")
    with pytest.raises(UsageError):
        set_parameter(sampling, "json_schema", "{}")


# The line editor


async def type_keys(tmp_path: Path, keys: str) -> str:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        return await prompt_session(tmp_path / "state" / "prompt_history", ["/bye", "/clear"]).prompt_async()


@pytest.mark.parametrize(
    "keys, text",
    [
        ("hello\r", "hello"),
        ("one\ntwo\r", "one\ntwo"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ('"""one\rtwo"""\r', '"""one\ntwo"""'),
    ],
)
async def test_enter_sends_and_the_others_start_a_line(tmp_path: Path, keys: str, text: str) -> None:
    assert await type_keys(tmp_path, keys) == text


async def test_ctrl_c_takes_the_line_back(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        await type_keys(tmp_path, "hello\x03")


async def test_ctrl_d_ends(tmp_path: Path) -> None:
    with pytest.raises(EOFError):
        await type_keys(tmp_path, "\x04")


async def test_what_was_typed_is_remembered_privately(tmp_path: Path) -> None:
    await type_keys(tmp_path, "first\r")
    assert await type_keys(tmp_path, "\x1b[A\r") == "first"
    if os.name == "posix":
        assert (tmp_path / "state" / "prompt_history").stat().st_mode & 0o077 == 0


async def test_a_history_that_cannot_be_written_is_kept_in_memory(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("not a directory", encoding="utf-8")
    assert await type_keys(tmp_path, "hello\r") == "hello"


# The whole chat on a terminal

DEADLINE_S = 30.0


class Pty:
    """This file as a program on a terminal of its own."""

    def __init__(self, *args: str) -> None:
        import pty

        self._master, slave = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "PYTHONPATH": str(Path(module.__file__).parents[2])}
        command = [sys.executable, __file__, *args]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True)
        os.close(slave)
        self._seen = b""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> str:
        """Everything on the screen up to `text`."""
        while text.encode() not in self._seen:
            ready, _, _ = select.select([self._master], [], [], DEADLINE_S)
            try:
                chunk = os.read(self._master, 65536) if ready else b""
            except OSError:
                chunk = b""
            assert chunk, f"{text!r} did not come after {self._seen.decode()!r}"
            self._seen += chunk
        before, _, self._seen = self._seen.partition(text.encode())
        return (before + text.encode()).decode()

    def wait_for_prompt(self) -> None:
        # The editor asks for bracketed paste when it has the keyboard; a key before that goes elsewhere.
        self.wait_for("\x1b[?2004h")
        self.wait_for(">>>")

    def close(self) -> int:
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._master)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pty")
def test_a_chat_on_a_terminal() -> None:
    chat = Pty("demo")
    try:
        chat.wait_for_prompt()
        chat.type("first\r")
        assert "answer 1 to 1 message" in chat.wait_for("412.3 tokens/s")
        chat.wait_for_prompt()
        chat.type("forever\r")
        chat.wait_for("once upon")
        chat.type("\x03")
        chat.wait_for("100.0 tokens/s")
        chat.wait_for_prompt()
        chat.type("half a line\x03")
        chat.wait_for_prompt()
        chat.type("\x03")
        chat.wait_for("/bye or Ctrl-D ends the chat")
        chat.wait_for_prompt()
        chat.type("third\r")
        chat.wait_for("answer 3 to 5 messages")
        chat.wait_for_prompt()
        chat.type("/bye\r")
    finally:
        code = chat.close()
    assert code == 0


def program() -> None:
    """`localllm run` with a model that counts, or goes on forever where the question says so."""
    import fcntl
    import termios

    # Ctrl-C reaches the session that owns the terminal.
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    class Counting(ScriptedBackend):
        def stream(self, request: Request) -> Any:
            n = len(request.messages)
            text = f"answer {len(self.requests) + 1} to {n} message{'s' if n > 1 else ''}"
            endless = request.messages[-1].content == "forever"
            self.scripts = [[Delta(0, "once upon"), wait] if endless else answer(text)]
            return super().stream(request)

    async def load(planned: Planned, options: dict[str, Any], screen: Screen) -> Loaded:
        return Loaded(cast(Any, Counting()), planned, ())

    module.load = load
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(module.run)
    app()


if __name__ == "__main__":
    program()
