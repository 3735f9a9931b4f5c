"""What surrounds the program: settings, variables, permissions, terminal. It names variables and never shows a secret's value."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from localllm.catalog import load_catalog
from localllm.doctor.finding import Finding
from localllm.doctor.system import System
from localllm.errors import ConfigError
from localllm.hardware.machine import is_wsl
from localllm.settings import NOT_SETTINGS, PREFIX, Settings, load

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def judge_settings(system: System) -> tuple[Settings, list[Finding]]:
    """The settings in force, the defaults where they are broken, and what is wrong with them."""
    try:
        loaded = load(env=system.env)
    except ConfigError as error:
        file = system.directories.config_file
        return Settings.model_validate({}), [
            Finding("config-broken", "problem", "settings", "the settings cannot be used", error.message, error.hint, {"file": str(file)})
        ]
    findings: list[Finding] = []
    known = [key.upper() for key in Settings.model_fields] + [name.removeprefix(PREFIX) for name in sorted(NOT_SETTINGS)]
    for name in loaded.ignored:
        close = get_close_matches(name.removeprefix(PREFIX), known, n=1)
        fix = f"did you mean {PREFIX}{close[0]}?" if close else f"unset {name}; localllm config show lists the settings"
        findings.append(Finding("unknown-variable", "warning", "settings", f"{name} matches no setting", "", fix, {"variable": name}))
    return loaded.settings, findings


def judge_catalog(system: System) -> Iterator[Finding]:
    """Whether the user's own `models.toml` can be used."""
    file = system.directories.catalog_file
    try:
        load_catalog(file)
    except ConfigError as error:
        yield Finding(
            "catalog-broken", "problem", "settings", "the catalogue cannot be used", error.message, error.hint, {"file": str(file)}
        )


def models_folder(system: System, settings: Settings) -> Path:
    """Where models are kept: the setting `models_dir`, else the data directory's."""
    return Path(settings.models_dir).expanduser().absolute() if settings.models_dir else system.directories.models


def judge_permissions(system: System) -> Iterator[Finding]:
    """Whether others can change what we read, or a `sudo` took our files away."""
    if os.name == "nt":
        return
    ours = system.directories
    paths = dict.fromkeys([ours.config, ours.config_file, ours.data, ours.models, ours.cache, ours.state])
    for path in paths:
        try:
            seen = path.stat()
        except OSError:
            continue
        # With the sticky bit others add files, but cannot replace ours.
        if seen.st_mode & stat.S_IWOTH and not seen.st_mode & stat.S_ISVTX:
            why = f"{path} can be written by everyone on this machine ({stat.filemode(seen.st_mode)})."
            fix = f"chmod o-w {shlex.quote(str(path))}"
            yield Finding("unsafe-permissions", "warning", "settings", "others can change localllm's files", why, fix, {"path": str(path)})
        if seen.st_uid != os.geteuid() and os.geteuid() != 0:
            why = f"{path} belongs to user {seen.st_uid}; a command was most likely run with sudo."
            fix = f"sudo chown -R {os.geteuid()} {shlex.quote(str(path))}"
            yield Finding("foreign-owner", "warning", "settings", "files belong to another user", why, fix, {"path": str(path)})


def judge_variables(system: System) -> Iterator[Finding]:
    env = system.env
    if not env.get("LOCALLLM_HOME") and not env.get("HOME") and system.os != "windows":
        where = system.directories.data
        title = "HOME is not set"
        why = f"Models and settings go to {where}."
        fix = "set HOME, or LOCALLLM_HOME to a folder that lasts"
        yield Finding("no-home", "warning" if where.is_absolute() else "problem", "settings", title, why, fix, {"data": str(where)})
    if env.get("HF_TOKEN"):
        host = env.get("HF_ENDPOINT") or "the Hub"
        yield Finding("hub-token", "info", "hub", "HF_TOKEN is set", f"pull and search show it to {host}; nothing else does.")
    if proxies := proxy_variables(env):
        title = f"a proxy is set: {', '.join(proxies)}"
        yield Finding("proxy", "info", "hub", title, "Requests to the Hub go through it.", data={"variables": proxies})


def proxy_variables(env: Mapping[str, str]) -> list[str]:
    """Names of the proxy variables in force; their values may hold passwords."""
    return [name for each in PROXIES for name in (each, each.lower()) if env.get(name)]


def judge_terminal(system: System, encoding: str | None) -> Iterator[Finding]:
    """`encoding` is that of stdout."""
    if encoding and encoding.lower().replace("-", "").replace("_", "") != "utf8":
        title = f"the terminal's encoding is {encoding}, not UTF-8"
        fix = "set PYTHONUTF8=1" if system.os == "windows" else "export LANG=C.UTF-8"
        why = "Letters that it lacks are shown as question marks."
        yield Finding("encoding", "info", "system", title, why, fix, {"encoding": encoding})
    if is_wsl(system.sources):
        old = not system.exists("dev/dxg") and "WSL2" not in system.read("proc/sys/kernel/osrelease")
        title = "this is WSL 1: no GPU, slow files" if old else "this is WSL 2"
        why = "" if old else "Its memory is limited by .wslconfig; models under /mnt/c load slowly."
        fix = "wsl --set-version DISTRIBUTION 2" if old else ""
        yield Finding("wsl", "warning" if old else "info", "system", title, why, fix)


def short(path: str | Path, env: Mapping[str, str]) -> str:
    """`path` with the home directory as `~`."""
    home = env.get("HOME") or env.get("USERPROFILE")
    if home and Path(path).is_relative_to(home):
        return str(Path("~") / Path(path).relative_to(home))
    return str(path)
