"""What a file is that is not GGUF, from its first bytes, and what to do about it."""

from __future__ import annotations

PEEK_BYTES = 1024
_CHECKPOINT = "llama.cpp reads GGUF only: look for a repository of the same model whose name ends in -GGUF"
_PULL_AGAIN = "pull it again"

_STARTS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    ((b"version https://git-lfs",), "a Git LFS pointer, not the file it stands for", "run git lfs pull, or pull it with localllm"),
    ((b"PK\x03\x04", b"PK\x05\x06"), "a zip archive, perhaps a PyTorch checkpoint", _CHECKPOINT),
    (tuple(bytes([0x80, version]) for version in range(2, 6)), "a Python pickle, perhaps a PyTorch checkpoint", _CHECKPOINT),
    ((b"lmgg", b"tjgg", b"fmgg", b"algg"), "a GGML file of 2023, the format before GGUF", "look for a newer version of the model"),
    ((b"FUGG",), "a GGUF file with its bytes in the wrong order", "convert it with --bigendian off"),
    ((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf"), "a compressed file", "unpack it first"),
    ((b"\x89HDF",), "an HDF5 file", _CHECKPOINT),
)


def explain(start: bytes, file_bytes: int) -> tuple[str, str]:
    """What the file is ("a zip archive") and the next step; `start` are its first PEEK_BYTES bytes."""
    if not start:
        return "empty", _PULL_AGAIN
    if not start.strip(b"\0"):
        return "empty space: zeros where a model should begin", "a download was cut off; " + _PULL_AGAIN
    for magics, what, hint in _STARTS:
        if start.startswith(magics):
            return what, hint
    if 0 < int.from_bytes(start[:8], "little") < file_bytes and start[8:9] == b"{":
        return "a safetensors file", _CHECKPOINT
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")):
        return "a web page: the server answered with a page instead of the model", _PULL_AGAIN + ", and check the address and the login"
    if text.startswith((b"{", b"[")):
        return "JSON: perhaps the server's error message instead of the model", "look into it, then " + _PULL_AGAIN
    return "of an unknown kind", "give a model in the GGUF format, llama.cpp's"
