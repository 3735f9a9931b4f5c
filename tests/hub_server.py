"""The Hub's HTTP on this machine, for the real huggingface_hub and our downloader: one port for the Hub, one for its CDN.

It knows the routes, JSON shapes, headers and error codes of huggingface.co (as huggingface_hub 2.4 reads them) and can misbehave
on demand. It knows nothing of localllm.

    with HubServer() as hub:
        hub.add_repo("user/repo", files={"model-Q4_K_M.gguf": b"GGUF…", "big.gguf": Path("sparse")}, gated=False, licence="mit")
        hub.fault("model-Q4_K_M.gguf", "truncate", after=1000, times=2)
        ...                                             # HF_ENDPOINT=hub.endpoint
        hub.requests[-1].header("range"), hub.bytes_sent("model-Q4_K_M.gguf")

Routes of the Hub port: `/api/models` (search), `/api/models/R[/revision/V]`, `/api/models/R/tree/V`, `/R/resolve/V/F` (302 to the CDN for
LFS files, 307 to `/api/resolve-cache/…` for small ones). The CDN port serves `/cdn/R/COMMIT/F?sig=N` with its own ETag, single
ranges, If-Range, If-Match and 416, and, like S3, refuses a request that carries Authorization.

Tokens: TOKEN opens gated and private repos; TOKEN_WITHOUT_ACCESS is a valid one that was not granted; any other is answered 401.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tests.hub_content import TOKEN, TOKEN_WITHOUT_ACCESS, Fault, File, Kind, Pace, Port, Repo, Request
from tests.hub_handlers import CdnHandler, HubHandler, Server

__all__ = ["TOKEN", "TOKEN_WITHOUT_ACCESS", "Fault", "HubServer", "Request"]


class HubServer:
    """Both servers, running inside `with`; `fault`, `push` and `requests` may be used at any time from any thread."""

    def __init__(self, host: str = "127.0.0.1", page_size: int = 1000) -> None:
        self.host = host
        self.page_size = page_size
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.oldest_link = 0
        self.newest_link = 0
        self.closing = threading.Event()
        self.lock = threading.RLock()
        self._servers: dict[Port, Server] = {}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> HubServer:
        for port in ("hub", "cdn"):
            server = self._servers[port] = Server((self.host, 0), HubHandler if port == "hub" else CdnHandler)
            server.hub, server.name = self, port
            self._threads.append(threading.Thread(target=server.serve_forever, args=(0.02,), name=f"{port}-server", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closing.set()
        for server in self._servers.values():
            server.shutdown()
            server.hang_up()
            server.server_close()
        for thread in self._threads:
            thread.join()

    # -- addresses and records

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://{self.host}:{self.port('hub')}"

    @property
    def cdn(self) -> str:
        return f"http://{self.host}:{self.port('cdn')}"

    def port(self, name: Port) -> int:
        return self._servers[name].server_address[1]

    def sent(self, pattern: str = "*", port: Port | None = None, method: str | None = None) -> list[Request]:
        """The requests so far whose target (`user/repo/file`) or last part matches `pattern`."""
        wanted = Fault(pattern, "status", port, None, {})
        with self.lock:
            return [each for each in self.requests if wanted.matches(each) and method in {None, each.method}]

    def bytes_sent(self, pattern: str = "*") -> int:
        """Bytes of bodies that the CDN port handed to its sockets (a client that died may not have read the last of them)."""
        return sum(each.body_bytes for each in self.sent(pattern, port="cdn"))

    # -- content

    def add_repo(
        self,
        name: str,
        files: Mapping[str, bytes | Path],
        gated: bool | Literal["auto", "manual"] = False,
        licence: str | None = "mit",
        lfs: bool = True,
        private: bool = False,
        disabled: bool = False,
        downloads: int = 0,
        likes: int = 0,
        tags: tuple[str, ...] = ("gguf",),
    ) -> str:
        """A repo with one commit on `main`, which is returned; `lfs` stores *.gguf in LFS and everything else in git, as the Hub does."""
        gate: Literal["auto", "manual", False] = "auto" if gated is True else gated
        self.repos[name] = Repo(name, {}, gate, private, disabled, licence, downloads, likes, tags)
        return self.push(name, files, lfs=lfs)

    def push(self, name: str, files: Mapping[str, bytes | Path], lfs: bool = True, branch: str = "main") -> str:
        """Add or replace `files` in a new commit of `branch`; older commits stay readable by their hash."""
        with self.lock:
            repo = self.repos[name]
            before = repo.commits.get(repo.branches.get(branch, ""), {})
            number = len(repo.commits)
            made = {path: File(content, lfs and path.lower().endswith(".gguf"), number) for path, content in files.items()}
            commit = hashlib.sha1(f"{name} {branch} {number}".encode()).hexdigest()
            repo.commits[commit] = {**before, **made}
            repo.branches[branch] = commit
            return commit

    def remove_repo(self, name: str) -> None:
        del self.repos[name]

    # -- misbehaviour

    def fault(self, pattern: str, kind: Kind, *, port: Port | None = None, times: int | None = None, **args: Any) -> Fault:
        """Misbehave for targets that match `pattern` ("*", "user/repo", "user/repo/file", "file", "*.gguf", "search").

        `port` limits it to one port (kinds about bodies only ever touch the CDN), `times` to so many requests.
        """
        bodies = {"stall", "truncate", "slow", "no_ranges", "oversize", "change", "body"}
        fault = Fault(pattern, kind, "cdn" if port is None and kind in bodies else port, times, args)
        if total := args.get("total"):
            fault.pace = Pace(total)
        with self.lock:
            self.faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        with self.lock:
            self.faults.clear()

    def expire_links(self) -> None:
        """Every CDN link handed out so far is answered 403 from now on, as a signed one after its hour."""
        with self.lock:
            self.oldest_link = self.newest_link + 1

    def pick(self, kind: Kind, request: Request) -> Fault | None:
        """The first fault of this kind that still applies to `request`; it counts as a hit."""
        with self.lock:
            for fault in self.faults:
                if fault.kind == kind and fault.matches(request) and (fault.times is None or fault.hits < fault.times):
                    fault.hits += 1
                    return fault
        return None


def main() -> None:
    """Serve one file from a process of its own, for benchmarks: prints the endpoint, ends when stdin ends."""
    options = argparse.ArgumentParser(description=main.__doc__)
    options.add_argument("file", type=Path)
    options.add_argument("--total-bytes-per-second", type=float)
    options.add_argument("--latency-ms", type=float)
    given = options.parse_args()
    with HubServer() as hub:
        hub.add_repo("user/repo", files={given.file.name: given.file})
        if given.total_bytes_per_second:
            hub.fault("*", "slow", total=given.total_bytes_per_second)
        if given.latency_ms:
            hub.fault("*", "latency", ms=given.latency_ms)
        print(json.dumps({"endpoint": hub.endpoint, "cdn": hub.cdn, "repo": "user/repo", "file": given.file.name}), flush=True)
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while input():
                pass


if __name__ == "__main__":
    main()
