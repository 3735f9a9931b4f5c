"""What is on a stick beside weights and wheels: its own programs, a page for people, licences, settings. Writes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from localllm import __version__
from localllm.bundle.manifest import Platform
from localllm.bundle.sources import Source

TRAVELLERS = ("__init__", "manifest", "ed25519", "machine", "verify", "bootstrap")
STICK_PACKAGE = "localllm_bundle"
LAUNCHER = """\
# {what}
import sys
from pathlib import Path

stick = Path(__file__).resolve().parent
sys.dont_write_bytecode = True
sys.path.insert(0, str(stick))  # Python may have been told to leave its own folder out

from {package}.{module} import main

sys.exit(main(stick, sys.argv[1:]))
"""
README = """\
An offline bundle of localllm {version}, made {created}.

    python3 verify.py      check every byte (add --key KEY to check who signed it)
{install}
On a machine that has localllm already:  localllm bundle install THIS_FOLDER --models-only

Models:
{models}
Licences are in the folder licences.
"""
INSTALL = "    python{python} install.py     install localllm and the models; needs {platform}, and no network\n"


@dataclass(frozen=True, slots=True)
class Runtime:
    """Wheels that together are localllm, for one platform, and the texts of their licences by file name."""

    wheels: tuple[Path, ...]
    platform: Platform
    licences: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Contents:
    """All that goes into a bundle besides its own programs; `config` is the text of a config.toml, or None."""

    sources: tuple[Source, ...]
    runtime: Runtime | None = None
    config: bytes | None = None

    @property
    def wheels(self) -> tuple[Path, ...]:
        return self.runtime.wheels if self.runtime else ()

    @property
    def platform(self) -> Platform | None:
        return self.runtime.platform if self.runtime else None


def small_files(contents: Contents, created: str) -> dict[str, bytes]:
    """The small files of a bundle by their path on the stick."""
    platform = contents.platform
    here = Path(__file__).parent
    texts = {f"{STICK_PACKAGE}/{name}.py": (here / f"{name}.py").read_bytes() for name in TRAVELLERS}
    texts["verify.py"] = LAUNCHER.format(
        what="Check this bundle: python3 verify.py [--key KEY]", package=STICK_PACKAGE, module="verify"
    ).encode()
    install = ""
    if platform:
        what = "Install localllm and the models of this bundle: python3 install.py [--venv DIR] [--key KEY]"
        texts["install.py"] = LAUNCHER.format(what=what, package=STICK_PACKAGE, module="bootstrap").encode()
        install = INSTALL.format(
            python=platform.python, platform=f"{platform.os} on {platform.arch} with {platform.libc} {platform.libc_version}"
        )
    table = "".join(f"    {source.name:<50} licence: {source.licence}\n" for source in contents.sources)
    texts["README.txt"] = README.format(version=__version__, created=created, install=install, models=table or "    none\n").encode()
    texts["licences/models.txt"] = (_model_licences(contents.sources) or "no models\n").encode()
    for source in contents.sources:
        folder = _tidy(source.files[0].target.rpartition("/")[0])
        texts |= {f"licences/models/{folder}/{_tidy(notice.name)}": notice.read_bytes() for notice in source.notices}
    if contents.runtime:
        texts |= {f"licences/{name}": data for name, data in contents.runtime.licences.items()}
    if contents.config is not None:
        texts["config.toml"] = contents.config
    return texts


def _model_licences(sources: Iterable[Source]) -> str:
    return "".join(f"{s.name}\n  licence: {s.licence}\n  source:  {s.repo or 'not recorded'} {s.commit}\n" for s in sources)


def _tidy(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80].strip("._") or "notice"
