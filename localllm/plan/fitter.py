"""What a choice takes: the options of the ladder turned into llama.cpp's terms, layers counted out over the cards, and summed up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from localllm.plan.budget import Budgets
from localllm.plan.compute import ComputeModel
from localllm.plan.footprint import Footprint
from localllm.plan.ladder import OFF, Choice
from localllm.plan.spec import CPU, Amount, Shape, SplitMode, Wishes
from localllm.plan.weights import experts_on_cpu

DRAFT_ROWS = 8
"""Drafted at a time where the user does not say."""
EVEN_STEPS = 5
"""Halvings in the search for an even load of several cards."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One choice in llama.cpp's terms, with what it takes."""

    choice: Choice
    shape: Shape
    draft: Shape | None
    need: Mapping[str, int]
    """Bytes on each device, draft included."""
    missing: Mapping[str, int]
    """Pool -> bytes that it falls short by; empty when it fits."""
    refusal: str = ""
    """Why llama.cpp would not take it, whatever the memory."""

    @property
    def fits(self) -> bool:
        return not self.missing and not self.refusal


class Fitter:
    """What choices take on this machine; each is looked up once."""

    def __init__(self, compute: ComputeModel, draft: ComputeModel | None, budgets: Budgets, wishes: Wishes, n_threads: int) -> None:
        self.compute, self.footprint = compute, compute.footprint
        self.draft_compute, self.draft = draft, None if draft is None else draft.footprint
        self.budgets = budgets
        self.wishes = wishes
        self.n_threads = n_threads
        self.names = [device.name for device in budgets.devices]
        self.rooms = {device.name: device.room_bytes for device in budgets.devices}
        self._known: dict[Choice, Candidate] = {}
        self._counts: dict[str, int] = {}
        """Layers that a card took last, which is near what it takes next."""

    def candidate(self, choice: Choice) -> Candidate:
        """`choice` filled in: of several cards each takes as many layers as it holds, in order."""
        known = self._known.get(choice)
        if known is None:
            known = self._known[choice] = self._fill(choice, 1.0)
        return known

    def evened(self, candidate: Candidate) -> Candidate:
        """The same with all cards filled to about the same share, where several hold the whole model."""
        if (
            len(candidate.choice.gpus) < 2
            or self.wishes.tensor_split
            or candidate.shape.n_gpu_layers <= self.footprint.architecture.n_layers
        ):
            return candidate
        low, high, best = 0.0, 1.0, candidate
        for _ in range(EVEN_STEPS):
            share = (low + high) / 2
            tried = self._fill(candidate.choice, share)
            if tried.fits and self._within(tried, share):
                high, best = share, tried
            else:
                low = share
        return best

    def parts(self, shape: Shape) -> dict[str, tuple[int, int, int]]:
        """Device -> bytes of weights, cache and buffers, of the model with its adapters and its projector."""
        return _by_device(self._weights(shape), self.footprint.kv(shape), self._buffers(shape))

    def _weights(self, shape: Shape) -> Amount:
        weights = self.footprint.weights(shape)
        for adapter in self.wishes.adapters:
            weights += self.footprint.adapter(adapter, shape)
        if self.wishes.projector is not None:
            weights += self.footprint.projector(self.wishes.projector, shape)
        return weights

    def _buffers(self, shape: Shape) -> Amount:
        return self.compute.amount(shape) + self.footprint.output(shape)

    def draft_parts(self, shape: Shape) -> dict[str, tuple[int, int, int]]:
        """The same of the draft model."""
        if self.draft is None or self.draft_compute is None:
            return {}
        buffers = self.draft_compute.amount(shape) + self.draft.output(shape)
        return _by_device(self.draft.weights(shape), self.draft.kv(shape), buffers)

    def _fill(self, choice: Choice, share: float) -> Candidate:
        shape = self._shape(choice)
        draft = self._draft_shape(choice)
        taken = {name: sum(parts) for name, parts in self.draft_parts(draft).items()} if draft is not None else {}
        if len(choice.gpus) > 1 and not self.wishes.tensor_split and shape.n_gpu_layers:
            shape = replace(shape, tensor_split=self._split(choice, shape, taken, share))
        need = dict(taken)
        for name, parts in self.parts(shape).items():
            need[name] = need.get(name, 0) + sum(parts)
        if self.wishes.load_mode == "mmap":
            # The user asked for pages that may go back to the file: then they need not all fit.
            need[CPU] -= mapped_bytes(self.footprint, shape)
        refusal = self.footprint.refusal(shape) or (self.draft.refusal(draft) if self.draft and draft else "")
        return Candidate(choice, shape, draft, need, self.budgets.shortfalls(need), refusal)

    def _shape(self, choice: Choice) -> Shape:
        wishes = self.wishes
        mode, main, split = self._devices(choice)
        return self.footprint.architecture.shape(
            choice.n_ctx,
            n_seq=choice.n_seq,
            n_resident=choice.n_resident,
            n_draft=n_draft(wishes) if choice.draft else 0,
            n_batch=wishes.n_batch or 512,
            n_ubatch=choice.n_ubatch,
            n_gpu_layers=max(choice.n_gpu_layers, 0),
            tensor_split=split,
            main_gpu=main,
            split_mode=mode,
            overrides=(*wishes.overrides, *experts_on_cpu(choice.n_cpu_moe)),
            type_k=choice.kv[0],
            type_v=choice.kv[1],
            flash_attn=wishes.flash_attn or "auto",
            swa_full=bool(wishes.swa_full),
            n_threads=self.n_threads,
            load_mode=wishes.load_mode or "auto",
        )

    def _devices(self, choice: Choice) -> tuple[SplitMode, int, tuple[float, ...]]:
        """(split_mode, main_gpu, tensor_split) for the cards of `choice`."""
        wishes = self.wishes
        if choice.n_gpu_layers == OFF:
            return "none", -1, ()
        main = wishes.main_gpu if wishes.main_gpu is not None else (self.names.index(choice.gpus[0]) if len(choice.gpus) == 1 else 0)
        if wishes.tensor_split:
            split = (*wishes.tensor_split, *(0.0 for _ in self.names[len(wishes.tensor_split) :]))
            return wishes.split_mode or "layer", main, split
        if len(choice.gpus) == 1:
            mode = wishes.split_mode or "none"
            return mode, main, () if mode == "none" else self._shares({choice.gpus[0]: 1})
        # Shares only until the layers are counted out.
        return wishes.split_mode or "layer", main, self._shares(dict.fromkeys(choice.gpus, 1))

    def _shares(self, by_device: Mapping[str, int]) -> tuple[float, ...]:
        return tuple(float(by_device.get(name, 0)) for name in self.names)

    def _split(self, choice: Choice, shape: Shape, taken: Mapping[str, int], share: float) -> tuple[float, ...]:
        """Layers for each card: as many as fit into `share` of its room, in order; the last card takes the rest."""
        split = shape.tensor_split
        for _ in range(2):  # buffers hardly depend on the split: those of a near one do, and the second look is at the very one
            buffers = self._buffers(replace(shape, tensor_split=split))
            counts: dict[str, int] = {}
            left = shape.n_gpu_layers
            for name, following in zip(choice.gpus, choice.gpus[1:], strict=False):
                room = self.rooms[name]
                if room is None:  # nobody knows: an equal share
                    counts[name] = left // (len(choice.gpus) - len(counts))
                else:
                    spare = int(room * share) - taken.get(name, 0) - buffers.on(name)
                    counts[name] = self._most_layers(name, following, counts, left, shape, spare)
                left -= counts[name]
            counts[choice.gpus[-1]] = left
            before, split = split, self._shares(counts)
            if before == split:
                break
        return split

    def _most_layers(self, name: str, following: str, counts: Mapping[str, int], left: int, shape: Shape, spare: int) -> int:
        """The largest number of layers whose weights and cache `name` holds in `spare` bytes; `following` has the others meanwhile."""

        def fits(count: int) -> bool:
            tried = replace(shape, tensor_split=self._shares({**counts, name: count, following: left - count}))
            return self._weights(tried).on(name) + self.footprint.kv(tried).on(name) <= spare

        count = self._counts[name] = last_true(left, fits, near=self._counts.get(name, left))
        return count

    def _within(self, candidate: Candidate, share: float) -> bool:
        return all(candidate.need.get(name, 0) <= room * share for name in candidate.choice.gpus if (room := self.rooms[name]) is not None)

    def _draft_shape(self, choice: Choice) -> Shape | None:
        if self.draft is None or not choice.draft:
            return None
        on_gpu = choice.n_gpu_layers > 0 and bool(choice.gpus)
        roomiest = max(choice.gpus, key=lambda name: self.rooms[name] or 0) if on_gpu else ""
        shape = self.draft.architecture.shape(
            choice.n_ctx,
            n_seq=choice.n_seq,
            n_resident=choice.n_resident,
            n_ubatch=choice.n_ubatch,
            n_gpu_layers=-1 if on_gpu else 0,
            split_mode="none" if self.names else "layer",
            main_gpu=self.names.index(roomiest) if on_gpu else (-1 if self.names else 0),
            type_k=choice.kv[0],
            type_v=choice.kv[1],
            flash_attn=self.wishes.flash_attn or "auto",
            n_threads=self.n_threads,
        )
        return replace(shape, type_k="f16", type_v="f16") if self.draft.refusal(shape) else shape


def n_draft(wishes: Wishes) -> int:
    """Rows drafted for a sequence in one batch."""
    return DRAFT_ROWS if wishes.n_draft is None else wishes.n_draft


def mapped_bytes(footprint: Footprint, shape: Shape) -> int:
    """The part of the CPU's weights that stays in the mapped file."""
    if not footprint.maps_file(shape):
        return 0
    return footprint.weights(shape).on(CPU) - footprint.repacked_bytes(shape)


def last_true(most: int, holds: Callable[[int], bool], near: int) -> int:
    """The largest number up to `most` for which `holds`, as it does for all below it and for 0; looked for around `near`."""
    low, high = 0, most + 1  # holds(low), and high is out of reach
    probe, step = min(near, most), 1
    while high - low > 1:
        if holds(probe):
            low, probe = probe, probe + step
        else:
            high, probe = probe, probe - step
        step *= 2
        if not low < probe < high:
            probe, step = (low + high) // 2, 1
    return low


def _by_device(weights: Amount, kv: Amount, buffers: Amount) -> dict[str, tuple[int, int, int]]:
    names = dict.fromkeys((*weights.by_device, *kv.by_device, *buffers.by_device, CPU))
    return {name: (weights.on(name), kv.on(name), buffers.on(name)) for name in names}
