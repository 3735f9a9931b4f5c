"""Which models a name means, and what to say when it means none or several. Reads the catalogue, no model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from localllm.demo import demo_models
from localllm.errors import NotFound, UsageError
from localllm.library.model import LocalModel
from localllm.library.scan import stem_of
from localllm.reference import HubReference, NameReference, PathReference, Reference, parse

_ANYTHING = "use demo, a name from localllm list, or the path of a .gguf file"
_MAX_LISTED = 8
_SHORTEST_COMMIT = 7


def one_of(models: Sequence[LocalModel], text: str, catalog_file: Path, aliases: Iterable[str] = ()) -> LocalModel:
    """The one model that `text` means; raises NotFound: candidates when it means several, the next step when none."""
    # The catalogue before what merely fits: there a bare name has a default tag, the one that `pull` takes.
    found = _exact(models, text) or _from_catalog(models, text, catalog_file) or matches(models, text)
    if len(found) == 1:
        return found[0]
    raise ambiguous(text, [model.name for model in found]) if found else _not_found(models, text, catalog_file, aliases)


def matches(models: Sequence[LocalModel], text: str) -> list[LocalModel]:
    """The models that `text` can mean: that of this full name or path alone, else all that its repository, name, tag or quant fit."""
    if exact := _exact(models, text):
        return exact
    reference = _parsed(text)
    match reference:
        case None | PathReference():
            return []
        case HubReference(file=file) if file:
            return [model for model in models if _in_repo(model, reference) and model.key.casefold().endswith(f"/{file}".casefold())]
        case HubReference():
            return [model for model in models if not model.is_side_file and _in_repo(model, reference)]
        case NameReference():
            return [model for model in models if not model.is_side_file and _has_name(model, reference)]


def _exact(models: Iterable[LocalModel], text: str) -> list[LocalModel]:
    wanted = text.casefold()
    found = [model for model in models if wanted in (model.name.casefold(), model.key.casefold(), str(model.path).casefold())]
    # Two files may differ in their capitals alone.
    return [model for model in found if text in (model.name, model.key, str(model.path))] or found


def _in_repo(model: LocalModel, wanted: HubReference) -> bool:
    repo, _, tag = model.name.partition(":")
    # A name that is a path still says where the file came from.
    repos = {repo.casefold(), model.repo.casefold(), "/".join(model.key.split("/")[:2]).casefold()}
    return (
        wanted.repo.casefold() in repos
        and (not wanted.quant or wanted.quant.casefold() in (model.quant.casefold(), tag.casefold()))
        and (not wanted.revision or wanted.revision == model.revision or _is_commit(wanted.revision, model.commit))
    )


def _is_commit(revision: str, commit: str) -> bool:
    """Whether `revision` is `commit`, or as much of its beginning as git takes."""
    return len(revision) >= _SHORTEST_COMMIT and commit.startswith(revision.lower())


def _has_name(model: LocalModel, wanted: NameReference) -> bool:
    name, tag = wanted.name.casefold(), wanted.tag.casefold()
    catalog_name, _, catalog_tag = model.catalog_name.casefold().partition(":")
    if name == catalog_name and tag in ("", catalog_tag):
        return True
    repo, _, model_tag = model.name.casefold().partition(":")
    if name == repo.rpartition("/")[2].removesuffix("-gguf") or name == repo.rpartition("/")[2]:
        return tag in ("", model.quant.casefold(), model_tag)
    return not tag and name == stem_of(model.path.name).casefold()


def ambiguous(name: str, candidates: Iterable[str]) -> NotFound:
    """The error for a name that means several models."""
    names = sorted(candidates)
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return NotFound(f"{name!r} is ambiguous: it means {len(names)} models", hint=f"choose one: {', '.join(names[:_MAX_LISTED])}{more}")


def _from_catalog(models: Sequence[LocalModel], text: str, catalog_file: Path) -> list[LocalModel]:
    """The models on this machine that are what the catalogue calls `text`, however they came here."""
    from localllm.catalog import load_catalog

    reference = _parsed(text)
    if not isinstance(reference, NameReference):
        return []
    try:
        spec = load_catalog(catalog_file).find(reference.name, reference.tag or None)
    except NotFound:
        return []
    if spec.built_in:
        return [model for model in models if model.path.name in spec.files.values()]
    of_repo = {model.key for model in matches(models, spec.repo) if spec.quant_of(model.path.name)}
    return [model for model in models if model.key in of_repo or model.catalog_name == spec.key]


def _not_found(models: Iterable[LocalModel], text: str, catalog_file: Path, aliases: Iterable[str]) -> NotFound:
    path = Path(os.path.expanduser(text))
    if text and os.path.isdir(path):
        files = [str(file) for file in sorted(path.glob("*.gguf"))]
        hint = f"give one of its files: {', '.join(files[:_MAX_LISTED])}" if files else _ANYTHING
        return NotFound(f"{text} is a directory, not a model", hint=hint)
    if _can_be_pulled(text, catalog_file):
        return NotFound(f"{text} is not on this machine", hint=f"fetch it with: localllm pull {text}")
    beside = [str(file) for file in path.parent.glob("*.gguf") if os.path.isfile(file)] if text and os.path.isdir(path.parent) else []
    close = get_close_matches(
        text, [*demo_models(), *aliases, *(model.name for model in models), *_catalog_names(text, catalog_file), *beside]
    )
    return NotFound(f"no model named {text!r}", hint=f"did you mean: {', '.join(sorted(close))}" if close else _ANYTHING)


def _can_be_pulled(text: str, catalog_file: Path) -> bool:
    """Whether `text` names something on the Hub: a repository, or an entry of the catalogue."""
    from localllm.catalog import load_catalog

    reference = _parsed(text)
    if not isinstance(reference, NameReference):
        return isinstance(reference, HubReference)
    try:
        load_catalog(catalog_file).find(reference.name, reference.tag or None)
    except NotFound:
        return False
    return True


def _catalog_names(text: str, catalog_file: Path) -> set[str]:
    """What the catalogue calls its models: with tags where `text` has one."""
    from localllm.catalog import load_catalog

    return {spec.key if ":" in text else spec.name for spec in load_catalog(catalog_file).models}


def _parsed(text: str) -> Reference | None:
    try:
        return parse(text)
    except UsageError:
        return None
