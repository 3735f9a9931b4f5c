from __future__ import annotations

import base64
import contextlib
import http.client
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from localllm.download import connection
from localllm.download.connection import Answer, Connection, Failures
from localllm.errors import ConfigError

BODY = bytes(range(256)) * 4096

# For localhost, of nobody's trust, until 2126; made with: openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes
PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgSbLq3v4zybg3RN54
yN9jRWdPZPl42ShM50YSAXuvmUOhRANCAAR4awICKZ+1MfG9c2t1KNUm8VVVPzT1
+H80iBrUy+oMtFn2HERFFBPAFbxSHludMd/AXywG5k5x/u9ytPVvzuv5
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUZpJ6BrQRxRKsINBLMScz5Jvnia0wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzE4MzIxM1oYDzIxMjYxMDMw
MTgzMjEzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAR4awICKZ+1MfG9c2t1KNUm8VVVPzT1+H80iBrUy+oMtFn2HERFFBPA
FbxSHludMd/AXywG5k5x/u9ytPVvzuv5o28wbTAdBgNVHQ4EFgQUx9uXRKgTAvnr
jRMThxJHaQN4hn0wHwYDVR0jBBgwFoAUx9uXRKgTAvnrjRMThxJHaQN4hn0wGgYD
VR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMA8GA1UdEwEB/wQFMAMBAf8wCgYIKoZI
zj0EAwIDSAAwRQIhANH23OHKOincscs1rKXh3kLvuOXs1z3Kg9DwIsCPyJTcAiAF
ELsBOsF85t8J02f4BOH3yGQW0dt+N3FzzA+QVtm0CA==
-----END CERTIFICATE-----
"""


class Handler(BaseHTTPRequestHandler):
    """A server with some ways to answer, and a proxy: absolute addresses and CONNECT."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append((self.client_address[1], self.path, dict(self.headers.items())))
        path = self.path.rpartition("/")[2]
        if path == "silent":
            self.server.ending.wait(30)
        elif path == "bye":
            self.answer(BODY[:10], close=True)
        elif path == "chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n")
        elif path == "short":
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY[:1000])
            self.close_connection = True
        else:
            self.answer(BODY)

    def do_CONNECT(self) -> None:
        self.server.seen.append((self.client_address[1], f"CONNECT {self.path}", dict(self.headers.items())))
        if self.path.startswith("refused"):
            return self.send_error(407)
        host, _, port = self.path.partition(":")
        self.send_response(200)
        self.end_headers()
        with socket.create_connection((host, int(port))) as far:
            near = self.connection
            while True:
                ready, _, _ = select.select([near, far], [], [], 30)
                if not ready:
                    break
                data = ready[0].recv(65536)
                if not data:
                    break
                (far if ready[0] is near else near).sendall(data)
        self.close_connection = True

    def answer(self, body: bytes, close: bool = False) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Words", "  two words ")
        if close:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[int, str, dict[str, str]]] = []
        self.ending = threading.Event()
        self.scheme = "https" if context else "http"
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.ending.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    connection._trust.cache_clear()
    yield
    connection._trust.cache_clear()


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server()) as server:
        yield server


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    path = tmp_path / "localhost.pem"
    path.write_text(PEM)
    return path


@pytest.fixture
def secure(pem: Path) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with running(Server(context)) as server:
        yield server


@pytest.fixture
def line() -> Iterator[Connection]:
    with contextlib.closing(Connection(stall_s=10)) as line:
        yield line


def whole(answer: Answer) -> bytes:
    return b"".join(iter(answer.read, b""))


def test_an_answer_is_read_in_pieces(server: Server, line: Connection) -> None:
    answer = line.get(f"{server.url}/file?sig=a%2Fb&x=1", {"Range": "bytes=0-", "X-Own": "1"})
    assert (answer.status, answer.reason, answer.host) == (200, "OK", "127.0.0.1")
    assert answer.header("x-words") == "two words"
    assert answer.header("absent", "else") == "else"
    first = answer.read()
    assert 0 < len(first) <= connection.READ_BYTES
    assert first + whole(answer) == BODY
    _, path, headers = server.seen[0]
    assert path == "/file?sig=a%2Fb&x=1"
    assert headers["Range"] == "bytes=0-"
    assert headers["X-Own"] == "1"


def test_the_connection_is_used_again_after_a_whole_body_only(server: Server, line: Connection) -> None:
    for path in ("a", "b", "chunked", "c"):
        whole(line.get(f"{server.url}/{path}", {}))
    line.get(f"{server.url}/half", {}).read()
    assert whole(line.get(f"{server.url}/d", {})) == BODY
    ports = [port for port, _, _ in server.seen]
    assert len(set(ports[:5])) == 1
    assert ports[5] != ports[0]


def test_a_stale_connection_is_replaced(server: Server, line: Connection) -> None:
    whole(line.get(f"{server.url}/a", {}))
    assert line._line is not None
    line._line.sock.shutdown(socket.SHUT_RDWR)  # as if the server had closed it
    assert whole(line.get(f"{server.url}/b", {})) == BODY


def test_a_server_that_closes_is_connected_to_again(server: Server, line: Connection) -> None:
    assert whole(line.get(f"{server.url}/bye", {})) == BODY[:10]
    assert whole(line.get(f"{server.url}/a", {})) == BODY


def test_another_host_gets_another_connection(server: Server, line: Connection) -> None:
    whole(line.get(f"{server.url}/a", {}))
    with running(Server()) as other:
        assert whole(line.get(f"{other.url}/b", {})) == BODY
        assert other.seen[0][2]["Host"] == other.url.removeprefix("http://")


def test_a_body_that_ends_early_ends_early(server: Server, line: Connection) -> None:
    assert whole(line.get(f"{server.url}/short", {})) == BODY[:1000]
    assert whole(line.get(f"{server.url}/a", {})) == BODY


def test_chunks_are_put_together(server: Server, line: Connection) -> None:
    assert whole(line.get(f"{server.url}/chunked", {})) == b"hello world"


def test_silence_is_a_timeout_and_the_connection_works_after_it(server: Server) -> None:
    with contextlib.closing(Connection(stall_s=0.05)) as line:
        with pytest.raises(TimeoutError):
            line.get(f"{server.url}/silent", {})
        assert whole(line.get(f"{server.url}/a", {})) == BODY


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/refused", "http://no-such-host.invalid/", "http://[::1/x", "http://host:port/"])
def test_what_fails_raises_one_of_failures(line: Connection, url: str) -> None:
    with pytest.raises((*Failures, ValueError)):
        line.get(url, {})


def test_hang_up_ends_a_wait_from_another_thread(server: Server) -> None:
    hang_up(Connection(stall_s=60), f"{server.url}/silent", server)


def test_hang_up_ends_a_wait_under_tls(secure: Server, pem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    hang_up(Connection(stall_s=60), f"{secure.url}/silent", secure)


def hang_up(line: Connection, url: str, server: Server) -> None:
    raised: list[BaseException] = []

    def get() -> None:
        try:
            line.get(url, {})
        except Failures as error:
            raised.append(error)

    thread = threading.Thread(target=get)
    thread.start()
    while not server.seen:
        assert thread.is_alive()
    line.hang_up()
    thread.join(20)
    assert not thread.is_alive()
    assert len(raised) == 1
    with pytest.raises(ConnectionAbortedError):
        line.get(url, {})
    line.close()


# -- TLS


def test_an_unknown_certificate_is_refused(secure: Server, line: Connection) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        line.get(f"{secure.url}/a", {})
    assert secure.seen == []


def test_ssl_cert_file_names_what_to_trust(secure: Server, line: Connection, pem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    assert whole(line.get(f"{secure.url}/a", {})) == BODY
    assert whole(line.get(f"{secure.url}/b", {})) == BODY
    assert secure.seen[0][0] == secure.seen[1][0]


# -- proxies


def test_a_proxy_is_asked_for_the_whole_address(server: Server, line: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:p%40ss@"))
    assert whole(line.get("http://far.invalid/f?x=1", {"X-Own": "1"})) == BODY
    _, path, headers = server.seen[0]
    assert path == "http://far.invalid/f?x=1"
    assert headers["Host"] == "far.invalid"
    assert headers["Proxy-Authorization"] == "Basic " + base64.b64encode(b"me:p@ss").decode()


def test_https_goes_through_a_tunnel_that_sees_no_headers(
    server: Server, secure: Server, line: Connection, pem: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    monkeypatch.setenv("HTTPS_PROXY", server.url.replace("//", "//me:pass@"))
    assert whole(line.get(f"{secure.url}/a", {"Authorization": "Bearer secret"})) == BODY
    (_, path, headers), *more = server.seen
    assert path == f"CONNECT {secure.url.removeprefix('https://')}"
    assert headers["Proxy-Authorization"] == "Basic " + base64.b64encode(b"me:pass").decode()
    assert "Authorization" not in headers
    assert more == []
    assert secure.seen[0][2]["Authorization"] == "Bearer secret"
    assert "Proxy-Authorization" not in secure.seen[0][2]


def test_no_proxy_goes_straight(server: Server, line: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert whole(line.get(f"{server.url}/a", {})) == BODY


def test_a_proxy_that_refuses_is_a_failure(server: Server, line: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", server.url)
    with pytest.raises(OSError, match="407"):
        line.get("https://refused.invalid/", {})


@pytest.mark.parametrize("address", ["socks5://127.0.0.1:1080", "https://127.0.0.1:1", "http://"])
def test_a_proxy_of_another_kind_is_said_to_be_unusable(line: Connection, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", address)
    with pytest.raises(ConfigError, match="cannot be used for downloads"):
        line.get("http://far.invalid/", {})


def test_failures_are_what_the_standard_library_raises() -> None:
    assert issubclass(ssl.SSLError, Failures)
    assert issubclass(socket.gaierror, Failures)
    assert issubclass(http.client.IncompleteRead, Failures)
