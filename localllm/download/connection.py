"""One HTTP/1.1 connection that one thread uses for GET requests, direct or through the proxy that the environment names.

The standard library's client, because it hands out the socket's bytes almost as they are: httpx2 spends about six times the
processor on a large body, most of it holding the interpreter. Certificates are checked against what httpx2 trusts, so that all of
localllm trusts the same. Follows no redirects and retries nothing, except once where a connection had gone stale.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import ssl
import threading
from collections.abc import Mapping
from functools import cache
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from localllm.errors import ConfigError

CONNECT_S = 10.0
READ_BYTES = 256 << 10
_URL_SAFE = "!#$%&'()*+,/:;=?@[]~"
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, ConnectionAbortedError, BrokenPipeError)

Failures = (OSError, http.client.HTTPException)
"""What `get` and `read` raise when the line or the server fails."""


class Answer:
    """Status and headers of one answer, and its body as it comes."""

    def __init__(self, response: http.client.HTTPResponse, host: str) -> None:
        self.status = response.status
        self.reason = response.reason
        self.host = host
        self._response = response

    def header(self, name: str, default: str = "") -> str:
        return (self._response.getheader(name) or default).strip()

    def read(self) -> bytes:
        """What has arrived, up to READ_BYTES; empty at the end, or where the line broke."""
        return self._response.read1(READ_BYTES)

    def close(self) -> bool:
        """Whether the whole body was read, so that the connection can be used again."""
        complete = self._response.isclosed() if self._response.chunked else self._response.length == 0
        self._response.close()
        return complete


class Connection:
    """Connects as needed, again for every other host; `stall_s` without a byte is a TimeoutError."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._lock = threading.Lock()
        self._line: http.client.HTTPConnection | None = None
        self._origin: tuple[str, str] | None = None
        self._answer: Answer | None = None
        self._hung_up = False

    def get(self, url: str, headers: Mapping[str, str]) -> Answer:
        """Raises one of Failures, or ConfigError for a proxy that cannot be used."""
        parts = urlsplit(quote(url, safe=_URL_SAFE))
        origin = (parts.scheme, parts.netloc)
        free = self._answer is None or self._answer.close()
        if self._line is not None and self._line.sock is not None and free and origin == self._origin:
            with contextlib.suppress(*_STALE):
                return self._ask(self._line, parts, headers)
        self.close()
        line = _line(parts, min(CONNECT_S, self._stall_s))
        line.connect()
        line.sock.settimeout(self._stall_s)
        with self._lock:
            self._line, self._origin = line, origin
            if self._hung_up:
                raise ConnectionAbortedError("stopped")
        return self._ask(line, parts, headers)

    def close(self) -> None:
        with self._lock:
            if self._line is not None:
                self._line.close()
                self._line = self._answer = None

    def hang_up(self) -> None:
        """For another thread: end what is being read, and answer no more."""
        with self._lock:
            self._hung_up = True
            if self._line is not None and self._line.sock is not None:
                with contextlib.suppress(OSError):
                    # Not SSLSocket's own, which pulls the TLS state away under the reader.
                    socket.socket.shutdown(self._line.sock, socket.SHUT_RDWR)

    def _ask(self, line: http.client.HTTPConnection, parts: SplitResult, headers: Mapping[str, str]) -> Answer:
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        proxy = _proxy(parts)
        if proxy is not None and parts.scheme == "http":
            path, headers = f"http://{parts.netloc}{path}", {**headers, **_credentials(proxy)}
        try:
            line.request("GET", path, headers=dict(headers))
            self._answer = Answer(line.getresponse(), parts.hostname or "")
        except BaseException:
            self.close()  # half a request was sent
            raise
        return self._answer


def _line(parts: SplitResult, timeout_s: float) -> http.client.HTTPConnection:
    """A connection for `parts`, not yet made."""
    host, proxy = parts.hostname or "", _proxy(parts)
    if parts.scheme != "https":
        to = proxy or parts
        return http.client.HTTPConnection(to.hostname or "", to.port or 80, timeout=timeout_s)
    if proxy is None:
        return http.client.HTTPSConnection(host, parts.port or 443, timeout=timeout_s, context=_trust())
    line = http.client.HTTPSConnection(proxy.hostname or "", proxy.port or 80, timeout=timeout_s, context=_trust())
    line.set_tunnel(host, parts.port or 443, headers=_credentials(proxy))
    return line


def _proxy(parts: SplitResult) -> SplitResult | None:
    """The proxy that the environment, or the system, wants for this host."""
    proxies = getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    if not address or proxy_bypass(parts.hostname or ""):
        return None
    proxy = urlsplit(address if "://" in address else f"http://{address}")
    if proxy.scheme != "http" or not proxy.hostname:
        raise ConfigError(f"the proxy {address} cannot be used for downloads", hint="set HTTPS_PROXY to an http:// proxy, or NO_PROXY")
    return proxy


def _credentials(proxy: SplitResult) -> dict[str, str]:
    if not proxy.username:
        return {}
    secret = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}


@cache
def _trust() -> ssl.SSLContext:
    from httpx2 import create_ssl_context

    return create_ssl_context()
