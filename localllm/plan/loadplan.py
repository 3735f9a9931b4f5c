"""The plan: what llama.cpp will be told, what it will take on each device, how fast it will be, and why it was chosen so.

A value; choosing it is choose.py's business, and the words in it are explain.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from localllm.plan.budget import Kind
from localllm.plan.spec import Shape

if TYPE_CHECKING:
    from localllm.engine.config import EngineConfig

STEP_BYTES = 256 << 20
STEP_SHARE = 16
"""After a load that ran out of memory, the next plan takes so much less: at least STEP_BYTES, and a sixteenth of a large plan."""


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """One device under a plan; sizes in bytes, None unknown."""

    name: str
    kind: Kind
    description: str
    total_bytes: int | None
    free_bytes: int | None
    room_bytes: int | None
    """The most that a plan may take here, draft included."""
    weights_bytes: int = 0
    """With adapters and projector."""
    mapped_bytes: int = 0
    """The part of the weights that stays in the mapped file: it must not fit, but is read again and again where it does not."""
    kv_bytes: int = 0
    compute_bytes: int = 0
    """Buffers for activations and logits."""
    draft_bytes: int = 0
    """All that the draft model takes."""
    overhead_bytes: int = 0
    """What the backend, or the worker process, takes beyond these."""
    reserve_bytes: int = 0
    """Stays free."""
    other_bytes: int = 0
    """Taken by others."""
    n_layers: int = 0
    """Layers here, the output counted as one."""
    read_bytes: int = 0
    """Read for each token."""

    @property
    def planned_bytes(self) -> int:
        """What the plan takes."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.draft_bytes

    @property
    def anonymous_bytes(self) -> int:
        """The part that cannot go back to a file."""
        return self.planned_bytes - self.mapped_bytes

    def to_json(self) -> dict[str, Any]:
        names = (
            *("name", "kind", "description", "total_bytes", "free_bytes", "room_bytes", "n_layers", "weights_bytes", "mapped_bytes"),
            *("kv_bytes", "compute_bytes", "draft_bytes", "overhead_bytes", "reserve_bytes", "other_bytes"),
            "read_bytes",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Draft:
    """How the draft model is loaded beside."""

    shape: Shape
    n_draft: int
    devices: tuple[str, ...]
    """Where its layers lie."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another plan for the same model, or for another file of it."""

    summary: str
    """Such as `32k context with q8_0 KV, about 38 tokens/s`."""
    wishes: Mapping[str, Any]
    """Fields of Wishes that lead to it; empty where another file is meant."""
    n_ctx: int
    n_gpu_layers: int
    type_k: str
    type_v: str
    decode_tps: tuple[float, float] | None
    quant: str = ""
    """Of the other file."""
    size_bytes: int = 0
    """Of the other file."""
    reference: str = ""
    """What `localllm pull` takes to fetch it."""

    def to_json(self) -> dict[str, Any]:
        return {
            "summary": self.summary,
            "wishes": dict(self.wishes),
            "n_ctx": self.n_ctx,
            "n_gpu_layers": self.n_gpu_layers,
            "type_k": self.type_k,
            "type_v": self.type_v,
            "decode_tps": _pair(self.decode_tps),
            "quant": self.quant,
            "size_bytes": self.size_bytes,
            "reference": self.reference,
        }


@dataclass(frozen=True, slots=True)
class Drift:
    """Where a dry run differs from the formulas: a gap in what we know of llama.cpp."""

    device: str
    part: Literal["weights", "kv"]
    formula_bytes: int
    dry_run_bytes: int

    def __str__(self) -> str:
        return f"{self.part} on {self.device}: {self.formula_bytes:,} bytes by formula, {self.dry_run_bytes:,} by dry run"

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("device", "part", "formula_bytes", "dry_run_bytes")}


Again = Callable[[Mapping[str, int]], "LoadPlan | None"]
"""Plans once more, taking no more of each named device than said."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How to load one model on one machine."""

    shape: Shape
    n_seq: int
    """Requests decoded at once."""
    n_resident: int
    draft: Draft | None
    devices: tuple[DevicePlan, ...]
    """The accelerators in llama.cpp's order, then the RAM (`CPU`)."""
    decode_tps: tuple[float, float] | None
    """Tokens per second of one answer, low and high; None where nothing is known of the device."""
    reasons: tuple[str, ...]
    """Sentences, the most important first."""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What the figures rest on."""
    alternatives: tuple[Alternative, ...] = ()
    n_cpu_moe: int = 0
    """Of so many first layers the experts stay on the CPU; `shape.overrides` says so to llama.cpp."""
    given_up: tuple[str, ...] = ()
    """What was sacrificed to make it fit, the least first."""
    doubt: str = ""
    """Why only a dry run can tell the exact bytes; empty when the figures are exact."""
    confirmed: bool = False
    """Whether the bytes are a dry run's."""
    drift: tuple[Drift, ...] = ()
    again: Again | None = field(default=None, repr=False, compare=False)

    def device(self, name: str) -> DevicePlan:
        """The device of that name; raises KeyError."""
        return {device.name: device for device in self.devices}[name]

    def engine_options(self) -> dict[str, Any]:
        """The fields of EngineConfig that say how to load."""
        shape = self.shape
        return {
            "n_ctx": shape.n_ctx,
            "n_seq": self.n_seq,
            "n_resident": self.n_resident,
            "n_batch": shape.n_batch,
            "n_ubatch": shape.n_ubatch,
            "n_draft": 0 if self.draft is None else self.draft.n_draft,
            "n_threads": shape.n_threads,
            "n_gpu_layers": shape.n_gpu_layers,
            "tensor_split": shape.tensor_split,
            "main_gpu": shape.main_gpu,
            "split_mode": shape.split_mode,
            "overrides": shape.overrides,
            "type_k": shape.type_k,
            "type_v": shape.type_v,
            "flash_attn": shape.flash_attn,
            "swa_full": shape.swa_full,
            "load_mode": shape.load_mode,
        }

    def engine_config(self, path: str | Path, **options: Any) -> EngineConfig:
        """What the worker is given to load the file at `path`; `options` are the fields that a plan leaves open."""
        from localllm.engine.config import EngineConfig

        return EngineConfig(model_path=str(path), **{**self.engine_options(), **options})

    def step_down(self, reason: str) -> LoadPlan | None:
        """The next plan after a load that ran out of memory: it takes clearly less, and says what it gave up for that.

        `reason` is what the engine said; a device named in it is the one to spare, otherwise all accelerators in use are, or
        the RAM where there are none. None when nothing is left to give up, or the user wished that nothing is.
        """
        if self.again is None:
            return None
        used = [device for device in self.devices if device.kind != "cpu" and device.planned_bytes] or [self.devices[-1]]
        named = [device for device in used if device.name in reason]
        limits = {device.name: _less(device.planned_bytes) for device in named or used}
        plan = self.again(limits)
        if plan is None:
            return None
        gone = [sentence for sentence in plan.given_up if sentence not in self.given_up]
        why = (
            f"The load before ran out of memory ({reason.strip()}), so this one takes less: {'; '.join(gone) or 'every buffer is smaller'}."
        )
        return replace(plan, reasons=(why, *plan.reasons))

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys."""
        options = self.engine_options()
        names = (
            *("n_gpu_layers", "tensor_split", "main_gpu", "split_mode", "overrides", "n_ctx", "type_k", "type_v", "flash_attn"),
            *("swa_full", "n_batch", "n_ubatch"),
        )
        return {
            **{name: _plain(options[name]) for name in names},
            "n_seq": self.n_seq,
            "n_resident": self.n_resident,
            "n_seq_max": self.shape.n_seq_max,
            "n_outputs": self.shape.n_outputs,
            "n_threads": self.shape.n_threads,
            "load_mode": self.shape.load_mode,
            "n_cpu_moe": self.n_cpu_moe,
            "draft": self._draft_json(),
            "devices": [device.to_json() for device in self.devices],
            "decode_tps": _pair(self.decode_tps),
            "confirmed": self.confirmed,
            "drift": [each.to_json() for each in self.drift],
            "exact": not self.doubt,
            "doubt": self.doubt,
            "reasons": list(self.reasons),
            "given_up": list(self.given_up),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "alternatives": [alternative.to_json() for alternative in self.alternatives],
        }

    def _draft_json(self) -> dict[str, Any] | None:
        if self.draft is None:
            return None
        shape = self.draft.shape
        return {
            "n_draft": self.draft.n_draft,
            "n_ctx": shape.n_ctx,
            "n_gpu_layers": shape.n_gpu_layers,
            "type_k": shape.type_k,
            "type_v": shape.type_v,
            "devices": list(self.draft.devices),
        }


def _less(n_bytes: int) -> int:
    return max(0, n_bytes - max(STEP_BYTES, n_bytes // STEP_SHARE))


def _pair(values: tuple[float, float] | None) -> list[float] | None:
    return None if values is None else [round(value, 2) for value in values]


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    return [_plain(each) for each in value] if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownVariableType]
