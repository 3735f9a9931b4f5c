"""What huggingface_hub and its httpx2 raise, as our errors: what went wrong with what, and the next step. Asks the Hub nothing.

Importing it imports huggingface_hub: only `hub` does, once it is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx2
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from localllm.errors import LocalLLMError, NetworkError, NotAuthorised, NotFound, Offline, UsageError

_PASSING = frozenset({408, 500, 502, 503, 504})
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a failed question was about; what it was not about is empty."""

    endpoint: str
    repo: str = ""
    revision: str = ""
    path: str = ""

    @property
    def page(self) -> str:
        return f"{self.endpoint}/{self.repo}"


def wait_s(error: Exception, pause_s: float | None) -> float | None:
    """Seconds after which to ask again: `pause_s`, or what the Hub said; None where it was the last try or would not help."""
    if pause_s is None:
        return None
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return max(pause_s, rate_limit_s(error.response.headers)) if status == 429 else pause_s if status in _PASSING else None
    # What cannot connect at all (no network, no such host) will not in two seconds.
    lost = isinstance(error, (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError))
    return pause_s if lost and not isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)) else None


def rate_limit_s(headers: Mapping[str, str]) -> float:
    """Seconds to wait after a 429, from `RateLimit` or `Retry-After`; infinite where the Hub does not say."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    seconds = headers.get("retry-after", "").strip()
    return int(seconds) if re.fullmatch(r"\d{1,9}", seconds) else math.inf


def explain(error: Exception, asked: Asked, env: Mapping[str, str], close_names: Callable[[str], list[str]]) -> LocalLLMError:
    """`error` as one of ours; `close_names` is asked for other repositories where there is none of that name."""
    if isinstance(error, OfflineModeIsEnabled):
        return Offline(
            f"{asked.repo or 'a search'} needs the Hugging Face Hub, and HF_HUB_OFFLINE forbade it when this program started",
            hint="unset HF_HUB_OFFLINE and start again",
        )
    if isinstance(error, HFValidationError):
        return UsageError(f"{asked.repo!r} is no repository", hint="give it as user/name")
    if isinstance(error, HfHubHTTPError):
        return _refused(error, asked, close_names)
    if isinstance(error, (httpx2.HTTPError, httpx2.InvalidURL)):
        return _unreachable(error, asked.endpoint, env)
    return NetworkError(
        f"{asked.endpoint} answered with something that no Hub says ({type(error).__name__})",
        hint="a login page of the network or a proxy may be in between: open the address in a browser; check HF_ENDPOINT",
    )


def _refused(error: HfHubHTTPError, asked: Asked, close_names: Callable[[str], list[str]]) -> LocalLLMError:
    """The Hub answered, with an error."""
    with_token = "authorization" in error.response.request.headers
    status = error.response.status_code
    login = f"make a token at {asked.endpoint}/settings/tokens, then set HF_TOKEN or run: hf auth login"
    if isinstance(error, GatedRepoError):
        if with_token:
            return NotAuthorised(
                f"{asked.repo} is gated, and the account of your token has no access to it", hint=f"accept its licence at {asked.page}"
            )
        return NotAuthorised(f"{asked.repo} is gated", hint=f"accept its licence at {asked.page}, {login}")
    if isinstance(error, RepositoryNotFoundError):
        close = close_names(asked.repo)
        hint = f"did you mean {', '.join(close)}?" if close else f"localllm search {asked.repo.rpartition('/')[2]}"
        private = "your token opens no private one of that name" if with_token else "a private one needs HF_TOKEN"
        return NotFound(f"there is no repository {asked.repo} at {asked.endpoint}", hint=f"{hint}; {private}")
    if isinstance(error, RevisionNotFoundError):
        return NotFound(f"{asked.repo} has no revision {asked.revision}", hint=f"use main, or one of {asked.page}/tree/main")
    if isinstance(error, EntryNotFoundError):
        return NotFound(f"{asked.repo} has no file {asked.path}", hint=f"localllm pull {asked.repo} --dry-run shows what it has")
    if isinstance(error, DisabledRepoError):
        return NotFound(f"the Hub has disabled {asked.repo}", hint=f"take another: localllm search {asked.repo.rpartition('/')[2]}")
    if status == 401:
        return NotAuthorised("the Hub refused your token" if with_token else "the Hub wants a token", hint=login)
    if status == 403:
        return NotAuthorised(
            f"the Hub forbids {asked.repo or 'this'}: {_said(error)}",
            hint=f"give the token more rights at {asked.endpoint}/settings/tokens",
        )
    if status == 429:
        seconds = rate_limit_s(error.response.headers)
        wait = f"wait {seconds:.0f} s" if math.isfinite(seconds) else "wait a few minutes"
        return NetworkError("too many requests to the Hub", hint=wait if with_token else f"{wait}; with HF_TOKEN set the limit is higher")
    if status >= 500:
        return NetworkError(f"{asked.endpoint} is in trouble ({status})", hint="try again later; https://status.huggingface.co")
    return NetworkError(f"{asked.endpoint} answered {status} about {asked.repo or 'a search'}: {_said(error)}", hint="check HF_ENDPOINT")


def _unreachable(error: Exception, endpoint: str, env: Mapping[str, str]) -> NetworkError:
    """There was no answer."""
    proxy = next((name for name in _PROXIES if env.get(name)), None)
    check = f"check the network and the proxy in {proxy}" if proxy else "check the network; behind a proxy, set HTTPS_PROXY"
    if isinstance(error, httpx2.ProxyError):
        return NetworkError(f"the proxy refuses {endpoint}: {error}", hint=check)
    if isinstance(error, httpx2.TimeoutException):
        return NetworkError(f"{endpoint} does not answer in time", hint=f"try again, or {check}")
    if isinstance(error, httpx2.ConnectError) and "CERTIFICATE" in str(error).upper():
        hint = "where the network inspects TLS, set SSL_CERT_FILE to its certificate; else check this machine's clock"
        return NetworkError(f"the certificate of {endpoint} is not to be trusted: {error}", hint=hint)
    if isinstance(error, httpx2.ConnectError):
        return NetworkError(f"cannot reach {endpoint}: {error}", hint=check)
    if isinstance(error, httpx2.TooManyRedirects):
        return NetworkError(f"{endpoint} redirects in circles", hint="check HF_ENDPOINT, or try again later")
    return NetworkError(f"the connection to {endpoint} failed: {error or type(error).__name__}", hint=f"try again, or {check}")


def _said(error: HfHubHTTPError) -> str:
    """The Hub's own words, on one line."""
    return "".join(char for char in error.server_message or "no reason given" if char.isprintable())[:200]
