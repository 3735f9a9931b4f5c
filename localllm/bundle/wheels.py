"""Wheels of what is installed here: the distributions that localllm needs, packed again from their own records.

So a bundle carries exactly what runs on this machine, and making it needs no network. What is compiled into them, and
for which CPU, is not known here.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit
from urllib.request import url2pathname

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from localllm.errors import LocalLLMError, NotFound, UsageError, VerificationFailed

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The zip format's first day: the same files give the same wheel, to the byte."""
OF_THE_INSTALLATION = frozenset({"INSTALLER", "REQUESTED", "RECORD", "RECORD.jws", "RECORD.p7s", "direct_url.json"})
"""Files of a dist-info folder that an installer writes for itself."""
SCRIPTS = ("bin", "Scripts")
INSTALLER = "pip"
"""Carried too: Python on Debian comes without it."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a wheel."""

    name: str
    load: Callable[[], bytes]
    executable: bool = False


def needed(root: str = "localllm", wheels: Mapping[str, WheelFile] | None = None) -> list[Distribution]:
    """`root` and all it depends on here and now, and pip, by name; `wheels` stand in for what is installed.

    Raises NotFound for a dependency that is missing.
    """
    overrides = wheels or {}
    found: dict[str, Distribution] = {}
    done: set[tuple[str, str]] = set()
    queue = [Requirement(root)]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name not in found:
            found[name] = overrides.get(name) or installed(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) not in done:
                done.add((name, extra))
                queue += (
                    child
                    for child in map(Requirement, found[name].requires or [])
                    if child.marker is None or child.marker.evaluate({"extra": extra})
                )
    if INSTALLER not in found:
        # An environment without pip (uv's): Python's own on the other machine must do.
        with contextlib.suppress(PackageNotFoundError):
            found[INSTALLER] = distribution(INSTALLER)
    return [found[name] for name in sorted(found)]


def installed(name: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError as error:
        raise NotFound(f"{name} is not installed here, but localllm needs it", hint=f"{sys.executable} -m pip install {name}") from error


def wheel_of(dist: Distribution, folder: Path) -> Path:
    """Write a wheel of an installed distribution into `folder`; the file. Raises LocalLLMError, or OSError from writing."""
    if source := editable_source(dist):
        return build(source, folder)
    name, version = dist.metadata["Name"], dist.version
    members = _members(dist)
    stem = f"{_plain(name)}-{version.replace('-', '_')}"
    info = next((member.name.split("/")[0] for member in members if ".dist-info/" in member.name), "")
    tags = re.findall(r"(?m)^Tag: *(\S+)\s*$", dist.read_text("WHEEL") or "")
    if not info or not tags:
        raise LocalLLMError(f"{name} was not installed from a wheel", hint="install localllm with pip into an environment of its own")
    path = folder / f"{stem}-{_joined(tags)}.whl"
    write_wheel(path, info, members)
    return path


def write_wheel(path: Path, info: str, members: Iterable[Member]) -> None:
    """Write `members` and their RECORD (in the folder `info`) as a wheel, the same bytes for the same content."""
    record = io.StringIO(newline="")
    table = csv.writer(record, lineterminator="\n")
    unfinished = path.with_name(path.name + ".part")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in sorted(members, key=lambda member: member.name):
            data = member.load()
            _add(archive, member.name, data, member.executable)
            table.writerow((member.name, f"sha256={_digest(data)}", len(data)))
        table.writerow((f"{info}/RECORD", "", ""))
        _add(archive, f"{info}/RECORD", record.getvalue().encode(), False)
    unfinished.replace(path)


def build(source: Path, folder: Path) -> Path:
    """Build the wheel of a checkout with pip. Raises LocalLLMError."""
    # Its own build tool where it is at hand; pip fetches it otherwise.
    at_hand = ["--no-build-isolation"] if _has("hatchling") else []
    out = folder / "build"
    out.mkdir()
    try:
        run_pip("wheel", "--no-deps", *at_hand, "--wheel-dir", str(out), str(source), what=f"building the wheel of {source}")
        (built,) = out.glob("*.whl")
        return built.rename(folder / built.name)
    finally:
        shutil.rmtree(out)


def run_pip(*arguments: str, what: str, env: Mapping[str, str] | None = None) -> None:
    """Run pip; raises LocalLLMError with its last lines where it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env={**os.environ, **(env or {})}, check=False)
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-12:])
        raise LocalLLMError(f"{what} failed:\n{last}", hint="give a wheel that was built elsewhere: --wheel PATH")


def editable_source(dist: Distribution) -> Path | None:
    """The checkout behind an editable installation."""
    direct = json.loads(dist.read_text("direct_url.json") or "{}")
    if not direct.get("dir_info", {}).get("editable"):
        return None
    return Path(url2pathname(urlsplit(str(direct["url"])).path))


class WheelFile(Distribution):
    """The metadata of a wheel that is not installed."""

    def __init__(self, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/[^/]+", name)]
                self._texts = {name.split("/")[1]: archive.read(name).decode("utf-8", "replace") for name in names}
        except (OSError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path} is not a wheel: {error}", hint="--wheel takes a .whl file") from error
        if "METADATA" not in self._texts or path.suffix != ".whl":
            raise UsageError(f"{path} is not a wheel", hint="--wheel takes a .whl file")
        self.path = path

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        raise FileNotFoundError(path)


def licence_of(dist: Distribution) -> str:
    """The licence that a distribution names, at most a line."""
    texts: list[str] = [text for key in ("License-Expression", "License") for text in dist.metadata.get_all(key) or []]
    for text in texts:
        if "\n" not in text.strip() and 0 < len(text.strip()) < 200:
            return text.strip()
    classifiers: list[str] = dist.metadata.get_all("Classifier") or []
    kinds = [text.rsplit("::", 1)[-1].strip() for text in classifiers if text.startswith("License ::")]
    return ", ".join(kinds) or "see its files"


def licence_texts(wheel: Path) -> dict[str, bytes]:
    """The licence files in a wheel by file name."""
    texts: dict[str, bytes] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            parts = PurePosixPath(name).parts
            if len(parts) > 1 and parts[0].endswith(".dist-info") and re.match(r"(?i)(licen[cs]e|copying|notice|authors)", parts[-1]):
                base = re.sub(r"[^A-Za-z0-9._-]", "_", parts[-1])
                texts[base if base not in texts else f"{len(texts)}-{base}"] = archive.read(name)
    return texts


def _members(dist: Distribution) -> list[Member]:
    base = Path(str(dist.locate_file(""))).resolve()
    if not dist.files or not any(file.name == "RECORD" for file in dist.files):
        raise LocalLLMError(
            f"{dist.metadata['Name']} has no list of its files: the system's package manager installed it",
            hint="install localllm with pip into an environment of its own",
        )
    members: list[Member] = []
    for file in dist.files:
        if file.suffix == ".pyc" or (file.parent.name.endswith(".dist-info") and file.name in OF_THE_INSTALLATION):
            continue
        path = Path(os.path.normpath(base / file))
        if path.is_relative_to(base):
            name = path.relative_to(base).as_posix()
            members.append(Member(name, partial(_read, dist, file, path), os.name != "nt" and os.access(path, os.X_OK)))
        elif not _is_launcher(dist, path):
            members.append(Member(_outside(dist, path), partial(_read_unbound, dist, file, path), executable=True))
    return members


def _is_launcher(dist: Distribution, path: Path) -> bool:
    """Whether it is a command that pip writes anew from the entry points; pip's own come with version numbers too."""
    names = {point.name for point in dist.entry_points if point.group in ("console_scripts", "gui_scripts")}
    name = re.sub(r"(\.exe|-script\.pyw?)$", "", path.name)
    return path.parent.name in SCRIPTS and (name in names or re.sub(r"[\d.]+$", "", name) in names)


def _read(dist: Distribution, file: PackagePath, path: Path) -> bytes:
    name = dist.metadata["Name"]
    again = f"{sys.executable} -m pip install --force-reinstall --no-deps {name}=={dist.version}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise VerificationFailed(f"{name} is incomplete: {path}: {error.strerror}", hint=again) from error
    if file.hash and file.hash.mode == "sha256" and file.hash.value != _digest(data):
        raise VerificationFailed(f"{name} was changed after it was installed: {path}", hint=again)
    return data


def _read_unbound(dist: Distribution, file: PackagePath, path: Path) -> bytes:
    """A script without the path of this machine's Python in its first line; other data as it is."""
    data = _read(dist, file, path)
    first, newline, rest = data.partition(b"\n")
    return b"#!python" + newline + rest if first.startswith(b"#!") and b"python" in first else data


def _outside(dist: Distribution, path: Path) -> str:
    """The name inside a wheel of a file that is installed beside the packages: a script, or data below the prefix."""
    data = f"{_plain(dist.metadata['Name'])}-{dist.version}.data"
    if path.parent.name in SCRIPTS:
        return f"{data}/scripts/{path.name}"
    prefix = Path(sys.prefix).resolve()
    if not path.is_relative_to(prefix):
        raise LocalLLMError(f"{dist.metadata['Name']} has a file at a strange place: {path}", hint="give a wheel of it: --wheel PATH")
    return f"{data}/data/{path.relative_to(prefix).as_posix()}"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name)


def _joined(tags: list[str]) -> str:
    """`py2-none-any`, `py3-none-any` as a file name has them: `py2.py3-none-any`."""
    columns: tuple[dict[str, None], ...] = ({}, {}, {})
    for tag in tags:
        for column, word in zip(columns, tag.split("-"), strict=True):
            column[word] = None
    return "-".join(".".join(column) for column in columns)


def _add(archive: zipfile.ZipFile, name: str, data: bytes, executable: bool) -> None:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.create_system = 3
    entry.external_attr = (0o100755 if executable else 0o100644) << 16
    archive.writestr(entry, data)


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _has(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
