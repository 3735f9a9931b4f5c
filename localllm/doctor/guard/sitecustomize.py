"""Runs at the start of every Python that has this folder on its PYTHONPATH: records every try to reach another machine, and refuses it.

It sees what Python code does with sockets (https://docs.python.org/3/library/audit_events.html), not what
native code does on its own. Only the standard library, since it runs before anything else is set up.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any, cast

RECORD = "SOCKET_GUARD_RECORD"
"""Variable with the path of the file that gets one JSON line per event."""
WITH_ADDRESS = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg"})
WITH_NAME = frozenset({"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"})


def address_of(host: object) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """`host` as the address that it spells; None for a name."""
    text = host.decode("ascii", "replace") if isinstance(host, bytes | bytearray) else str(host)
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_here(host: object) -> bool:
    """Whether `host`, an address or a name, means this machine."""
    if host in (None, "", b""):
        return True
    address = address_of(host)
    if address is None:
        return (host.decode("ascii", "replace") if isinstance(host, bytes | bytearray) else str(host)).lower() == "localhost"
    return address.is_loopback


def install(path: str) -> None:
    """Watch this process from now on; an audit hook cannot be taken away again."""

    def record(event: str, **more: Any) -> None:
        line = json.dumps({"pid": os.getpid(), "event": event, **more}) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def check(event: str, host: object) -> None:
        here = is_here(host)
        record(event, host=str(host), here=here)
        if not here:
            raise OSError(errno.ENETUNREACH, "refused by localllm's socket guard")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WITH_NAME:
            check(event, arguments[0])
        # A path is a local socket; None is a socket that connected before.
        elif event in WITH_ADDRESS and isinstance(address := arguments[1], tuple):
            check(event, cast(tuple[Any, ...], address)[0])

    sys.addaudithook(hook)
    for name in ("connect", "connect_ex", "sendto", "sendmsg"):
        _watch_names(name, check)
    record("watching", command=sys.orig_argv[1:])


def _watch_names(method: str, check: Callable[[str, object], None]) -> None:
    """Let a socket's method check names: Python looks them up, over the network, before the audit event."""
    original = getattr(socket.socket, method)

    def watched(self: socket.socket, *arguments: Any) -> Any:
        address = arguments[-1] if arguments else None
        if isinstance(address, tuple) and address:
            host: object = cast(tuple[Any, ...], address)[0]
            if address_of(host) is None and not is_here(host):
                check(f"socket.{method}", host)
        return original(self, *arguments)

    setattr(socket.socket, method, watched)


if _path := os.environ.get(RECORD):
    install(_path)
