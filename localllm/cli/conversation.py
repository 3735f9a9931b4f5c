"""The turns of one chat, and the file that a named chat is kept in. Knows nothing of models or terminals."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from localllm.errors import LocalLLMError, UsageError
from localllm.files import write_atomic
from localllm.types import Message
from localllm.wire import decode, encode, parse

SCHEMA = 1
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


@dataclass(slots=True)
class Conversation:
    """A system prompt and whole turns: each a question with its answer, which a Ctrl-C may have cut short."""

    system: str = ""
    turns: list[tuple[Message, Message]] = field(default_factory=list[tuple[Message, Message]])
    name: str = ""
    """Names the file and the saved KV state; an unnamed chat leaves nothing on disk."""

    def ask(self, question: str) -> tuple[Message, ...]:
        """The messages that put `question` next."""
        system = (Message("system", self.system),) if self.system else ()
        return (*system, *(message for turn in self.turns for message in turn), Message("user", question))

    def add(self, question: str, answer: Message) -> None:
        self.turns.append((Message("user", question), answer))

    def save(self, directory: Path) -> None:
        """Write a named conversation to `directory`; an unnamed one stays in memory. Raises LocalLLMError."""
        if not self.name:
            return
        try:
            write_atomic(conversation_file(directory, self.name), encode({"schema": SCHEMA, "system": self.system, "turns": self.turns}))
        except OSError as error:
            hint = f"make room or check the permissions of {directory}"
            raise LocalLLMError(f"cannot save the session {self.name}: {error.strerror}", hint=hint) from error


def conversation_file(directory: Path, name: str) -> Path:
    """Where the session `name` lies; raises UsageError for a name that is not fit for a file."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot name a session", hint="use up to 64 letters, digits, '.', '_' and '-'")
    return directory / f"{name}.json"


def load_conversation(directory: Path, name: str) -> Conversation:
    """The conversation saved as `name`, empty where there is none yet. Raises LocalLLMError for a damaged file."""
    path = conversation_file(directory, name)
    try:
        data = parse(path.read_bytes())
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}")
        turns = [(decode(Message, question), decode(Message, answer)) for question, answer in data["turns"]]
        return Conversation(system=str(data["system"]), turns=turns, name=name)
    except FileNotFoundError:
        return Conversation(name=name)
    except (OSError, ValueError, KeyError, TypeError, LocalLLMError) as error:
        raise LocalLLMError(f"cannot read the session file {path}: {error}", hint="move it away, or choose another name") from error
