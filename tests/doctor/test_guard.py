"""The socket guard: what leaves this machine is caught, what stays is let through, and nothing passes unwatched."""

from __future__ import annotations

import os
import socket
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.doctor.guard import FOLDER, RECORD, TEST_ADDRESS, Attempt, Guarded, control, isolation, run_guarded
from localllm.doctor.guard.sitecustomize import is_here


def guarded(code: str, *flags: str) -> Guarded:
    return run_guarded([sys.executable, *flags, "-c", f"import os, socket, subprocess, sys\n{code}"], os.environ, 60)


def tried(ran: Guarded) -> list[tuple[str, str]]:
    return [(attempt.event, attempt.host) for attempt in ran.outside]


@pytest.mark.parametrize(
    "code, attempt",
    [
        ("socket.socket().connect(('192.0.2.1', 9))", ("socket.connect", "192.0.2.1")),
        ("socket.socket().connect_ex(('192.0.2.1', 9))", ("socket.connect", "192.0.2.1")),
        ("socket.socket().connect(('example.invalid', 9))", ("socket.connect", "example.invalid")),
        ("socket.socket().connect_ex(('example.invalid', 9))", ("socket.connect_ex", "example.invalid")),
        ("socket.socket(type=socket.SOCK_DGRAM).sendto(b'', 0, ('example.invalid', 9))", ("socket.sendto", "example.invalid")),
        ("socket.socket(type=socket.SOCK_DGRAM).sendmsg([b''], [], 0, ('192.0.2.1', 9))", ("socket.sendmsg", "192.0.2.1")),
        ("socket.socket(socket.AF_INET6).connect(('2001:db8::1', 9))", ("socket.connect", "2001:db8::1")),
        ("socket.socket(type=socket.SOCK_DGRAM).connect(('192.0.2.1', 9))", ("socket.connect", "192.0.2.1")),
        ("socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 9))", ("socket.sendto", "192.0.2.1")),
        ("socket.getaddrinfo('example.invalid', 80)", ("socket.getaddrinfo", "example.invalid")),
        ("socket.gethostbyname('example.invalid')", ("socket.gethostbyname", "example.invalid")),
        ("import urllib.request; urllib.request.urlopen('http://example.invalid')", ("socket.getaddrinfo", "example.invalid")),
        ("import asyncio; asyncio.run(asyncio.open_connection('192.0.2.1', 9))", ("socket.connect", "192.0.2.1")),
    ],
)
def test_what_would_leave_is_caught(code: str, attempt: tuple[str, str]) -> None:
    ran = guarded(code)
    assert tried(ran) == [attempt]
    assert ran.code != 0
    assert "refused by localllm's socket guard" in ran.stderr


def test_it_is_caught_even_where_the_program_hides_it() -> None:
    ran = guarded("try: socket.socket().connect(('192.0.2.1', 9))\nexcept OSError: print('all is well')")
    assert (ran.code, ran.stdout.strip()) == (0, "all is well")
    assert tried(ran) == [("socket.connect", "192.0.2.1")]


def test_loopback_works_and_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepting = threading.Thread(target=lambda: server.accept()[0].close())
        accepting.start()
        ran = guarded(f"socket.create_connection(('localhost', {server.getsockname()[1]})).close()")
        accepting.join()
    assert ran.code == 0, ran.stderr
    assert ran.outside == ()
    assert ran.inside >= 2, "the name and the connect"


@pytest.mark.skipif(sys.platform == "win32", reason="local sockets")
def test_local_sockets_are_no_network() -> None:
    ran = guarded("a, b = socket.socketpair(); a.sendall(b'x'); assert b.recv(1) == b'x'")
    assert (ran.code, ran.attempts) == (0, ())


@pytest.mark.parametrize("flags", [(), ("-P",), ("-P", "-X", "utf8")])
def test_children_are_watched_too(flags: tuple[str, ...]) -> None:
    child = "import socket; socket.socket().connect(('192.0.2.1', 9))"
    ran = guarded(f"sys.exit(subprocess.run([sys.executable, *{list(flags)}, '-c', {child!r}]).returncode)")
    assert ran.code != 0
    assert len(ran.watched) == 2
    assert tried(ran) == [("socket.connect", "192.0.2.1")]
    assert ran.outside[0].pid in ran.watched


def test_who_turns_the_guard_off_is_not_watched() -> None:
    ran = guarded("pass", "-I")
    assert (ran.code, ran.watched, ran.attempts) == (0, {}, ())


def test_the_path_of_the_user_stays() -> None:
    env = {**os.environ, "PYTHONPATH": "/somewhere"}
    ran = run_guarded([sys.executable, "-c", "import os, sys; print(os.environ['PYTHONPATH'], '/somewhere' in sys.path)"], env, 60)
    assert ran.stdout.split() == [f"{FOLDER}{os.pathsep}/somewhere", "True"]


def test_importing_the_guard_guards_nothing() -> None:
    assert RECORD not in os.environ
    with socket.socket(type=socket.SOCK_DGRAM) as quiet:
        assert quiet.connect_ex(("127.0.0.1", 9)) == 0


def test_the_control_is_caught() -> None:
    ran = control(os.environ)
    assert tried(ran) == [("socket.connect", TEST_ADDRESS)]
    assert ran.code != 0


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces")
def test_in_a_namespace_nothing_leaves_even_unwatched() -> None:
    words = isolation()
    if not words:
        pytest.skip("no network namespaces for this user")
    code = f"print(socket.socket(type=socket.SOCK_DGRAM).connect_ex(('{TEST_ADDRESS}', 9)))"
    ran = run_guarded([sys.executable, "-I", "-c", f"import socket; {code}"], os.environ, 60, words)
    assert ran.isolated
    assert ran.stdout.strip() == "101", "ENETUNREACH"
    assert tried(control(os.environ, words)) == [("socket.connect", TEST_ADDRESS)]


def test_without_unshare_there_is_no_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert isolation() == []


@given(st.ip_addresses())
def test_addresses(address: object) -> None:
    assert is_here(str(address)) is bool(getattr(getattr(address, "ipv4_mapped", None) or address, "is_loopback", False))


@pytest.mark.parametrize("host", [None, "", "localhost", "LOCALHOST", b"localhost", "127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
def test_hosts_that_are_here(host: object) -> None:
    assert is_here(host)


NOT_HERE = ["example.com", "localhost.example.com", "0.0.0.0", "10.0.0.1", "fe80::1%eth0", b"\xff", "127.0.0.1.nip.io", "::ffff:10.0.0.1"]


@pytest.mark.parametrize("host", NOT_HERE)
def test_hosts_that_are_not(host: object) -> None:
    assert not is_here(host)


def test_counts() -> None:
    attempts = (Attempt(1, "socket.connect", "127.0.0.1", True), Attempt(1, "socket.connect", "10.0.0.1", False))
    ran = Guarded(0, "", "", {}, attempts, False)
    assert (ran.outside, ran.inside) == (attempts[1:], 1)
