"""The Hub through the real huggingface_hub, against the server of hub_server.py."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from localllm.errors import ConfigError, LocalLLMError, NetworkError, NotAuthorised, NotFound, Offline, UsageError
from localllm.hub import MAX_FILES, MAX_PAGES, Hub, RepoFile, SearchHit, check_scheme
from tests.hub_server import TOKEN, TOKEN_WITHOUT_ACCESS, HubServer

REPO = "user/tiny-GGUF"
WEIGHTS = b"GGUF" + bytes(range(256)) * 8
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def asked(hub: HubServer) -> Hub:
    """A Hub that asks `hub`, without a token; a second try follows at once."""
    hub.add_repo(REPO, {"tiny-Q4_K_M.gguf": WEIGHTS, "sub/tiny-Q8_0.gguf": WEIGHTS * 2, "README.md": b"# tiny"}, licence="apache-2.0")
    return made(hub)


def made(hub: HubServer, waits: list[float] | None = None, **env: str) -> Hub:
    return Hub(env={"HF_ENDPOINT": hub.endpoint, **env}, sleep=(waits if waits is not None else []).append)


def refusal(question: Any, kind: type[LocalLLMError]) -> LocalLLMError:
    with pytest.raises(LocalLLMError) as caught:
        question()
    assert type(caught.value) is kind, caught.value
    assert caught.value.hint
    return caught.value


# -- listings


def test_a_listing_gives_size_and_hash_of_every_file_at_one_commit(hub: HubServer, asked: Hub) -> None:
    listing = asked.listing(REPO)
    assert listing.files == (
        RepoFile("tiny-Q4_K_M.gguf", len(WEIGHTS), SHA256),
        RepoFile("sub/tiny-Q8_0.gguf", len(WEIGHTS) * 2, hashlib.sha256(WEIGHTS * 2).hexdigest()),
        RepoFile("README.md", 6, None),
    )
    assert (listing.repo, listing.revision, listing.gated, listing.licence) == (REPO, "main", False, "apache-2.0")
    assert listing.commit == hub.repos[REPO].branches["main"]
    assert [(model.repo, model.commit, model.quant) for model in listing.models] == [
        (REPO, listing.commit, "Q8_0"),
        (REPO, listing.commit, "Q4_K_M"),
    ]
    assert listing.side_files == ()
    assert len(hub.requests) == 1


def test_a_commit_stays_what_it_was_when_the_branch_moves_on(hub: HubServer, asked: Hub) -> None:
    before = asked.listing(REPO)
    hub.push(REPO, {"tiny-Q4_K_M.gguf": b"new"})
    after = asked.listing(REPO)
    assert after.commit != before.commit
    assert after.files[0].size_bytes == 3
    assert asked.listing(REPO, before.commit).files == before.files
    assert asked.location(REPO, before.commit, "tiny-Q4_K_M.gguf").sha256 == SHA256


def test_a_revision_may_hold_slashes(hub: HubServer, asked: Hub) -> None:
    commit = hub.push(REPO, {"other-Q4_0.gguf": b"x"}, branch="refs/pr/1")
    listing = asked.listing(REPO, "refs/pr/1")
    assert (listing.revision, listing.commit) == ("refs/pr/1", commit)


@pytest.mark.parametrize(
    "card,tags,licence",
    [
        ({"license": "mit"}, ["gguf"], "mit"),
        ({"license": "other", "license_name": "gemma"}, ["license:other"], "gemma"),
        ({"license": ["mit", "apache-2.0"]}, [], "mit, apache-2.0"),
        ({"license": "a\x1b[31mb\nc"}, [], "a[31mbc"),
        ({}, ["gguf", "license:llama3.3"], "llama3.3"),
        (None, None, ""),
        ("no card", 5, None),
    ],
)
def test_the_licence_is_what_the_card_says(hub: HubServer, asked: Hub, card: Any, tags: Any, licence: str | None) -> None:
    info = {"id": REPO, "sha": "a" * 40, "siblings": [], "cardData": card, "tags": tags}
    hub.fault(REPO, "body", port="hub", data=json.dumps(info).encode())
    if licence is None:
        refusal(lambda: asked.listing(REPO), NetworkError)
    else:
        assert asked.listing(REPO).licence == licence


def sibling(path: str = "m.gguf", size: Any = 1, sha256: Any = "a" * 64) -> dict[str, Any]:
    return {"rfilename": path, "size": size, "lfs": {"size": size, "sha256": sha256, "pointerSize": 134}}


@pytest.mark.parametrize(
    "siblings,words",
    [
        ([sibling("../../../.ssh/authorized_keys")], "authorized_keys"),
        ([sibling("/etc/passwd")], "/etc/passwd"),
        ([sibling("a/./b.gguf")], "a/./b.gguf"),
        ([sibling("a//b.gguf")], "a//b.gguf"),
        ([sibling("..\\b.gguf")], "b.gguf"),
        ([sibling("a\x1b]0;b.gguf")], "x1b"),
        ([sibling("a\u202eb.gguf")], "u202e"),
        ([sibling("")], "named ''"),
        ([sibling("m" * 2000)], "mmm"),
        ([sibling(size=-1)], "-1 bytes"),
        ([sibling(size=1 << 60)], str(1 << 60)),
        ([{"rfilename": "m.gguf"}], "None bytes"),
        ([sibling(sha256="a" * 63)], "the hash"),
        ([sibling(sha256="A" * 64)], "the hash"),
        ([{"rfilename": str(number), "size": 1} for number in range(MAX_FILES + 1)], f"{MAX_FILES + 1} files"),
    ],
)
def test_listings_that_no_honest_repository_has_are_refused(hub: HubServer, asked: Hub, siblings: list[Any], words: str) -> None:
    info = {"id": REPO, "sha": "a" * 40, "siblings": siblings}
    hub.fault(REPO, "body", port="hub", data=json.dumps(info).encode())
    assert words in refusal(lambda: asked.listing(REPO), NetworkError).message


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>Welcome to Hotel Wi-Fi</html>",
        b"[]",
        b"{}",
        b"null",
        b'{"id": "user/repo", "sha": "main", "siblings": []}',
        b'{"id": "user/repo", "sha": 5, "siblings": []}',
        b'{"id": "user/repo", "siblings": [{}]}',
        b'{"id": "user/repo", "sha": "' + b"a" * 40 + b'", "siblings": [{"rfilename": 5, "size": 1}]}',
        b'{"id": "user/repo", "sha": "' + b"a" * 40 + b'", "siblings": [{"rfilename": "a", "size": "1"}]}',
        b'{"id": "user/repo", "sha": "' + b"a" * 40 + b'", "siblings": [{"rfilename": "a", "size": true, "lfs": 7}]}',
        b"\xff\xfe",
    ],
)
def test_an_answer_that_is_none_is_one_clear_error(hub: HubServer, asked: Hub, answer: bytes) -> None:
    hub.fault("*", "body", port="hub", data=answer)
    refusal(lambda: asked.listing(REPO), NetworkError)
    refusal(lambda: asked.location(REPO, "a" * 40, "tiny-Q4_K_M.gguf"), NetworkError)


def test_an_answer_that_no_search_gives(hub: HubServer, asked: Hub) -> None:
    for answer in (b"<html>", b'{"error": "x"}', b"null", b"[5]", b'[{"downloads": 1}]', b'[{"id": "a/b", "likes": "many"}]'):
        hub.clear_faults()
        hub.fault("search", "body", port="hub", data=answer)
        refusal(lambda: asked.search("x"), NetworkError)


def test_names_that_would_write_to_the_terminal_are_left_out_of_a_search(hub: HubServer, asked: Hub) -> None:
    items = [{"id": "a/\x1b[2Jb"}, {"id": "no-publisher"}, {"id": "a/b", "lastModified": "\x1b]0;x", "gated": "auto"}]
    hub.fault("search", "body", port="hub", data=json.dumps(items).encode())
    assert asked.search("x") == [SearchHit("a/b", 0, 0, "", True)]


def test_a_search_whose_pages_never_end_ends(hub: HubServer, asked: Hub) -> None:
    headers = {"Link": f'<{hub.endpoint}/api/models?cursor=x>; rel="next"'}
    hub.fault("search", "body", port="hub", data=b"[]", headers=headers)
    assert asked.search("x") == []
    assert len(hub.requests) == MAX_PAGES


# -- what is missing, gated, forbidden


def test_a_missing_repository_brings_close_names(hub: HubServer, asked: Hub) -> None:
    error = refusal(lambda: asked.listing("user/tinny-GGUF"), NotFound)
    assert "there is no repository user/tinny-GGUF" in error.message
    assert f"did you mean {REPO}?" in error.hint
    assert "HF_TOKEN" in error.hint


def test_a_missing_repository_unlike_any_other_names_the_search(asked: Hub) -> None:
    assert refusal(lambda: asked.listing("nobody/at-all"), NotFound).hint.startswith("localllm search at-all")


def test_a_missing_repository_is_reported_even_where_the_search_for_others_fails(hub: HubServer, asked: Hub) -> None:
    hub.fault("search", "status", code=500)
    assert "localllm search tinny-GGUF" in refusal(lambda: asked.listing("user/tinny-GGUF"), NotFound).hint


def test_a_missing_revision_and_a_missing_file(asked: Hub) -> None:
    assert "no revision v9" in refusal(lambda: asked.listing(REPO, "v9"), NotFound).message
    commit = asked.listing(REPO).commit
    error = refusal(lambda: asked.location(REPO, commit, "nothing.gguf"), NotFound)
    assert error.message == f"{REPO} has no file nothing.gguf"
    assert "--dry-run" in error.hint


@pytest.mark.parametrize("repo", ["../../api", "a/b/c", "user/..", "user/re--po", "us er/repo", "user/repo\n", ""])
def test_a_name_that_no_repository_has_is_never_asked_for(hub: HubServer, asked: Hub, repo: str) -> None:
    refusal(lambda: asked.listing(repo), UsageError)
    refusal(lambda: asked.location(repo, "a" * 40, "f.gguf"), UsageError)
    assert hub.requests == []


def test_a_gated_repository_is_listed_but_its_files_need_the_licence(hub: HubServer) -> None:
    commit = hub.add_repo("meta/llama", {"llama-Q8_0.gguf": WEIGHTS}, gated=True)
    assert made(hub).listing("meta/llama").gated
    error = refusal(lambda: made(hub).location("meta/llama", commit, "llama-Q8_0.gguf"), NotAuthorised)
    assert error.hint.startswith(f"accept its licence at {hub.endpoint}/meta/llama")
    assert "HF_TOKEN" in error.hint
    error = refusal(lambda: made(hub, HF_TOKEN=TOKEN_WITHOUT_ACCESS).location("meta/llama", commit, "llama-Q8_0.gguf"), NotAuthorised)
    assert "your token has no access" in error.message
    assert made(hub, HF_TOKEN=TOKEN).location("meta/llama", commit, "llama-Q8_0.gguf").sha256 == SHA256


def test_a_private_repository_looks_like_a_missing_one_without_the_token(hub: HubServer) -> None:
    hub.add_repo("user/secret", {"m-Q8_0.gguf": WEIGHTS}, private=True)
    assert "a private one needs HF_TOKEN" in refusal(lambda: made(hub).listing("user/secret"), NotFound).hint
    assert (
        "your token opens no private one" in refusal(lambda: made(hub, HF_TOKEN=TOKEN_WITHOUT_ACCESS).listing("user/secret"), NotFound).hint
    )
    assert made(hub, HF_TOKEN=TOKEN).listing("user/secret").files[0].sha256 == SHA256


def test_a_refused_token_says_where_to_make_another(hub: HubServer, asked: Hub) -> None:
    for question in (lambda: made(hub, HF_TOKEN="hf_old").listing(REPO), lambda: made(hub, HF_TOKEN="hf_old").search("tiny")):
        error = refusal(question, NotAuthorised)
        assert error.message == "the Hub refused your token"
        assert f"{hub.endpoint}/settings/tokens" in error.hint


def test_a_disabled_repository(hub: HubServer, asked: Hub) -> None:
    hub.add_repo("user/bad", {"m-Q8_0.gguf": WEIGHTS}, disabled=True)
    assert "disabled user/bad" in refusal(lambda: asked.listing("user/bad"), NotFound).message


@pytest.mark.parametrize(
    "code,kind", [(401, NotAuthorised), (403, NotAuthorised), (400, NetworkError), (404, NetworkError), (451, NetworkError)]
)
def test_other_refusals_keep_the_words_of_the_hub(hub: HubServer, asked: Hub, code: int, kind: type[LocalLLMError]) -> None:
    hub.fault(REPO, "status", code=code, message="because we say so")
    error = refusal(lambda: asked.listing(REPO), kind)
    assert "because we say so" in error.message or code == 401


# -- tokens


def test_the_token_goes_to_the_hub_and_not_to_its_cdn(hub: HubServer, asked: Hub) -> None:
    commit = asked.listing(REPO).commit
    found = made(hub, HF_TOKEN=TOKEN).location(REPO, commit, "tiny-Q4_K_M.gguf")
    assert hub.requests[-1].header("authorization") == f"Bearer {TOKEN}"
    assert found.url.startswith(hub.cdn)
    assert TOKEN not in str(found.headers)
    assert httpx2.get(found.url, headers=dict(found.headers)).content == WEIGHTS
    assert [request.header("authorization") for request in hub.requests if request.port == "cdn"] == [None]


def test_a_small_file_lies_at_the_hub_itself_and_gets_the_token(hub: HubServer) -> None:
    commit = hub.add_repo("user/secret", {"config.json": b"{}"}, private=True)
    found = made(hub, HF_TOKEN=TOKEN).location("user/secret", commit, "config.json")
    assert (found.size_bytes, found.sha256, len(found.etag)) == (2, None, 40)
    assert found.headers["authorization"] == f"Bearer {TOKEN}"
    assert httpx2.get(found.url, headers=dict(found.headers)).content == b"{}"


def test_a_token_is_only_sent_where_one_is_set(hub: HubServer, asked: Hub) -> None:
    asked.listing(REPO)
    asked.search("tiny")
    assert [request.header("authorization") for request in hub.requests] == [None, None]
    made(hub, HUGGING_FACE_HUB_TOKEN=f" {TOKEN}\n").listing(REPO)
    assert hub.requests[-1].header("authorization") == f"Bearer {TOKEN}"


def test_the_search_sends_no_token_to_a_next_page_elsewhere(hub: HubServer) -> None:
    with HubServer() as other:
        link = f'<{other.endpoint}/api/models?search=tiny>; rel="next"'
        hub.fault("search", "body", port="hub", data=b'[{"id": "user/tiny2"}]', headers={"Link": link})
        hits = made(hub, HF_TOKEN=TOKEN).search("tiny", 3)
        assert [hit.repo for hit in hits] == ["user/tiny2"]
        assert other.requests == []


# -- the line


def test_what_passes_is_asked_again(hub: HubServer, asked: Hub) -> None:
    for code in (500, 502, 503, 504, 408):
        waits: list[float] = []
        hub.fault(REPO, "status", code=code, times=2)
        assert made(hub, waits).listing(REPO).files
        assert waits == [0.5, 2.0]
    waits = []
    hub.fault(REPO, "drop", times=1)
    assert made(hub, waits).listing(REPO).files
    assert waits == [0.5]


def test_what_lasts_is_an_error_after_three_tries(hub: HubServer, asked: Hub) -> None:
    hub.fault("*", "status", code=503)
    commit = "a" * 40
    for question in (lambda: asked.listing(REPO), lambda: asked.search("tiny"), lambda: asked.location(REPO, commit, "tiny-Q4_K_M.gguf")):
        hub.requests.clear()
        error = refusal(question, NetworkError)
        assert "(503)" in error.message
        assert len(hub.requests) == 3


def test_a_refusal_is_not_asked_again(hub: HubServer, asked: Hub) -> None:
    waits: list[float] = []
    refusal(lambda: made(hub, waits).listing(REPO, "v9"), NotFound)
    assert waits == []
    assert len(hub.requests) == 1


def test_a_short_rate_limit_is_waited_for(hub: HubServer, asked: Hub) -> None:
    waits: list[float] = []
    hub.fault(REPO, "rate_limit", seconds=7, times=1)
    assert made(hub, waits).listing(REPO).files
    assert waits == [7]


def test_a_long_rate_limit_says_how_long(hub: HubServer, asked: Hub) -> None:
    hub.fault("*", "rate_limit", seconds=155)
    assert refusal(lambda: asked.listing(REPO), NetworkError).hint == "wait 155 s; with HF_TOKEN set the limit is higher"
    assert refusal(lambda: made(hub, HF_TOKEN=TOKEN).search("tiny"), NetworkError).hint == "wait 155 s"
    assert len(hub.requests) == 2


def test_a_rate_limit_without_a_time(hub: HubServer, asked: Hub) -> None:
    hub.fault(REPO, "status", code=429)
    assert refusal(lambda: asked.listing(REPO), NetworkError).hint.startswith("wait a few minutes")
    assert len(hub.requests) == 1


def test_nobody_listens_at_the_endpoint() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: refuses, and nobody else can take it
        endpoint = f"http://127.0.0.1:{held.getsockname()[1]}"
        waits: list[float] = []
        error = refusal(lambda: Hub({"HF_ENDPOINT": endpoint}, sleep=waits.append).search("x"), NetworkError)
    assert error.message.startswith(f"cannot reach {endpoint}")
    assert "behind a proxy, set HTTPS_PROXY" in error.hint
    assert waits == []


def test_a_host_without_a_name_and_a_proxy_that_is_named() -> None:
    env = {"HF_ENDPOINT": "http://hub.invalid", "HTTPS_PROXY": "http://proxy:3128"}
    assert "the proxy in HTTPS_PROXY" in refusal(lambda: Hub(env).listing(REPO), NetworkError).hint


def test_a_hub_that_says_nothing(hub: HubServer, asked: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localllm.hub.TIMEOUT_S", 0.05)
    hub.fault("*", "latency", ms=60_000)
    for question in (lambda: asked.listing(REPO), lambda: asked.search("tiny"), lambda: asked.location(REPO, "a" * 40, "tiny-Q4_K_M.gguf")):
        assert refusal(question, NetworkError).message == f"{hub.endpoint} does not answer in time"


def test_redirects_in_circles_end(hub: HubServer, asked: Hub) -> None:
    hub.fault("*", "redirect_loop", port="hub")
    for question in (lambda: asked.listing(REPO), lambda: asked.location(REPO, "a" * 40, "tiny-Q4_K_M.gguf")):
        assert "in circles" in refusal(question, NetworkError).message


def test_a_location_that_is_no_web_address(hub: HubServer, asked: Hub) -> None:
    commit = asked.listing(REPO).commit
    for target in ("ftp://example.com/f", "file:///etc/passwd"):
        hub.clear_faults()
        hub.fault("tiny-Q4_K_M.gguf", "redirect", port="hub", to=target)
        refusal(lambda: asked.location(REPO, commit, "tiny-Q4_K_M.gguf"), NetworkError)


def test_unencrypted_bytes_only_from_an_unencrypted_hub() -> None:
    for url, endpoint in [("https://cdn/f", "https://hub"), ("https://cdn/f", "http://hub"), ("http://cdn/f", "http://hub")]:
        check_scheme(url, endpoint)
    for url, endpoint in [("http://cdn/f", "https://hub"), ("ftp://cdn/f", "http://hub"), ("/f", "http://hub")]:
        refusal(lambda url=url, endpoint=endpoint: check_scheme(url, endpoint), NetworkError)


def test_another_commit_than_the_one_asked_for_is_refused(hub: HubServer, asked: Hub) -> None:
    old = asked.listing(REPO).commit
    hub.push(REPO, {"tiny-Q4_K_M.gguf": b"new"})
    hub.repos[REPO].branches[old] = hub.repos[REPO].branches["main"]
    assert "another commit" in refusal(lambda: asked.location(REPO, old, "tiny-Q4_K_M.gguf"), NetworkError).message


# -- search


def test_a_search_finds_gguf_repositories_by_downloads(hub: HubServer, asked: Hub) -> None:
    hub.add_repo("a/tiny-big", {"m-Q8_0.gguf": b"x"}, downloads=900, likes=7, gated="manual")
    hub.add_repo("a/tiny-safetensors", {"model.safetensors": b"x"}, downloads=9000, tags=("safetensors",))
    hub.add_repo("a/other", {"m-Q8_0.gguf": b"x"}, downloads=9000)
    hits = asked.search("tiny", 10)
    assert [(hit.repo, hit.downloads, hit.likes, hit.gated) for hit in hits] == [("a/tiny-big", 900, 7, True), (REPO, 0, 0, False)]
    assert hits[0].updated == "2026-05-04T03:02:01.000Z"


def test_a_search_follows_the_pages_as_far_as_it_needs(hub: HubServer, asked: Hub) -> None:
    hub.page_size = 3
    for number in range(10):
        hub.add_repo(f"a/many{number}", {"m-Q8_0.gguf": b"x"}, downloads=100 - number)
    assert [hit.repo for hit in asked.search("many", 7)] == [f"a/many{number}" for number in range(7)]
    assert len(hub.requests) == 3
    assert len(asked.search("many", 100)) == 10
    assert asked.search("many", 0) == asked.search("none of these", 5) == []


# -- offline, endpoint, environment


@pytest.mark.parametrize(
    "offline,env,named",
    [
        (True, {}, "--offline"),
        (False, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        (False, {"TRANSFORMERS_OFFLINE": "yes"}, "TRANSFORMERS_OFFLINE"),
        (True, {"LOCALLLM_OFFLINE": "true"}, "LOCALLLM_OFFLINE"),
    ],
)
def test_offline_asks_nothing_and_names_what_forbids_it(hub: HubServer, offline: bool, env: dict[str, str], named: str) -> None:
    offline_hub = Hub({"HF_ENDPOINT": hub.endpoint, **env}, offline=offline)
    assert offline_hub.offline
    for question in (
        lambda: offline_hub.listing(REPO),
        lambda: offline_hub.search("x"),
        lambda: offline_hub.location(REPO, "a" * 40, "f.gguf"),
    ):
        assert named in refusal(question, Offline).hint
    assert hub.requests == []


def test_a_variable_that_says_no_does_not_forbid() -> None:
    assert not Hub({"HF_HUB_OFFLINE": "0", "LOCALLLM_OFFLINE": ""}).offline


def test_the_offline_flag_that_huggingface_hub_read_at_its_import(hub: HubServer, asked: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(lambda: asked.listing(REPO), Offline).hint


def test_the_endpoint() -> None:
    assert Hub({}).endpoint == "https://huggingface.co"
    assert Hub({"HF_ENDPOINT": "https://mirror.example/hf/"}).endpoint == "https://mirror.example/hf"
    for bad in ("mirror.example", "ftp://mirror.example", "http://", "file:///etc", "http://a b"):
        assert "HF_ENDPOINT" in refusal(lambda bad=bad: Hub({"HF_ENDPOINT": bad}).endpoint, ConfigError).message


@pytest.fixture
def program(tmp_path: Path, hub: HubServer) -> Any:
    """Runs Python code in a process of its own, with this environment alone; returns the JSON that it prints."""

    def run(code: str, **env: str) -> Any:
        keep = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**keep, "HOME": str(tmp_path), "HF_ENDPOINT": hub.endpoint, **env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


ASK = """
import json, sys
from localllm.hub import Hub
assert "huggingface_hub" not in sys.modules, "imported too early"
sizes = [file.size_bytes for file in Hub().listing("user/secret").files]
from huggingface_hub import constants
print(json.dumps({"sizes": sizes, "telemetry": not constants.HF_HUB_DISABLE_TELEMETRY}))
"""


def test_a_stored_token_is_found_and_nothing_else_is_sent(hub: HubServer, program: Any, tmp_path: Path) -> None:
    hub.add_repo("user/secret", {"m-Q8_0.gguf": WEIGHTS}, private=True)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text(f"{TOKEN}\n")
    # AI_AGENT would make huggingface_hub ask the Hub which agents there are, and tell it of this one.
    answer = program(ASK, HF_HOME=str(tmp_path / "hf"), AI_AGENT="some-agent")
    assert answer == {"sizes": [len(WEIGHTS)], "telemetry": False}
    (request,) = hub.requests
    assert request.header("authorization") == f"Bearer {TOKEN}"
    agent = request.header("user-agent") or ""
    assert agent.startswith("localllm/")
    assert "agent/" not in agent
    assert sorted(each.name for each in (tmp_path / "hf").iterdir()) == ["token"]


def test_telemetry_is_off_even_where_huggingface_hub_was_imported_before(hub: HubServer, program: Any) -> None:
    hub.add_repo("user/secret", {"m-Q8_0.gguf": WEIGHTS})
    code = ASK.replace("import json, sys", "import json, sys, huggingface_hub, huggingface_hub.constants").replace(
        "assert", "assert True or", 1
    )
    assert program(code)["telemetry"] is False
    assert len(hub.requests) == 1


def test_requests_go_through_the_proxy_of_the_environment(hub: HubServer, program: Any) -> None:
    hub.add_repo("user/secret", {"m-Q8_0.gguf": WEIGHTS})
    with HubServer() as proxy:
        proxy.add_repo("user/secret", {"m-Q8_0.gguf": WEIGHTS * 3})
        # A plain proxy is asked for the whole address; this one answers by itself.
        answer = program(ASK, HF_ENDPOINT="http://hub.invalid", HTTP_PROXY=proxy.endpoint)
        assert answer["sizes"] == [len(WEIGHTS) * 3]
        assert proxy.requests[0].path.startswith("http://hub.invalid/api/models/user/secret")
    assert hub.requests == []
