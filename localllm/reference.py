"""What a person types to mean a model: a path, a name, or something on the Hugging Face Hub. Looks at no disk.

    ./model.gguf  ~/m.gguf  C:\\m.gguf  file:///m.gguf  any/thing.gguf     a path
    demo  llama3.3:70b                                                    a name with an optional tag
    user/repo[:QUANT]  user/repo@quant  user/repo@revision                 the Hub; also after hf.co/ and huggingface.co/
    hf://user/repo[@revision]/file.gguf  https://hf.co/user/repo/resolve/main/file.gguf

After `@`, what is the name of a quantisation is one (LM Studio writes `@q4_k_m`); anything else is a branch, tag or commit
of the repository. After `:` stands a quantisation, or one of the repository's files (Ollama writes both).
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from localllm.errors import UsageError
from localllm.quant import quant_of

HOSTS = ("hf.co", "huggingface.co", "www.huggingface.co")
MAX_COMPONENT_BYTES = 200
"""File systems take 255; `.part.json` and the like must still fit behind it."""
MAX_DEPTH = 8

_FORMS = "use a path, NAME[:TAG], user/repo[:QUANT] or hf://user/repo/file.gguf"
_NAME = re.compile(r"(?=.{1,96}$)[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_REPO_PART = re.compile(r"(?=.{1,96}$)(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_REVISION = re.compile(r"(?=.{1,200}$)(?!.*(?:\.\.|//))[A-Za-z0-9_](?:[A-Za-z0-9._/-]*[A-Za-z0-9_-])?")
_MARK = re.compile(r"([:@])(refs/\w+/[^/:@]+|[^/:@]*)")
_HUB = re.compile(rf"(?P<repo>[^/:@]+/[^/:@]+)(?P<marks>(?:{_MARK.pattern})*)(?:/(?P<file>.*))?", re.DOTALL)
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_FORBIDDEN = frozenset('<>:"|?*\\/')
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$|clock\$) *(\..*)?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class PathReference:
    """A file on this machine, `~` expanded; it may not exist."""

    path: Path


@dataclass(frozen=True, slots=True)
class NameReference:
    """A built-in model, an alias or an entry of the catalogue."""

    name: str
    tag: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}" if self.tag else self.name


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository on the Hub and, where said, which of its models; what was not said is empty."""

    repo: str
    """`user/name`."""
    quant: str = ""
    """In capitals, as `Q4_K_M`."""
    file: str = ""
    """Path inside the repository."""
    revision: str = ""
    """Branch, tag or commit."""

    def __str__(self) -> str:
        repo = f"{self.repo}@{self.revision}" if self.revision else self.repo
        if self.file:
            return f"hf://{repo}/{self.file}"
        return f"{repo}:{self.quant}" if self.quant else repo


Reference = PathReference | NameReference | HubReference


def parse(text: str) -> Reference:
    """What `text` refers to; raises UsageError naming what is wrong with it."""
    if _is_path(text) and "\0" not in text:
        # Unlike Path.expanduser, this leaves an unknown user's home alone.
        return PathReference(Path(os.path.expanduser(text)))
    text = text.strip()
    if not text or not text.isprintable():
        raise UsageError(f"{text!r} is no model reference", hint=_FORMS)
    scheme, separator, rest = text.partition("://")
    if separator:
        return _parse_url(text, scheme.lower(), rest)
    host, _, rest = text.partition("/")
    if host.lower() in HOSTS:
        return _parse_hub(text, rest)
    return _parse_hub(text, text) if "/" in text else _parse_name(text)


def check_revision(revision: str) -> str:
    """`revision`, if it can be a branch, tag or commit; else UsageError."""
    if not _REVISION.fullmatch(revision):
        raise UsageError(f"{revision!r} is no revision", hint="give a branch, a tag or a commit of the repository, as main")
    return revision


def check_repo(repo: str) -> str:
    """`repo`, if it reads `user/name` as the Hub allows; else UsageError."""
    parts = repo.split("/")
    if len(parts) != 2 or not all(_REPO_PART.fullmatch(part) for part in parts):
        raise UsageError(f"{repo!r} is no repository", hint="give it as user/name: letters, digits and single . _ - between them")
    safe_parts(repo, "file")
    return repo


def safe_parts(repo: str, filename: str) -> tuple[str, ...]:
    """The components of `repo/filename` below the models folder: none can leave it, or be a device or a hidden file on any OS.

    `filename` is a path inside the repository, as the Hub lists it. Raises UsageError naming the first bad component.
    """
    parts = (*repo.split("/"), *filename.split("/"))
    if len(parts) > MAX_DEPTH:
        raise UsageError(f"{filename!r} in {repo} lies too deep", hint=f"at most {MAX_DEPTH} folders")
    for part in parts:
        if reason := _fault(part):
            raise UsageError(f"{part!r} in {repo!r}, {filename!r} cannot be a file name: {reason}", hint="such a file is never written")
    return parts


def _fault(part: str) -> str:
    """Why `part` cannot be one component of a path on every OS; empty if it can."""
    if not part:
        return "it is empty"
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in part):
        return "it holds control characters"
    if bad := _FORBIDDEN.intersection(part):
        return f"it holds {' '.join(sorted(bad))}"
    if part.startswith((".", " ")):
        return "it begins with a dot or a space"
    if part.endswith((".", " ")):
        return "it ends in a dot or a space"
    if _RESERVED.fullmatch(part):
        return "Windows reserves it"
    return "it is too long" if len(part.encode()) > MAX_COMPONENT_BYTES else ""


def _is_path(text: str) -> bool:
    if text in (".", "..") or text.startswith(("/", "~", "./", "../")) or _DRIVE.match(text):
        return True
    if "\\" in text and "://" not in text:
        return True
    # With a colon it is an address or Ollama's `user/repo:file.gguf`; such a local file needs ./
    return text.lower().endswith(".gguf") and ":" not in text and text.partition("/")[0].lower() not in HOSTS


def _parse_url(text: str, scheme: str, rest: str) -> Reference:
    if scheme == "hf":
        return _parse_hub(text, rest)
    if scheme == "file":
        path = unquote(rest.removeprefix("localhost"))
        if not path.startswith("/"):
            raise UsageError(f"{text} names no file", hint="write file:///path/to/model.gguf, or the path alone")
        return PathReference(Path(path.removeprefix("/") if _DRIVE.match(path[1:]) else path))
    if scheme not in ("http", "https"):
        raise UsageError(f"{scheme}:// is not supported", hint=_FORMS)
    try:
        url = urlsplit(text)
    except ValueError as error:
        raise UsageError(f"{text} is no address", hint=_FORMS) from error
    if url.hostname not in HOSTS:
        raise UsageError(f"{text} is not on the Hugging Face Hub", hint="download it yourself, then: localllm import FILE")
    parts = [unquote(part) for part in url.path.split("/") if part]
    if len(parts) < 2:
        raise UsageError(f"{text} names no repository", hint=_FORMS)
    repo = "/".join(parts[:2])
    if len(parts) == 2:
        return _parse_hub(text, repo)
    kind, revision, file = parts[2], "/".join(parts[3:4]), "/".join(parts[4:])
    if kind not in ("resolve", "blob", "raw", "tree") or not revision:
        raise UsageError(f"{text} is no page of a repository or a file", hint=_FORMS)
    # A folder's page means its repository: which of its models, the quantisation decides.
    return _hub(text, repo, file="" if kind == "tree" else file, revision=revision)


def _parse_hub(text: str, rest: str) -> HubReference:
    match = _HUB.fullmatch(rest.removesuffix("/"))
    if not match:
        raise UsageError(f"{text!r} is no model reference", hint=_FORMS)
    quant = revision = ""
    file = match["file"] or ""
    for sign, value in _MARK.findall(match["marks"]):
        if sign == ":" and value.lower().endswith(".gguf") and not file:
            file = value
        elif value and not quant and (sign == ":" or as_quant(value)):
            quant = value
        elif sign == "@" and not as_quant(value) and not revision:
            revision = check_revision(unquote(value))
        else:
            raise UsageError(f"{text!r}: {sign}{value} is empty or was said already", hint=_FORMS)
    return _hub(text, match["repo"], quant, file, revision)


def _hub(text: str, repo: str, quant: str = "", file: str = "", revision: str = "") -> HubReference:
    check_repo(repo)
    if quant and not _NAME.fullmatch(quant):
        raise UsageError(f"{text!r}: {quant!r} is no quantisation", hint="give one as Q4_K_M or Q8_0")
    if quant.lower() == "latest":  # Ollama's word for "choose one"
        quant = ""
    if file:
        safe_parts(repo, file)
        if not file.lower().endswith(".gguf"):
            raise UsageError(f"{text!r}: {file} is not a .gguf file", hint=_FORMS)
    if revision:
        check_revision(revision)
    return HubReference(repo, as_quant(quant) or quant.upper(), file, revision)


def _parse_name(text: str) -> NameReference:
    name, colon, tag = text.partition(":")
    if not _NAME.fullmatch(name) or (colon and not _NAME.fullmatch(tag)):
        raise UsageError(f"{text!r} is no model name", hint="letters, digits and . _ - between them, as in llama3.3:70b")
    return NameReference(name, tag)


def as_quant(text: str) -> str:
    """The quantisation that `text` is the name of, in its usual spelling; empty if it is none."""
    name = text.upper()
    found = quant_of(f"model-{name}.gguf")
    return found if found and found in (name, name.replace("FP", "F", 1)) else ""
