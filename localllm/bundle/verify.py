"""Whether the files of a bundle are what its manifest says, and whose manifest it is. Writes nothing.

Travels on the stick as `python verify.py`: standard library only, Python 3.8.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import stat
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ed25519
from .manifest import MANIFEST, MAX_MANIFEST_BYTES, SIGNATURE, UNFINISHED, Manifest, Piece, Refused, parse, unsafe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    OnProgress = Callable[[str, int, int], None]
    """Called with what is being done, bytes done and bytes in all."""

BUFFER_BYTES = 4 << 20
MAX_UNPACKED_BYTES = 32 << 30
"""All wheels together; CUDA ones take a few GB."""
PUBLIC = "localllm-ed25519-public"
PRIVATE = "localllm-ed25519-private"
REPARSE_POINT = 0x400
"""Windows' file attribute of junctions and links."""


@dataclass(frozen=True)
class Signature:
    """`state` is `unsigned`, `unknown key` (right, but by anybody) or `trusted`; `public_key` is hex, empty when unsigned."""

    state: str
    public_key: str


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest is sound, whose signature is not wrong, and whose files have the right kinds and sizes."""

    root: Path
    manifest: Manifest
    signature: Signature


def no_progress(_what: str, _done: int, _total: int) -> None:
    """For those who do not watch."""


def open_bundle(root: Path, key: str | None = None) -> Bundle:
    """The bundle at `root`, checked in all that costs no reading of weights. `key` is a public key that must have signed it.

    Raises Refused.
    """
    data = _manifest_bytes(root)
    signature = check_signature(root, data, key)
    manifest = parse(data)
    problems = [problem for piece in manifest.pieces for problem in _file_problems(root, piece)]
    if not problems:
        problems = list(_wheel_problems(root, manifest))
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise Refused(problems[:20] + more, "copy the bundle again, or make it again: localllm bundle create")
    return Bundle(root, manifest, signature)


def check_hashes(bundle: Bundle, on_progress: OnProgress = no_progress) -> None:
    """Read every byte. Raises Refused naming each file that is not what the manifest says."""
    done, total = 0, bundle.manifest.size_bytes
    problems: list[str] = []
    for small in (*bundle.manifest.others, *bundle.manifest.wheels):
        problems += hash_problems(bundle.root, small, lambda _: None)
        done += small.size_bytes
        on_progress(small.file, done, total)
    for file in (file for model in bundle.manifest.models for file in model.files):
        whole = hashlib.sha256()
        before = len(problems)
        for chunk in file.chunks:
            # One chunk that is the whole file is not hashed twice.
            problems += hash_problems(bundle.root, chunk, whole.update if len(file.chunks) > 1 else lambda _: None)
            done += chunk.size_bytes
            on_progress(chunk.file, done, total)
        if len(problems) == before and len(file.chunks) > 1 and whole.hexdigest() != file.sha256:
            problems.append(f"{file.path}: its chunks are right one by one, but not the file that they make")
    if problems:
        raise Refused(problems[:20], "copy the bundle again, or make it again: localllm bundle create")


def hash_problems(root: Path, piece: Piece, use: Callable[[memoryview], object]) -> list[str]:
    """Read a file of the bundle, handing each block to `use`; what is wrong with its content, empty when nothing is."""
    digest = hashlib.sha256()
    try:
        for block in blocks(root, piece):
            digest.update(block)
            use(block)
    except OSError as error:
        return [f"{piece.file} cannot be read: {error.strerror or error}"]
    return [] if digest.hexdigest() == piece.sha256 else [f"{piece.file} is damaged: its sha256 is not the manifest's"]


def blocks(root: Path, piece: Piece) -> Iterator[memoryview]:
    """The content of a file of the bundle, never more than its size; each block is valid until the next. Raises OSError."""
    buffer = memoryview(bytearray(min(BUFFER_BYTES, max(1, piece.size_bytes))))
    left = piece.size_bytes
    with open_regular(root.joinpath(*piece.file.split("/"))) as file:
        while left:
            count = file.readinto(buffer[: min(left, len(buffer))])
            if not count:
                break
            left -= count
            yield buffer[:count]


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file that is no link, device or pipe. Raises OSError."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a plain file")
    return open(descriptor, "rb")


def check_signature(root: Path, data: bytes, key: str | None) -> Signature:
    """Who signed the manifest `data`. Raises Refused for a wrong signature, and for any other than `key`'s where one is asked for."""
    wanted = read_public_key(key) if key else None
    path = root / SIGNATURE
    if not os.path.lexists(path):
        if wanted:
            raise Refused(["the bundle is unsigned, and a key was asked for"], "without --key it can be used at your own risk")
        return Signature("unsigned", "")
    try:
        with open_regular(path) as file:
            raw: Any = json.loads(file.read(10_000).decode("utf-8"))
        public, signature = bytes.fromhex(raw["public_key"]), bytes.fromhex(raw["signature"])
        right = raw["algorithm"] == "ed25519" and ed25519.verify(public, data, signature)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused([f"{SIGNATURE} is not readable: {error}"]) from error
    if not right:
        raise Refused([f"the signature is wrong: {MANIFEST} is not what was signed"], "do not use this bundle")
    if wanted and public != wanted:
        raise Refused([f"the bundle is signed, but by another key: {public.hex()}"], "do not use this bundle unless you know that key")
    return Signature("trusted" if wanted else "unknown key", public.hex())


def read_public_key(key: str) -> bytes:
    """A public key from 64 hex digits, or from the file that `localllm bundle keygen` wrote. Raises Refused (exit code 2)."""
    text = key
    if not re.fullmatch(r"[0-9a-fA-F]{64}", key):
        try:
            with open(key, encoding="utf-8") as file:
                text = file.read(1000)
        except (OSError, ValueError) as error:
            raise Refused([f"cannot read the key {key}: {error}"], "give the .pub file, or its 64 hex digits", exit_code=2) from error
    match = re.fullmatch(rf"\s*(?:{PUBLIC}\s+)?([0-9a-fA-F]{{64}})\s*", text)
    if not match:
        raise Refused([f"{key} is no public key"], "give the .pub file that localllm bundle keygen wrote", exit_code=2)
    return bytes.fromhex(match[1])


def _manifest_bytes(root: Path) -> bytes:
    try:
        with open_regular(root / MANIFEST) as file:
            return file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        if (root / UNFINISHED).exists():
            raise Refused([f"the bundle in {root} is not finished"], "run the same localllm bundle create again", exit_code=3) from error
        raise Refused([f"there is no bundle in {root}"], f"give the folder that holds {MANIFEST}", exit_code=3) from error
    except OSError as error:
        raise Refused([f"cannot read {root / MANIFEST}: {error.strerror or error}"]) from error


def _file_problems(root: Path, piece: Piece) -> Iterator[str]:
    path = root
    parts = piece.file.split("/")
    for number, part in enumerate(parts, 1):
        path = path / part
        try:
            found = os.lstat(path)
        except OSError as error:
            yield f"{piece.file} is missing" if isinstance(error, FileNotFoundError) else f"{piece.file}: {error.strerror}"
            return
        if stat.S_ISLNK(found.st_mode) or getattr(found, "st_file_attributes", 0) & REPARSE_POINT:
            yield f"{piece.file}: {part} is a link"
            return
        if number < len(parts) and not stat.S_ISDIR(found.st_mode):
            yield f"{piece.file}: {part} is not a folder"
            return
        if number == len(parts) and not stat.S_ISREG(found.st_mode):
            yield f"{piece.file} is not a plain file"
        elif number == len(parts) and found.st_size != piece.size_bytes:
            yield f"{piece.file} has {found.st_size:,} bytes, not {piece.size_bytes:,}"


def _wheel_problems(root: Path, manifest: Manifest) -> Iterator[str]:
    """What unpacking the wheels would do that it must not; only their tables of contents are read."""
    total = 0
    for wheel in manifest.wheels:
        try:
            with open_regular(root.joinpath(*wheel.file.split("/"))) as file, zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            yield f"{wheel.file} is not a wheel: {error}"
            continue
        seen: set[str] = set()
        for entry in entries:
            total += entry.file_size
            name = entry.filename
            if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or (name[1:2] == ":" and unsafe(name)):
                yield f"{wheel.file} holds {name!r:.80}, which leaves its folder"
            if stat.S_ISLNK(entry.external_attr >> 16):
                yield f"{wheel.file} holds a link, {name!r:.80}"
            if name in seen:
                yield f"{wheel.file} holds {name!r:.80} twice"
            seen.add(name)
    if total > MAX_UNPACKED_BYTES:
        yield f"the wheels unpack to {total:,} bytes, more than {MAX_UNPACKED_BYTES:,}"


def unpacked_bytes(bundle: Bundle) -> int:
    """What the wheels take once installed, by their tables of contents."""
    total = 0
    for wheel in bundle.manifest.wheels:
        with zipfile.ZipFile(bundle.root.joinpath(*wheel.file.split("/"))) as archive:
            total += sum(entry.file_size for entry in archive.infolist())
    return total


def describe_signature(signature: Signature) -> str:
    """One line for a person; an unsigned bundle is loud."""
    if signature.state == "unsigned":
        return "WARNING: this bundle is UNSIGNED. Its hashes find damage, not an attacker: use it only if you trust who had it."
    if signature.state == "unknown key":
        return f"WARNING: signed by the key {signature.public_key}, which was not compared with one you trust (--key)."
    return f"signed by the trusted key {signature.public_key}"


def print_progress(what: str, done: int, total: int) -> None:
    """A line on a terminal's stderr that is overwritten; nothing elsewhere."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done * 100 // max(1, total):3d} % {what[-60:]:<60}" + ("\r" + " " * 70 + "\r" if done >= total else ""))
        sys.stderr.flush()


def complain(refused: Refused) -> int:
    """Say on stderr why a bundle is refused; the exit code."""
    for problem in refused.problems:
        print(f"error: {problem}", file=sys.stderr)
    if refused.hint:
        print(f"hint: {refused.hint}", file=sys.stderr)
    return refused.exit_code


def main(root: Path, arguments: list[str]) -> int:
    """`python verify.py` on the stick."""
    parser = argparse.ArgumentParser(prog="verify.py", description="Check that every byte of this bundle is what it should be.")
    parser.add_argument("--key", help="public key (file or hex) that must have signed the bundle")
    options = parser.parse_args(arguments)
    try:
        bundle = open_bundle(root, options.key)
        print(describe_signature(bundle.signature), file=sys.stderr)
        check_hashes(bundle, print_progress)
    except Refused as refused:
        return complain(refused)
    except KeyboardInterrupt:
        return 130
    print(f"ok: {sum(1 for _ in bundle.manifest.pieces)} files, {bundle.manifest.size_bytes:,} bytes")
    return 0
