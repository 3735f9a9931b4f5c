"""The engine as it is installed, judged against the cards and the pinned version. Asking it is probe.py's business."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from localllm.doctor.cards import Card
from localllm.doctor.finding import Finding, Level
from localllm.doctor.system import System
from localllm.doctor.tools import ENGINE, TOOLKITS, Build, compiler, install_command, pinned_version, rebuild_command, toolkit
from localllm.hardware.cpu import cpu_features
from localllm.probe import TIMEOUT_S, Backend, Engine

_NAMES: dict[Build, str] = {"cpu": "the CPU", "cuda": "CUDA", "hip": "ROCm", "vulkan": "Vulkan", "metal": "Metal"}
_LIBRARY_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LD_PRELOAD", "LLAMA_CPP_LIB_PATH")


def judge_engine(system: System, engine: Engine, cards: Sequence[Card], gpu_layers: int = -1) -> Iterator[Finding]:
    """What is wrong with the engine on this machine; `gpu_layers` is the setting, 0 means that no card is wanted."""
    if engine.death:
        yield from _dead(system, engine, best_build(system, cards))
    else:
        pinned = pinned_version(system)
        if pinned and engine.version != pinned:
            yield Finding(
                "engine-version",
                "warning",
                "engine",
                f"the engine is {ENGINE} {engine.version}, this localllm was made for {pinned}",
                "localllm/llama knows the structures and defaults of that one build.",
                rebuild_command(system, engine.builds[0] if engine.builds else "cpu"),
                {"version": engine.version, "pinned": pinned},
            )
        yield from _unused_cards(system, engine, cards, gpu_layers)
    if not cards and (nvcc := toolkit(system, "cuda")):
        title = "a CUDA toolkit is here, but no NVIDIA card"
        fix = "if there should be one: install its driver, or pass the card into the container"
        yield Finding("toolkit-without-card", "info", "cards", title, nvcc, fix, {"nvcc": nvcc})
    if foreign := _foreign_libraries(system, engine):
        yield Finding(
            "foreign-ggml",
            "warning",
            "engine",
            "llama.cpp libraries from elsewhere may be taken for the engine's own",
            f"{', '.join(foreign['paths'])}: two builds in one process have two sets of devices, or crash.",
            f"unset {' '.join(foreign['variables'])}" if foreign["variables"] else "remove them, or the path that leads to them",
            foreign,
        )
    if compiler(system) is None:
        yield Finding(
            "no-compiler",
            "info",
            "engine",
            "no C++ compiler is here",
            "Only compiling the engine anew needs one.",
            install_command(system),
        )


def judge_cpu(system: System) -> Iterator[Finding]:
    """Whether the CPU has what llama.cpp's fast paths use."""
    features = cpu_features(system.sources)
    if system.sources.arch in ("x86_64", "amd64") and features and "avx2" not in features:
        yield Finding(
            "no-avx2",
            "info",
            "engine",
            "this CPU has no AVX2",
            "Models run, several times slower than on one that has it; an engine compiled on a newer machine will not start here.",
            data={"features": list(features)},
        )


def best_build(system: System, cards: Sequence[Card]) -> Build:
    """What to compile here: for the first card that can be used and has its toolkit, else for the CPU."""
    for card in cards:
        for backend in card.backends:
            if card.usable and toolkit(system, backend):
                return backend
    return "cpu"


def _dead(system: System, engine: Engine, build: Build) -> Iterator[Finding]:
    words = "\n".join(engine.last_words)
    data = {"death": engine.death, "last_words": list(engine.last_words)}
    anew = rebuild_command(system, build)
    match engine.death:
        case "illegal-instruction":
            why = "The engine was compiled for another CPU: it uses instructions that this one lacks."
            yield Finding("illegal-instruction", "problem", "engine", "the engine does not run on this CPU", why, anew, data)
        case "missing":
            yield Finding("engine-missing", "problem", "engine", f"the engine, {ENGINE}, is not installed", words, anew, data)
        case "timeout":
            why = f"It gave no sign within {TIMEOUT_S:.0f} s; a GPU driver may hang.\n{words}".rstrip()
            yield Finding("engine-hangs", "problem", "engine", "the engine does not start", why, f"restart the machine, or: {anew}", data)
        case _:
            title = "the engine crashes when it is loaded" if engine.death == "crashed" else "the engine cannot be loaded"
            yield Finding("engine-broken", "problem", "engine", title, words, anew, data)


def _unused_cards(system: System, engine: Engine, cards: Sequence[Card], gpu_layers: int) -> Iterator[Finding]:
    for card in {card.vendor: card for card in reversed(cards)}.values():
        data = {"card": asdict(card), "backends": list(engine.backends)}
        if not card.usable:
            yield _unreachable(card, data)
            continue
        built: list[Backend] = [backend for backend in card.backends if backend in engine.builds]
        if built:
            if not engine.gpus:
                why = f"The engine is built for {_NAMES[built[0]]}, but that finds no device."
                fix = "see that the driver matches the card" + (": nvidia-smi" if card.vendor == "NVIDIA" else "")
                yield Finding("gpu-not-found", "problem", "cards", f"the engine does not see the {card.name}", why, fix, data)
            continue
        build: Build = best_build(system, [card])
        backend: Backend = card.backends[0] if build == "cpu" else build
        fix = rebuild_command(system, backend)
        why = f"The engine has no backend for it ({', '.join(engine.backends)})."
        if build == "cpu":
            fix = f"install {TOOLKITS[backend]}, then: {fix}"
        else:
            why += f" What compiles one is here: {toolkit(system, backend)}."
        level: Level = "info" if gpu_layers == 0 or (card.integrated and card.vendor != "Apple") else "problem"
        if gpu_layers == 0:
            why += " n_gpu_layers is 0, so none is wanted."
        elif level == "info":
            why += " It shares the CPU's memory: the gain may be small."
        title = f"the engine uses only the CPU, not the {card.name}"
        yield Finding("cpu-only-engine", level, "cards", title, why, fix, {**data, "build": backend, "toolkit": build != "cpu"})


def _unreachable(card: Card, data: Mapping[str, Any]) -> Finding:
    if card.vendor == "NVIDIA" and card.driver and card.driver != "nouveau":
        why = "The driver runs, but its device files are not here: most likely this is a container without the card."
        fix = "start the container with --gpus all (needs the NVIDIA Container Toolkit)"
        return Finding("card-not-passed", "warning", "cards", f"the {card.name} is out of reach", why, fix, data)
    why = f"It is run by {card.driver or 'no driver'}." if card.vendor == "NVIDIA" else "There is no /dev/dri/renderD* to compute with."
    fix = "install the vendor's driver" if card.vendor == "NVIDIA" else "install the driver; in a container, pass --device /dev/dri"
    level: Level = "info" if card.integrated else "warning"
    return Finding("card-without-driver", level, "cards", f"the {card.name} has no driver to compute with", why, fix, data)


def _foreign_libraries(system: System, engine: Engine) -> dict[str, list[str]]:
    """Variables that lead to other builds of llama.cpp, and the files; empty when there are none."""
    variables: list[str] = []
    paths: list[str] = []
    for name in _LIBRARY_VARIABLES:
        for part in filter(None, system.env.get(name, "").replace(" ", os.pathsep).split(os.pathsep)):
            here = Path(part)
            files = [here] if here.is_file() else [*here.glob("*ggml*"), *here.glob("*llama.*")]
            found = [str(file) for file in sorted(files) if file.name.removeprefix("lib").startswith(("ggml", "llama."))]
            if found:
                variables.append(name)
                paths += found[:3]
    paths += [path for path in engine.foreign if path not in paths]
    return {"variables": list(dict.fromkeys(variables)), "paths": paths} if paths else {}
