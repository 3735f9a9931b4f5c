"""How the tests' Hub and its CDN answer: routes, JSON, headers, ranges, and the faults that were ordered. See hub_server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from tests.hub_content import CHUNK_BYTES, DATE, TOKEN, TOKEN_WITHOUT_ACCESS, File, Pace, Port, Repo, Request

if TYPE_CHECKING:
    from tests.hub_server import HubServer


class Server(ThreadingHTTPServer):
    """Counts its connections so that closing it ends every thread, also those that wait for a next request or stall."""

    hub: HubServer
    name: Port
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        self.open_sockets: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open_sockets.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open_sockets.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for each in list(self.open_sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not worth a traceback on stderr."""


class Handler(BaseHTTPRequestHandler):
    """What both ports share: the record, the faults that replace an answer, and sending one."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    request_record: Request

    def do_GET(self) -> None:
        hub = self.server.hub
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        record = self.request_record = Request(self.server.name, self.command, self.path, headers, self.target(parts.path))
        with hub.lock:
            hub.requests.append(record)
        try:
            if fault := hub.pick("latency", record):
                hub.closing.wait(fault.args.get("ms", 30) / 1000)
            if not self.misbehave(record):
                self.answer(unquote(parts.path), {name: values[-1] for name, values in parse_qs(parts.query).items()})
        except OSError:
            self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Not on stderr: `requests` holds it all."""

    def target(self, path: str) -> str:
        raise NotImplementedError

    def answer(self, path: str, query: dict[str, str]) -> None:
        raise NotImplementedError

    def misbehave(self, record: Request) -> bool:
        """True where a fault was the answer."""
        hub = self.server.hub
        if hub.pick("drop", record):
            self.close_connection = True
            return True
        if fault := hub.pick("rate_limit", record):
            seconds = fault.args.get("seconds", 7)
            self.refuse(429, "", "Too many requests", {"Retry-After": str(seconds), "ratelimit": f'"resolvers";r=0;t={seconds}'})
            return True
        if fault := hub.pick("status", record):
            self.refuse(fault.args.get("code", 500), fault.args.get("error", ""), fault.args.get("message", "Something broke here"))
            return True
        if hub.pick("redirect_loop", record):
            self.send(302, headers={"Location": self.path})
            return True
        if fault := hub.pick("redirect", record):
            self.send(302, headers={"Location": fault.args["to"]})
            return True
        if fault := hub.pick("body", record):
            self.send(200, fault.args["data"], {"Content-Type": "text/html", **fault.args.get("headers", {})})
            return True
        return False

    def send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, length: int | None = None) -> None:
        """The status line and headers, and `body` unless it was a HEAD; `length` where the body follows by other means."""
        self.request_record.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body) if length is None else length), **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("X-Request-Id", f"Root=1-{len(self.server.hub.requests):08x}")
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(body)
            self.request_record.body_bytes += len(body)

    def send_json(self, data: Any, headers: Mapping[str, str] | None = None) -> None:
        self.send(200, json.dumps(data).encode(), {"Content-Type": "application/json; charset=utf-8", **(headers or {})})

    def refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        """An error as the Hub words it: `X-Error-Code` where it has one, `X-Error-Message` always."""
        named = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self.send(status, body, {"Content-Type": "application/json", **named, "X-Error-Message": message, **(headers or {})})


class HubHandler(Handler):
    """The Hub proper: information and redirects."""

    def target(self, path: str) -> str:
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match parts:
            case ["api", "models"]:
                return "search"
            case ["api", "models", user, repo, *_]:
                return f"{user}/{repo}"
            case ["api", "resolve-cache", "models", user, repo, _, *file]:
                return "/".join([user, repo, *file])
            case [user, repo, "resolve", _, *file]:
                return "/".join([user, repo, *file])
            case _:
                return path

    def answer(self, path: str, query: dict[str, str]) -> None:
        # Revisions such as refs/pr/1 come with their slashes quoted, so split first and unquote the parts.
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.headers.get("Authorization") not in {None, f"Bearer {TOKEN}", f"Bearer {TOKEN_WITHOUT_ACCESS}"}:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        match parts:
            case ["api", "models"]:
                self.search(parse_qs(urlsplit(self.path).query))
            case ["api", "models", user, name]:
                self.info(f"{user}/{name}", "main", query)
            case ["api", "models", user, name, "revision", revision]:
                self.info(f"{user}/{name}", revision, query)
            case ["api", "models", user, name, "tree", revision, *below]:
                self.tree(f"{user}/{name}", revision, "/".join(below), query)
            case ["api", "resolve-cache", "models", user, name, commit, *file]:
                self.small_file(f"{user}/{name}", commit, "/".join(file))
            case [user, name, "resolve", revision, *file]:
                self.resolve(f"{user}/{name}", revision, "/".join(file))
            case _:
                self.refuse(404, "", "Sorry, we can't find the page you are looking for.")

    def opened(self, name: str, revision: str, content: bool) -> tuple[Repo, str] | None:
        """The repo and commit, or None once the refusal was sent; `content` asks for what a gate protects."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repo = self.server.hub.repos.get(name)
        if repo is None or (repo.private and token != TOKEN):
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.disabled:
            return self.refuse(403, "", "Access to this resource is disabled.")
        if repo.gated and content and token != TOKEN:
            reason = "Your request to access it is awaiting a review" if token else "Please log in"
            return self.refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted. {reason}.")
        commit = repo.commit_of(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit

    def search(self, query: dict[str, list[str]]) -> None:
        words = query.get("search", [""])[0].lower()
        tags = set(query.get("filter", []))
        author = query.get("author", [""])[0]
        repos = [each for each in self.server.hub.repos.values() if not each.private and words in each.name.lower()]
        repos = [each for each in repos if tags <= set(each.tags) and author in {"", each.name.partition("/")[0]}]
        if query.get("sort") == ["downloads"]:
            repos.sort(key=lambda each: -each.downloads)
        wanted = set(query.get("expand", [])) or {"downloads", "likes", "tags", "private", "createdAt"}
        self.page([self.described(each, each.branches["main"], wanted) for each in repos], query)

    def described(self, repo: Repo, commit: str, wanted: set[str] | None = None) -> dict[str, Any]:
        """What the Hub says about a repo: the properties in `wanted`, or all."""
        card = {"license": repo.licence} if repo.licence else {}
        everything: dict[str, Any] = {
            "sha": commit,
            "author": repo.name.partition("/")[0],
            "gated": repo.gated,
            "private": repo.private,
            "disabled": repo.disabled,
            "downloads": repo.downloads,
            "likes": repo.likes,
            "lastModified": DATE,
            "createdAt": DATE,
            "tags": [*repo.tags, *([f"license:{repo.licence}"] if repo.licence else [])],
            "cardData": card,
            "usedStorage": sum(file.size for file in repo.commits[commit].values()),
        }
        shown = {name: value for name, value in everything.items() if wanted is None or name in wanted}
        return {"_id": hashlib.sha1(repo.name.encode()).hexdigest()[:24], "id": repo.name, "modelId": repo.name, **shown}

    def info(self, name: str, revision: str, query: dict[str, str]) -> None:
        if (found := self.opened(name, revision, content=False)) is None:
            return
        repo, commit = found
        if expand := parse_qs(urlsplit(self.path).query).get("expand"):
            return self.send_json(self.described(repo, commit, set(expand)))
        blobs = query.get("blobs", "").lower() == "true"
        siblings: list[dict[str, Any]] = []
        for path, file in repo.commits[commit].items():
            sibling: dict[str, Any] = {"rfilename": path}
            if blobs:
                sibling |= {"size": file.size, "blobId": file.blob_id}
                if file.lfs:
                    sibling["lfs"] = {"sha256": self.sha256(name, path, file), "size": file.size, "pointerSize": 134}
            siblings.append(sibling)
        self.send_json({**self.described(repo, commit), "siblings": siblings})

    def tree(self, name: str, revision: str, below: str, query: dict[str, str]) -> None:
        if (found := self.opened(name, revision, content=False)) is None:
            return
        repo, commit = found
        recursive = query.get("recursive", "").lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(repo.commits[commit].items()):
            if below and not path.startswith(f"{below}/"):
                continue
            inner = path[len(below) + 1 if below else 0 :].split("/")
            for depth in range(1, len(inner) if recursive else min(2, len(inner))):
                folder = "/".join([*([below] if below else []), *inner[:depth]])
                entries[folder] = {"type": "directory", "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0, "path": folder}
            if recursive or len(inner) == 1:
                entry: dict[str, Any] = {"type": "file", "oid": file.blob_id, "size": file.size, "path": path}
                if file.lfs:
                    entry["lfs"] = {"oid": self.sha256(name, path, file), "size": file.size, "pointerSize": 134}
                entries[path] = entry
        if below and not entries:
            return self.refuse(404, "EntryNotFound", f"{below} does not exist on {revision}")
        self.page(list(entries.values()), parse_qs(urlsplit(self.path).query))

    def page(self, items: list[Any], query: dict[str, list[str]]) -> None:
        """One page, with a Link header to the next one."""
        size = min(self.server.hub.page_size, int(query.get("limit", [str(self.server.hub.page_size)])[0]))
        start = int(query.get("cursor", ["0"])[0])
        headers: dict[str, str] = {}
        if start + size < len(items):
            following = urlencode({**query, "cursor": [str(start + size)]}, doseq=True)
            headers["Link"] = f'<{self.server.hub.endpoint}{urlsplit(self.path).path}?{following}>; rel="next"'
        self.send_json(items[start : start + size], headers)

    def file_of(self, repo: Repo, commit: str, path: str) -> File | None:
        file = repo.commits[commit].get(path)
        return file if file is not None else self.refuse(404, "EntryNotFound", "Entry not found")

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (found := self.opened(name, revision, content=True)) is None:
            return
        repo, commit = found
        if (file := self.file_of(repo, commit, path)) is None:
            return
        headers = {"X-Repo-Commit": commit, "X-Linked-Size": str(file.size), "Content-Type": "text/plain", "Accept-Ranges": "bytes"}
        if not file.lfs:
            location = f"/api/resolve-cache/models/{name}/{commit}/{quote(path)}"
            return self.send(307, headers={**headers, "Location": location, "X-Linked-Etag": f'"{file.blob_id}"'})
        hub = self.server.hub
        with hub.lock:
            hub.newest_link += 1
            location = f"{hub.cdn}/cdn/{name}/{commit}/{quote(path)}?sig={hub.newest_link}"
        headers |= {"Location": location, "X-Linked-Etag": f'"{self.sha256(name, path, file)}"'}
        self.send(302, b"Found. Redirecting to the CDN", headers)

    def small_file(self, name: str, commit: str, path: str) -> None:
        if (found := self.opened(name, commit, content=True)) is None or (file := self.file_of(*found, path)) is None:
            return
        content = file.content.read_bytes() if isinstance(file.content, Path) else file.content
        self.send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{file.blob_id}"', "Content-Type": "text/plain; charset=utf-8"})

    def sha256(self, name: str, path: str, file: File) -> str:
        """The hash that the Hub claims."""
        probe = Request("hub", "GET", "", {}, f"{name}/{path}")
        wrong = any(fault.kind == "wrong_hash" and fault.matches(probe) for fault in self.server.hub.faults)
        return hashlib.sha256(path.encode()).hexdigest() if wrong else file.sha256


class CdnHandler(Handler):
    """The CDN: bytes of one file behind a signed link, whole or in ranges."""

    def target(self, path: str) -> str:
        match [unquote(part) for part in path.strip("/").split("/")]:
            case ["cdn", user, repo, _, *file]:
                return "/".join([user, repo, *file])
            case _:
                return path

    def answer(self, path: str, query: dict[str, str]) -> None:
        hub = self.server.hub
        if self.headers.get("Authorization"):
            return self.refuse(400, "", "Only one auth mechanism allowed")
        match path.strip("/").split("/"):
            case ["cdn", user, name, commit, *file] if f"{user}/{name}" in hub.repos:
                files = hub.repos[f"{user}/{name}"].commits.get(commit, {})
                inner = "/".join(file)
            case _:
                return self.refuse(404, "", "no such object")
        if not hub.oldest_link <= int(query.get("sig", "-1")) <= hub.newest_link:
            return self.refuse(403, "", "Request has expired")
        if inner not in files:
            return self.refuse(404, "", "no such object")
        if self.command == "GET":
            self.perhaps_change(files, inner)
        self.serve(files[inner])

    def perhaps_change(self, files: dict[str, File], path: str) -> None:
        hub = self.server.hub
        with hub.lock:
            fault = hub.pick("change", self.request_record)
            if fault and fault.hits == fault.args.get("after", 0) + 1:
                files[path] = File(fault.args["data"], files[path].lfs, files[path].generation + 1)

    def serve(self, file: File) -> None:
        hub, record = self.server.hub, self.request_record
        ranges = not hub.pick("no_ranges", record)
        oversize = hub.pick("oversize", record)
        extra = oversize.args.get("extra", 1000) if oversize else 0
        size = file.size + extra
        headers = {"Content-Type": "application/octet-stream", "ETag": file.cdn_etag}
        if ranges:
            headers["Accept-Ranges"] = "bytes"
        if (expected := self.headers.get("If-Match")) and expected not in {"*", file.cdn_etag}:
            return self.refuse(412, "", "At least one of the pre-conditions you specified did not hold")
        start, end, status = 0, size, 200
        if ranges and self.headers.get("Range") and self.headers.get("If-Range", file.cdn_etag) == file.cdn_etag:
            asked = _range(self.headers["Range"], size)
            if asked == "unsatisfiable":
                return self.send(416, headers={**headers, "Content-Range": f"bytes */{size}"})
            if asked is not None:
                (start, end), status = asked, 206
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self.send(status, headers=headers, length=end - start)
        if self.command == "GET":
            self.stream(file, start, end)

    def stream(self, file: File, start: int, end: int) -> None:
        """The bytes [start, end), with the faults of bodies; what lies beyond the file is zeros."""
        hub, record = self.server.hub, self.request_record
        stop, silent = end, False
        if fault := hub.pick("truncate", record):
            stop = min(end, start + fault.args["after"])
        if fault := hub.pick("stall", record):
            stop, silent = min(end, start + fault.args["after"]), True
        paces: list[Pace] = []
        if fault := hub.pick("slow", record):
            paces = [fault.pace] if fault.pace else []
            if per_connection := fault.args.get("per_connection"):
                paces.append(Pace(per_connection))
        slowest = min((pace.bytes_per_second for pace in paces), default=0.0)
        # A slow line drips: about 50 pieces a second.
        piece = CHUNK_BYTES if not slowest else max(1, min(CHUNK_BYTES, int(slowest / 50)))
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(file.content.open("rb")) if isinstance(file.content, Path) else memoryview(file.content)
            for position, length in _pieces(start, stop, piece):
                for pace in paces:
                    hub.closing.wait(pace.reserve(length))
                if hub.closing.is_set():
                    break
                real = max(0, min(length, file.size - position))
                if isinstance(source, memoryview):
                    self.connection.sendall(source[position : position + real])
                elif real:
                    self.connection.sendfile(source, position, real)
                self.connection.sendall(bytes(length - real))
                record.body_bytes += length
        if silent:
            hub.closing.wait()
        if stop < end:
            self.close_connection = True


def _pieces(start: int, stop: int, piece: int) -> Iterator[tuple[int, int]]:
    """(position, length) of consecutive pieces of [start, stop)."""
    for position in range(start, stop, piece):
        yield position, min(piece, stop - position)


def _range(header: str, size: int) -> tuple[int, int] | Literal["unsatisfiable"] | None:
    """[start, end) of a single byte range; None for what RFC 9110 lets a server ignore (several ranges, other units, nonsense)."""
    unit, _, text = header.partition("=")
    first, dash, last = text.strip().partition("-")
    if unit.strip() != "bytes" or not dash or not (first.isdigit() or (not first and last.isdigit())) or not (last.isdigit() or not last):
        return None
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
    if first and last and int(last) < int(first):
        return None
    return (start, end) if start < end else "unsatisfiable"
