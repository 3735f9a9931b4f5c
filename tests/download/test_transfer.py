"""`fetch` against a real server that misbehaves (hub_server.py)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from localllm.download import transfer
from localllm.download.partial import Partial
from localllm.download.rate import RateLimit
from localllm.download.transfer import Fetched, Options, Progress, Stopped, discard, fetch
from localllm.errors import DoesNotFit, LocalLLMError, ModelError, NetworkError, NotFound, UsageError, VerificationFailed
from localllm.hub import Hub, Location, RepoFile
from tests.hub_server import TOKEN, HubServer

MIB = 1 << 20
QUICK = Options(stall_s=0.5, backoff_s=0.0, attempts=4)
DATA = random.Random(3).randbytes(24 * MIB + 12345)
FILE = "model.gguf.bin"
"""Not *.gguf, whose header would be checked; in LFS nevertheless, see `server`."""


@pytest.fixture
def server(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    # On a busy machine any part may look slow, and what a thread gives away it may have received already.
    monkeypatch.setattr("localllm.download.parts.SLOW_S", 1000.0)
    return hub


@dataclass
class Case:
    """One file on the server and where it goes."""

    server: HubServer
    hub: Hub
    target: Path
    file: RepoFile
    commit: str

    def __post_init__(self) -> None:
        self.messages: list[str] = []
        self.progress: list[Progress] = []

    def fetch(self, **more: Any) -> Fetched:
        given = {"options": QUICK, "on_message": self.messages.append, "on_progress": self.progress.append, **more}
        return fetch(self.hub, self.file, "user/repo", self.commit, self.target, **given)

    def fetch_half(self) -> None:
        """As much as arrives until half is there."""
        cancel = threading.Event()

        def stop(progress: Progress) -> None:
            if progress.done_bytes * 2 >= self.file.size_bytes:
                cancel.set()

        fault = self.server.fault("*", "slow", total=40e6)
        with pytest.raises(Stopped):
            self.fetch(cancel=cancel, on_progress=stop)
        self.server.faults.remove(fault)

    @property
    def left(self) -> list[str]:
        return sorted(path.name for path in self.target.parent.iterdir())

    @property
    def ranges(self) -> list[tuple[int, int]]:
        found = [each.header("range") for each in self.server.sent(port="cdn", method="GET")]
        return sorted((int(start), int(end) + 1) for start, end in (each.removeprefix("bytes=").split("-") for each in found if each))


def make(server: HubServer, folder: Path, data: bytes | Path, name: str = "model.gguf", target: str = FILE) -> Case:
    server.add_repo("user/repo", files={name: data})
    hub = Hub(env={"HF_ENDPOINT": server.endpoint})
    listing = hub.listing("user/repo")
    (folder / "models").mkdir(exist_ok=True)
    return Case(server, hub, folder / "models" / target, listing.files[0], listing.commit)


@pytest.fixture
def case(server: HubServer, tmp_path: Path) -> Case:
    return make(server, tmp_path, DATA)


# -- the plain way


def test_a_file_comes_in_parts_and_is_verified(case: Case) -> None:
    fetched = case.fetch()
    assert case.target.read_bytes() == DATA
    assert fetched == Fetched(case.target, len(DATA), hashlib.sha256(DATA).hexdigest(), 0, len(DATA))
    assert case.left == [FILE]
    assert len(case.ranges) > 4
    assert case.ranges[0][0] == 0
    assert case.ranges[-1][1] == len(DATA)
    assert all(before[1] == after[0] for before, after in zip(case.ranges, case.ranges[1:], strict=False))
    assert case.messages == []
    assert case.progress[0].total_bytes == len(DATA)


def test_connections_are_used_again(case: Case) -> None:
    opened: list[Any] = []
    cdn = case.server._servers["cdn"]
    process = cdn.process_request
    cdn.process_request = lambda request, address: (opened.append(address), process(request, address))[1]  # type: ignore[method-assign]
    case.fetch(options=Options(parts=1))
    assert len(case.ranges) > 4
    assert len(opened) == 1


def test_the_header_of_a_gguf_is_checked_before_it_gets_its_name(server: HubServer, tmp_path: Path, demo_small: Path) -> None:
    good = make(server, tmp_path, demo_small, target="model.gguf")
    good.fetch()
    assert good.target.read_bytes() == demo_small.read_bytes()
    bad = make(server, tmp_path, b"GGUF" + b"\xff" * 5000, target="bad.gguf")
    with pytest.raises(ModelError):
        bad.fetch()
    assert bad.left == ["model.gguf"]


@pytest.mark.parametrize("size", [0, 1, MIB, MIB + 1])
def test_small_files_come_whole(server: HubServer, tmp_path: Path, size: int) -> None:
    data = DATA[:size]
    case = make(server, tmp_path, data)
    assert case.fetch().sha256 == hashlib.sha256(data).hexdigest()
    assert case.target.read_bytes() == data
    assert case.left == [FILE]


def test_a_file_outside_lfs_is_held_against_git_s_hash(server: HubServer, tmp_path: Path) -> None:
    case = make(server, tmp_path, b'{"a": 1}', "config.json", "config.json")
    assert case.file.sha256 is None
    assert case.fetch().sha256 == hashlib.sha256(b'{"a": 1}').hexdigest()
    other = Case(server, case.hub, case.target.with_name("other.json"), case.file, case.commit)
    other.hub = Fixed(case.hub, case.hub.location("user/repo", case.commit, "config.json"))  # type: ignore[assignment]
    server.fault("config.json", "body", port="hub", data=b'{"a": 2}', times=1)
    with pytest.raises(VerificationFailed):
        other.fetch()
    assert other.left == ["config.json"]


def test_a_target_that_is_right_is_left_alone(case: Case) -> None:
    case.fetch()
    before = case.target.stat().st_mtime_ns
    requests = len(case.ranges)
    assert case.fetch() == Fetched(case.target, len(DATA), hashlib.sha256(DATA).hexdigest(), len(DATA), 0)
    assert any(each.state == "verifying" for each in case.progress)
    case.progress.clear()
    case.fetch(recorded_sha256=case.file.sha256)
    assert case.progress == []  # not even read
    assert len(case.ranges) == requests
    assert case.target.stat().st_mtime_ns == before
    assert case.left == [FILE]


def test_another_file_of_that_name_stays_until_the_new_one_is_whole(case: Case) -> None:
    other = b"\0" * len(DATA)
    case.target.write_bytes(other)
    fault = case.server.fault("model.gguf", "status", port="cdn", code=500)
    with pytest.raises(NetworkError):
        case.fetch()
    assert case.target.read_bytes() == other
    case.server.faults.remove(fault)
    case.fetch()
    assert case.target.read_bytes() == DATA
    assert any("another file of that name" in message for message in case.messages)


def test_the_rate_limit_sees_every_byte(case: Case) -> None:
    class Counting(RateLimit):
        total = 0

        def take(self, n_bytes: int, stop: threading.Event) -> None:
            with self._changed:
                self.total += n_bytes

    limit = Counting()
    case.fetch(limit=limit)
    assert limit.total == len(DATA)


# -- going on


def test_a_stopped_download_goes_on_where_it_was(case: Case) -> None:
    case.fetch_half()
    assert case.left == [f"{FILE}.part", f"{FILE}.part.json"]
    fetched = case.fetch()
    assert case.target.read_bytes() == DATA
    assert fetched.resumed_bytes >= len(DATA) // 2
    assert fetched.fetched_bytes == len(DATA) - fetched.resumed_bytes
    assert case.left == [FILE]
    assert any("going on" in message for message in case.messages)


def test_going_on_sends_if_range_with_the_cdn_s_own_etag(case: Case) -> None:
    case.fetch_half()
    record = Partial(case.target).read()
    assert record is not None
    etag = case.server.repos["user/repo"].commits[case.commit]["model.gguf"].cdn_etag
    assert record.validator == etag
    before = len(case.server.requests)
    case.fetch()
    assert {each.header("if-range") for each in case.server.requests[before:] if each.port == "cdn"} == {etag}


KILLED = """
import sys
from pathlib import Path
from localllm.hub import Hub
from localllm.download.transfer import fetch
endpoint, target = sys.argv[1:]
hub = Hub(env={"HF_ENDPOINT": endpoint})
listing = hub.listing("user/repo")
fetch(hub, listing.files[0], "user/repo", listing.commit, Path(target))
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_gigabyte_costs_less_than_2_percent(server: HubServer, tmp_path: Path) -> None:
    size, big = 1 << 30, tmp_path / "big"
    luck = random.Random(5)
    with big.open("wb") as file:
        file.truncate(size)
        for start in range(0, size, 7 * MIB):
            file.seek(start)
            file.write(luck.randbytes(4096))
    case = make(server, tmp_path, big)
    server.fault("*", "slow", total=120e6)
    child = subprocess.Popen([sys.executable, "-c", KILLED, server.endpoint, str(case.target)])
    while server.bytes_sent("model.gguf") < size // 2 and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    child.wait()
    assert f"{FILE}.part" in case.left
    server.clear_faults()
    fetched = case.fetch(options=Options())
    assert fetched.resumed_bytes > size * 0.45
    assert server.bytes_sent("model.gguf") - size < size * 0.02
    with case.target.open("rb") as copy:
        assert hashlib.file_digest(copy, "sha256").hexdigest() == case.file.sha256
    assert case.left == [FILE]


def test_two_downloads_of_one_file_make_one(case: Case) -> None:
    case.server.fault("*", "slow", total=60e6)
    results: list[Fetched] = []
    begun = threading.Event()
    first = threading.Thread(target=lambda: results.append(case.fetch(on_progress=lambda _: begun.set())))
    first.start()
    assert begun.wait(20)
    said: list[str] = []
    second = case.fetch(on_message=said.append)
    first.join()
    assert second.fetched_bytes == 0
    assert results[0].fetched_bytes == len(DATA)
    assert said == [f"{FILE}: another download of it is running; waiting for that"]
    assert case.left == [FILE]


def test_waiting_for_another_download_can_be_stopped(case: Case) -> None:
    cancel = threading.Event()
    with Partial(case.target).locked(lambda _: None), pytest.raises(Stopped):
        case.fetch(cancel=cancel, on_message=lambda _: cancel.set())


def test_damage_in_what_was_there_is_found_and_mended(case: Case) -> None:
    case.fetch_half()
    part = Partial(case.target).data
    with part.open("r+b") as file:
        file.seek(100)
        file.write(bytes(byte ^ 255 for byte in DATA[100:200]))
    fetched = case.fetch()
    assert case.target.read_bytes() == DATA
    assert fetched.resumed_bytes == 0
    assert any("damaged; starting again" in message for message in case.messages)


def test_discard_removes_what_is_left_but_not_while_it_is_in_use(case: Case) -> None:
    case.fetch_half()
    with Partial(case.target).locked(lambda _: None):
        discard(case.target)
        assert f"{FILE}.part" in case.left
    discard(case.target)
    assert case.left == []
    discard(case.target.parent / "nowhere" / "x")
    assert case.left == []


def test_ctrl_c_keeps_what_is_there_and_stops_all_threads(case: Case) -> None:
    case.server.fault("*", "stall", after=2 * MIB)

    def interrupt(progress: Progress) -> None:
        if progress.done_bytes >= 8 * MIB:
            raise KeyboardInterrupt

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        case.fetch(on_progress=interrupt, options=Options(stall_s=60))
    assert time.monotonic() - before < 20  # though every connection hangs
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("fetch", "hash"))]
    record = Partial(case.target).read()
    assert record is not None
    assert record.done.total_bytes >= 8 * MIB


# -- a bad line


@pytest.mark.parametrize(
    "kind, args",
    [
        ("drop", {"times": 5}),
        ("status", {"code": 503, "times": 3}),
        ("status", {"code": 500, "times": 3}),
        ("truncate", {"after": 100_000, "times": 9}),
        ("stall", {"after": 100_000, "times": 3}),
        ("body", {"data": b"<html>log in first</html>", "times": 3}),
    ],
)
def test_it_survives(case: Case, kind: Any, args: dict[str, Any]) -> None:
    fault = case.server.fault("model.gguf", kind, **{"port": "cdn", **args})
    fetched = case.fetch(options=Options(stall_s=0.5, backoff_s=0.0, attempts=20))
    assert case.target.read_bytes() == DATA
    assert fault.hits == args["times"]
    assert fetched.fetched_bytes == len(DATA)  # nothing twice


@pytest.mark.slow
def test_one_slow_connection_does_not_hold_up_the_end(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localllm.download.parts.SLOW_S", 1.0)
    case.server.fault("model.gguf", "slow", per_connection=20_000, times=1)
    before = time.monotonic()
    case.fetch()
    assert case.target.read_bytes() == DATA
    assert time.monotonic() - before < 60  # 4 MiB at 20 kB/s are 210 s


@pytest.mark.parametrize("kind, args", [("status", {"code": 500}), ("drop", {}), ("truncate", {"after": 0})])
def test_it_gives_up_and_keeps_what_is_there(case: Case, kind: Any, args: dict[str, Any]) -> None:
    case.fetch_half()
    fault = case.server.fault("model.gguf", kind, port="cdn", **args)
    with pytest.raises(NetworkError, match=r"model\.gguf failed: .* 4 times in a row; .* of 25\.2 MB are kept") as caught:
        case.fetch()
    assert "goes on from there" in caught.value.hint
    assert case.left == [f"{FILE}.part", f"{FILE}.part.json"]
    case.server.faults.remove(fault)
    assert case.fetch().resumed_bytes >= len(DATA) // 2
    assert case.target.read_bytes() == DATA


def test_retry_after_is_honoured(case: Case) -> None:
    case.server.fault("model.gguf", "rate_limit", port="cdn", seconds=1, times=1)
    before = time.monotonic()
    case.fetch()
    assert time.monotonic() - before >= 1
    assert case.target.read_bytes() == DATA


def test_a_server_that_wants_too_much_patience_is_given_up(case: Case) -> None:
    case.server.fault("model.gguf", "rate_limit", port="cdn", seconds=100_000)
    with pytest.raises(NetworkError, match="429 .* asks to wait 100000 s"):
        case.fetch()


def test_links_that_expire_are_renewed_once_for_all(case: Case) -> None:
    case.server.fault("*", "slow", total=40e6)
    expired: list[int] = []

    def expire(progress: Progress) -> None:
        if progress.done_bytes > 8 * MIB and not expired:
            expired.append(1)
            case.server.expire_links()

    case.fetch(on_progress=expire, options=Options(parts=2, backoff_s=0.0))
    assert case.target.read_bytes() == DATA
    assert expired
    assert len(case.server.sent("model.gguf", port="hub")) == 2
    assert case.messages == []


def test_a_file_that_is_gone_is_said_to_be_gone(case: Case) -> None:
    case.fetch_half()
    case.server.remove_repo("user/repo")
    with pytest.raises(LocalLLMError) as caught:
        case.fetch()
    assert caught.value.exit_code in {NotFound.exit_code, 7}


# -- another file than before


def test_a_new_commit_with_another_file_starts_again_and_says_so(case: Case) -> None:
    case.fetch_half()
    new = DATA[::-1]
    case.server.push("user/repo", {"model.gguf": new})
    listing = case.hub.listing("user/repo")
    later = Case(case.server, case.hub, case.target, listing.files[0], listing.commit)
    assert later.fetch().resumed_bytes == 0
    assert case.target.read_bytes() == new
    assert later.messages == [f"{FILE}: the file on the Hub has changed; starting again"]


def test_a_new_commit_with_the_same_file_goes_on(case: Case) -> None:
    case.fetch_half()
    case.server.push("user/repo", {"README.md": b"new"})
    listing = case.hub.listing("user/repo")
    file = next(each for each in listing.files if each.path == "model.gguf")
    assert Case(case.server, case.hub, case.target, file, listing.commit).fetch().resumed_bytes >= len(DATA) // 2
    assert case.target.read_bytes() == DATA


@pytest.mark.parametrize("size", [len(DATA), len(DATA) - 1000, len(DATA) + 1000, 100])
def test_a_file_that_changes_meanwhile_starts_again_and_says_so(case: Case, size: int) -> None:
    new = random.Random(size).randbytes(size)
    case.server.fault("model.gguf", "change", after=3, data=new)
    fetched = case.fetch()
    assert case.target.read_bytes() == new
    assert fetched.sha256 == hashlib.sha256(new).hexdigest()
    assert fetched.size_bytes == len(new)
    assert any("it has changed on the Hub; starting again" in message for message in case.messages)
    assert case.left == [FILE]


def test_another_etag_for_the_same_content_is_no_change(case: Case) -> None:
    case.server.fault("model.gguf", "change", after=3, data=DATA)
    assert case.fetch().fetched_bytes == len(DATA)
    assert case.target.read_bytes() == DATA
    assert case.messages == []


def test_a_wrong_hash_leaves_nothing(case: Case) -> None:
    case.server.fault("model.gguf", "wrong_hash")
    listing = case.hub.listing("user/repo")
    wrong = Case(case.server, case.hub, case.target, listing.files[0], listing.commit)
    with pytest.raises(VerificationFailed, match=hashlib.sha256(DATA).hexdigest()) as caught:
        wrong.fetch()
    assert "removed" in caught.value.message
    assert case.left == []


def test_a_server_without_ranges_sends_the_whole(case: Case) -> None:
    case.server.fault("model.gguf", "no_ranges")
    assert case.fetch().sha256 == case.file.sha256
    assert case.target.read_bytes() == DATA
    assert case.messages == [f"{FILE}: the server sends only whole files, so it comes over one connection; starting again"]


def test_more_bytes_than_announced_are_refused(case: Case) -> None:
    case.server.fault("model.gguf", "oversize", extra=1000)
    with pytest.raises(NetworkError, match=f"has {len(DATA) + 1000} bytes where the Hub says {len(DATA)}"):
        case.fetch()
    assert case.target.exists() is False


# -- the disk


def test_no_byte_is_fetched_without_space_for_all(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage(len(DATA) - 1))
    with pytest.raises(DoesNotFit, match="needs 25.2 MB"):
        case.fetch()
    assert case.ranges == []
    assert case.left == []


def test_going_on_needs_space_for_the_rest_only(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.fetch_half()
    if Partial(case.target).allocated_bytes() == len(DATA):
        pytest.skip("this file system has no sparse files")
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage(len(DATA) * 2 // 3))
    case.fetch()
    assert case.target.read_bytes() == DATA


@dataclass
class _Usage:
    free: int


def test_a_disk_that_fills_up_is_said_and_nothing_lost(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = transfer._write, [10 * MIB]

    def full(file: Any, data: memoryview) -> None:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, data)

    monkeypatch.setattr(transfer, "_write", full)
    with pytest.raises(DoesNotFit, match="is full; what was fetched is kept"):
        case.fetch()
    record = Partial(case.target).read()
    assert record is not None
    assert record.done.total_bytes > 5 * MIB
    monkeypatch.undo()
    case.fetch()
    assert case.target.read_bytes() == DATA


def test_a_folder_that_cannot_be_is_named(case: Case) -> None:
    case.target.parent.rmdir()
    case.target.parent.write_text("a file")
    with pytest.raises(UsageError, match=f"cannot write {case.target}"):
        case.fetch()


# -- where to, and with which headers


@dataclass
class Fixed:
    """A Hub that gives one location."""

    hub: Any
    found: Location

    @property
    def endpoint(self) -> str:
        return self.hub.endpoint

    def location(self, repo: str, commit: str, path: str) -> Location:
        return self.found


@dataclass
class At:
    endpoint: str


def fixed(case: Case, endpoint: str | None = None, **change: Any) -> Fixed:
    file = case.file
    url = f"{case.server.endpoint}/user/repo/resolve/{case.commit}/model.gguf"
    values = {"url": url, "headers": {}, "etag": file.sha256, "size_bytes": file.size_bytes, "sha256": file.sha256, **change}
    return Fixed(At(endpoint or case.server.endpoint), Location(**values))


def test_the_token_stays_with_the_host_it_was_given_for(server: HubServer, tmp_path: Path) -> None:
    server.add_repo("user/repo", files={"model.gguf": DATA}, gated=True)
    listing = Hub(env={"HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN}).listing("user/repo")
    case = Case(server, Hub(env={}), tmp_path / FILE, listing.files[0], listing.commit)
    case.hub = fixed(case, headers={"Authorization": f"Bearer {TOKEN}", "X-Secret": "s"})  # type: ignore[assignment]
    case.fetch()
    assert case.target.read_bytes() == DATA
    assert {each.header("authorization") for each in server.sent(port="hub", method="GET") if "resolve" in each.path} == {f"Bearer {TOKEN}"}
    assert {(each.header("authorization"), each.header("x-secret")) for each in server.sent(port="cdn")} == {(None, None)}


def test_a_redirect_is_followed_once_not_for_every_part(case: Case) -> None:
    case.hub = fixed(case)  # type: ignore[assignment]
    case.fetch(options=Options(parts=1))
    assert len(case.ranges) > 4
    assert len([each for each in case.server.sent("model.gguf", port="hub") if each.status == 302]) == 1


def test_redirects_end(case: Case) -> None:
    case.hub = fixed(case)  # type: ignore[assignment]
    case.server.fault("model.gguf", "redirect_loop", port="hub")
    with pytest.raises(NetworkError, match="redirected more than 5 times"):
        case.fetch(options=Options(parts=1))
    assert len(case.server.sent("model.gguf", port="hub")) == 6


@pytest.mark.parametrize(
    "endpoint, url, words",
    [
        ("https://8.8.8.8", "http://8.8.8.8/f", "refused to fetch from http://8.8.8.8"),
        ("https://8.8.8.8", "file:///etc/passwd", "refused to fetch from file://"),
        ("http://127.0.0.1:1", "ftp://127.0.0.1/f", "refused to fetch from ftp://127.0.0.1"),
        ("https://8.8.8.8", "https://127.0.0.1:9/f", "8.8.8.8 sent us to 127.0.0.1, inside this network"),
        ("https://8.8.8.8", "https://[::1]/f", "inside this network"),
        ("https://8.8.8.8", "https://169.254.169.254/latest/meta-data", "inside this network"),
        ("https://8.8.8.8", "https://10.0.0.7/f", "inside this network"),
        ("http://8.8.8.8", "http://localhost:9/f", "inside this network"),
    ],
)
def test_addresses_where_a_download_has_no_business(case: Case, endpoint: str, url: str, words: str) -> None:
    case.hub = fixed(case, endpoint, url=url)  # type: ignore[assignment]
    with pytest.raises(NetworkError) as caught:
        case.fetch()
    assert words in caught.value.message


def test_a_redirect_to_such_an_address_is_refused_too(case: Case) -> None:
    case.hub = fixed(case)  # type: ignore[assignment]
    case.server.fault("model.gguf", "redirect", port="hub", to="gopher://127.0.0.1/x")
    with pytest.raises(NetworkError, match="refused to fetch from gopher"):
        case.fetch()


@pytest.mark.parametrize("size", [-1, 1 << 50])
def test_a_size_beyond_reason_never_reaches_the_disk(case: Case, size: int) -> None:
    case.hub = fixed(case, size_bytes=size)  # type: ignore[assignment]
    with pytest.raises(VerificationFailed, match=f"has {size} bytes"):
        case.fetch()
    assert case.left == []


def test_a_record_speaks_only_of_bytes_that_are_in_the_file(case: Case) -> None:
    case.fetch_half()
    partial = Partial(case.target)
    data = partial.data.read_bytes()
    for start, end in json.loads(partial.record.read_text())["done"]:
        assert data[start:end] == DATA[start:end]
