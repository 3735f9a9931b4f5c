"""The Hugging Face Hub as localllm sees it: what a repository holds, what a search finds, where a file's bytes are. Fetches no bytes.

huggingface_hub does the talking, and with it HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and proxies mean what they mean
elsewhere; its telemetry is off. It is imported (about 0.4 s) by the first question only. Every failure is one of ours, with the next step.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from localllm.errors import ConfigError, LocalLLMError, NetworkError, Offline
from localllm.quant import RemoteModel, SideFile, models_in, side_files

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 10.0
RETRY_WAITS_S = (0.5, 2.0)
LONGEST_WAIT_S = 10
"""A rate limit that ends sooner is waited for."""
MAX_FILES = 20_000
MAX_FILE_BYTES = 8 << 40
"""More than any model there is; a size beyond it is an error or an attack."""
MAX_PATH = 1024

MAX_PAGES = 20

_REPO = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")
_DATE = re.compile(r"[0-9T:.Z+-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TRUE = {"1", "ON", "YES", "TRUE"}
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "LOCALLLM_OFFLINE")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RepoFile:
    """One file of a repository."""

    path: str
    """Inside the repository, with slashes; no `..`, backslash or control character in it."""
    size_bytes: int
    sha256: str | None
    """Of the content, for files in LFS: all weights are."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository holds at one commit."""

    repo: str
    revision: str
    """What was asked for: a branch, tag or commit."""
    commit: str
    """What it was then, 40 hex digits."""
    gated: bool
    """Its files need a token of an account that accepted the licence."""
    licence: str
    """As the model card says, such as "apache-2.0"; empty where it does not."""
    files: tuple[RepoFile, ...]

    @property
    def models(self) -> tuple[RemoteModel, ...]:
        """Its GGUF models, best quality first."""
        return models_in(self.files, self.repo, self.commit)

    @property
    def side_files(self) -> tuple[SideFile, ...]:
        return side_files(self.files)


@dataclass(frozen=True, slots=True)
class SearchHit:
    """One repository with GGUF files."""

    repo: str
    downloads: int
    """In the last 30 days."""
    likes: int
    updated: str
    """ISO 8601; empty where unknown."""
    gated: bool


@dataclass(frozen=True, slots=True)
class Location:
    """Where the bytes of one file are, for now: links to a CDN are signed and expire, so ask again after a 403."""

    url: str
    headers: Mapping[str, str]
    """To send to this URL and to no other: they hold the token where the URL is the Hub's own, and only there."""
    etag: str
    """Names the content on the Hub (sha256 in LFS, else git's hash). The CDN has an ETag of its own: If-Range takes that one."""
    size_bytes: int
    sha256: str | None


class Hub:
    """The Hub at `env["HF_ENDPOINT"]`; `env` decides over what huggingface_hub read when it was imported.

    `offline` forbids every question, as HF_HUB_OFFLINE does. Threads may share it.
    """

    def __init__(self, env: Mapping[str, str] = os.environ, offline: bool = False, sleep: Callable[[float], object] = time.sleep) -> None:
        self._env = env
        self._offline = offline
        self._sleep = sleep

    @property
    def endpoint(self) -> str:
        """Without a slash at the end; raises ConfigError where HF_ENDPOINT is no address."""
        endpoint = (self._env.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", endpoint):
            raise ConfigError(f"HF_ENDPOINT is {endpoint!r}, which is no address", hint=f"use one like {DEFAULT_ENDPOINT}, or unset it")
        return endpoint

    @property
    def offline(self) -> bool:
        return self._offline or self._offline_variable is not None

    def listing(self, repo: str, revision: str = "main") -> Listing:
        """Every file of `repo` at the commit that `revision` is now, in one request.

        Raises NotFound, NotAuthorised, Offline, or NetworkError, also where the answer is not what a Hub says.
        """

        def ask() -> Listing:
            from huggingface_hub import HfApi

            hub = HfApi(endpoint=self.endpoint, **self._identity())
            return _listing(hub.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S), repo, revision)

        return self._ask(ask, repo, revision)

    def search(self, query: str, limit: int = 20) -> list[SearchHit]:
        """Up to `limit` repositories with GGUF files whose name matches `query`, the most downloaded first."""
        return self._search({"search": query}, limit)

    def location(self, repo: str, commit: str, path: str) -> Location:
        """Where the bytes of `path` at `commit` are; the errors of `listing`, and NotFound for the file."""

        def ask() -> Location:
            from huggingface_hub import get_hf_file_metadata, hf_hub_url  # pyright: ignore[reportUnknownVariableType]

            url = hf_hub_url(repo, path, revision=commit, endpoint=self.endpoint)
            found = get_hf_file_metadata(url, timeout=TIMEOUT_S, endpoint=self.endpoint, **self._identity())
            if _COMMIT.fullmatch(commit) and found.commit_hash != commit:
                raise NetworkError(f"the Hub answered for another commit of {repo}: {found.commit_hash}", hint="try again later")
            if not found.etag or found.size is None or not 0 <= found.size <= MAX_FILE_BYTES:
                raise NetworkError(f"the Hub gives no usable size and ETag for {path} in {repo}", hint="try again later")
            check_scheme(found.location, self.endpoint)
            # A token goes to the host it was given for, whoever asks for it.
            headers = self._headers(with_token=_origin(found.location) == _origin(self.endpoint))
            sha256 = found.etag if _SHA256.fullmatch(found.etag) else None
            return Location(found.location, headers, found.etag, found.size, sha256)

        return self._ask(ask, repo, commit, path)

    def _search(self, query: Mapping[str, str], limit: int) -> list[SearchHit]:
        # Not HfApi.list_models: without a network it tries again for 23 s and cannot be given a timeout.
        def ask() -> list[SearchHit]:
            from huggingface_hub import get_session
            from huggingface_hub.utils import hf_raise_for_status

            headers = self._headers(with_token=True)
            expand = ["downloads", "likes", "lastModified", "gated"]
            params: dict[str, Any] | None = {**query, "filter": "gguf", "sort": "downloads", "limit": limit, "expand": expand}
            url = f"{self.endpoint}/api/models"
            hits: list[SearchHit] = []
            for _ in range(MAX_PAGES):
                answer = get_session().get(url, params=params, headers=headers, timeout=TIMEOUT_S)
                hf_raise_for_status(answer)
                # A name that no repository can have is left out: it would end up on a terminal.
                hits += [hit for hit in map(_hit, cast(list[Any], answer.json())) if _REPO.fullmatch(hit.repo)]
                # The link to the next page holds the query.
                url, params = str(answer.links.get("next", {}).get("url", "")), None
                if len(hits) >= limit or _origin(url) != _origin(self.endpoint):
                    break
            return hits[:limit]

        return self._ask(ask) if limit > 0 else []

    def _ask(self, question: Callable[[], T], repo: str = "", revision: str = "", path: str = "") -> T:
        """The answer to `question`, asked again where the line or the Hub may recover; every failure is one of ours."""
        if self.offline:
            raise Offline(f"{repo or 'a search'} needs the Hugging Face Hub, and {self._forbidden_by}", hint=self._how_to_allow)
        _import_hub()
        from localllm.hub_errors import Asked, explain, wait_s

        for pause in (*RETRY_WAITS_S, None):
            try:
                return question()
            except LocalLLMError:
                raise
            except Exception as error:  # a border: huggingface_hub's own, httpx2's, and KeyError and the like where an answer is odd
                wait = wait_s(error, pause)
                if wait is None or wait > LONGEST_WAIT_S:
                    raise explain(error, Asked(self.endpoint, repo, revision, path), self._env, self._close_names) from error
                self._sleep(wait)
        raise AssertionError("unreachable")

    def _close_names(self, repo: str) -> list[str]:
        """Repositories of the same publisher with a name like `repo`'s; none where the Hub will not say."""
        from difflib import get_close_matches

        try:
            there = {hit.repo.lower(): hit.repo for hit in self._search({"author": repo.partition("/")[0]}, 200)}
        except LocalLLMError:
            return []
        return [there[name] for name in get_close_matches(repo.lower(), there, n=3, cutoff=0.7)]

    def _identity(self, with_token: bool = True) -> dict[str, Any]:
        """Who asks, as huggingface_hub's functions take it: our name, and the token."""
        from localllm import __version__

        token: str | bool | None = (self._env.get("HF_TOKEN") or self._env.get("HUGGING_FACE_HUB_TOKEN") or "").strip()
        if not token:
            # None lets huggingface_hub look for the one that `hf auth login` stored.
            token = None if self._env is os.environ else False
        return {"token": token if with_token else False, "library_name": "localllm", "library_version": __version__}

    def _headers(self, with_token: bool) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers  # pyright: ignore[reportUnknownVariableType]

        return build_hf_headers(**self._identity(with_token))

    @property
    def _offline_variable(self) -> str | None:
        return next((name for name in _OFFLINE_VARIABLES if self._env.get(name, "").upper() in _TRUE), None)

    @property
    def _forbidden_by(self) -> str:
        return f"{self._offline_variable} forbids the network" if self._offline_variable else "localllm is set to stay offline"

    @property
    def _how_to_allow(self) -> str:
        if self._offline_variable:
            return f"unset {self._offline_variable}, or bring the file and: localllm import FILE"
        return "leave out --offline, or: localllm config set offline false"


def check_scheme(url: str, endpoint: str) -> None:
    """Raise NetworkError unless `url` is https, or http where the Hub itself is asked without encryption."""
    scheme = urlsplit(url).scheme
    if scheme != "https" and not (scheme == "http" and endpoint.startswith("http://")):
        raise NetworkError(f"the Hub points to {url.partition('?')[0]}, which is not https", hint="set HF_ENDPOINT to a host you trust")


def _import_hub() -> None:
    """Import huggingface_hub with its telemetry off; it reads the variable only then, unless someone imported it before us."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True


def _listing(info: ModelInfo, repo: str, revision: str) -> Listing:
    siblings = info.siblings or []
    if len(siblings) > MAX_FILES:
        raise NetworkError(f"{repo} has {len(siblings)} files", hint=f"localllm takes repositories of up to {MAX_FILES} files")
    if info.sha is None or not _COMMIT.fullmatch(info.sha):
        raise NetworkError(f"the Hub names no commit for {repo}", hint="try again later")
    return Listing(repo, revision, info.sha, bool(info.gated), _licence(info), tuple(_repo_file(each, repo) for each in siblings))


def _repo_file(sibling: RepoSibling, repo: str) -> RepoFile:
    path, size = sibling.rfilename, sibling.lfs.size if sibling.lfs else sibling.size
    sha256 = sibling.lfs.sha256 if sibling.lfs else None
    parts = path.split("/")
    # What may be written to disk is checked again, and harder, where it is written (reference.safe_parts).
    if len(path) > MAX_PATH or not path.isprintable() or "\\" in path or any(part in {"", ".", ".."} for part in parts):
        raise NetworkError(
            f"{repo} lists a file named {path[:200]!r}", hint="do not use this repository: such a name is an attack or an accident"
        )
    if size is None or not 0 <= size <= MAX_FILE_BYTES or (sha256 is not None and not _SHA256.fullmatch(sha256)):
        raise NetworkError(
            f"{repo} lists {path} with {size} bytes and the hash {sha256}", hint="do not use this repository, or try again later"
        )
    return RepoFile(path, size, sha256)


def _hit(item: Any) -> SearchHit:
    updated = str(item.get("lastModified") or "")
    return SearchHit(
        repo=str(item["id"]),
        downloads=int(item.get("downloads") or 0),
        likes=int(item.get("likes") or 0),
        updated=updated if _DATE.fullmatch(updated) else "",
        gated=bool(item.get("gated")),
    )


def _licence(info: ModelInfo) -> str:
    """What the model card calls its licence: a card that says "other" has its name beside it."""
    card: Any = info.card_data
    named = getattr(card, "license", None)
    if named in (None, "other"):
        named = getattr(card, "license_name", None) or named
    if not named:
        named = next((tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")), "")
    text = ", ".join(map(str, cast(list[Any], named))) if isinstance(named, list) else str(named)
    return "".join(char for char in text if char.isprintable())[:100]


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
