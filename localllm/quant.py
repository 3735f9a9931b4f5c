"""Quantisations: their names in file names, the models that a repository's files make up, and which of them to take here.

Pure: it knows names and sizes, opens no file and asks no Hub. What fits is a rule of thumb from a file's size; `plan` knows better.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from localllm.errors import DoesNotFit, NotFound

if TYPE_CHECKING:
    from localllm.hub import RepoFile

BITS: dict[str, float] = {
    **{"F32": 32.0, "BF16": 16.0, "F16": 16.0},
    **{"Q8_K_XL": 10.0, "Q8_0": 8.50, "Q8": 8.50},
    **{"Q6_K_XL": 7.1, "Q6_K_L": 6.7, "Q6_K": 6.56, "Q6": 6.56},
    **{"Q5_K_XL": 5.8, "Q5_K_L": 5.8, "Q5_K_M": 5.70, "Q5_K": 5.70, "Q5_K_S": 5.57, "Q5_1": 6.00, "Q5_0": 5.50, "Q5": 5.50},
    **{"Q4_K_XL": 5.0, "Q4_K_L": 5.0, "Q4_K_M": 4.89, "Q4_K": 4.89, "MXFP4": 4.25, "NVFP4": 4.50, "Q4_K_S": 4.67},
    **{"IQ4_NL": 4.68, "IQ4_XS": 4.46, "Q4_1": 5.00, "Q4_0": 4.50, "Q4": 4.50, "Q4_0_4_4": 4.50, "Q4_0_4_8": 4.50, "Q4_0_8_8": 4.50},
    **{"Q3_K_XL": 4.4, "Q3_K_L": 4.30, "Q3_K_M": 4.00, "Q3_K": 4.00, "IQ3_M": 3.76, "IQ3_S": 3.66, "Q3_K_S": 3.64, "IQ3_XS": 3.50},
    **{"IQ3_XXS": 3.25, "Q3": 3.44},
    **{"Q2_K_XL": 3.3, "Q2_K_L": 3.3, "Q2_K": 3.16, "IQ2_M": 2.93, "Q2_K_S": 2.97, "IQ2_S": 2.74, "IQ2_XS": 2.59, "IQ2_XXS": 2.38},
    **{"Q2": 2.63, "Q2_0": 2.25, "TQ2_0": 2.06},
    **{"IQ1_M": 2.15, "IQ1_S": 2.00, "TQ1_0": 1.69, "Q1_0": 1.13},
}
"""Bits per weight, best quality first; the order, not the number, says what is better.

Llama 3.1 8B as llama.cpp's tools/quantize/README.md measures it, for the rest the block size; _L and _XL (more bits for some
tensors) are rounded from their publishers' files.
"""

FLOATS = frozenset({"F32", "BF16", "F16"})
REMOVED = frozenset({"Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8"})
"""llama.cpp no longer loads them."""
USUAL = ("Q4_K_M", "Q4_K_XL", "Q4_K_L", "Q4_K", "MXFP4", "Q4")
"""What LM Studio, Ollama and llama.cpp take unasked, or its nearest relative."""
BEST_SENSIBLE = "Q8_0"
"""Beyond it only the size grows."""
WORST_SENSIBLE = "IQ3_XXS"
"""Below it answers suffer so much that a smaller model is the better choice."""

_ALIASES = {"FP32": "F32", "FP16": "F16", "MXFP4_MOE": "MXFP4"}
_ORDER = {name: position for position, name in enumerate(BITS)}
# Longest first, as Q4_K would match within Q4_K_M. Not before _R4 and the like: those are ik_llama.cpp's, another format.
_NAME = re.compile(
    rf"(?<![A-Z0-9])(UD[-_])?({'|'.join(sorted([*BITS, *_ALIASES], key=len, reverse=True))})(?!_R\d|_[K01](?![A-Z0-9])|[A-Z0-9])"
)
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<parts>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
_WORDS = re.compile(r"[^a-z0-9]+")
_DRAFTS = frozenset({"draft", "drafter", "mtp", "eagle", "eagle3", "dflash"})
_SAME_MODEL = frozenset({"", "gguf", "ggml", "ud", "i1", "imat", "imatrix"})
"""Words of a file name that say how it was quantised, not what it is."""

_GB = 1e9
_FIXED_BYTES = 1_000_000_000
_PER_BYTE = 1.1

SideKind = Literal["mmproj", "imatrix", "draft"]


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """One model of a repository: a GGUF file, or the parts of a split one in order."""

    repo: str
    commit: str
    quant: str
    """As in `Q4_K_M` or `UD-Q4_K_XL`; empty where no name tells."""
    files: tuple[RepoFile, ...]
    n_parts: int = 1

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def name(self) -> str:
        """The path of its file, or of its first part."""
        return self.files[0].path

    @property
    def missing(self) -> tuple[str, ...]:
        """The paths of the parts that the repository lacks."""
        if len(self.files) == self.n_parts:
            return ()
        match = _PART.fullmatch(self.name)
        assert match is not None  # only parts of a split file are counted
        there = {_number(file.path) for file in self.files}
        absent = (number for number in range(1, self.n_parts + 1) if number not in there)
        return tuple(f"{match['stem']}-{number:05}-of-{self.n_parts:05}.gguf" for number in absent)


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that goes with a model and is none by itself: a vision projector, a draft model, an importance matrix."""

    kind: SideKind
    file: RepoFile


@dataclass(frozen=True, slots=True)
class Choice:
    """The model to take where nobody said which, why, and what it will need."""

    model: RemoteModel
    reason: str
    needed_bytes: int
    fits: bool


def quant_of(filename: str) -> str | None:
    """The quantisation that a file is named after, or else the folder it lies in: "Q4_K_M", "UD-Q4_K_XL", "BF16"; None without one.

    The last one counts (`…-F16.Q6_K.gguf`), and a float only where nothing else is said.
    """
    for part in reversed(filename.upper().removesuffix(".GGUF").split("/")):
        found = [f"{'UD-' if match[1] else ''}{_ALIASES.get(match[2], match[2])}" for match in _NAME.finditer(part)]
        if found:
            return next((name for name in reversed(found) if name not in FLOATS), found[-1])
    return None


def bits_per_weight(quant: str) -> float:
    """About how many bits a weight takes; 0.0 for an unknown name."""
    return BITS.get(_base(quant), 0.0)


def models_in(files: Iterable[RepoFile], repo: str = "", commit: str = "") -> tuple[RemoteModel, ...]:
    """The models among a repository's files, best quality first: parts of a split file together, side files left out.

    A model whose parts are not all there is listed too, with what is `missing`.
    """
    main, _ = _sort(files)
    groups: dict[tuple[str, int], list[RepoFile]] = {}
    for file in main:
        groups.setdefault(_group(file.path), []).append(file)
    models: list[RemoteModel] = []
    for (_, n_parts), members in groups.items():
        members.sort(key=lambda file: file.path)
        models.append(RemoteModel(repo, commit, quant_of(members[0].path) or "", tuple(members), n_parts))
    return tuple(sorted(models, key=lambda model: (_rank(model), -model.size_bytes, model.name)))


def side_files(files: Iterable[RepoFile]) -> tuple[SideFile, ...]:
    """The files that go with the models of a repository, in the order given."""
    return tuple(_sort(files)[1])


def find_quant(models: Sequence[RemoteModel], quant: str) -> RemoteModel:
    """The one model that `quant` (any case; `UD-` may be left out) names; NotFound lists what there is, or the candidates."""
    wanted = quant_of(f"x-{quant}.gguf") or quant.upper()
    found = [each for each in models if each.quant == wanted] or [each for each in models if each.quant == f"UD-{wanted}"]
    if not found:
        raise NotFound(f"there is no {quant} in {_place(models)}", hint=f"it has {_list(models)}" if models else "it holds no GGUF model")
    return _only(found)


def choose_quant(models: Sequence[RemoteModel], memory_bytes: int, *, strict: bool = False) -> Choice:
    """The model of a repository to take on a machine with `memory_bytes` free, by file size alone.

    Q4_K_M is the default, as elsewhere: the usual balance of size, speed and quality. Decoding reads all weights for every token, so a
    better one is taken only where it leaves half of the memory free, and never one above Q8_0. Where Q4_K_M does not fit, the best below
    it that does; where nothing fits, the smallest sensible one with a warning, or DoesNotFit if `strict`. NotFound: no complete model,
    or files of several models, which only a person can choose from.
    """
    candidates = _candidates(models)
    model, fits, reason = _pick(candidates, memory_bytes)
    if strict and not fits:
        smallest = min(candidates, key=needed_bytes)
        raise DoesNotFit(
            f"nothing in {_place(models)} fits: the smallest, {_label(smallest)}, takes {_need(smallest)}, with {_gb(memory_bytes)} free",
            hint="choose a smaller model, or name one with --quant to download it anyway",
        )
    model = _only([each for each in candidates if each.quant == model.quant])
    return Choice(model, reason, needed_bytes(model), fits)


def _pick(candidates: Sequence[RemoteModel], memory_bytes: int) -> tuple[RemoteModel, bool, str]:
    """What `choose_quant` promises: the model, whether it fits, and why it is this one."""
    free = f"{_gb(memory_bytes)} free"
    usual = _usual(candidates)
    ladder = sorted(candidates, key=lambda model: (_rank(model), -model.size_bytes))
    for model in ladder:
        better = _ORDER[BEST_SENSIBLE] <= _rank(model) < _rank(usual)
        if better and needed_bytes(model) * 2 <= memory_bytes:
            return model, True, f"better than {_label(usual)}, and small here: {_need(model)}, under half of the {free}"
    if needed_bytes(usual) <= memory_bytes:
        why = "the usual balance of size and quality" if _base(usual.quant) in USUAL else "the nearest to Q4_K_M here"
        return usual, True, f"{why}: {_need(usual)}, of {free}"
    # What is worse, best first; then what is better and yet smaller, as odd repositories have it.
    below = [model for model in ladder if _rank(model) > _rank(usual)]
    above = [model for model in reversed(ladder) if _rank(model) <= _rank(usual)]
    for model in [*below, *above]:
        if needed_bytes(model) <= memory_bytes:
            poor = _rank(model) > _ORDER[WORST_SENSIBLE]
            warning = "; so few bits cost much quality, a smaller model may answer better" if poor else ""
            return model, True, f"{_label(usual)} takes {_need(usual)}, of {free}; this one {_need(model)}{warning}"
    sensible = [model for model in candidates if _rank(model) <= _ORDER[WORST_SENSIBLE]]
    model = min(sensible or candidates, key=needed_bytes)
    return model, False, f"nothing fits: this one takes {_need(model)}, with {free}; it will be slow or fail, a smaller model is better"


def needed_bytes(model: RemoteModel) -> int:
    """Memory to run a model, roughly: its weights, a tenth more for context and buffers, and 1 GB."""
    return int(model.size_bytes * _PER_BYTE) + _FIXED_BYTES


def _candidates(models: Sequence[RemoteModel]) -> list[RemoteModel]:
    """The complete, loadable ones: quantised if any is, floats if not, unnamed ones as a last resort; all of one model."""
    whole = [model for model in models if not model.missing and model.quant not in REMOVED]
    if not whole:
        lacking = ", ".join(models[0].missing[:3]) if models and models[0].missing else ""
        raise NotFound(
            f"{_place(models)} holds no complete GGUF model" + (f": {lacking} is missing" if lacking else ""),
            hint="look for another repository: localllm search WORDS",
        )
    named = [model for model in whole if model.quant and model.quant not in FLOATS]
    candidates = named or [model for model in whole if model.quant] or whole
    # The same bytes under two names are one choice.
    unique: dict[tuple[str, ...], RemoteModel] = {}
    for model in candidates:
        unique.setdefault(tuple(file.sha256 or file.path for file in model.files), model)
    candidates = list(unique.values())
    if len({_identity(model) for model in candidates}) > 1:
        raise NotFound(f"{_place(models)} holds several models", hint=f"name a file: {_list(candidates, files=True)}")
    return candidates


def _usual(candidates: Sequence[RemoteModel]) -> RemoteModel:
    """Q4_K_M, or what comes nearest to it: first its relatives, then the best below, then the least above."""
    for name in USUAL:
        if found := [model for model in candidates if _base(model.quant) == name]:
            return found[0]
    middle = _ORDER[USUAL[0]]
    return min(candidates, key=lambda model: (_rank(model) < middle, abs(_rank(model) - middle), model.size_bytes))


def _only(found: Sequence[RemoteModel]) -> RemoteModel:
    if len(found) > 1:
        raise NotFound(f"{_place(found)} holds several {_label(found[0])} files", hint=f"name one: {_list(found, files=True)}")
    return found[0]


def _sort(files: Iterable[RepoFile]) -> tuple[list[RepoFile], list[SideFile]]:
    """The files of models, and those that go with them; what is no GGUF file and no importance matrix is in neither."""
    main: list[RepoFile] = []
    side: list[SideFile] = []
    drafts: list[RepoFile] = []
    for file in files:
        name = file.path.lower()
        words = set(_WORDS.split(name.rpartition("/")[2]))
        if "imatrix" in words and quant_of(name) is None:
            side.append(SideFile("imatrix", file))
        elif not name.endswith(".gguf"):
            continue
        elif "mmproj" in words:
            side.append(SideFile("mmproj", file))
        elif words & _DRAFTS:
            drafts.append(file)
        else:
            main.append(file)
    # A repository of nothing but drafts is one of models: someone wants to pull them.
    return (main, side + [SideFile("draft", file) for file in drafts]) if main else (drafts, side)


def _group(path: str) -> tuple[str, int]:
    """What the parts of one split file have in common, and how many they are; a file on its own is its only part."""
    match = _PART.fullmatch(path)
    if match and 1 <= int(match["number"]) <= int(match["parts"]):
        return match["stem"], int(match["parts"])
    return path, 1


def _number(path: str) -> int:
    match = _PART.fullmatch(path)
    return int(match["number"]) if match else 1


def _identity(model: RemoteModel) -> frozenset[str]:
    """The words of a path without the quantisation: equal for all quantisations of one model, wherever folders repeat its name."""
    path, _ = _group(model.name)
    name = _NAME.sub(" ", path.upper().removesuffix(".GGUF")).lower()
    return frozenset(_WORDS.split(name)) - _SAME_MODEL


def _base(quant: str) -> str:
    return quant.removeprefix("UD-")


def _rank(model: RemoteModel) -> int:
    """Position on the ladder of quality, 0 the best; unknown names last."""
    return _ORDER.get(_base(model.quant), len(_ORDER))


def _label(model: RemoteModel) -> str:
    return model.quant or model.name


def _place(models: Sequence[RemoteModel]) -> str:
    return models[0].repo if models and models[0].repo else "the repository"


def _list(models: Sequence[RemoteModel], files: bool = False, most: int = 12) -> str:
    return ", ".join(_entries(models[:most], files)) + (f" and {len(models) - most} more" if len(models) > most else "")


def _entries(models: Iterable[RemoteModel], files: bool) -> Iterator[str]:
    for model in models:
        yield f"{model.name if files else _label(model)} ({_gb(model.size_bytes)})"


def _need(model: RemoteModel) -> str:
    return f"{_gb(model.size_bytes)} and about {_gb(needed_bytes(model) - model.size_bytes)} to run"


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / _GB:.1f} GB" if n_bytes >= 50_000_000 else f"{n_bytes / 1e6:.1f} MB"
