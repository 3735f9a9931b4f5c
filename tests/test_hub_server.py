"""The tests' own Hub: that it says what the real one says, as huggingface_hub reads it, and misbehaves as ordered."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hub_content import Pace
from tests.hub_server import TOKEN, HubServer

REPO = "user/tiny-GGUF"
FILE = "tiny-Q4_K_M.gguf"
WEIGHTS = bytes(range(250)) * 40


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    with httpx2.Client() as client:
        yield client


@pytest.fixture
def link(hub: HubServer) -> str:
    """A fresh link to the CDN for FILE."""
    hub.add_repo(REPO, {FILE: WEIGHTS, "a/b/c.gguf": b"c", "README.md": b"# tiny"})
    return fresh(hub)


def fresh(hub: HubServer, file: str = FILE) -> str:
    return get_hf_file_metadata(hf_hub_url(REPO, file, endpoint=hub.endpoint), token=False).location


def test_huggingface_hub_reads_tree_and_info_alike_over_any_pages(hub: HubServer, link: str) -> None:
    api = HfApi(endpoint=hub.endpoint, token=False)
    hub.page_size = 2
    tree = list(api.list_repo_tree(REPO, recursive=True))
    assert [each.path for each in tree] == ["README.md", "a", "a/b", "a/b/c.gguf", FILE]
    assert [each.path for each in api.list_repo_tree(REPO)] == ["README.md", "a", FILE]
    assert [each.path for each in api.list_repo_tree(REPO, "a/b")] == ["a/b/c.gguf"]
    hashes = {each.path: each.lfs.sha256 for each in tree if getattr(each, "lfs", None)}
    siblings = api.model_info(REPO, files_metadata=True).siblings or []
    assert hashes == {each.rfilename: each.lfs.sha256 for each in siblings if each.lfs}
    assert hashes[FILE] == hashlib.sha256(WEIGHTS).hexdigest()


def test_huggingface_hub_itself_downloads_from_it(hub: HubServer, link: str, tmp_path: Path) -> None:
    for file, content in [(FILE, WEIGHTS), ("README.md", b"# tiny")]:
        path = HfApi(endpoint=hub.endpoint, token=TOKEN).hf_hub_download(REPO, file, local_dir=tmp_path)
        assert Path(path).read_bytes() == content
    assert {each.header("authorization") for each in hub.sent(port="cdn")} == {None}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.integers(0, 12_000), st.none() | st.integers(0, 12_000))
def test_ranges_are_slices(client: httpx2.Client, link: str, first: int, last: int | None) -> None:
    answer = client.get(link, headers={"Range": f"bytes={first}-{'' if last is None else last}"})
    if last is not None and last < first:
        assert (answer.status_code, answer.content) == (200, WEIGHTS)
    elif first >= len(WEIGHTS):
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{len(WEIGHTS)}")
    else:
        expected = WEIGHTS[first:] if last is None else WEIGHTS[first : last + 1]
        assert (answer.status_code, answer.content) == (206, expected)
        assert answer.headers["content-range"] == f"bytes {first}-{first + len(expected) - 1}/{len(WEIGHTS)}"


@pytest.mark.parametrize(
    "headers,status,length",
    [
        ({"Range": "bytes=-10"}, 206, 10),
        ({"Range": "bytes=-99999"}, 206, len(WEIGHTS)),
        ({"Range": "bytes=-0"}, 416, 0),
        ({"Range": "bytes=0-1,5-6"}, 200, len(WEIGHTS)),
        ({"Range": "lines=0-1"}, 200, len(WEIGHTS)),
        ({"Range": "bytes=0-9", "If-Range": "ETAG"}, 206, 10),
        ({"Range": "bytes=0-9", "If-Range": '"another"'}, 200, len(WEIGHTS)),
        ({"Range": "bytes=0-9", "If-Match": '"another"'}, 412, None),
        ({"Range": "bytes=0-9", "Authorization": f"Bearer {TOKEN}"}, 400, None),
    ],
)
def test_conditions_and_odd_ranges(client: httpx2.Client, link: str, headers: dict[str, str], status: int, length: int | None) -> None:
    etag = client.head(link).headers["etag"]
    answer = client.get(link, headers={name: etag if value == "ETAG" else value for name, value in headers.items()})
    assert answer.status_code == status
    assert length is None or len(answer.content) == length


def test_links_expire(client: httpx2.Client, hub: HubServer, link: str) -> None:
    assert client.get(link).content == WEIGHTS
    hub.expire_links()
    assert client.get(link).status_code == 403
    assert client.get(fresh(hub)).content == WEIGHTS


def test_a_file_changes_under_its_link(client: httpx2.Client, hub: HubServer, link: str) -> None:
    etag = client.head(link).headers["etag"]
    hub.fault(FILE, "change", after=2, data=b"new")
    assert [client.get(link).content for _ in range(4)] == [WEIGHTS, WEIGHTS, b"new", b"new"]
    assert client.head(link).headers["etag"] != etag
    assert get_hf_file_metadata(hf_hub_url(REPO, FILE, endpoint=hub.endpoint), token=False).etag == hashlib.sha256(b"new").hexdigest()


def test_bodies_that_end_early_or_never(client: httpx2.Client, hub: HubServer, link: str) -> None:
    hub.fault(FILE, "truncate", after=100, times=1)
    with pytest.raises(httpx2.RemoteProtocolError, match="received 100 bytes"):
        client.get(link, headers={"Range": "bytes=50-"})
    hub.fault(FILE, "stall", after=100, times=1)
    with client.stream("GET", link, timeout=httpx2.Timeout(5, read=0.2)) as answer:
        pieces = answer.iter_raw()
        assert next(pieces) == WEIGHTS[:100]
        with pytest.raises(httpx2.ReadTimeout):
            next(pieces)
    hub.fault(FILE, "drop", times=1)
    with pytest.raises(httpx2.RemoteProtocolError):
        client.get(link)
    assert client.get(link).content == WEIGHTS
    # on the same connection: answered once the bytes before are counted
    client.head(link)
    assert hub.bytes_sent(FILE) == 100 + 100 + len(WEIGHTS)


def test_lies(client: httpx2.Client, hub: HubServer, link: str) -> None:
    hub.fault(FILE, "oversize", extra=7, times=1)
    assert client.get(link).content == WEIGHTS + bytes(7)
    hub.fault(FILE, "no_ranges", times=1)
    answer = client.get(link, headers={"Range": "bytes=5-9"})
    assert (answer.status_code, answer.content, "accept-ranges" in answer.headers) == (200, WEIGHTS, False)
    hub.fault(FILE, "wrong_hash")
    lie = get_hf_file_metadata(hf_hub_url(REPO, FILE, endpoint=hub.endpoint), token=False).etag
    assert lie != hashlib.sha256(WEIGHTS).hexdigest()
    siblings = HfApi(endpoint=hub.endpoint, token=False).model_info(REPO, files_metadata=True).siblings or []
    assert lie == next(each.lfs.sha256 for each in siblings if each.lfs and each.rfilename == FILE)


def test_a_large_sparse_file_is_served_without_being_read(client: httpx2.Client, hub: HubServer, tmp_path: Path) -> None:
    big = tmp_path / "big-Q8_0.gguf"
    big.touch()
    os.truncate(big, 3 << 30)
    with big.open("r+b") as file:
        file.seek((2 << 30) + 5)
        file.write(b"here")
    hub.add_repo(REPO, {big.name: big})
    # The link without the Hub, which would hash 3 GB to answer.
    link = f"{hub.cdn}/cdn/{REPO}/{hub.repos[REPO].branches['main']}/{big.name}?sig=0"
    answer = client.get(link, headers={"Range": f"bytes={2 << 30}-{(2 << 30) + 9}"})
    assert answer.content == b"\0\0\0\0\0here\0"
    assert answer.headers["content-range"].endswith(f"/{3 << 30}")


def test_a_rate_holds_over_all_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr("tests.hub_content.time.monotonic", lambda: clock)
    pace = Pace(1000)
    # What may be caught up at the start: 50 ms.
    assert [round(pace.reserve(100), 3) for _ in range(3)] == [0.05, 0.15, 0.25]
    clock += 60
    assert round(pace.reserve(1000), 3) == 0.95
