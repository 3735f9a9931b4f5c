"""Showing text that somebody else wrote, so that it cannot steer the terminal."""

from __future__ import annotations

# C0 and DEL as their control pictures, C1, which has none, as U+FFFD; "\r" goes because it would overwrite the line it ends.
_CONTROLS: dict[int, int | None] = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    0x7F: 0x2421,
    ord("\r"): None,
}


def visible(text: str) -> str:
    """`text` with its control characters shown, not obeyed."""
    return text.translate(_CONTROLS)
