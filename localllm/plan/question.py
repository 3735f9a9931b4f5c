"""One question to the planner with all that goes into the answer, and the candidate that answers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from localllm.errors import UsageError
from localllm.gguf import Header
from localllm.hardware import Hardware
from localllm.plan.budget import budgets
from localllm.plan.compute import ComputeModel
from localllm.plan.fitter import Candidate, Fitter
from localllm.plan.footprint import Footprint
from localllm.plan.history import History
from localllm.plan.ladder import ORDER, Ladder, Rung, ladder
from localllm.plan.search import grown, search
from localllm.plan.spec import Wishes
from localllm.plan.speed import Range, Reads, Speeds, keys, typical_past, weight_kind


@dataclass(frozen=True, slots=True)
class OtherQuant:
    """Another file of the same model."""

    name: str
    """Such as Q3_K_M."""
    size_bytes: int
    reference: str = ""
    """What `localllm pull` takes."""


@dataclass(frozen=True)
class Question:
    """A model, a machine, wishes, and what is known from before."""

    header: Header
    hardware: Hardware
    wishes: Wishes
    history: History
    model: str
    quants: tuple[OtherQuant, ...]
    compute: ComputeModel
    reads: Reads
    limits: tuple[tuple[str, int], ...] = ()
    """(device, the most to take there), after a load that failed."""

    @property
    def footprint(self) -> Footprint:
        return self.compute.footprint

    def fitter(self) -> Fitter:
        """What choices take on this machine, within its budgets. Raises UsageError."""
        names = keys(self.hardware)
        learned = {name: size for name, key in names.items() if (size := self.history.overhead_bytes(key)) is not None}
        rooms = budgets(self.hardware, self.wishes, learned, dict(self.limits))
        threads = self.wishes.n_threads or self.hardware.physical_cores
        return Fitter(self.compute, self._draft_model(), rooms, self.wishes, threads)

    def with_wishes(self, **changes: Any) -> Question:
        return replace(self, wishes=replace(self.wishes, **changes))

    def with_limits(self, limits: Mapping[str, int]) -> Question:
        """Taking no more of each device than `limits`, and than earlier limits."""
        both = dict(self.limits)
        for device, limit in limits.items():
            both[device] = min(limit, both.get(device, limit))
        return replace(self, limits=tuple(sorted(both.items())))

    def read_bytes(self, candidate: Candidate) -> dict[str, float]:
        """What each device reads for one token: weights, and the cache of a chat under way."""
        shape = candidate.shape
        read = self.reads.by_device(self.footprint.placement(shape), shape.overrides)
        for name, n_bytes in self.footprint.kv_read_bytes(shape, typical_past(shape.n_ctx)).items():
            read[name] = read.get(name, 0.0) + n_bytes
        return read

    def decode_tps(self, candidate: Candidate) -> Range | None:
        """Tokens per second of one answer, without a draft model's help."""
        speeds = Speeds(self.hardware, self.history, weight_kind(self.header), candidate.shape.n_threads, self.model)
        return speeds.tokens_per_s(self.read_bytes(candidate), self.footprint.architecture.n_layers)

    def _draft_model(self) -> ComputeModel | None:
        draft = self.wishes.draft
        if draft is None:
            return None
        return ComputeModel(Footprint(draft, self.hardware.devices, cpu_features=self.hardware.cpu_features))


@dataclass(frozen=True)
class Found:
    """A candidate with what it was chosen from."""

    candidate: Candidate
    fitter: Fitter
    ladder: Ladder

    @property
    def partly(self) -> bool:
        """Whether cards hold some layers and the CPU others, or experts."""
        on_cards = self.candidate.shape.n_gpu_layers
        whole = on_cards > self.fitter.footprint.architecture.n_layers and not self.candidate.choice.n_cpu_moe
        return on_cards > 0 and bool(self.candidate.choice.gpus) and not whole


def find(question: Question) -> Found:
    """The candidate that gives up least, with its automatic context grown. Raises NothingFits and UsageError."""
    fitter = question.fitter()
    options = _possible(ladder(question.footprint.architecture, fitter.budgets, question.wishes), fitter)
    candidate = grown(fitter, options, search(fitter, options))
    return Found(fitter.evened(candidate), fitter, options)


def _possible(options: Ladder, fitter: Fitter) -> Ladder:
    """The options that llama.cpp would take. Raises UsageError when the wishes leave none."""
    checked: tuple[Rung, ...] = ("kv", "n_seq", "n_resident", "n_ubatch")
    for i, rung in enumerate(checked):
        # With the best of what was checked, and the smallest of what is still to be.
        at: dict[Rung, int] = {each: options.worst(each) if each in checked[i + 1 : -1] else 0 for each in ORDER}
        choice = options.choice(at)
        refusals = {option: fitter.candidate(replace(choice, **{rung: option})).refusal for option in getattr(options, rung)}
        kept = tuple(option for option, refusal in refusals.items() if not refusal)
        if not kept:
            raise UsageError(f"this cannot be loaded as wished: {next(iter(refusals.values()))}", hint="leave one of these choices open")
        options = replace(options, **{rung: kept})
    return options
