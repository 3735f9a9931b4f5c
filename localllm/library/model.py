"""One model on this machine, as a value. Reads nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BUILT_IN, PULLED, IMPORTED, ADOPTED, FOUND = "built-in", "pulled", "imported", "adopted", "found"
"""How a model came here; `found`: somebody put it into the models folder."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine; what is not known is empty or 0."""

    name: str
    """`publisher/repo:QUANT`; where two would share that, the path below the models folder."""
    key: str
    """Path of the first file: below the models folder, or absolute where it lies elsewhere."""
    path: Path
    files: tuple[Path, ...]
    size_bytes: int
    how: str
    """`pulled`, `imported`, `adopted`, `found` (put there by hand) or `built-in`."""
    quant: str = ""
    architecture: str = ""
    n_params: int = 0
    n_ctx_train: int = 0
    sha256s: tuple[str, ...] = ()
    """Of each file; empty where none is known, or the file changed since."""
    repo: str = ""
    revision: str = ""
    commit: str = ""
    catalog_name: str = ""
    """The catalogue's name it was pulled by."""
    added: str = ""
    """ISO 8601, UTC."""
    problem: str = ""
    """Why it cannot be used."""
    changed: bool = False
    """A file changed since its hash was taken."""
    is_side_file: bool = False
    """A vision projector or importance matrix: goes with a model, is none."""

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it; the keys stay."""
        return {
            "name": self.name,
            "path": str(self.path),
            "files": [str(path) for path in self.files],
            "size_bytes": self.size_bytes,
            "quant": self.quant,
            "architecture": self.architecture,
            "n_params": self.n_params,
            "n_ctx_train": self.n_ctx_train,
            "sha256s": list(self.sha256s),
            "repo": self.repo,
            "revision": self.revision,
            "commit": self.commit,
            "catalog_name": self.catalog_name,
            "added": self.added,
            "how": self.how,
            "problem": self.problem,
            "changed": self.changed,
            "is_side_file": self.is_side_file,
        }


def unique_names(models: Iterable[LocalModel]) -> list[LocalModel]:
    """The same models, sorted; those that share a name are named by their path."""
    listed = list(models)
    uses = Counter(model.name.casefold() for model in listed)
    named = [model if uses[model.name.casefold()] == 1 else replace(model, name=model.key) for model in listed]
    return sorted(named, key=lambda model: model.name.casefold())
