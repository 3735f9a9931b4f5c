"""The order of sacrifice: what may be given up so that a model fits, in which order, and how far the user lets it go.

Data: the rungs from the lightest to the heaviest, and for one model on one machine the options of each, the best first. A value that
the user fixed is the only option of its rung.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from localllm.plan.architecture import DEFAULT_CELLS, Architecture
from localllm.plan.budget import Budget, Budgets
from localllm.plan.spec import KVType, Wishes

Rung = Literal["gpus", "n_resident", "n_seq", "n_ubatch", "n_cpu_moe", "n_ctx", "kv", "draft", "n_gpu_layers"]

ORDER: tuple[Rung, ...] = ("gpus", "n_resident", "n_seq", "n_ubatch", "n_cpu_moe", "n_ctx", "kv", "draft", "n_gpu_layers")
"""Lightest first. A further graphics card comes first of all: it costs no quality and next to no speed, everything below costs one."""
FREE = frozenset[Rung]({"gpus", "n_resident", "n_seq", "n_ubatch"})
"""No answer gets worse by these, nor slower to write; only more of them at once, or reading a long prompt."""

RESIDENTS = (24, 8, 3, 0)
COSTLY_RESIDENTS = (4, 0)
"""Where each sequence has a state or a sliding window of its own: two dozen of them would take more than the whole context."""
SEQUENCES = (8, 4, 2, 1)
MICRO_BATCHES = (512, 256, 128)
FLOOR_CELLS = 4096
"""An automatic context is not made smaller than this."""
CONTEXT_STEP = 256
QUANTISED_KV: KVType = "q8_0"
"""The only type that is chosen unasked: about half the size for a loss that few tests can see."""
OFF = -1
"""For n_gpu_layers: no graphics card takes part at all, not even in reading prompts."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One option of every rung."""

    gpus: tuple[str, ...]
    """Devices that share the layers, in llama.cpp's order."""
    n_resident: int
    n_seq: int
    n_ubatch: int
    n_cpu_moe: int
    n_ctx: int
    kv: tuple[KVType, KVType]
    draft: bool
    n_gpu_layers: int
    """0 to n_layers + 1, or OFF."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """The options of every rung, the best first."""

    gpus: tuple[tuple[str, ...], ...]
    n_resident: tuple[int, ...]
    n_seq: tuple[int, ...]
    n_ubatch: tuple[int, ...]
    n_cpu_moe: tuple[int, ...]
    n_ctx: tuple[int, ...]
    kv: tuple[tuple[KVType, KVType], ...]
    draft: tuple[bool, ...]
    n_gpu_layers: tuple[int, ...]

    def worst(self, rung: Rung) -> int:
        """The index of a rung's last option."""
        return len(getattr(self, rung)) - 1

    def choice(self, index: dict[Rung, int]) -> Choice:
        """The options at the given places."""
        return Choice(**{rung: getattr(self, rung)[index[rung]] for rung in ORDER})


def ladder(architecture: Architecture, budgets: Budgets, wishes: Wishes) -> Ladder:
    """What there is to choose from for one model on one machine."""
    layers = _layers(architecture, budgets, wishes)
    sequences = _fixed(wishes.n_seq, SEQUENCES)
    options = Ladder(
        gpus=_gpus(budgets, wishes) if layers != (0,) or wishes.n_gpu_layers is not None else ((),),
        n_resident=_fixed(wishes.n_resident, COSTLY_RESIDENTS if architecture.windowed or architecture.recurrent else RESIDENTS),
        n_seq=sequences,
        n_ubatch=_micro_batches(wishes),
        n_cpu_moe=_experts(architecture, layers, wishes),
        n_ctx=_contexts(architecture, sequences[0], wishes),
        kv=_kv_types(architecture, wishes),
        draft=(True, False) if wishes.draft is not None else (False,),
        n_gpu_layers=layers,
    )
    if not wishes.strict:
        return options
    return Ladder(**{rung: getattr(options, rung) if rung in FREE else getattr(options, rung)[:1] for rung in ORDER})


def comfortable_cells(architecture: Architecture, n_seq: int) -> int:
    """The automatic context, in cells for all sequences together, before it grows into memory that would lie idle."""
    return min((architecture.n_ctx_train or DEFAULT_CELLS) * n_seq, DEFAULT_CELLS)


def larger_contexts(architecture: Architecture, n_ctx: int) -> list[int]:
    """What an automatic context may grow to: doublings, and the length that the model was trained for."""
    most = architecture.n_ctx_train
    sizes: list[int] = []
    while n_ctx * 2 < most:
        n_ctx *= 2
        sizes.append(n_ctx)
    return [*sizes, most] if most > n_ctx else sizes


def known_devices(budgets: Budgets) -> list[Budget]:
    """Accelerators whose memory somebody knows, or that the user put a limit on; the roomiest first."""
    known = [device for device in budgets.devices if device.room_bytes is not None]
    return sorted(known, key=lambda device: -(device.room_bytes or 0))


def _gpus(budgets: Budgets, wishes: Wishes) -> tuple[tuple[str, ...], ...]:
    """Sets of devices, the smallest first."""
    names = [device.name for device in budgets.devices]
    if wishes.tensor_split:
        return (tuple(name for name, share in zip(names, wishes.tensor_split, strict=False) if share),)
    usable = [device.name for device in known_devices(budgets)]
    if wishes.n_gpu_layers and not usable:
        usable = names
    if wishes.main_gpu is not None and 0 <= wishes.main_gpu < len(names):
        main = names[wishes.main_gpu]
        usable = [main, *(name for name in usable if name != main)]
    if not usable:
        return ((),)
    if wishes.split_mode == "none":
        return ((usable[0],),)
    first = len(usable) if wishes.split_mode == "row" else 1
    return tuple(tuple(sorted(usable[:count], key=names.index)) for count in range(first, len(usable) + 1))


def _layers(architecture: Architecture, budgets: Budgets, wishes: Wishes) -> tuple[int, ...]:
    most = architecture.n_layers + 1
    if wishes.n_gpu_layers is not None:
        return (most if wishes.n_gpu_layers < 0 else min(wishes.n_gpu_layers, most),)
    if wishes.tensor_split or wishes.main_gpu is not None or wishes.split_mode is not None:
        return tuple(range(most, -1, -1)) if budgets.devices else (0,)
    return (*range(most, -1, -1), OFF) if known_devices(budgets) else (OFF if budgets.devices else 0,)


def _experts(architecture: Architecture, layers: tuple[int, ...], wishes: Wishes) -> tuple[int, ...]:
    if wishes.n_cpu_moe is not None:
        return (min(wishes.n_cpu_moe, architecture.n_layers),)
    return tuple(range(architecture.n_layers + 1)) if architecture.n_expert and layers[0] > 0 else (0,)


def _contexts(architecture: Architecture, n_seq: int, wishes: Wishes) -> tuple[int, ...]:
    if wishes.n_ctx:
        return (wishes.n_ctx,)
    most = comfortable_cells(architecture, n_seq)
    return tuple(range(most, min(most, FLOOR_CELLS) - 1, -CONTEXT_STEP))


def _kv_types(architecture: Architecture, wishes: Wishes) -> tuple[tuple[KVType, KVType], ...]:
    best: tuple[KVType, KVType] = (wishes.type_k or "f16", wishes.type_v or "f16")
    small: tuple[KVType, KVType] = (wishes.type_k or QUANTISED_KV, wishes.type_v or QUANTISED_KV)
    if architecture.mla and wishes.type_k != wishes.type_v:
        # Keys and values are one there: whichever was fixed fixes both.
        only = wishes.type_k or wishes.type_v or "f16"
        best = small = (only, only)
    return (best, small) if small != best and wishes.flash_attn != "off" else (best,)


def _micro_batches(wishes: Wishes) -> tuple[int, ...]:
    if wishes.n_ubatch is not None:
        return (wishes.n_ubatch,)
    most = wishes.n_batch or MICRO_BATCHES[0]
    return tuple(size for size in MICRO_BATCHES if size <= most) or (most,)


def _fixed(value: int | None, free: tuple[int, ...]) -> tuple[int, ...]:
    return free if value is None else (value,)
