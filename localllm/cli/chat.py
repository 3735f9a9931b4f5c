"""The interactive chat of `localllm run`: a prompt, the answers, and the /commands between them.

Knows the conversation and where it is kept; the model is loaded by whoever starts the chat.
"""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localllm.cli.answer import Manner, on_interrupt, stream_answer
from localllm.cli.conversation import Conversation, conversation_file, load_conversation
from localllm.cli.output import Screen
from localllm.errors import ContextExceeded, EngineDied, LocalLLMError, UsageError
from localllm.types import Backend, Sampling

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import Output

QUOTES = '"""'
_HINTS: dict[type[LocalLLMError], str] = {
    ContextExceeded: "/clear starts afresh; a larger -c holds more",
    EngineDied: "/retry starts it again and asks again",
}
"""What to do in a chat, where the general hint speaks of requests."""
_ALIASES = {"temp": "temperature", "num_predict": "max_tokens", "n_predict": "max_tokens"}


@dataclass(frozen=True, slots=True)
class Command:
    """A /command: what follows its name, what it does, and the method that does it."""

    arguments: str
    help: str
    run: Callable[[Chat, str], Awaitable[None]]


class Chat:
    """One conversation with one model; an error ends an answer, never the chat."""

    def __init__(self, model: str, backend: Backend, screen: Screen, conversation: Conversation, manner: Manner, state: Path) -> None:
        """`state` is the directory of the prompt history and of the sessions."""
        self.model = model
        self.conversation = conversation
        self.manner = manner
        self._backend = backend
        self._screen = screen
        self._state = state
        self._last_question = ""
        self._open = True

    async def run(self) -> None:
        """Read and answer until /bye or Ctrl-D."""
        from prompt_toolkit.output import create_output

        self._screen.note(f"{self.model} · /? for help, Ctrl-D to leave")
        # The prompt must not land in `> answers.txt`.
        prompt = prompt_session(self._state / "prompt_history", sorted(COMMANDS), create_output(always_prefer_tty=True))
        # A Ctrl-C that is neither at the prompt nor in an answer ends nothing.
        with on_interrupt(lambda: None):
            while self._open:
                try:
                    await self.take(await prompt.prompt_async())
                except KeyboardInterrupt:
                    # Ctrl-C took back the line; where there was none, the person wants to leave.
                    if not prompt.default_buffer.text:
                        self._screen.note("/bye or Ctrl-D ends the chat")
                except EOFError:
                    break

    async def take(self, line: str) -> None:
        """Answer a question or obey a /command; an error is printed and the chat goes on."""
        text = unquote(line)
        try:
            if is_command(line):
                await self._obey(line)
            elif text:
                await self._answer(text)
        except LocalLLMError as error:
            self._screen.complain(error)

    async def _answer(self, question: str) -> None:
        self._last_question = question
        request = self.manner.request(messages=self.conversation.ask(question), session=self.conversation.name)
        answer = await stream_answer(self._backend, request, self._screen)
        self._screen.end_answer()
        if answer.text or answer.tool_calls:
            self.conversation.add(question, answer.message())
        elif not answer.error:
            self._screen.note("stopped before the answer began" if answer.interrupted else "the model gave no answer; /retry asks again")
        if answer.error:
            answer.error.hint = _HINTS.get(type(answer.error), answer.error.hint)
            raise answer.error
        self._screen.statistics(answer.timings)
        self._save()

    def _save(self) -> None:
        self.conversation.save(self._state / "sessions")

    async def _obey(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        if command := COMMANDS.get(name):
            await command.run(self, rest.strip())
            return
        close = get_close_matches(name, COMMANDS, n=3)
        raise UsageError(f"there is no {name} command", hint=f"did you mean {' or '.join(close)}?" if close else "/? lists the commands")

    async def bye(self, _: str) -> None:
        self._open = False

    async def help(self, _: str) -> None:
        for name, command in COMMANDS.items():
            self._screen.note(f"{f'{name} {command.arguments}':<32}{command.help}")
        self._screen.note(f"\n{QUOTES} opens and closes a text of many lines; Alt+Enter or Ctrl-J starts a line; Ctrl-C stops an answer.")

    async def clear(self, _: str) -> None:
        self.conversation.turns.clear()
        self._save()
        self._screen.note("the conversation is forgotten")

    async def retry(self, _: str) -> None:
        turns = self.conversation.turns
        question = self._last_question or (str(turns[-1][0].content) if turns else "")
        if not question:
            raise UsageError("there is nothing to ask again", hint="ask something first")
        before = list(turns)
        if turns and turns[-1][0].content == question:
            turns.pop()
        try:
            await self._answer(question)
        finally:
            # A new answer that did not come must not cost the old one.
            if len(turns) < len(before):
                turns[:] = before

    async def set(self, rest: str) -> None:
        what, _, value = rest.partition(" ")
        value = unquote(value)
        match what:
            case "system":
                self.conversation.system = value
                self._save()
            case "think" if value in ("on", "off"):
                self.manner = replace(self.manner, thinking=value == "on")
            case "parameter" if value:
                name, _, text = value.partition(" ")
                self.manner = replace(self.manner, sampling=set_parameter(self.manner.sampling, name, text.strip()))
            case _:
                hint = "use /set parameter NAME VALUE, /set system TEXT or /set think on|off"
                raise UsageError(f"cannot set {rest or 'nothing'}", hint=hint)

    async def show(self, _: str) -> None:
        now, default = asdict(self.manner.sampling), asdict(Sampling())
        changed = [f"{name} {value!r}" for name, value in now.items() if value != default[name]]
        rows = {
            "model": self.model,
            "session": self.conversation.name or "none; /save NAME keeps this chat",
            "turns": str(len(self.conversation.turns)),
            "system": self.conversation.system or "none",
            "parameters": ", ".join(changed) or "all at their defaults",
            "thinking": {None: "as the model likes", True: "on", False: "off"}[self.manner.thinking],
        }
        for name, value in rows.items():
            self._screen.note(f"{name:<12}{value}")

    async def save(self, name: str) -> None:
        path = conversation_file(self._state / "sessions", name or self.conversation.name)
        if name != self.conversation.name and path.exists():
            raise UsageError(f"there is already a session named {name}", hint="choose another name, or /load it")
        self.conversation.name = name or self.conversation.name
        self._save()
        self._screen.note(f"saved as {self.conversation.name}, and from now on after each answer")

    async def load(self, name: str) -> None:
        directory = self._state / "sessions"
        if not conversation_file(directory, name).exists():
            names = ", ".join(sorted(path.stem for path in directory.glob("*.json")))
            raise UsageError(f"there is no session named {name}", hint=f"there are: {names}" if names else "/save NAME makes one")
        self.conversation = load_conversation(directory, name)
        self._last_question = ""
        self._screen.note(f"{name}: {len(self.conversation.turns)} turns")


COMMANDS: dict[str, Command] = {
    "/bye": Command("", "end the chat; also /exit and Ctrl-D", Chat.bye),
    "/exit": Command("", "the same", Chat.bye),
    "/clear": Command("", "forget the conversation, keep the system prompt", Chat.clear),
    "/retry": Command("", "ask the last question again", Chat.retry),
    "/set": Command("parameter NAME VALUE", "change how it answers; also: /set system TEXT, /set think on|off", Chat.set),
    "/show": Command("", "the model, the session and what was set", Chat.show),
    "/save": Command("NAME", "keep this chat", Chat.save),
    "/load": Command("NAME", "go on with a chat that was kept", Chat.load),
    "/?": Command("", "this list; also /help", Chat.help),
    "/help": Command("", "the same", Chat.help),
}


def is_command(line: str) -> bool:
    """A line such as `/set …`; `/etc/hosts is what?` is a question."""
    name = line.lstrip().partition(" ")[0]
    return name.startswith("/") and "/" not in name[1:] and "\n" not in name


def unquote(text: str) -> str:
    '''`text` without blanks around it and without the """ of a text of many lines.'''
    text = text.strip()
    if text.startswith(QUOTES):
        text = text.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text


def set_parameter(sampling: Sampling, name: str, text: str) -> Sampling:
    """`sampling` with the parameter `name` read from `text`; raises UsageError or InvalidRequest."""
    name = _ALIASES.get(name, name)
    settable: dict[str, Any] = {
        f.name: getattr(Sampling(), f.name) for f in fields(Sampling) if f.name not in ("logit_bias", "json_schema")
    }
    if name not in settable:
        close = get_close_matches(name, settable, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(settable)}"
        raise UsageError(f"there is no parameter {name!r}", hint=hint)
    return replace(sampling, **{name: _parameter(name, text, settable[name].__class__)})


def _parameter(name: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}[text.lower()]
        return tuple(shlex.split(text)) if kind is tuple else kind(text)
    except (KeyError, ValueError):
        wanted = {bool: "on or off", int: "a whole number", float: "a number", tuple: "texts in quotes"}[kind]
        raise UsageError(f"{name} is {text!r}", hint=f"use {wanted}") from None


def prompt_session(history_file: Path, completions: list[str], output: Output | None = None) -> PromptSession[str]:
    """The line editor: Enter sends, Alt+Enter, Ctrl-J and an open triple quote start a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    return PromptSession(
        ">>> ",
        output=output,
        history=_history(history_file),
        key_bindings=_keys(),
        completer=WordCompleter(completions, sentence=True),
        complete_while_typing=False,
        multiline=True,
        prompt_continuation="... ",
    )


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        text = event.current_buffer.text.strip()
        if text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES)):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history(path: Path) -> History:
    """The lines typed before, private to the user; in memory where the disk does not allow it."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
