"""The two built-in models, a few megabytes each, so that everything runs at once and offline."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def demo_models() -> dict[str, Path]:
    """The files behind the built-in names; `demo` is demo-large, `demo-small` its draft."""
    large = _HERE / "demo-large-q8_0.gguf"
    return {"demo": large, "demo-large": large, "demo-small": _HERE / "demo-small-q8_0.gguf"}
