"""One file on the Hub, readable in ranges by many threads at once.

Follows redirects by hand, so that the token stays with the host it was meant for; renews links that have expired; sorts what
goes wrong into `Retry` (the same again may work), `Restart` (what we have is of no use) and the errors of errors.py.
Knows no disk and decides no retries.
"""

from __future__ import annotations

import email.utils
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urljoin, urlsplit

from localllm import __version__
from localllm.download.connection import Answer, Connection, Failures
from localllm.download.partial import Identity
from localllm.errors import NetworkError, Offline, VerificationFailed

if TYPE_CHECKING:
    from localllm.hub import Hub, Location

MAX_REDIRECTS = 5
MAX_FILE_BYTES = 8 << 40
"""Beyond any model; a size that a server made up must not reach the disk."""
REDIRECTS = frozenset({301, 302, 303, 307, 308})
EXPIRED = frozenset({401, 403, 404, 410})
"""What a CDN answers to a link that has had its time; the Hub itself then says whether the file is really gone."""
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_CERTIFICATE = "a proxy on the way may have one of its own: SSL_CERT_FILE names the certificates to trust"
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class Retry(Exception):
    """This attempt failed, another may not; `after_s` is what the server asked to wait."""

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s


class Restart(Exception):
    """The bytes fetched so far cannot be continued; `whole` where the server knows no ranges at all."""

    def __init__(self, reason: str, whole: bool = False) -> None:
        super().__init__(reason)
        self.whole = whole


@dataclass(frozen=True, slots=True)
class _Link:
    """Where to send requests now, and with which headers."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    age: int = 0
    """How often the Hub was asked anew before it; links found by redirects are as old as the one they were found by."""

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""


class Source:
    """`path` of `repo` at `commit`."""

    def __init__(self, hub: Hub, repo: str, commit: str, path: str) -> None:
        self._hub = hub
        self._endpoint = urlsplit(hub.endpoint)
        self._lock = threading.Lock()
        self._where = (repo, commit, path)
        location = hub.location(repo, commit, path)
        self.identity = self._identity(location)
        self.validator = ""
        """The storage server's strong ETag, once known; empty where it gave none that can be trusted."""
        self._trust_etags = True
        self._link = self._linked(location)

    def read(self, connection: Connection, start: int, end: int) -> Iterator[bytes]:
        """The bytes `[start, end)` as they come, and no more. Raises Retry, Restart or an error for the user, at any piece."""
        link, validator = self._link, self.validator
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
        if validator:
            headers["If-Range"] = validator
        left = end - start
        try:
            answer = self._send(connection, link, headers)
            self._check(answer, start, end, validator, link.age)
            while left and (piece := answer.read()):
                piece = piece[:left]
                left -= len(piece)
                yield piece
        except ssl.SSLCertVerificationError as error:
            raise NetworkError(f"{link.host} shows a certificate that is not trusted: {error.verify_message}", hint=_CERTIFICATE) from error
        except TimeoutError as error:
            raise Retry(f"{link.host} was silent for too long") from error
        except Failures as error:
            raise Retry(f"{link.host}: {str(error) or type(error).__name__}") from error
        if left:
            raise Retry(f"{link.host} closed the connection early")

    def _send(self, connection: Connection, link: _Link, headers: Mapping[str, str]) -> Answer:
        """The first answer that is no redirect; where it was found is remembered for the next request."""
        first = link
        for _ in range(MAX_REDIRECTS + 1):
            answer = connection.get(link.url, {"User-Agent": f"localllm/{__version__}", **link.headers, **headers})
            if answer.status not in REDIRECTS:
                if answer.status in (200, 206):
                    with self._lock:
                        self._link = link if self._link is first else self._link
                return answer
            target = urljoin(link.url, answer.header("location"))
            self._allow(target)
            link = _Link(target, link.headers if _origin(target) == _origin(link.url) else {}, link.age)
        raise NetworkError(f"{first.host} redirected more than {MAX_REDIRECTS} times", hint="try again later, or check HF_ENDPOINT")

    def _check(self, answer: Answer, start: int, end: int, validator: str, age: int) -> None:
        """Return if `answer` holds the bytes `[start, end)` of our file."""
        status, host, size = answer.status, answer.host, self.identity.size_bytes
        if status in EXPIRED:
            self._renew(age)
            raise Retry(f"{host} refused the link with {status}")
        if status in BUSY:
            raise Retry(f"{host} answered {status} {answer.reason}", _retry_after(answer.header("retry-after")))
        if answer.header("content-encoding", "identity") != "identity":
            raise NetworkError(f"{host} sent the file compressed, which cannot be resumed", hint="check the proxy in between")
        if status == 206:
            found = _CONTENT_RANGE.fullmatch(answer.header("content-range"))
            if not found or int(found[1]) != start or int(found[2]) >= end:
                raise Retry(f"{host} sent another range than it was asked for")
            if found[3] not in ("*", str(size)):
                self._renew(age)
                raise Retry(f"{host} has {found[3]} bytes where the Hub says {size}")
            if etag := answer.header("etag"):
                self._compare(etag, age)
        elif status == 200 and validator:
            self._compare("", age)
            raise Retry(f"{host} sent the whole file")
        elif status == 200:
            length = answer.header("content-length", str(size))
            if length != str(size):
                raise Retry(f"{host} sent {length} bytes where the file has {size}")
            if (start, end) != (0, size):
                raise Restart("the server sends only whole files, so it comes over one connection", whole=True)
        elif status == 416:
            self._renew(age)
            raise Retry(f"{host} has no bytes {start}-{end - 1}")
        else:
            raise NetworkError(f"{host} answered {status} {answer.reason}", hint="try again later")

    def _compare(self, etag: str, age: int) -> None:
        """Hold the server's ETag against the one before; where they differ the Hub has the last word."""
        with self._lock:
            if not self._trust_etags or etag.startswith("W/"):
                return
            self.validator = self.validator or etag
            if etag == self.validator:
                return
        self._renew(age)
        # The same file under two ETags: servers behind one name that do not agree. The hash at the end decides.
        self._trust_etags, self.validator = False, ""

    def _renew(self, age: int) -> None:
        """Ask the Hub for the file again, once for all whose link is of that age; raises Restart if the file is another now."""
        with self._lock:
            if self._link.age != age:
                return
            try:
                location = self._hub.location(*self._where)
            except Offline:
                raise
            except NetworkError as error:
                raise Retry(error.message) from error
            if not self._identity(location).same_content(self.identity):
                raise Restart("it has changed on the Hub")
            self._link = self._linked(location, age + 1)

    def _linked(self, location: Location, age: int = 0) -> _Link:
        self._allow(location.url)
        return _Link(location.url, dict(location.headers), age)

    def _identity(self, location: Location) -> Identity:
        repo, commit, path = self._where
        if not 0 <= location.size_bytes <= MAX_FILE_BYTES:
            raise VerificationFailed(f"the Hub says that {path} of {repo} has {location.size_bytes} bytes", hint="check HF_ENDPOINT")
        return Identity(repo, commit, path, location.size_bytes, location.sha256, location.etag)

    def _allow(self, address: str) -> None:
        """Refuse an address where a download has no business."""
        home, url = self._endpoint, _split(address)
        host = url.hostname or ""
        if url.scheme != "https" and (url.scheme, home.scheme) != ("http", "http"):
            raise NetworkError(f"refused to fetch from {url.scheme}://{host}", hint="only https is used unless HF_ENDPOINT is http")
        if host != home.hostname and _inside(host) and not _inside(home.hostname or ""):
            raise NetworkError(f"{home.hostname} sent us to {host}, inside this network", hint="check HF_ENDPOINT and the name server")


def _split(address: str) -> SplitResult:
    try:
        url = urlsplit(address)
        _ = url.port  # looked at only when asked for
    except ValueError as error:
        raise NetworkError(f"{address[:200]!r} is no address", hint="check HF_ENDPOINT") from error
    return url


def _origin(address: str) -> tuple[str, str | None, int]:
    url = _split(address)
    return url.scheme, url.hostname, url.port or (443 if url.scheme == "https" else 80)


def _inside(host: str) -> bool:
    """Whether `host` is not a public address; a name that cannot be looked up here (a proxy does it) counts as public."""
    try:
        addresses = {ipaddress.ip_address(host)}
    except ValueError:
        try:
            addresses = {ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in socket.getaddrinfo(host, None)}
        except (OSError, UnicodeError):
            return False
    return not all(address.is_global for address in addresses)


def _retry_after(value: str) -> float | None:
    """Seconds from a Retry-After header, which holds a number or a date (RFC 9110, 10.2.3)."""
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
