"""Asking a child what configs would take: the parent's side of engine/dryrun.py.

It knows how the child is started, what it gets in the place of the model, and every way it can end. It never imports llama.cpp.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from localllm import wire
from localllm.child import headline, how_it_ended
from localllm.engine.config import EngineConfig
from localllm.errors import EngineError, LocalLLMError, ModelError
from localllm.gguf import Header, read_model, write_outline
from localllm.rows import Row

TIMEOUT_S = 60.0
"""It takes half a second; but the first start of a GPU driver may compile its kernels."""
# https://learn.microsoft.com/openspecs/windows_protocols/ms-erref: abort() and an illegal instruction
_ABORTED = (-getattr(signal, "SIGABRT", 6), 3, 0xC0000409)
_ILLEGAL = (-getattr(signal, "SIGILL", 4), 0xC000001D)
_KILLED = (-9,)


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a config would take."""

    rows: tuple[Row, ...]
    """Devices first; `mapped_bytes` as the config's load mode would have it."""
    n_cells: int
    """Of the cache: the context, rounded up by llama.cpp."""
    exact: bool
    """To the byte. Otherwise weights and caches are 0, the rest is as llama.cpp's log tells it: compute buffers and recurrent states
    to 0.01 MiB."""


def child_command() -> list[str]:
    """The child's command line; -P keeps files of the current folder from posing as modules."""
    return [sys.executable, "-P", "-X", "utf8", "-m", "localllm.engine.dryrun"]


def dry_run(config: EngineConfig, header: Header | None = None, *, timeout_s: float = TIMEOUT_S, command: Sequence[str] = ()) -> DryRun:
    """What `config` would take. With the model's header, its file need not be here. Raises as `dry_runs` does."""
    headers = {config.model_path: header} if header else {}
    return dry_runs([config], headers, timeout_s=timeout_s, command=command)[0]


def dry_runs(
    configs: Iterable[EngineConfig],
    headers: Mapping[str, Header] = MappingProxyType({}),
    *,
    timeout_s: float = TIMEOUT_S,
    command: Sequence[str] = (),
) -> tuple[DryRun, ...]:
    """What each config would take, from one child; configs of one model placed alike should follow each other.

    `headers` are those that are known already, by model_path. Raises ModelError for a file that llama.cpp cannot use, UsageError for
    buffers that are not there, EngineError where the child fails in any other way. `command` replaces the child's command line.
    """
    configs = list(configs)
    if not configs:
        return ()
    with tempfile.TemporaryDirectory(prefix="localllm-", ignore_cleanup_errors=True) as folder:
        stand_ins: dict[str, str] = {}
        for path in {config.model_path: None for config in configs}:
            header = headers.get(path) or read_model(Path(path))
            stand_ins[path] = str(_stand_in(header, path, Path(folder) / str(len(stand_ins))))
        asked = [replace(config, model_path=stand_ins[config.model_path]) for config in configs]
        return _ask(asked, timeout_s, command or child_command())


def _stand_in(header: Header, path: str, folder: Path) -> Path:
    """A file that is opened faster than the model's own, and that is here when that is not."""
    folder.mkdir()
    outline = folder / Path(path).name
    # Windows' file systems give a file of that size its room on the disk
    if sys.platform != "win32" or not header.files:
        try:
            write_outline(header, outline)
            return outline
        except OSError as error:
            if not header.files:
                raise EngineError(
                    f"no room for the outline of {outline.name}: {error.strerror}", hint="point TMPDIR to another disk"
                ) from None
    return header.files[0]


def _ask(configs: Sequence[EngineConfig], timeout_s: float, command: Sequence[str]) -> tuple[DryRun, ...]:
    process = _start(command)
    try:
        out, err = process.communicate(wire.encode({"configs": configs}), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise EngineError(
            f"the dry run of {_name(configs[0])} did not end within {timeout_s:g} s", hint="is a GPU driver stuck? see localllm doctor"
        ) from None
    except BaseException:
        process.kill()
        process.wait()
        raise
    return _read(configs, out, process.returncode, err.decode("utf-8", "replace").splitlines())


_NONSENSE = (ValueError, KeyError, TypeError, AttributeError, LocalLLMError)


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # a debugger's backtrace would take seconds and bury the last words
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
    except (OSError, ValueError) as error:
        raise EngineError(f"the dry run does not start: {error}", hint="check the installation: localllm doctor") from None


def _read(configs: Sequence[EngineConfig], out: bytes, code: int, last_words: list[str]) -> tuple[DryRun, ...]:
    """The answers in `out`; raises what is in the place of one."""
    results: list[DryRun] = []
    stage = ""
    for line in out.splitlines():
        try:
            message = wire.parse(line)
            if "stage" in message:
                stage = str(message["stage"])
                continue
            result = LocalLLMError.from_json(message["error"]) if "error" in message else wire.decode(DryRun, message)
        except _NONSENSE:
            last_words.append(f"it said {line[:80]!r}")
            break
        if isinstance(result, LocalLLMError):
            raise result
        results.append(result)
    if len(results) == len(configs):
        return tuple(results)
    raise _death(_name(configs[len(results)]), stage, code, last_words)


def _death(name: str, stage: str, code: int, last_words: Sequence[str]) -> LocalLLMError:
    """The child's end as an error; a file makes llama.cpp abort while it reads it."""
    words = headline(last_words)
    details: dict[str, Any] = {"last_words": list(last_words[-20:]), "exit_code": code}
    if code in _ABORTED and stage == "model":
        return ModelError(
            f"{name} cannot be loaded: llama.cpp gave up{words and ': ' + words}",
            hint="the file may be damaged or made for another version; fetch it again",
            **details,
        )
    hint = "see localllm doctor"
    if code in _KILLED:
        hint = "was memory short? close other programs"
    elif code in _ILLEGAL:
        hint = "llama.cpp was built for another CPU: localllm doctor says how to get the right one"
    return EngineError(f"the dry run of {name} {how_it_ended(code)}{words and ': ' + words}", hint=hint, **details)


def _name(config: EngineConfig) -> str:
    return Path(config.model_path).name
