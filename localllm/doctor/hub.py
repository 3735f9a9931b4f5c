"""Whether the Hub may be asked, and, only when the user wants that, whether it answers. It sends no token."""

from __future__ import annotations

import http.client
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from localllm.doctor.finding import Finding
from localllm.settings import Settings

ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 3.0
_TRUE = {"1", "ON", "YES", "TRUE"}
"""What huggingface_hub takes for yes, in capitals."""

Ask = Callable[[str, float], int]
"""(url, seconds) -> HTTP status; raises OSError or HTTPException."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What is known about the way to the Hub."""

    endpoint: str
    offline: bool
    offline_by: tuple[str, ...]
    """What turned it off: `offline` (the setting), HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE."""
    asked: bool
    reachable: bool | None = None
    """None: not asked."""
    status: int | None = None
    error: str = ""
    milliseconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_true(value: str | None) -> bool:
    return (value or "").upper() in _TRUE


def offline_by(env: Mapping[str, str], settings: Settings) -> tuple[str, ...]:
    """What keeps localllm off the network: variables, else the setting, which follows them."""
    variables = tuple(name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if is_true(env.get(name)))
    return variables or (("offline",) if settings.offline else ())


def reach(env: Mapping[str, str], settings: Settings, network: bool, ask: Ask | None = None) -> Reach:
    """One request to the Hub where `network` is wanted and nothing says offline; without, no packet leaves."""
    endpoint = (env.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    off = offline_by(env, settings)
    if off or not network:
        return Reach(endpoint, bool(off), off, asked=False)
    started = time.perf_counter()
    answer = _within(TIMEOUT_S, ask or head, f"{endpoint}/api/models?limit=1")
    took = round((time.perf_counter() - started) * 1000, 1)
    if isinstance(answer, int):
        return Reach(endpoint, False, (), True, answer < 500, answer, "" if answer < 500 else f"HTTP {answer}", took)
    return Reach(endpoint, False, (), True, False, error=_words(answer), milliseconds=took)


def judge_reach(found: Reach, env: Mapping[str, str]) -> Iterator[Finding]:
    if found.reachable is not False:
        return
    data = found.to_json()
    if "certificate" in found.error.lower():
        fix = "set SSL_CERT_FILE to your organisation's certificates"
        if env.get("SSL_CERT_FILE"):
            fix = f"check SSL_CERT_FILE ({env['SSL_CERT_FILE']})"
        yield Finding("hub-certificate", "warning", "hub", "the Hub's certificate is not trusted", found.error, fix, data)
        return
    fix = "check the connection and the proxy; models on disk run without it"
    if env.get("HF_ENDPOINT"):
        fix = f"check HF_ENDPOINT ({found.endpoint}) and the connection; models on disk run without it"
    yield Finding("hub-unreachable", "warning", "hub", f"{found.endpoint} does not answer", found.error, fix, data)


def head(url: str, timeout_s: float) -> int:
    """The HTTP status of `url`, through the proxies of the environment."""
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "localllm-doctor"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def _within(seconds: float, ask: Ask, url: str) -> int | Exception:
    """What `ask` answers in time; looking up a name keeps no timeout of its own."""
    answers: list[int | Exception] = []

    def run() -> None:
        try:
            answers.append(ask(url, seconds))
        except (OSError, http.client.HTTPException, ValueError) as error:
            answers.append(error)

    thread = threading.Thread(target=run, name="hub", daemon=True)
    thread.start()
    thread.join(seconds + 0.5)
    return answers[0] if answers else TimeoutError(f"no answer within {seconds:.0f} s")


def _words(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"certificate: {cause.verify_message}"
    return str(cause) or type(cause).__name__
