"""Bytes as people read them."""

from __future__ import annotations


def amount(n_bytes: float) -> str:
    """`n_bytes` for people, in decimal units as the Hub and disks count."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{int(n_bytes)} B"
