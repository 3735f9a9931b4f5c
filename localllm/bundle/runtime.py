"""localllm itself for a bundle: every wheel that it needs, and what a machine must be to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from packaging.utils import canonicalize_name

from localllm.bundle.engine_wheel import PACKAGE, portable_wheel
from localllm.bundle.machine import this_machine
from localllm.bundle.stick import Runtime
from localllm.bundle.wheels import WheelFile, build, editable_source, installed, licence_of, licence_texts, needed, wheel_of
from localllm.errors import UsageError

ROOT = "localllm"


def collect(folder: Path, cache: Path, *, native: bool, given: Sequence[Path] = (), say: Callable[[str], object] = print) -> Runtime:
    """The wheels of what is installed here, written to `folder`; llama.cpp's built for the baseline CPU unless `native`.

    `given` wheels stand in for installed packages. `say` is told what takes long. Raises LocalLLMError.
    """
    wheels: dict[str, WheelFile] = {canonicalize_name(wheel.metadata["Name"]): wheel for wheel in map(WheelFile, given)}
    features = this_machine().cpu_features if native else None
    if ROOT not in wheels and (source := editable_source(installed(ROOT))):
        # A checkout's recorded dependencies may be older than its pyproject.toml: build first, then ask the wheel.
        say(f"building the wheel of {source}")
        wheels[ROOT] = WheelFile(build(source, folder))
    if not native and PACKAGE not in wheels:
        path, features = portable_wheel(installed(PACKAGE).version, cache, say)
        wheels[PACKAGE] = WheelFile(path)
    found = needed(ROOT, wheels)
    unused = sorted(set(wheels) - {canonicalize_name(dist.metadata["Name"]) for dist in found})
    if unused:
        raise UsageError(f"localllm needs no {unused[0]}", hint="leave that --wheel out")
    paths: list[Path] = []
    texts: dict[str, bytes] = {}
    table: list[str] = []
    for dist in found:
        path = dist.path if isinstance(dist, WheelFile) else wheel_of(dist, folder)
        paths.append(path)
        label = f"{canonicalize_name(dist.metadata['Name'])}-{dist.version}"
        texts |= {f"{label}/{name}": text for name, text in licence_texts(path).items()}
        table.append(f"{label}: {licence_of(dist)}\n")
        say(f"packed {path.name}")
    texts["packages.txt"] = "".join(table).encode()
    return Runtime(tuple(paths), replace(this_machine(), cpu_features=features), texts)
