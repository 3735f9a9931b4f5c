"""`plan_load`: from a header, a machine and wishes to a LoadPlan, or a refusal with the numbers. Pure and deterministic.

It puts the parts together: what is there (budget), what a shape takes (footprint, compute), what may be given up (ladder), the least
of it (search), how fast that is (speed), why (explain), what else there is (otherwise).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from localllm.gguf import Header
from localllm.hardware import Hardware
from localllm.plan import explain
from localllm.plan.budget import Budget
from localllm.plan.compute import ComputeModel
from localllm.plan.explain import Situation
from localllm.plan.fitter import mapped_bytes, n_draft
from localllm.plan.footprint import Footprint
from localllm.plan.history import History
from localllm.plan.loadplan import DevicePlan, Draft, LoadPlan
from localllm.plan.otherwise import alternatives, refusal
from localllm.plan.question import Found, OtherQuant, Question, find
from localllm.plan.search import NothingFits
from localllm.plan.spec import CPU, Wishes
from localllm.plan.speed import Reads

NO_HISTORY = History()


def plan_load(
    header: Header,
    hardware: Hardware,
    wishes: Wishes | None = None,
    *,
    history: History = NO_HISTORY,
    model: str = "",
    quants: Sequence[OtherQuant] = (),
    compute: ComputeModel | None = None,
    others: bool = True,
) -> LoadPlan:
    """How to load `header`'s model here, giving up as little as possible of what the user left open.

    `model` is its sha256 or a hash of its header, for measurements of this very model; `quants` are other files of it, for
    suggestions; `compute` is what dry runs told of it, or the one of an earlier call, which saves reading the header again;
    without `others` no alternatives are looked for.
    Raises DoesNotFit, with the bytes missing in each memory and what would fit, and UsageError for wishes that contradict each
    other or the machine.
    """
    if compute is None:
        compute = ComputeModel(Footprint(header, hardware.devices, cpu_features=hardware.cpu_features))
    reads = Reads(header, compute.footprint.architecture)
    question = Question(header, hardware, wishes or Wishes(), history, model, tuple(quants), compute, reads)
    try:
        return _plan(question, others=others)
    except NothingFits as none:
        raise refusal(question, none.least) from None


def _plan(question: Question, *, others: bool) -> LoadPlan:
    """Raises NothingFits and UsageError."""
    found = find(question)
    candidate, choice, fitter = found.candidate, found.candidate.choice, found.fitter
    doubts = _doubts(found)
    situation = Situation(
        candidate=candidate,
        ladder=found.ladder,
        budgets=fitter.budgets,
        wishes=question.wishes,
        footprint=fitter.footprint,
        devices=_devices(question, found),
        decode_tps=question.decode_tps(candidate),
        whole_bytes=_whole_bytes(found),
    )
    return LoadPlan(
        shape=candidate.shape,
        n_seq=choice.n_seq,
        n_resident=choice.n_resident,
        draft=_draft(question, found),
        devices=situation.devices,
        decode_tps=situation.decode_tps,
        reasons=explain.reasons(situation),
        warnings=(*explain.warnings(situation), *question.hardware.warnings),
        notes=explain.notes(situation, doubts),
        alternatives=alternatives(question, found) if others else (),
        n_cpu_moe=choice.n_cpu_moe,
        given_up=explain.given_up(situation),
        doubt="; ".join(doubts),
        again=None if question.wishes.strict else lambda limits: _again(question, limits),
    )


def _again(question: Question, limits: Mapping[str, int]) -> LoadPlan | None:
    """A plan within `limits`; None when there is none."""
    try:
        return _plan(question.with_limits(limits), others=False)
    except NothingFits:
        return None


def _draft(question: Question, found: Found) -> Draft | None:
    shape, footprint = found.candidate.draft, found.fitter.draft
    if shape is None or footprint is None:
        return None
    return Draft(shape, n_draft(question.wishes), tuple(name for name, _, _ in footprint.placement(shape).items()))


def _doubts(found: Found) -> tuple[str, ...]:
    """Why the bytes may differ from llama.cpp's."""
    fitter, shape = found.fitter, found.candidate.shape
    amounts = [fitter.footprint.weights(shape), fitter.footprint.kv(shape), fitter.compute.amount(shape)]
    if fitter.wishes.projector is not None:
        amounts.append(fitter.footprint.projector(fitter.wishes.projector, shape))
    return tuple(dict.fromkeys(amount.doubt for amount in amounts if amount.doubt))


def _devices(question: Question, found: Found) -> tuple[DevicePlan, ...]:
    candidate, fitter = found.candidate, found.fitter
    parts = fitter.parts(candidate.shape)
    drafts = fitter.draft_parts(candidate.draft) if candidate.draft is not None else {}
    read = question.read_bytes(candidate)
    layers = {name: end - first for name, first, end in fitter.footprint.placement(candidate.shape).items()}

    def plan(budget: Budget) -> DevicePlan:
        weights, kv, buffers = parts.get(budget.name, (0, 0, 0))
        return DevicePlan(
            name=budget.name,
            kind=budget.kind,
            description=budget.description,
            total_bytes=budget.total_bytes,
            free_bytes=budget.free_bytes,
            room_bytes=budget.room_bytes,
            weights_bytes=weights,
            mapped_bytes=mapped_bytes(fitter.footprint, candidate.shape) if budget.name == CPU else 0,
            kv_bytes=kv,
            compute_bytes=buffers,
            draft_bytes=sum(drafts.get(budget.name, ())),
            overhead_bytes=budget.overhead_bytes,
            reserve_bytes=budget.reserve_bytes,
            other_bytes=budget.other_bytes,
            n_layers=layers.get(budget.name, 0),
            read_bytes=round(read.get(budget.name, 0)),
        )

    return tuple(plan(budget) for budget in fitter.budgets)


def _whole_bytes(found: Found) -> int | None:
    """What the cards of the plan would have to hold for all layers, where they do not have them all."""
    choice, most = found.candidate.choice, found.fitter.footprint.architecture.n_layers + 1
    if not choice.gpus or not 0 < choice.n_gpu_layers < most:
        return None
    whole = found.fitter.candidate(replace(choice, n_gpu_layers=most))
    return sum(whole.need.get(name, 0) for name in choice.gpus)
