"""What a user may set, and which layer set it: flag > LOCALLLM_* > config.toml > another tool's variable > default.

Reads and edits `config.toml`; knows nothing of the command line. The docstring under a field is its help text.
Importing this costs pydantic's start-up, so commands import it inside their functions.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from localllm.errors import ConfigError
from localllm.files import write_atomic
from localllm.paths import directories

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

PREFIX = "LOCALLLM_"
NOT_SETTINGS = frozenset({"LOCALLLM_HOME", "LOCALLLM_DEBUG"})
"""Variables of ours that no setting stands behind."""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
KVType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


def parse_bytes(value: Any) -> Any:
    """`"2GiB"`, `"500 MB"` and `"1073741824"` as a number of bytes; anything else is left for the type check."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", value.lower())):
        return int(float(match[1]) * UNITS[match[2] or ""]) if match[2] else match[1]
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]


ENGINE_OPTIONS = (
    *("n_ctx", "n_seq", "n_threads", "n_gpu_layers", "type_k", "type_v", "flash_attn"),
    *("cache_ram_bytes", "state_disk_bytes"),
)


class Settings(BaseModel):
    """Every setting with its default; the names are the keys of `config.toml` and, in capitals, of LOCALLLM_*."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str = Field("demo", min_length=1)
    """Model used when a command names none: a built-in name or the path of a GGUF file."""
    n_ctx: int = Field(0, ge=0)
    """KV cache cells shared by all sequences, in tokens; 0 chooses from the model."""
    n_seq: int = Field(8, ge=1, le=128)
    """Requests decoded at once."""
    n_threads: int = Field(0, ge=0)
    """CPU threads; 0 takes the physical cores this process may use."""
    n_gpu_layers: int = Field(-1, ge=-1)
    """Layers on the GPU; -1 takes all where there is one, 0 none."""
    type_k: KVType = "f16"
    """Type of the keys in the KV cache; q8_0 halves their memory."""
    type_v: KVType = "f16"
    """Type of the values in the KV cache; a quantised one needs flash attention."""
    flash_attn: Literal["auto", "on", "off"] = "auto"
    """Flash attention."""
    cache_ram_bytes: Bytes = 1 << 30
    """RAM for prompts kept to be reused, as bytes or "2GiB"; 0 turns it off."""
    state_disk_bytes: Bytes = 4 << 30
    """Disk for saved chats' KV state, as bytes or "2GiB"; 0 turns it off."""
    models_dir: str = ""
    """Folder for downloaded models; empty takes `models` in the data directory."""
    offline: bool = False
    """Never use the network: pull and search refuse, whatever else is set."""
    limit_rate: Bytes = 0
    """Most bytes per second for downloads, as bytes or "10MB"; 0 is no limit."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """How much goes to the log."""
    color: bool = True
    """Colours in the terminal."""

    def engine_options(self) -> dict[str, Any]:
        """The settings that an engine takes, under the names of `EngineConfig`."""
        return self.model_dump(include=set(ENGINE_OPTIONS))


FOREIGN: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    # https://no-color.org: present and not empty means off, whatever it holds.
    "NO_COLOR": ("color", lambda _: False),
    # As huggingface_hub reads it.
    "HF_HUB_OFFLINE": ("offline", lambda value: value.upper() in {"1", "ON", "YES", "TRUE"}),
}
"""Other tools' variables that are honoured: variable -> (key, value it stands for)."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings with where each came from."""

    settings: Settings
    origins: Mapping[str, str]
    """key -> "flag", the name of a variable, the path of the file, or "default"."""
    ignored: tuple[str, ...] = ()
    """LOCALLLM_* variables that match no setting, most likely typing errors."""


def load(flags: Mapping[str, Any] | None = None, env: Mapping[str, str] = os.environ) -> Loaded:
    """The settings in force; a flag that is None was not given. Raises ConfigError naming the origin of what is wrong."""
    file = directories(env).config_file
    values: dict[str, Any] = {}
    origins = dict.fromkeys(Settings.model_fields, "default")

    def layer(key: str, value: Any, origin: str) -> None:
        values[key], origins[key] = value, origin

    for variable, (key, meaning) in FOREIGN.items():
        if env.get(variable):
            layer(key, meaning(env[variable]), variable)
    for key, value in read_file(file).items():
        layer(known_key(key, str(file)), value, str(file))
    for key in Settings.model_fields:
        if env.get(variable := PREFIX + key.upper()):
            layer(key, env[variable], variable)
    for key, value in (flags or {}).items():
        if value is not None:
            layer(known_key(key, "flag"), value, "flag")
    known = NOT_SETTINGS | {PREFIX + key.upper() for key in Settings.model_fields}
    ignored = tuple(sorted(name for name in env if name.startswith(PREFIX) and name not in known))
    return Loaded(_validate(values, origins), origins, ignored)


def load_settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """`load` for those who do not ask where a value came from."""
    return load(flags).settings


def read_file(path: Path) -> dict[str, Any]:
    """The keys of a TOML file, empty where there is none. Raises ConfigError."""
    try:
        return tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}", hint="correct it with: localllm config edit") from error


def set_value(path: Path, key: str, text: str) -> Any:
    """Write `key = text` into the file at `path`, keeping its comments and order; returns the value as stored."""
    value = _validate({known_key(key, str(path)): text}, {key: str(path)}).model_dump()[key]
    document = _document(path)
    document[key] = value
    _write(path, document)
    return value


def unset_value(path: Path, key: str) -> bool:
    """Remove `key` from the file at `path`, also one that is no setting; False when it was not there."""
    document = _document(path)
    if key not in document:
        return False
    del document[key]
    _write(path, document)
    return True


def template() -> str:
    """A first `config.toml`: every setting with its help and default, commented out."""
    lines = ["# Settings of localllm. `localllm config show --origin` says what is in force and why.", ""]
    for key, field in Settings.model_fields.items():
        # A default is a string, a number or a boolean, which JSON and TOML write alike.
        lines += [f"# {field.description}", f"# {key} = {json.dumps(field.default)}", ""]
    return "\n".join(lines)


def known_key(key: str, origin: str = "config") -> str:
    """`key`, if it is a setting; else ConfigError naming `origin` and the closest settings."""
    if key in Settings.model_fields:
        return key
    close = get_close_matches(key, Settings.model_fields, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "localllm config show lists the settings"
    raise ConfigError(f"{origin}: {key} is no setting", hint=hint)


def help_of(key: str) -> str:
    """The help text of a setting, one sentence or two."""
    return Settings.model_fields[key].description or ""


def _validate(values: Mapping[str, Any], origins: Mapping[str, str]) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise ConfigError(f"{origins[key]}: {key} = {values[key]!r}: {reason}", hint=f"{key}: {help_of(key)}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read {path}: {reason}", hint="correct or remove the file") from error


def _document(path: Path) -> TOMLDocument:
    import tomlkit
    import tomlkit.exceptions

    try:
        return tomlkit.parse(_text(path))
    except tomlkit.exceptions.ParseError as error:
        raise ConfigError(f"{path}: {error}", hint="correct it with: localllm config edit") from error


def _write(path: Path, document: TOMLDocument) -> None:
    try:
        write_atomic(path, document.as_string().encode())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", hint="the old file is untouched") from error
