"""The header of a model that is on the Hub and not here: a few ranged requests, no weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from localllm.download.connection import Connection
from localllm.download.source import Restart, Retry, Source
from localllm.errors import NetworkError
from localllm.gguf import Header, joined, parse_header

if TYPE_CHECKING:
    from localllm.hub import Hub
    from localllm.quant import RemoteModel

ATTEMPTS = 4
TIMEOUT_S = 20.0


def remote_header(hub: Hub, model: RemoteModel) -> Header:
    """What `read_model` would say of `model` once it is here; its `files` are empty.

    Raises ModelError for a file that is no sound GGUF, and what the Hub raises.
    """
    parts = [_header(hub, model, file.path) for file in model.files]
    return replace(joined(parts) if len(parts) > 1 else parts[0], files=())


def _header(hub: Hub, model: RemoteModel, path: str) -> Header:
    source = Source(hub, model.repo, model.commit, path)
    size = source.identity.size_bytes
    connection = Connection(TIMEOUT_S)

    def read(offset: int, n: int) -> bytes:
        end = min(offset + n, size)
        reason = ""
        for _ in range(ATTEMPTS):
            try:
                return b"".join(source.read(connection, offset, end)) if offset < end else b""
            except (Retry, Restart) as error:
                reason = str(error)
        raise NetworkError(f"the header of {path} cannot be read: {reason}", hint="try again later")

    try:
        header = parse_header(read, size, path)
    finally:
        connection.close()
    return replace(header, files=(Path(path),))
