"""Proof that this machine needs no network: whole files, no way to a cloud, offline flags, and an answer given while watched.

Every step leaves a finding, also when it succeeds; one `problem` and nothing is proven.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from localllm import __version__
from localllm.demo import demo_models
from localllm.doctor.environment import judge_settings, models_folder
from localllm.doctor.finding import Finding, worst
from localllm.doctor.guard import CONTROL, TEST_ADDRESS, Guarded, control, isolation, run_guarded
from localllm.doctor.hub import is_true, offline_by
from localllm.doctor.system import System
from localllm.library import Library
from localllm.library.hashing import sha256_of
from localllm.library.library import Checked
from localllm.library.model import BUILT_IN
from localllm.settings import Settings

DEMO_TIMEOUT_S = 120.0
DEMO = ("-m", "localllm", "run", "demo", "--json", "--temperature", "0", "--max-tokens", "24", "What is the capital of France?")
SUMS = "SHA256SUMS"

CLOUD_KEYS = frozenset(
    {
        *("OPENAI", "AZURE_OPENAI", "ANTHROPIC", "OPENROUTER", "GEMINI", "GOOGLE", "GOOGLE_GENERATIVE_AI", "MISTRAL", "GROQ", "TOGETHER"),
        *("DEEPSEEK", "COHERE", "CO", "FIREWORKS", "XAI", "PERPLEXITY", "CEREBRAS", "REPLICATE", "HYPERBOLIC", "MOONSHOT", "DASHSCOPE"),
    }
)
"""Makers of cloud models, as they stand before _API_KEY, _API_TOKEN or _KEY in a variable."""
_KEY_VARIABLE = re.compile(r"(?:LOCALLLM_)?(.+?)_(?:API_KEY|API_TOKEN|AUTH_TOKEN|ACCESS_TOKEN|KEY)")
_BEDROCK = "AWS_BEARER_TOKEN_BEDROCK"
_KEY_SETTING = re.compile(r"(?:.*_)?(?:api_key|apikey|secret|token)")
OnStep = Callable[[str], None]
TELEMETRY = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")


@dataclass(frozen=True, slots=True)
class Proof:
    """The steps, in order."""

    findings: tuple[Finding, ...]

    @property
    def proven(self) -> bool:
        return worst(self.findings) != "problem"

    def to_json(self) -> dict[str, Any]:
        return {"version": __version__, "proven": self.proven, "findings": [finding.to_json() for finding in self.findings]}


def prove(
    system: System, on_step: OnStep = lambda text: None, *, demo: Sequence[str] | None = None, words: Sequence[str] | None = None
) -> Iterator[Finding]:
    """The steps one by one, as they are done; `on_step` hears what is being done.

    `demo` is the command to watch, `words` those of `isolation()`; tests hand in their own.
    """
    settings, broken = judge_settings(system)
    yield from (finding for finding in broken if finding.level == "problem")
    yield judge_demo_files()
    library = Library(system.directories)
    library.root = models_folder(system, settings)
    yield from judge_models(library, on_step)
    yield from judge_keys(system)
    yield from judge_flags(system, settings)
    on_step("testing the socket guard")
    prefix = isolation() if words is None else words
    yield judge_control(control(system.env, prefix))
    yield judge_isolation(prefix)
    on_step("asking the demo")
    yield judge_demo(system, demo or [str(system.python), *DEMO], prefix)


def demo_sums(folder: Path) -> dict[str, str]:
    """file name -> sha256 of the built-in models, from the list that ships with them (`sha256sum -c` reads it, too)."""
    pairs = (line.split() for line in (folder / SUMS).read_text(encoding="ascii").splitlines())
    return {name.lstrip("*"): digest for digest, name in pairs}


def judge_demo_files(folder: Path | None = None) -> Finding:
    """Whether the built-in models are those that were shipped; `folder` is where they are."""
    folder = folder or demo_models()["demo"].parent
    bad: list[str] = []
    sums: dict[str, str] = {}
    try:
        sums = demo_sums(folder)
        bad = [name for name, digest in sums.items() if sha256_of(folder / name) != digest]
    except (OSError, ValueError) as error:
        bad = [str(error)]
    if bad or not sums:
        fix = "install localllm again: a file of the package was damaged or changed"
        return Finding("demo-damaged", "problem", "models", "the built-in models are not as shipped", ", ".join(bad), fix, {"files": bad})
    return Finding("demo-matches", "ok", "models", f"{len(sums)} built-in models match their hashes", data=sums)


def judge_models(library: Library, on_step: OnStep) -> Iterator[Finding]:
    """Whether every model of the library is whole and still what was downloaded or imported. Reads all of them."""
    good = 0
    unknown: list[str] = []
    for model in library.models():
        if model.how == BUILT_IN:
            continue
        if model.problem:
            fix = f"localllm rm {model.name}, then pull it or install it from its bundle again"
            data = {"model": model.name, "path": str(model.path)}
            yield Finding("model-broken", "problem", "models", f"{model.name} cannot be used", model.problem, fix, data)
        elif not model.changed and not any(model.sha256s):
            unknown.append(model.name)  # verify would believe what it finds
        else:
            for checked in library.verify(model, _progress(model.name, model.size_bytes, on_step)):
                good += checked.state in ("ok", "recorded")
                yield from _mismatch(checked)
    if good or not unknown:
        title = f"{good} model file{'' if good == 1 else 's'} match their hashes" if good else "no other models are here"
        yield Finding("models-match", "ok", "models", title, data={"files": good})
    if unknown:
        title = f"{len(unknown)} model{' has' if len(unknown) == 1 else 's have'} no known hash"
        yield Finding(
            "models-without-hash", "info", "models", title, ", ".join(unknown), "localllm verify records one", {"models": unknown}
        )


def _progress(name: str, size_bytes: int, on_step: OnStep) -> Callable[[int], None]:
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        on_step(f"reading {name}, {done / max(1, size_bytes):.0%}")

    return more


def _mismatch(checked: Checked) -> Iterator[Finding]:
    data = {"model": checked.model, "path": str(checked.path), "sha256": checked.sha256, "expected": checked.expected}
    fix = f"localllm rm {checked.model}, then pull it or install it from its bundle again"
    if checked.state == "mismatch":
        why = f"{checked.path} has another content than it had: a damaged disk, or somebody changed it."
        yield Finding("model-changed", "problem", "models", f"{checked.model} does not match its hash", why, fix, data)
    elif checked.state == "unreadable":
        yield Finding("model-unreadable", "problem", "models", f"{checked.model} cannot be read", f"{checked.path}", fix, data)


def judge_keys(system: System) -> Iterator[Finding]:
    """Whether anything here opens a cloud model; names only, never a value."""
    variables = cloud_variables(system.env)
    file = system.directories.config_file
    try:
        settings = secret_settings(tomllib.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        settings = []
    for name in variables:
        yield Finding("cloud-key", "problem", "keys", f"{name} is set", "It opens a cloud model.", f"unset {name}", {"variable": name})
    for name in settings:
        why = f"{file} holds a key or token."
        yield Finding("cloud-key", "problem", "keys", f"{name} is set", why, f"localllm config unset {name}", {"setting": name})
    if not variables and not settings:
        yield Finding("no-cloud-key", "ok", "keys", "no cloud key in the environment or the settings")


def cloud_variables(env: Mapping[str, str]) -> list[str]:
    """Names of variables that hold keys of cloud models."""
    found = [name for name, value in env.items() if value and (match := _KEY_VARIABLE.fullmatch(name)) and match[1] in CLOUD_KEYS]
    return sorted([*found, *([_BEDROCK] if env.get(_BEDROCK) else [])])


def secret_settings(table: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of settings that look like keys and are not empty."""
    found: list[str] = []
    for name, value in table.items():
        if isinstance(value, dict):
            found += secret_settings(cast(dict[str, Any], value), f"{prefix}{name}.")
        elif isinstance(value, str) and value and _KEY_SETTING.fullmatch(name.lower()):
            found.append(prefix + name)
    return found


def judge_flags(system: System, settings: Settings) -> Iterator[Finding]:
    """Whether localllm is told to stay off the network, and to report to nobody."""
    off = offline_by(system.env, settings)
    if off:
        yield Finding("offline-flag", "ok", "flags", f"offline is set by {' and '.join(off)}", data={"by": list(off)})
    else:
        why = "pull and search would use the network."
        fix = "localllm config set offline true"
        yield Finding("not-offline", "problem", "flags", "localllm may use the network", why, fix)
    quiet = [name for name in TELEMETRY if is_true(system.env.get(name))]
    why = f"by {', '.join(quiet)}" if quiet else "localllm has none, and turns off that of huggingface_hub"
    yield Finding("telemetry-off", "ok", "flags", f"telemetry is off ({why})", data={"by": quiet})


def judge_control(tried: Guarded) -> Finding:
    """Whether the guard sees what it should see: without that, its silence would mean nothing."""
    if tried.code != 0 and any(a.event == "socket.connect" and a.host == TEST_ADDRESS for a in tried.outside):
        return Finding("guard-works", "ok", "guard", f"the socket guard caught a test connect to {TEST_ADDRESS}")
    why = f"A process that connects to {TEST_ADDRESS} was not caught (exit code {tried.code}). {tried.stderr.strip()[-200:]}".strip()
    fix = "unset PYTHONNOUSERSITE, PYTHONHOME and the like: Python must run sitecustomize"
    return Finding("guard-broken", "problem", "guard", "the socket guard does not work here", why, fix, {"command": ["-c", CONTROL]})


def judge_isolation(prefix: Sequence[str]) -> Finding:
    """What keeps native code from the network, which the guard does not see."""
    if prefix:
        return Finding("isolated", "ok", "guard", "the test runs in a network namespace without a network")
    why = "Only what Python code does is watched; native code is not kept from the network."
    fix = "run it once more with the network unplugged" if sys.platform != "linux" else "allow user namespaces, or unplug the network"
    return Finding("no-isolation", "info", "guard", "this system gives no network namespace", why, fix)


def judge_demo(system: System, command: Sequence[str], prefix: Sequence[str]) -> Finding:
    """An answer of the built-in model, from the command line down to llama.cpp, while watched."""
    try:
        ran = run_guarded(command, system.env, DEMO_TIMEOUT_S, prefix)
    except subprocess.TimeoutExpired:
        why = f"It took more than {DEMO_TIMEOUT_S:.0f} s."
        return Finding("demo-failed", "problem", "demo", "the demo did not answer", why, "localllm doctor says what is wrong")
    hosts = list(dict.fromkeys(attempt.host for attempt in ran.outside))
    workers = [words for words in ran.watched.values() if "localllm.worker" in words]
    data = {
        "connects_outside": len(ran.outside),
        "connects_loopback": ran.inside,
        "hosts": hosts,
        "processes": len(ran.watched),
        "isolated": ran.isolated,
        "command": list(command[1:]),
    }
    if ran.outside:
        title = f"the demo tried to reach {len(ran.outside)} time{'' if len(ran.outside) == 1 else 's'} another machine"
        fix = "this is a bug in localllm or in a package beside it: please report it"
        return Finding("demo-connects", "problem", "demo", title, ", ".join(hosts), fix, data)
    text = _answer(ran)
    if not text:
        why = (ran.stderr or ran.stdout).strip()[-600:]
        return Finding("demo-failed", "problem", "demo", "the demo did not answer", why, "localllm doctor says what is wrong", data)
    if len(ran.watched) < 2 or not workers:
        why = f"{len(ran.watched)} processes were watched, the worker not among them."
        return Finding(
            "demo-unwatched", "problem", "demo", "the demo escaped the socket guard", why, "unset PYTHONPATH, and try again", data
        )
    title = f"the demo answered with 0 connects outside this machine ({ran.inside} loopback)"
    return Finding("demo-stays-here", "ok", "demo", title, data={**data, "answer": text})


def _answer(ran: Guarded) -> str:
    """The text that `run --json` printed; empty when there is none."""
    if ran.code != 0:
        return ""
    try:
        said = json.loads(ran.stdout)
    except ValueError:
        return ""
    return str(cast(dict[str, Any], said).get("answer") or "") if isinstance(said, dict) else ""
