"""Finding the plan that gives up least: the heaviest sacrifice is made as small as it can be, then the next, down to the lightest.

Each rung of the ladder is a binary search, since every step down takes less of the accelerators; so a plan costs some dozens of
looks at the formulas. Knows bytes and rooms; what a rung means to people is explain.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from localllm.plan.budget import RAM, Budgets
from localllm.plan.fitter import Candidate, Fitter
from localllm.plan.ladder import ORDER, Ladder, Rung, larger_contexts

GROWTH, GROWTH_IN_RAM = 2, 4
"""An automatic context may take one part in so many of what would stay free; the RAM is other programs', too."""
CPU_CELLS = 32_768
"""Without a card an automatic context does not grow beyond this: to read so much would take the processor many minutes."""


class NothingFits(Exception):
    """Even with everything given up; `least` is what came closest."""

    def __init__(self, least: Candidate) -> None:
        super().__init__()
        self.least = least


def search(fitter: Fitter, ladder: Ladder) -> Candidate:
    """The candidate that gives up least. Raises NothingFits.

    Each type of the cache is searched for itself: a quantised one is smaller, but a card unpacks it into a buffer that can be larger
    than what was saved on the layers it has.
    """
    found: list[dict[Rung, int]] = []
    nothing: NothingFits | None = None
    for i, kv in enumerate(ladder.kv):
        try:
            found.append({**_descend(fitter, replace(ladder, kv=(kv,))), "kv": i})
        except NothingFits as none:
            nothing = none
        else:
            if not any(found[-1][rung] for rung in ORDER[ORDER.index("kv") :]):
                break  # whatever else it gave up is lighter than another type
    if not found:
        assert nothing is not None
        raise nothing
    return fitter.candidate(ladder.choice(min(found, key=lambda at: [at[rung] for rung in reversed(ORDER)])))


def _descend(fitter: Fitter, ladder: Ladder) -> dict[Rung, int]:
    """How far down each rung has to be gone. Raises NothingFits."""
    at: dict[Rung, int] = {rung: ladder.worst(rung) for rung in ORDER}
    layers: Rung = "n_gpu_layers"

    def candidate(places: Mapping[Rung, int]) -> Candidate:
        return fitter.candidate(ladder.choice({**at, **places}))

    def on_cards(tried: Candidate) -> bool:
        return not tried.refusal and not (tried.missing.keys() - {RAM})

    def possible(places: Mapping[Rung, int]) -> bool:
        tried = candidate(places)
        if not on_cards(tried) or not tried.missing:
            return tried.fits
        # The RAM is full of experts: fewer of them may do for the cards as well.
        return experts > 0 and candidate({**places, "n_cpu_moe": least_experts(places)}).fits

    def least_experts(places: Mapping[Rung, int]) -> int:
        return first_true(range(experts), lambda i: on_cards(candidate({**places, "n_cpu_moe": i})), default=experts)

    experts = at["n_cpu_moe"]
    # What leaves the cards goes to the RAM: as few layers as the cards allow is also the best for the RAM.
    at[layers] = first_true(range(at[layers]), lambda i: on_cards(candidate({layers: i})), default=at[layers])
    if not possible({}):
        raise NothingFits(candidate({"n_cpu_moe": least_experts({})} if experts else {}))
    for rung in reversed(ORDER[: ORDER.index(layers)]):
        if rung == "n_cpu_moe":
            at[rung] = least_experts({})
            experts = 0
        else:
            at[rung] = first_true(range(at[rung]), lambda i, rung=rung: possible({rung: i}), default=at[rung])
    return at


def grown(fitter: Fitter, ladder: Ladder, candidate: Candidate) -> Candidate:
    """`candidate` with a larger automatic context, as long as each memory keeps most of what would stay free.

    Only where nothing had to be given up, and where all memories are known.
    """
    given_up = any(getattr(candidate.choice, rung) != getattr(ladder, rung)[0] for rung in ORDER if rung != "gpus")
    before = free_bytes(fitter.budgets, candidate.need)
    if fitter.wishes.n_ctx or given_up or before is None:
        return candidate
    best = candidate
    for n_ctx in larger_contexts(fitter.footprint.architecture, candidate.choice.n_ctx):
        tried = fitter.candidate(replace(candidate.choice, n_ctx=n_ctx))
        after = free_bytes(fitter.budgets, tried.need)
        if not tried.fits or after is None or (n_ctx > CPU_CELLS and not tried.shape.n_gpu_layers):
            break
        if any((left - after[pool]) * (GROWTH_IN_RAM if pool == RAM else GROWTH) > left for pool, left in before.items()):
            break
        best = tried
    return best


def free_bytes(budgets: Budgets, need: Mapping[str, int]) -> dict[str, int] | None:
    """Pool -> what stays free of its room, of pools in use; None when one of them is unknown."""
    left: dict[str, int] = {}
    for pool in budgets.pools:
        taken = sum(need.get(name, 0) for name in pool.devices)
        if taken:
            if pool.room_bytes is None:
                return None
            left[pool.name] = pool.room_bytes - taken
    return left


def first_true(places: range, holds: Callable[[int], bool], default: int) -> int:
    """The first of `places` for which `holds`, which stays true once it is; `default` when none does.

    Only the very first may hold without the next: a model that lies on the cards as a whole needs no room for copies from the RAM.
    """
    low, high = places.start, places.stop
    if low < high and holds(low):
        return low
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low if low < places.stop else default
