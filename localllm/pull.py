"""From what a person asks for to the files that answer it: reference, catalogue, the repository's listing, the quantisation.

It asks the Hub once for each name and fetches nothing; a download is download.py's, what is here already the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from localllm.catalog import Catalog, ModelSpec
from localllm.demo import demo_models
from localllm.download.queue import Order, Planned, order_for, planned
from localllm.errors import NotFound, UsageError
from localllm.hub import Hub, Listing
from localllm.quant import RemoteModel, choose_quant, find_quant, models_in
from localllm.reference import HubReference, NameReference, PathReference, check_revision, parse

GB = 1e9


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a name means on the Hub now, and why this of what is there."""

    name: str
    """As it was asked for."""
    listing: Listing
    model: RemoteModel
    reason: str
    fits: bool
    """Whether it will run here, by its size; True where the user chose it."""
    catalog_name: str = ""
    """`llama3.3:70b`, where the catalogue led here."""

    @property
    def label(self) -> str:
        """`user/repo:Q4_K_M`."""
        return f"{self.model.repo}:{self.model.quant}" if self.model.quant else f"{self.model.repo}/{self.model.name}"

    def to_json(self, order: Order) -> dict[str, Any]:
        """As `pull --dry-run --json` prints it; the keys stay."""
        return {
            "asked": self.name,
            "name": self.label,
            "repo": self.model.repo,
            "revision": self.listing.revision,
            "commit": self.listing.commit,
            "quant": self.model.quant,
            "catalog_name": self.catalog_name,
            "licence": self.listing.licence,
            "gated": self.listing.gated,
            "reason": self.reason,
            "fits": self.fits,
            "size_bytes": self.model.size_bytes,
            "files": [_file(each) for each in planned(order)],
        }


def find_wanted(
    name: str,
    hub: Hub,
    catalog: Catalog,
    *,
    quant: str = "",
    revision: str = "",
    memory_bytes: Callable[[], int],
    expand: Callable[[str], str] = str,
) -> Wanted:
    """The files that `name` means; `memory_bytes` is asked only where no quantisation is named, `expand` resolves aliases.

    Raises UsageError for what cannot be pulled, NotFound for what is not there or is ambiguous, and what the Hub raises.
    """
    name = expand(name)
    if name in demo_models():
        raise UsageError(f"{name} is built in", hint=f"there is nothing to fetch: localllm run {name}")
    reference = parse(name)
    match reference:
        case PathReference(path=path):
            raise UsageError(f"{name} is a path", hint=f"it needs no pull: localllm run {path}, or localllm import {path}")
        case NameReference(name=short, tag=tag):
            spec = catalog.find(short, tag or None)
            reference = HubReference(spec.repo)
        case HubReference():
            spec = None
    if quant and reference.quant and quant.upper() != reference.quant:
        raise UsageError(f"{name} names {reference.quant}, and --quant says {quant}", hint="say one of them")
    if revision and reference.revision and revision != reference.revision:
        raise UsageError(f"{name} names the revision {reference.revision}, and --revision says {revision}", hint="say one of them")
    quant = quant or reference.quant
    revision = check_revision(revision) if revision else reference.revision
    listing = hub.listing(reference.repo, revision or "main")
    models = _models(listing, spec)
    if reference.file:
        model, reason, fits = _with_file(models, listing, reference.file), "the file that was asked for", True
    elif quant:
        model, reason, fits = find_quant(models, quant), "the quantisation that was asked for", True
    else:
        choice = choose_quant(models, memory_bytes())
        model, reason, fits = choice.model, choice.reason, choice.fits
    if model.missing:
        missing = ", ".join(model.missing[:3])
        raise NotFound(f"{model.name} is not complete on the Hub: {missing} is missing", hint="choose another quantisation with --quant")
    return Wanted(name, listing, model, reason, fits, spec.key if spec else "")


def order(wanted: Wanted, library_folder: Any) -> Order:
    """The download of `wanted` into the models folder."""
    return order_for(wanted.model, library_folder)


def _models(listing: Listing, spec: ModelSpec | None) -> tuple[RemoteModel, ...]:
    """The models of a repository; for an entry of the catalogue those that its patterns name."""
    if spec is None:
        if not listing.models:
            raise NotFound(
                f"{listing.repo} holds no GGUF model", hint=f"look for one that does: localllm search {listing.repo.partition('/')[2]}"
            )
        return listing.models
    models = models_in([file for file in listing.files if spec.quant_of(file.path)], listing.repo, listing.commit)
    if not models:
        raise NotFound(
            f"{listing.repo} holds none of the files that the catalogue names for {spec.key}",
            hint=f"the repository may have changed: localllm pull {listing.repo}, or correct the entry in your models.toml",
        )
    return models


def _with_file(models: tuple[RemoteModel, ...], listing: Listing, path: str) -> RemoteModel:
    for model in models:
        if any(file.path == path for file in model.files):
            return model
    for side in listing.side_files:
        if side.file.path == path:
            return RemoteModel(listing.repo, listing.commit, "", (side.file,))
    raise NotFound(f"{listing.repo} has no file {path}", hint=f"it has {', '.join(m.name for m in models[:8]) or 'no GGUF file'}")


def _file(each: Planned) -> Mapping[str, Any]:
    return {
        "path": each.file.path,
        "size_bytes": each.file.size_bytes,
        "sha256": each.file.sha256,
        "target": str(each.target),
        "present_bytes": each.present_bytes,
        "state": each.state,
    }
