"""Keys that sign bundles, and signing with them. Checking needs neither this module nor `cryptography`: see ed25519."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from localllm.bundle.verify import PRIVATE, PUBLIC
from localllm.errors import NotFound, UsageError
from localllm.files import write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def generate(path: Path) -> str:
    """Write a new private key to `path` (for its owner only) and its public half beside it; the public key as hex."""
    public_path = path.with_name(path.name + ".pub")
    for existing in (path, public_path):
        if os.path.lexists(existing):
            raise UsageError(f"{existing} is there already", hint="a key is never overwritten: choose another name")
    key = _library().generate()
    public = key.public_key().public_bytes_raw().hex()
    write_atomic(path, f"{PRIVATE} {key.private_bytes_raw().hex()}\n".encode())
    write_atomic(public_path, f"{PUBLIC} {public}\n".encode())
    return public


def signature_file(manifest: bytes, key_path: Path) -> bytes:
    """The content of `manifest.sig`. Raises NotFound or UsageError about the key."""
    try:
        text = key_path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise NotFound(f"cannot read the private key {key_path}: {error}", hint="make one with: localllm bundle keygen FILE") from error
    match = re.fullmatch(rf"\s*{PRIVATE}\s+([0-9a-f]{{64}})\s*", text)
    if not match:
        raise UsageError(f"{key_path} is no private key", hint="give the file that localllm bundle keygen wrote, not the .pub one")
    key = _library().from_private_bytes(bytes.fromhex(match[1]))
    fields = {"algorithm": "ed25519", "public_key": key.public_key().public_bytes_raw().hex(), "signature": key.sign(manifest).hex()}
    return (json.dumps(fields, indent=1) + "\n").encode()


def _library() -> type[Ed25519PrivateKey]:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as error:
        raise UsageError("signing needs the cryptography package", hint="pip install 'localllm[sign]'; checking needs nothing") from error
    return Ed25519PrivateKey
