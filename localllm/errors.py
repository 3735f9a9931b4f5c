"""Every error a user can meet: one tree, each with the next step.

    LocalLLMError
    ├── UsageError             a flag, setting or option that makes no sense            exit 2, 400
    │   └── ConfigError        the settings file or an environment variable
    ├── NotFound               a model, file or name that is not there, or is ambiguous exit 3, 404
    ├── InvalidRequest         a request that cannot be honoured as written             exit 2, 400
    │   ├── ContextExceeded    prompt longer than the context
    │   ├── GrammarError       a grammar or JSON schema that does not parse
    │   └── TemplateError      a chat template that raises, loops or grows too large
    ├── ModelError             a file that is not a usable model                        exit 1, 422
    ├── DoesNotFit             not enough memory, or disk                               exit 4, 507
    ├── NetworkError           the network failed, or may not be used                   exit 5, 502
    │   └── Offline            it was asked for while offline
    ├── VerificationFailed     bytes are not the bytes they should be                   exit 6, 422
    ├── NotAuthorised          a missing or refused token                               exit 7, 401
    ├── Overloaded             the queue is full                                        exit 1, 429
    ├── EngineError            decoding failed for this request; the engine lives on    exit 1, 500
    └── EngineDied             the worker process ended; the next request restarts it   exit 1, 503

The CLI prints them, the server maps them, the TUI toasts them: three places and nowhere else.
"""

from __future__ import annotations

from typing import Any, ClassVar


class LocalLLMError(Exception):
    """An error meant for a person: `message` says what and why, `hint` the next step."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self).__name__, self.message, self.hint, self.details)

    def to_json(self) -> dict[str, Any]:
        """As plain data, for the worker's pipe."""
        return {"class": type(self).__name__, "message": self.message, "hint": self.hint, "details": self.details}

    @staticmethod
    def from_json(data: dict[str, Any]) -> LocalLLMError:
        """The error that `to_json` wrote; an unknown class becomes EngineError."""
        return _rebuild(str(data.get("class")), str(data["message"]), str(data.get("hint", "")), data.get("details") or {})


class UsageError(LocalLLMError):
    exit_code = 2
    http_status = 400
    type = "invalid_request_error"


class ConfigError(UsageError):
    """The settings file or an environment variable holds something unusable."""


class NotFound(LocalLLMError):
    exit_code = 3
    http_status = 404
    type = "not_found_error"


class InvalidRequest(LocalLLMError):
    exit_code = 2
    http_status = 400
    type = "invalid_request_error"


class ContextExceeded(InvalidRequest):
    """The prompt does not fit the context; details hold `n_prompt_tokens` and `n_ctx`."""

    type = "exceed_context_size_error"


class GrammarError(InvalidRequest):
    """A grammar does not parse, or a JSON schema uses something that cannot be enforced."""


class TemplateError(InvalidRequest):
    """The model's chat template raised, ran too long or wrote too much."""


class ModelError(LocalLLMError):
    """The file is not a model that llama.cpp can load."""

    http_status = 422
    type = "model_error"


class DoesNotFit(LocalLLMError):
    exit_code = 4
    http_status = 507
    type = "insufficient_memory_error"


class NetworkError(LocalLLMError):
    """A host could not be reached, or answered with nonsense."""

    exit_code = 5
    http_status = 502
    type = "network_error"


class Offline(NetworkError):
    """Something needs the network, and localllm was told to stay off it."""


class VerificationFailed(LocalLLMError):
    """A hash, a size or a signature does not match."""

    exit_code = 6
    http_status = 422
    type = "verification_error"


class NotAuthorised(LocalLLMError):
    """A token is missing, wrong, or has no access."""

    exit_code = 7
    http_status = 401
    type = "authentication_error"


class Overloaded(LocalLLMError):
    http_status = 429
    type = "rate_limit_error"


class EngineError(LocalLLMError):
    """Decoding failed for this request; others and the engine go on."""


class EngineDied(LocalLLMError):
    """The worker process ended; `details["last_words"]` holds the end of its log."""

    http_status = 503
    type = "unavailable_error"


def _rebuild(name: str, message: str, hint: str, details: dict[str, Any]) -> LocalLLMError:
    kinds: dict[str, type[LocalLLMError]] = {}
    queue: list[type[LocalLLMError]] = [LocalLLMError]
    while queue:
        kind = queue.pop()
        kinds[kind.__name__] = kind
        queue.extend(kind.__subclasses__())
    return kinds.get(name, EngineError)(message, hint=hint, **details)
