"""What else there is: two or three other plans beside the one chosen, and when nothing fits, what would.

Candidates are looked at next to the plan, mostly without a new search, so that a screen can plan anew at every key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from localllm.errors import DoesNotFit, UsageError
from localllm.plan import explain
from localllm.plan.fitter import Candidate
from localllm.plan.ladder import CONTEXT_STEP, FLOOR_CELLS
from localllm.plan.loadplan import Alternative
from localllm.plan.question import Found, OtherQuant, Question, find
from localllm.plan.search import NothingFits, first_true
from localllm.plan.spec import KVType

MOST = 3
CONTEXTS = tuple(1 << power for power in range(24, 11, -1))
"""Round sizes, the largest first."""
Q8: tuple[KVType, KVType] = ("q8_0", "q8_0")
F16: tuple[KVType, KVType] = ("f16", "f16")


def alternatives(question: Question, found: Found) -> tuple[Alternative, ...]:
    """Other plans worth a thought: all layers on the card, a longer context, a finer cache; each is what its wishes lead to."""
    seen = {_essence(found.candidate)}
    others: list[Alternative] = []
    if (smaller := _smaller_file(question, found)) is not None:
        others.append(smaller)
    for offer in (_whole_on_cards, _longer_context, _finer_cache):
        for wishes in offer(question, found):
            other = _find(question.with_wishes(**wishes)) if len(others) < MOST else None
            if other is not None and _essence(other) not in seen:
                seen.add(_essence(other))
                others.append(_alternative(question, found, wishes, other))
    return tuple(others)


def refusal(question: Question, least: Candidate) -> DoesNotFit:
    """The error for a model that does not fit: what is missing where, which wish is to blame, what would fit."""
    fitter = question.fitter()
    missing = dict(least.missing)
    blamed = list(_blamed(question))
    files = [quant for quant in _by_size(question) if _file_fits(least, quant, question)]
    offers = [f"{text} would fit" for _, text in blamed]
    if files:
        offers.append(f"{files[0].name} ({explain.size(files[0].size_bytes)}) would fit")
    elif not blamed:
        offers.append(f"a model of about {explain.size(_affordable_bytes(least, question))} would fit")
    if question.wishes.strict:
        offers.append("without --strict something may be given up for it")
    return DoesNotFit(
        explain.refusal(least, fitter.budgets, _name(question)),
        hint="; ".join(offers),
        missing_bytes=missing,
        needed_bytes=dict(least.need),
        room_bytes={pool.name: pool.room_bytes for pool in fitter.budgets.pools},
        wishes=[wish for wish, _ in blamed],
        would_fit=[quant.name for quant in files],
    )


def _smaller_file(question: Question, found: Found) -> Alternative | None:
    """The best other file that would lie on the cards as a whole."""
    whole = found.fitter.candidate(_whole(question, found)) if found.partly else None
    best = None if whole is None else next((quant for quant in _by_size(question) if _file_fits(whole, quant, question)), None)
    if whole is None or best is None:
        return None
    other = _alternative(question, found, {}, whole)
    tps = other.decode_tps
    if tps is not None:
        faster = question.header.weights_bytes / best.size_bytes
        tps = tps[0] * faster, tps[1] * faster
    text = explain.summary(whole, found.candidate, question.footprint.architecture.n_layers, tps)
    text = f"{best.name} ({explain.size(best.size_bytes)}): {text}"
    return replace(other, summary=text, decode_tps=tps, quant=best.name, size_bytes=best.size_bytes, reference=best.reference)


def _whole_on_cards(question: Question, found: Found) -> Iterator[dict[str, Any]]:
    """All layers on the cards, with what the user fixed in the way of that."""
    if not found.partly or question.wishes.n_gpu_layers is not None or not question.wishes.n_ctx:
        return
    whole = _whole(question, found)
    for n_ctx in CONTEXTS:
        if n_ctx < whole.n_ctx and found.fitter.candidate(replace(whole, n_ctx=n_ctx)).fits:
            yield {"n_ctx": n_ctx}
            return


def _longer_context(question: Question, found: Found) -> Iterator[dict[str, Any]]:
    """The longest context that fits beside the same layers, and the longest with a quantised cache."""
    choice, fitter = found.candidate.choice, found.fitter
    trained = fitter.footprint.architecture.n_ctx_train
    longer = [n for n in dict.fromkeys((trained, *CONTEXTS)) if found.candidate.shape.n_ctx < n <= trained]
    best = 0
    for kv in dict.fromkeys((choice.kv, Q8)):
        if kv not in found.ladder.kv:
            continue
        fitting = (n for n in longer if n > best and fitter.candidate(replace(choice, n_ctx=n, kv=kv)).fits)
        n_ctx = next(fitting, None)
        if n_ctx is not None:
            best = n_ctx
            yield {"n_ctx": n_ctx, **_kv_wish(question, kv)}


def _finer_cache(question: Question, found: Found) -> Iterator[dict[str, Any]]:
    """The cache in f16, where the plan quantised it."""
    if found.candidate.choice.kv != F16 == found.ladder.kv[0]:
        yield {"n_ctx": found.candidate.choice.n_ctx, "type_k": "f16", "type_v": "f16"}


def _find(question: Question) -> Candidate | None:
    try:
        return find(question).candidate
    except (NothingFits, UsageError):
        return None


def _alternative(question: Question, found: Found, wishes: dict[str, Any], candidate: Candidate) -> Alternative:
    shape = candidate.shape
    tps = question.decode_tps(candidate)
    return Alternative(
        summary=explain.summary(candidate, found.candidate, question.footprint.architecture.n_layers, tps),
        wishes=wishes,
        n_ctx=shape.n_ctx,
        n_gpu_layers=shape.n_gpu_layers,
        type_k=shape.type_k,
        type_v=shape.type_v,
        decode_tps=tps,
    )


def _blamed(question: Question) -> Iterator[tuple[str, str]]:
    """(field of Wishes, the flag that would fit instead), for each wish that alone is in the way."""
    wishes = question.wishes
    everything = question.footprint.architecture.n_layers + 1
    if wishes.n_ctx:
        least = min(FLOOR_CELLS, wishes.n_ctx) // CONTEXT_STEP * CONTEXT_STEP
        most = _most(question, "n_ctx", range(wishes.n_ctx // CONTEXT_STEP * CONTEXT_STEP, least - 1, -CONTEXT_STEP))
        if most is not None:
            yield "n_ctx", f"-c {most}"
    if wishes.n_gpu_layers:
        asked = everything if wishes.n_gpu_layers < 0 else min(wishes.n_gpu_layers, everything)
        most = _most(question, "n_gpu_layers", range(asked - 1, -1, -1))
        if most is not None:
            yield "n_gpu_layers", f"-ngl {most}"
    for changes, text in _CHANGES:
        if any(getattr(wishes, name) not in (None, value, (), {}) for name, value in changes.items()) and _find(
            question.with_wishes(**changes)
        ):
            yield next(iter(changes)), text


_CHANGES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"type_k": "q8_0", "type_v": "q8_0"}, "--kv q8_0"),
    ({"n_seq": None}, "a smaller -np"),
    ({"n_ubatch": None}, "a smaller -ub"),
    ({"n_cpu_moe": None}, "another -ncmoe"),
    ({"overrides": ()}, "leaving out -ot"),
    ({"tensor_split": ()}, "leaving out -ts"),
    ({"gpu_memory": {}}, "a higher --gpu-memory"),
    ({"reserve_bytes": None}, "a smaller --reserve"),
    ({"swa_full": None}, "leaving out --swa-full"),
    ({"draft": None}, "leaving out the draft model"),
)
"""What to wish instead, and what that is called."""


def _most(question: Question, name: str, values: range) -> int | None:
    """The first of falling values of a wish with which the rest fits; None when none does."""
    at = first_true(range(len(values)), lambda i: _find(question.with_wishes(**{name: values[i]})) is not None, default=-1)
    return None if at < 0 else values[at]


def _name(question: Question) -> str:
    header = question.header
    return header.name or (header.files[0].name if header.files else "")


def _whole(question: Question, found: Found) -> Any:
    """The plan's choice with everything on the cards."""
    return replace(found.candidate.choice, n_gpu_layers=question.footprint.architecture.n_layers + 1, n_cpu_moe=0)


def _by_size(question: Question) -> list[OtherQuant]:
    """The other files that are smaller than this one, the largest first."""
    own = question.header.weights_bytes
    return sorted((quant for quant in question.quants if 0 < quant.size_bytes < own), key=lambda quant: -quant.size_bytes)


def _file_fits(candidate: Candidate, quant: OtherQuant, question: Question) -> bool:
    """Whether another file would fit where this one's `candidate` does not: each device has weights in proportion."""
    fitter = question.fitter()
    share = quant.size_bytes / question.header.weights_bytes
    weights = fitter.footprint.weights(candidate.shape)
    need = {name: n_bytes - round(weights.on(name) * (1 - share)) for name, n_bytes in candidate.need.items()}
    return not fitter.budgets.shortfalls(need)


def _affordable_bytes(least: Candidate, question: Question) -> int:
    """About how large a file of this kind may be."""
    return max(0, question.header.weights_bytes - sum(least.missing.values()))


def _kv_wish(question: Question, kv: tuple[KVType, KVType]) -> dict[str, Any]:
    return {} if kv == F16 or question.wishes.type_k else {"type_k": kv[0], "type_v": kv[1]}


def _essence(candidate: Candidate) -> tuple[Any, ...]:
    """What makes plans differ to people."""
    shape = candidate.shape
    return shape.n_ctx, shape.type_k, shape.type_v, shape.n_gpu_layers, candidate.choice.n_cpu_moe
