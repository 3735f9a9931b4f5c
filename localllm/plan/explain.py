"""Why a plan is as it is, in sentences with numbers: what was chosen, what was given up and for what, what is uncertain.

Every function takes a Situation and returns words; nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from localllm.plan.budget import RAM, Budget, Budgets
from localllm.plan.fitter import Candidate
from localllm.plan.footprint import Footprint
from localllm.plan.ladder import OFF, ORDER, Choice, Ladder, Rung
from localllm.plan.loadplan import DevicePlan
from localllm.plan.spec import CPU, Wishes

TO_CONFIRM = "to be confirmed by a dry run"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Situation:
    """A chosen candidate, and what it was chosen from."""

    candidate: Candidate
    ladder: Ladder
    budgets: Budgets
    wishes: Wishes
    footprint: Footprint
    devices: tuple[DevicePlan, ...]
    decode_tps: Range | None
    whole_bytes: int | None = None
    """What the cards would have to hold with all layers on them; None where that is not the question."""

    @property
    def choice(self) -> Choice:
        return self.candidate.choice

    @property
    def cards(self) -> list[DevicePlan]:
        """Accelerators that hold layers."""
        return [device for device in self.devices if device.kind != "cpu" and device.n_layers]


def size(n_bytes: float) -> str:
    """`4.5 GiB`, `512 MiB`, `96 KiB`."""
    if n_bytes >= GIB:
        return f"{n_bytes / GIB:.1f} GiB"
    return f"{n_bytes / MIB:.0f} MiB" if n_bytes >= MIB else f"{n_bytes / KIB:.0f} KiB"


def exact(n_bytes: int) -> str:
    """A size for people, and to the byte."""
    return f"{size(n_bytes)} ({n_bytes:,} bytes)"


def tokens(n_ctx: int) -> str:
    """`8k`, `128k`, `1,000`."""
    return f"{n_ctx // KIB}k" if n_ctx >= KIB and n_ctx % KIB == 0 else f"{n_ctx:,}"


def speed(decode_tps: Range | None) -> str:
    """`about 41 tokens/s`: the middle; empty when unknown."""
    if decode_tps is None:
        return ""
    middle = (decode_tps[0] * decode_tps[1]) ** 0.5
    return f"about {middle:,.{0 if middle >= 10 else 1}f} tokens/s"


def reasons(s: Situation) -> tuple[str, ...]:
    """Why the plan is as it is, the most important first."""
    told = given_up(s)[:-1] if s.cards and s.choice.n_gpu_layers != s.ladder.n_gpu_layers[0] else given_up(s)
    gone = (f"{sentence[0].upper()}{sentence[1:]}." for sentence in told)
    return tuple(filter(None, (*_where(s), _context(s), *gone, *_windows(s), _ram(s), _budget(s), _speed(s))))


def given_up(s: Situation) -> tuple[str, ...]:
    """What was sacrificed, the least first; a further graphics card is no sacrifice."""
    best, now = s.ladder, s.choice
    shape, architecture = s.candidate.shape, s.footprint.architecture
    said: dict[Rung, str] = {
        "n_resident": f"finished chats kept for their prefixes: {now.n_resident} instead of {best.n_resident[0]}",
        "n_seq": f"requests at once: {now.n_seq} instead of {best.n_seq[0]}",
        "n_ubatch": f"prompts are read {now.n_ubatch} tokens at a time instead of {best.n_ubatch[0]}, which is slower",
        "n_cpu_moe": f"the experts of the first {now.n_cpu_moe} of {architecture.n_layers} layers stay in RAM: a token reads few of them",
        "draft": "the draft model stays out",
        "n_gpu_layers": "the GPU takes no part"
        if now.n_gpu_layers == OFF
        else f"{architecture.n_layers + 1 - shape.n_gpu_layers} of {architecture.n_layers + 1} layers are on the CPU",
    }
    if now.n_ctx < best.n_ctx[0]:
        said["n_ctx"] = f"a context of {now.n_ctx:,} tokens instead of {best.n_ctx[0]:,}"
    if now.kv != best.kv[0]:
        before = s.footprint.kv(replace(shape, type_k=best.kv[0][0], type_v=best.kv[0][1])).total_bytes
        after = s.footprint.kv(shape).total_bytes
        said["kv"] = f"the KV cache is kept in {_types(now.kv)} instead of {_types(best.kv[0])}: {size(after)} instead of {size(before)}"
    return tuple(said[rung] for rung in ORDER if rung in said and getattr(now, rung) != getattr(best, rung)[0])


def warnings(s: Situation) -> tuple[str, ...]:
    """What may go wrong or surprise."""
    trained = s.footprint.architecture.n_ctx_train
    said: list[str] = []
    if s.wishes.n_ctx and trained and s.candidate.shape.n_ctx > trained * s.choice.n_seq:
        said.append(f"the model was trained for {trained:,} tokens: beyond that its answers get worse, and one sequence holds no more")
    for device in s.budgets.devices:
        if device.room_bytes is None:
            used = s.candidate.need.get(device.name, 0)
            what = f"{exact(used)} on it are not checked" if used else "it is left alone; --gpu-memory says how much of it to take"
            said.append(f"the memory of {device.name} ({device.description}) is not known: {what}")
    if s.budgets.ram.room_bytes is None:
        said.append("how much RAM is available is not known: whether the plan fits it is not checked")
    ram = s.devices[-1]
    if ram.room_bytes is not None and ram.planned_bytes > ram.room_bytes:
        said.append(
            f"{size(ram.planned_bytes - ram.room_bytes)} of the mapped file do not fit into RAM: they are read from disk again and again"
        )
    draft = s.wishes.draft
    if draft is not None and draft.vocab_hash != s.footprint.header.vocab_hash:
        said.append("the draft model has another vocabulary: it cannot draft for this one")
    return tuple(said)


def notes(s: Situation, doubts: Iterable[str]) -> tuple[str, ...]:
    """What the figures rest on."""
    said = [f"{TO_CONFIRM}: {doubt}" for doubt in dict.fromkeys(doubts) if doubt]
    if s.decode_tps is None and s.cards:
        said.append(f"the speed on {s.cards[0].description} is known after the first answer")
    if s.choice.draft:
        said.append("the speed is without the draft model's help")
    return tuple(said)


def summary(candidate: Candidate, before: Candidate, n_layers: int, decode_tps: Range | None) -> str:
    """An alternative in half a line: what differs from the plan, and how fast it would be."""
    shape, was = candidate.shape, before.shape
    parts = [f"{tokens(shape.n_ctx)} context"]
    if (shape.type_k, shape.type_v) != (was.type_k, was.type_v):
        parts[0] += f" with {_types(candidate.choice.kv)} KV"
    if shape.n_gpu_layers != was.n_gpu_layers:
        everything = shape.n_gpu_layers > n_layers
        parts.append("all layers on the GPU" if everything else f"{shape.n_gpu_layers} of {n_layers + 1} layers on the GPU")
    if candidate.choice.n_cpu_moe != before.choice.n_cpu_moe:
        k = candidate.choice.n_cpu_moe
        parts.append(f"experts of {k} layers in RAM" if k else "all experts on the GPU")
    if before.choice.draft and not candidate.choice.draft:
        parts.append("no draft model")
    return ", ".join(filter(None, (*parts, speed(decode_tps))))


def refusal(least: Candidate, budgets: Budgets, name: str) -> str:
    """What is missing where, to the byte."""
    short: list[str] = []
    beside: list[str] = []
    for pool in budgets.pools:
        need = sum(least.need.get(device, 0) for device in pool.devices)
        where = "RAM" if pool.name == RAM else f"memory on {pool.name}"
        if missing := least.missing.get(pool.name):
            short.append(f"{size(need)} of {where} where {size(need - missing)} may be taken, {exact(missing)} too much")
        elif need:
            beside.append(f"{size(need)} of {where}")
    more = f", beside {' and '.join(beside)}" if beside else ""
    return f"{name or 'the model'} does not fit: it needs {' and '.join(short)}{more}"


def flags(wishes: Mapping[str, Any]) -> str:
    """Wishes as command-line flags."""
    names = {
        "n_ctx": "-c",
        "n_gpu_layers": "-ngl",
        "n_seq": "-np",
        "n_ubatch": "-ub",
        "n_cpu_moe": "-ncmoe",
        "type_k": "-ctk",
        "type_v": "-ctv",
    }
    if wishes.get("type_k") is not None and wishes.get("type_k") == wishes.get("type_v"):
        wishes = {**{key: value for key, value in wishes.items() if key not in ("type_k", "type_v")}, "kv": wishes["type_k"]}
        names["kv"] = "--kv"
    return " ".join(f"{names[key]} {value}" for key, value in wishes.items() if key in names)


def _where(s: Situation) -> Iterable[str]:
    total = s.footprint.architecture.n_layers + 1
    placed = sum(device.n_layers for device in s.cards)
    if not s.cards:
        yield _all_in_ram(s)
        return
    names = ", ".join(f"{device.n_layers} on {device.name}" for device in s.cards)
    if placed < total:
        whole = f": all of them would take {size(s.whole_bytes)}, and there is room for {size(_room(s))}" if s.whole_bytes else ""
        yield f"{placed} of {total} layers on the GPU ({names}), the rest on the CPU{whole}."
    elif len(s.cards) == 1:
        card = s.cards[0]
        room = "" if card.room_bytes is None else f" of the {size(card.room_bytes)} that may be taken there"
        yield f"All {total} layers on {card.name} ({card.description}): {size(card.planned_bytes)}{room}."
    else:
        yield f"All {total} layers on {len(s.cards)} GPUs ({names}): no single one holds them."


def _all_in_ram(s: Situation) -> str:
    ram = s.devices[-1]
    room = "" if ram.room_bytes is None else f" of the {size(ram.room_bytes)} that may be taken"
    what = f"Everything in RAM, {size(ram.planned_bytes)}{room}"
    if s.wishes.n_gpu_layers == 0:
        return f"{what}, as you asked."
    if not s.budgets.devices:
        return f"{what}: there is no graphics card that the engine can use."
    if all(device.room_bytes is None for device in s.budgets.devices):
        return f"{what}: the memory of the graphics card is not known."
    return f"{what}: not one layer fits on {' or '.join(device.name for device in s.budgets.devices)}."


def _context(s: Situation) -> str:
    n_ctx, trained = s.candidate.shape.n_ctx, s.footprint.architecture.n_ctx_train
    what = f"Context of {n_ctx:,} tokens" + (f" for {s.choice.n_seq} requests together" if s.choice.n_seq > 1 else "")
    if s.wishes.n_ctx:
        return f"{what}, as you asked."
    if s.choice.n_ctx < s.ladder.n_ctx[0]:
        return ""  # said among what was given up
    start = s.ladder.n_ctx[0]
    limit = "" if not trained else " (all that the model was trained for)" if n_ctx >= trained else f" (trained for {trained:,})"
    if s.choice.n_ctx > start:
        return f"{what}{limit}: grown from {start:,} into memory that would lie idle, at least half of which stays free."
    return f"{what}{limit}, by default; -c asks for another."


def _windows(s: Situation) -> Iterable[str]:
    shape = s.candidate.shape
    if s.footprint.architecture.windowed and not shape.swa_full:
        saved = s.footprint.kv(replace(shape, swa_full=True)).total_bytes - s.footprint.kv(shape).total_bytes
        if saved > 0:
            yield f"Layers with a sliding window keep only that: {size(saved)} less KV cache than the whole context would take."


def _ram(s: Situation) -> str:
    ram = s.devices[-1]
    if not ram.mapped_bytes or not (ram.n_layers or s.choice.n_cpu_moe):
        return ""
    return (
        f"In RAM, {size(ram.anonymous_bytes)} must stay; {size(ram.mapped_bytes)} are weights in the mapped file, which the system may "
        "drop and read again, slowly."
    )


def _budget(s: Situation) -> str:
    parts = [_kept(device) for device in s.budgets.devices if s.candidate.need.get(device.name)]
    if not s.cards:
        parts.append(_kept(s.budgets.ram))
    return " ".join(filter(None, parts))


def _kept(device: Budget) -> str:
    if device.free_bytes is None or device.room_bytes is None:
        return ""
    where = "RAM" if device.name == CPU else device.name
    kept = [f"{size(device.overhead_bytes)} for {'the worker process' if device.name == CPU else f'{device.backend} itself'}"]
    kept += [f"{size(device.reserve_bytes)} for {'the system' if device.name == CPU else 'the screen'}"] if device.reserve_bytes else []
    kept += [f"{size(device.resident_bytes)} for models that are being loaded"] if device.resident_bytes else []
    limit = f", and you allow {size(device.cap_bytes)}" if device.cap_bytes is not None and device.cap_bytes == device.room_bytes else ""
    return f"{where} has {size(device.free_bytes)} free; {' and '.join(kept)} stay out of it{limit}."


def _speed(s: Situation) -> str:
    if s.decode_tps is None:
        return ""
    low, high = (f"{rate:,.{0 if rate >= 10 else 1}f}" for rate in s.decode_tps)
    read = [(device.name, device.read_bytes) for device in s.devices]
    parts = [f"{size(n_bytes)} on {'the CPU' if name == CPU else name}" for name, n_bytes in read if n_bytes >= MIB]
    read = f": each token reads {' and '.join(parts)}" if parts else ""
    return f"{low} to {high} tokens/s{read}."


def _types(kv: tuple[str, str]) -> str:
    return kv[0] if kv[0] == kv[1] else f"{kv[0]} and {kv[1]}"


def _room(s: Situation) -> int:
    return sum(device.room_bytes or 0 for device in s.cards)
