"""The settings that travel with a bundle: this user's, without secrets, with a model that the bundle holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import tomlkit
import tomlkit.exceptions

from localllm.errors import ConfigError

SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)


def settings_for(config_file: Path, models: Sequence[str]) -> bytes:
    """A config.toml for the other machine. The default model becomes the first of `models`, unless it is one of them."""
    try:
        document = tomlkit.parse(config_file.read_text(encoding="utf-8") if config_file.exists() else "")
    except (OSError, ValueError, tomlkit.exceptions.ParseError) as error:
        raise ConfigError(f"cannot read {config_file}: {error}", hint="correct it, or use --no-config") from error
    table = cast(dict[str, Any], document)
    _drop_secrets(table)
    table.pop("models_dir", None)  # a folder of this machine
    if models and table.get("model") not in models:
        table["model"] = models[0]
    return tomlkit.dumps(document).encode()


def _drop_secrets(table: dict[str, Any]) -> None:
    for key, value in list(table.items()):
        if SECRET.search(key):
            del table[key]
        elif isinstance(value, dict):
            _drop_secrets(cast(dict[str, Any], value))
