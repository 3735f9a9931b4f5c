"""The models known by name: the shipped `models.toml`, the user's own file laid over it, and the lookup by name and tag.

Knows which repository of the Hub holds a model and which of its files belong to a quant. Knows neither the network nor
what lies on this disk; a pattern for files becomes a file only against the Hub's listing. The head of `models.toml`
explains the format.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast

from localllm.errors import ConfigError, NotFound, UsageError
from localllm.paths import package_data
from localllm.reference import check_repo

Tier = Literal["small", "middle", "large"]
TIERS: tuple[Tier, ...] = ("small", "middle", "large")
ROLES = ("chat", "code", "reasoning", "small", "large", "draft", "embed", "rerank")
LATEST = "latest"
"""Ollama's word for a name's default tag."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the catalogue says about one model; the head of `models.toml` explains each field."""

    name: str
    """`llama3.3` of `llama3.3:70b`."""
    tag: str
    """`70b` of `llama3.3:70b`; empty where there is one model of the name."""
    repo: str
    """Repository on the Hub, `owner/name`; empty for a built-in model."""
    files: Mapping[str, str] = field(hash=False)
    """quant -> pattern for the paths in the repository; for a built-in model, its file."""
    parameters: int
    active_parameters: int
    """Weights read for one token: `parameters`, or fewer in a mixture of experts."""
    context: int
    licence: str
    roles: tuple[str, ...]
    tier: Tier
    draft: tuple[str, ...]
    """Models that can draft for this one, best first, as `key`s."""
    source: tuple[str, ...]
    checked: date | None
    note: str

    @property
    def key(self) -> str:
        """The whole name, `llama3.3:70b`."""
        return f"{self.name}:{self.tag}" if self.tag else self.name

    @property
    def built_in(self) -> bool:
        """Whether it ships with the package."""
        return not self.repo

    def quant_of(self, path: str) -> str | None:
        """The quant to which the file at `path` of the repository belongs; None where no pattern takes it."""
        return next((quant for quant, pattern in self.files.items() if fnmatchcase(path.lower(), pattern.lower())), None)


@dataclass(frozen=True, slots=True)
class Catalog:
    """All entries, and which tag a bare name means."""

    models: tuple[ModelSpec, ...]
    default_tags: Mapping[str, str] = field(hash=False)

    def find(self, name: str, tag: str | None = None) -> ModelSpec:
        """The entry `name:tag`, given as two or as one; without a tag, or with `latest`, the default of the name.

        Raises NotFound naming the entries that are close, or the tags to choose from.
        """
        name, _, inner = name.lower().partition(":")
        tag = (tag or inner or LATEST).lower()
        found = {spec.tag: spec for spec in self.models if spec.name == name}
        if not found:
            raise NotFound(f"the catalogue has no model named {name!r}", hint=self._near(name, tag))
        if tag == LATEST and tag not in found:
            tag = self.default_tags.get(name, "")
        if tag not in found:
            why = f"{name!r} has no tag {tag!r} in the catalogue" if tag else f"{name!r} has no default tag"
            raise NotFound(why, hint=f"choose one of {', '.join(found[tag].key for tag in self.tags(name))}")
        return found[tag]

    def tags(self, name: str) -> tuple[str, ...]:
        """The tags of `name`, smallest model first; none for an unknown name."""
        return tuple(spec.tag for spec in sorted(self.models, key=lambda spec: spec.parameters) if spec.name == name.lower())

    def drafts_for(self, spec: ModelSpec) -> tuple[ModelSpec, ...]:
        """The models that can draft for `spec`, best first."""
        return tuple(self.find(key) for key in spec.draft)

    def _near(self, name: str, tag: str) -> str:
        bare = tag == LATEST
        known = dict.fromkeys(spec.name if bare else spec.key for spec in self.models)
        close = get_close_matches(name if bare else f"{name}:{tag}", known, n=3)
        return f"did you mean {' or '.join(close)}?" if close else f"look on the Hub: localllm search {name}"


def load_catalog(user_file: Path | None = None) -> Catalog:
    """The shipped catalogue with `user_file`, where there is one, laid over it; about 10 ms.

    A user's entry of a new name must be whole; one of a known name replaces the fields that it gives and keeps the others.
    `[default_tags]` are laid over each other likewise. Raises ConfigError naming the file, the line and what to do.
    """
    documents = [_read(package_data("models.toml"))]
    if user_file is not None and user_file.exists():
        documents.append(_read(user_file))
    merged = _Merged({}, {}, {})
    for document in documents:
        merged.lay_over(document, shipped=document is documents[0])
    return merged.catalog()


@dataclass(frozen=True, slots=True)
class _Document:
    """One file, and where its statements stand."""

    path: Path
    text: str
    data: Mapping[str, object]

    def error(self, what: str, hint: str, *keys: str) -> ConfigError:
        """A ConfigError about the statement that sets `keys`, such as `models`, `llama3.3:70b`, `repo`."""
        return ConfigError(f"{self.path}, line {_line_of(self.text, keys)}: {what}", hint=hint)

    def table(self, value: object, *keys: str) -> Mapping[str, object]:
        """`value`, which stands at `keys`, if it is a table."""
        if not isinstance(value, dict):
            raise self.error(f"{keys[-1]} is not a table", "write it as a [table], its fields on the lines below", *keys)
        return cast("dict[str, object]", value)


@dataclass(frozen=True, slots=True)
class _Merged:
    """The fields of all documents so far, each with the document that set it last."""

    entries: dict[str, dict[str, Any]]
    origins: dict[tuple[str, str], _Document]
    """(key of the entry, field) -> its document; (key, "") -> the document that began the entry."""
    default_tags: dict[str, tuple[str, _Document]]

    def lay_over(self, document: _Document, *, shipped: bool) -> None:
        """Add what `document` says, each field checked by itself. Raises ConfigError."""
        for part in document.data:
            if part not in ("models", "default_tags"):
                raise document.error(f"{part!r} is not part of a catalogue", 'an entry begins with [models."name:tag"]', part)
        for key, entry in document.table(document.data.get("models", {}), "models").items():
            self._add(document, key, document.table(entry, "models", key), shipped=shipped)
        for name, tag in document.table(document.data.get("default_tags", {}), "default_tags").items():
            if not isinstance(tag, str):
                raise document.error(f"the default tag of {name} is {tag!r}", 'write it as a text, such as "70b"', "default_tags", name)
            self.default_tags[name] = tag, document

    def _add(self, document: _Document, key: str, entry: Mapping[str, object], *, shipped: bool) -> None:
        if not _KEY.fullmatch(key):
            raise document.error(f"{key!r} is not a name", "write name:tag in small letters, such as llama3.3:70b", "models", key)
        parsers = _PARSERS if shipped else {name: parse for name, parse in _PARSERS.items() if name != "built_in"}
        fields = self.entries.setdefault(key, {})
        self.origins.setdefault((key, ""), document)
        for name, value in entry.items():
            if name not in parsers:
                close = get_close_matches(name, parsers, n=1)
                hint = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(parsers)}"
                raise document.error(f"{key} has a field {name!r}, which means nothing", hint, "models", key, name)
            try:
                fields[name] = parsers[name](value)
            except ValueError as error:
                raise document.error(f"{name} of {key} is {value!r}", f"{name} must be {error}", "models", key, name) from error
            self.origins[key, name] = document
        required = {*_REQUIRED, *(["source", "checked"] if shipped else []), *([] if "built_in" in fields else ["repo"])}
        if missing := [name for name in _PARSERS if name in required and name not in fields]:
            raise document.error(f"{key} lacks {', '.join(missing)}", "an entry of a new name needs them", "models", key)

    def catalog(self) -> Catalog:
        """The catalogue, once everything in it that names something else names it rightly. Raises ConfigError."""
        models = {key: _spec(key, fields) for key, fields in self.entries.items()}
        for key, spec in models.items():
            if spec.active_parameters > spec.parameters:
                raise self._error(
                    key, "active_parameters", f"{key} has more active parameters than parameters", "give the smaller number here"
                )
            for draft in spec.draft:
                if draft not in models:
                    close = get_close_matches(draft, models, n=2)
                    hint = f"did you mean {' or '.join(close)}?" if close else "add an entry of that name, or drop it here"
                    raise self._error(key, "draft", f"{draft!r}, to draft for {key}, is no entry", hint)
                if models[draft].parameters >= spec.parameters:
                    raise self._error(key, "draft", f"{draft} is no smaller than {key}", "a draft must be the smaller model")
        for name, (tag, document) in self.default_tags.items():
            if f"{name}:{tag}" not in models:
                near = [key for key in models if key.startswith(f"{name}:")] or list(models)[:3]
                raise document.error(f"{name}:{tag} is no entry", f"choose one of {', '.join(near)}", "default_tags", name)
        return Catalog(tuple(models.values()), {name: tag for name, (tag, _) in self.default_tags.items()})

    def _error(self, key: str, name: str, what: str, hint: str) -> ConfigError:
        document = self.origins.get((key, name)) or self.origins[key, ""]
        return document.error(what, hint, "models", key, name)


def _spec(key: str, fields: Mapping[str, Any]) -> ModelSpec:
    name, _, tag = key.partition(":")
    return ModelSpec(
        name=name,
        tag=tag,
        repo=fields.get("repo", ""),
        files=fields["files"],
        parameters=fields["parameters"],
        active_parameters=fields.get("active_parameters", fields["parameters"]),
        context=fields["context"],
        licence=fields["licence"],
        roles=fields["roles"],
        tier=fields["tier"],
        draft=fields.get("draft", ()),
        source=fields.get("source", ()),
        checked=fields.get("checked"),
        note=fields.get("note", ""),
    )


# One function per kind of value. A ValueError says what the value must be, behind "repo must be".

_KEY = re.compile(r"[a-z0-9][a-z0-9._-]*(:[a-z0-9][a-z0-9._-]*)?")
_QUANT = re.compile(r"[A-Z][A-Z0-9]*([_-][A-Z0-9]+)*")
_PATTERN = re.compile(r"(?!/)(?!.*(\.\.|//))[^\\:\x00-\x1f]+\.gguf", re.IGNORECASE)


def _repo(value: object) -> str:
    try:
        return check_repo(value if isinstance(value, str) else "")
    except UsageError as error:
        raise ValueError('a repository of the Hub as "owner/name"') from error


def _files(value: object) -> dict[str, str]:
    files = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    good = {quant: path for quant, path in files.items() if _QUANT.fullmatch(quant) and isinstance(path, str) and _PATTERN.fullmatch(path)}
    if not files or len(good) < len(files):
        raise ValueError('a table of quants with a pattern for their .gguf files, such as { Q4_K_M = "Llama-3.2-3B-*Q4_K_M*.gguf" }')
    return good


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError("a positive whole number, such as 131_072")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text in quotes")
    return value


def _texts(value: object) -> tuple[str, ...]:
    items = cast("list[object]", value) if isinstance(value, list) else []
    texts = tuple(item for item in items if isinstance(item, str) and item.strip())
    if not texts or len(set(texts)) < len(items):
        raise ValueError('a list of texts, each once, such as ["…", "…"]')
    return texts


def _drafts(value: object) -> tuple[str, ...]:
    return () if value == [] else _texts(value)


def _roles(value: object) -> tuple[str, ...]:
    roles = _texts(value)
    if set(roles) - set(ROLES):
        raise ValueError(f"a list out of {', '.join(ROLES)}")
    return roles


def _tier(value: object) -> Tier:
    if value not in TIERS:
        raise ValueError(f"one of {', '.join(TIERS)}, in quotes")
    return value


def _day(value: object) -> date:
    if not isinstance(value, date) or isinstance(value, datetime):
        raise ValueError("a day without quotes, such as 2026-11-23")
    return value


def _true(value: object) -> bool:
    if value is not True:
        raise ValueError("true, or not there")
    return True


_PARSERS: Mapping[str, Callable[[object], object]] = {
    "repo": _repo,
    "built_in": _true,
    "files": _files,
    "parameters": _count,
    "active_parameters": _count,
    "context": _count,
    "licence": _text,
    "roles": _roles,
    "tier": _tier,
    "draft": _drafts,
    "source": _texts,
    "checked": _day,
    "note": _text,
}
_REQUIRED = frozenset({"files", "parameters", "context", "licence", "roles", "tier"})


def _read(path: Path) -> _Document:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read {path}: {reason}", hint="correct the file, or move it away") from error
    try:
        return _Document(path, text, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        what, _, place = str(error).partition(" (at ")
        line = re.match(r"line (\d+)", place)
        number = line[1] if line else text.rstrip().count("\n") + 1
        raise ConfigError(f"{path}, line {number}: {what}", hint="correct that line; no entry and no field may stand twice") from error


def _line_of(text: str, keys: tuple[str, ...]) -> int:
    """The line, from 1, of the statement that sets `keys`, or of the one nearest around it.

    tomllib keeps no positions: the text is cut into its statements again, which only an error has to pay for.
    """
    table: tuple[str, ...] = ()
    best, depth = 1, 0
    for line, statement in _statements(text):
        names = _names(statement)
        if not names:
            continue
        if statement.lstrip().startswith("["):
            table = names
        else:
            names = (*table, *names)
        common = next((i for i, (a, b) in enumerate(zip(names, keys, strict=False)) if a != b), min(len(names), len(keys)))
        if common > depth:
            best, depth = line, common
    return best


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each statement: a table's header, or a key with its value over as many lines as it takes."""
    start, held = 0, ""
    for number, line in enumerate(text.split("\n"), start=1):
        start, held = start if held else number, f"{held}{line}\n"
        try:
            tomllib.loads(held)
        except tomllib.TOMLDecodeError:
            continue
        yield start, held
        held = ""


def _names(statement: str) -> tuple[str, ...]:
    """The keys that one statement opens or sets: `[models."a:b"]` is ("models", "a:b")."""
    names: list[str] = []
    value: object = tomllib.loads(statement)
    while isinstance(value, dict) and len(cast("dict[str, object]", value)) == 1:
        ((name, value),) = cast("dict[str, object]", value).items()
        names.append(name)
    return tuple(names)
