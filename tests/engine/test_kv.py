"""The pool against the truth: whatever is shared, cut, evicted and restored, logits are those of a fresh prefill.

Every test drives a real context of a tiny random model (tests/tiny_models.py) with an f32 cache and without flash
attention: rounding stays below 1e-4, one wrong token in the context shows as 0.3 or more.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.engine.kv import MAX_CHECKPOINTS, Cut, KVPool, Source
from localllm.engine.store import Checkpoint, Entry, StateStore
from localllm.llama.context import Context, ContextParams
from localllm.llama.model import Model
from tests.tiny_models import KINDS, WINDOW

TOLERANCE = 2e-3
EXACT: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
N_BATCH = 64


@dataclass(slots=True, eq=False)
class Running:
    """A sequence as the step loop has it: tokens [n_past:] are still to be computed."""

    slot: int
    tokens: list[int]
    n_prompt: int
    until: int
    n_past: int
    pauses: list[int] = field(default_factory=list[int])


class Rig:
    """A pool and its context; every batch's logits are compared with a fresh prefill of the same tokens."""

    def __init__(self, model: Model, fresh: Context, *, n_ctx: int = 512, n_seq: int = 6, ram_bytes: int = 1 << 26) -> None:
        # two micro-batches to a batch, where the model bears it
        params = ContextParams(n_ctx=n_ctx, n_seq=n_seq, n_batch=2 * N_BATCH, n_ubatch=N_BATCH, n_outputs=n_seq, **EXACT)
        self.context = Context(model, params)
        self.pool = KVPool(self.context, StateStore("rig", ram_bytes=ram_bytes), n_swa=model.n_swa)
        self.running: list[Running] = []
        self._fresh = fresh

    def close(self) -> None:
        self.context.close()

    def begin(self, tokens: list[int], *, marks: tuple[int, ...] = (), extra: int = 0, source: Source | None = None) -> Running | None:
        """Admit a prompt that will grow by `extra` tokens; None when there is no room."""
        source = self.pool.best(tokens, len(tokens) - 1) if source is None else source
        slot = self.pool.open(source, len(tokens) + extra)
        if slot < 0:
            return None
        reused = self.pool.length(slot)
        assert reused <= len(tokens)
        assert self.pool.trie.tokens(slot) == tokens[:reused]
        end = len(tokens) - 1
        pauses = [p for p in (*marks, end) if reused < p <= end] if self.pool.cut is not Cut.ANY else []
        self.running.append(Running(slot, list(tokens), len(tokens), len(tokens) + extra, reused, pauses))
        return self.running[-1]

    def step(self, *work: tuple[Running, int]) -> None:
        """One batch with up to n tokens of each; must find room, for the pool promised it."""
        c, row = self.context, 0
        rows: list[tuple[Running, int, int]] = []
        for sequence, n in work:
            limit = sequence.pauses[0] if sequence.pauses else len(sequence.tokens)
            n = min(n, limit - sequence.n_past, c.n_batch - row)
            if n <= 0:
                continue
            start, end = sequence.n_past, row + n
            c.tokens[row:end], c.positions[row:end] = sequence.tokens[start : start + n], range(start, start + n)
            c.sequences[row:end], c.outputs[row:end] = sequence.slot, 0
            c.outputs[end - 1] = 1
            rows.append((sequence, n, end - 1))
            row = end
        if not row:
            return
        c.decode(row)
        for sequence, n, last in rows:
            sequence.n_past += n
            if sequence.n_past <= sequence.n_prompt:
                self.pool.advance(sequence.slot, sequence.tokens[sequence.n_past - n : sequence.n_past])
            if sequence.n_past == len(sequence.tokens) or sequence.pauses:
                self.check(sequence, c.logits(last))
            if sequence.pauses and sequence.pauses[0] == sequence.n_past:
                sequence.pauses.pop(0)
                self.pool.checkpoint(sequence.slot, sequence.n_past)

    def complete(self, sequence: Running) -> Running:
        while sequence.n_past < len(sequence.tokens):
            self.step((sequence, N_BATCH))
        return sequence

    def grow(self, sequence: Running, tokens: list[int]) -> Running:
        """Decode tokens one by one, as an answer is."""
        for token in tokens:
            sequence.tokens.append(token)
            self.step((sequence, 1))
        return sequence

    def finish(self, sequence: Running, *, keep: bool = True) -> None:
        self.running.remove(sequence)
        if keep:
            self.pool.advance(sequence.slot, sequence.tokens[self.pool.length(sequence.slot) : sequence.n_past])
        self.pool.close(sequence.slot, keep=keep)

    def leave(self, tokens: list[int], *, marks: tuple[int, ...] = ()) -> int:
        """Compute a prompt and keep it resident; returns its slot."""
        sequence = self.begin(tokens, marks=marks)
        assert sequence is not None
        self.finish(self.complete(sequence))
        return sequence.slot

    def check(self, sequence: Running, logits: npt.NDArray[np.float32]) -> None:
        c, tokens = self._fresh, sequence.tokens[: sequence.n_past]
        c.clear()
        n = 0
        for at in range(0, len(tokens), c.n_batch):
            part = tokens[at : at + c.n_batch]
            n = len(part)
            c.tokens[:n], c.positions[:n], c.sequences[:n], c.outputs[:n] = part, range(at, at + n), 0, 0
            c.outputs[n - 1] = 1
            c.decode(n)
        wrong = float(np.abs(logits - c.logits(n - 1)).max())
        assert wrong < TOLERANCE, f"slot {sequence.slot} at {sequence.n_past}: a logit is {wrong:.2g} off"

    def check_books(self) -> None:
        """Residents hold what the trie says, and the books never say less than is used."""
        for slot in range(self.context.n_seq):
            if slot not in [s.slot for s in self.running]:
                assert self.context.span(slot)[1] == self.pool.length(slot) - 1
        assert 0 <= self.pool.available <= self.context.n_ctx - self.pool.trie.size

    def fill(self) -> None:
        """Use every cell that the pool says is available: llama.cpp must agree."""
        while self.pool.evict():
            pass
        filler = self.begin(words(999, self.pool.available), source=Source())
        assert filler is not None
        self.finish(self.complete(filler), keep=False)


def words(seed: int, n: int) -> list[int]:
    r = random.Random(seed)
    return [r.randrange(256) for _ in range(n)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    folder = tmp_path_factory.mktemp("models")
    models = {kind: Model(str(write(folder / f"{kind}.gguf")), n_gpu_layers=0) for kind, write in KINDS.items()}
    yield models
    for model in models.values():
        model.close()


@pytest.fixture(scope="module")
def fresh(models: dict[str, Model]) -> Iterator[dict[str, Context]]:
    contexts = {
        kind: Context(model, ContextParams(n_ctx=2048, n_batch=N_BATCH, n_ubatch=N_BATCH, **EXACT)) for kind, model in models.items()
    }
    yield contexts
    for context in contexts.values():
        context.close()


class Lab:
    """Makes rigs and closes them."""

    def __init__(self, models: dict[str, Model], fresh: dict[str, Context]) -> None:
        self.models, self.fresh, self.made = models, fresh, list[Rig]()

    def rig(self, kind: str, **sizes: int) -> Rig:
        self.made.append(Rig(self.models[kind], self.fresh[kind], **sizes))
        return self.made[-1]

    def close(self) -> None:
        for rig in self.made:
            rig.close()
        self.made.clear()


@pytest.fixture
def lab(models: dict[str, Model], fresh: dict[str, Context]) -> Iterator[Lab]:
    lab = Lab(models, fresh)
    yield lab
    lab.close()


each_kind = pytest.mark.parametrize("kind", KINDS)
cannot_cut = pytest.mark.parametrize("kind", ["hybrid", "recurrent", "window"])
has_attention = pytest.mark.parametrize("kind", ["plain", "hybrid", "window"])

# what happens next, and the numbers that decide how
schedules = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 1 << 30)), min_size=20, max_size=70)


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("n_ctx, n_seq", [(512, 6), (300, 4), (256, 9)])
def test_any_schedule_gives_the_logits_of_a_fresh_prefill(
    kind: str, n_ctx: int, n_seq: int, models: dict[str, Model], fresh: dict[str, Context]
) -> None:
    segments = [words(i, n) for i, n in enumerate((5, 20, 40, 70, 70))]

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(schedule=schedules, ram_bytes=st.sampled_from([0, 1 << 18, 1 << 26]))
    def play(schedule: list[tuple[int, int]], ram_bytes: int) -> None:
        rig = Rig(models[kind], fresh[kind], n_ctx=n_ctx, n_seq=n_seq, ram_bytes=ram_bytes)
        try:
            for event, seed in schedule:
                _play(rig, event, random.Random(seed), segments)
                rig.check_books()
        finally:
            rig.close()

    play()


def _play(rig: Rig, event: int, r: random.Random, segments: list[list[int]]) -> None:
    if event < 35:
        tokens, marks = list[int](), list[int]()
        residents = [s for s in range(rig.context.n_seq) if rig.pool.length(s)]
        if residents and r.random() < 0.5:
            # go on from something known, from its end or from the middle
            tokens = rig.pool.trie.tokens(r.choice(residents))
            tokens = tokens[: r.choice([len(tokens), r.randrange(1, len(tokens) + 1)])]
            marks.append(len(tokens))
        for _ in range(r.randrange(1, 4)):
            tokens = tokens + r.choice(segments)
            marks.append(len(tokens))
        if len(rig.running) < 4 and len(tokens) < 240:
            rig.begin(tokens, marks=tuple(marks[-3:-1]), extra=r.choice([0, 5, 15]))
    elif event < 75 and rig.running:
        for sequence in rig.running:
            if sequence.n_past == len(sequence.tokens) < sequence.until and r.random() < 0.7:
                sequence.tokens.append(r.randrange(256))
        rig.step(*((s, r.choice([0, 1, 7, N_BATCH])) for s in r.sample(rig.running, len(rig.running))))
    elif event < 90 and rig.running:
        rig.finish(r.choice(rig.running), keep=r.random() < 0.85)
    elif event < 95:
        rig.pool.evict()
    elif event < 97:
        rig.pool.clear()
    elif rig.running:
        sequence = r.choice(rig.running)
        rig.pool.promise(sequence.slot, sequence.until)


@each_kind
def test_a_resident_is_continued(kind: str, lab: Lab) -> None:
    rig = lab.rig(kind)
    tokens = words(1, 150)
    rig.leave(tokens)
    sequence = rig.begin(tokens + words(2, 30))
    assert sequence is not None
    assert sequence.n_past == 150
    rig.complete(sequence)


@each_kind
def test_the_only_slot_left_is_continued_in_place(kind: str, lab: Lab) -> None:
    rig = lab.rig(kind, n_seq=1)
    tokens = words(3, 150)
    rig.leave(tokens, marks=(100,))
    sequence = rig.begin(tokens + words(4, 20))
    assert sequence is not None
    assert sequence.n_past == 150
    rig.finish(rig.complete(sequence))
    parted = rig.begin(tokens[:120] + words(5, 20))
    assert parted is not None
    assert parted.n_past == (120 if kind in ("plain", "window") else 100)
    rig.complete(parted)


@cannot_cut
def test_the_latest_checkpoint_before_the_parting_is_taken(kind: str, lab: Lab) -> None:
    rig = lab.rig(kind)
    tokens = words(6, 200)
    rig.leave(tokens, marks=(50, 100, 150))
    for parting, start in ((180, 150), (120, 100), (99, 50)):
        sequence = rig.begin(tokens[:parting] + words(7, 20))
        assert sequence is not None
        # the window model may still have the cells of the window there
        assert sequence.n_past == start or (kind == "window" and sequence.n_past == parting)
        rig.finish(rig.complete(sequence), keep=False)


def test_a_window_that_has_moved_on_is_not_taken_for_whole(lab: Lab) -> None:
    # cutting behind the window leaves it empty, and llama.cpp calls the first position of nothing -1
    rig = lab.rig("window", n_ctx=512, n_seq=2)
    tokens = words(8, 450)
    slot = rig.leave(tokens, marks=(60,))
    assert rig.context.span(slot)[0] > 60
    source = rig.pool.best([*tokens[:60], *words(9, 20)], 79)
    assert source == Source(60, slot=slot)
    sequence = rig.begin([*tokens[:60], *words(9, 20)], source=source)
    assert sequence is not None
    assert sequence.n_past == 60
    rig.complete(sequence)


def test_a_window_still_there_needs_no_checkpoint(lab: Lab) -> None:
    rig = lab.rig("window")
    tokens = words(10, WINDOW + 30)
    rig.leave(tokens)
    sequence = rig.begin(tokens[:40] + words(11, 20))
    assert sequence is not None
    assert sequence.n_past == 40
    rig.complete(sequence)


def test_forks_do_not_fill_the_window_cache_with_what_left_the_window(lab: Lab) -> None:
    # 5 windows and a batch: 256 cells, of which the 180 tokens here hold most until others need them
    rig = lab.rig("window", n_ctx=1024, n_seq=5)
    tokens = words(12, 180)
    rig.leave(tokens)
    forks = [rig.begin(tokens + words(13 + i, 60)) for i in range(3)]
    for fork in forks:
        assert fork is not None
        assert fork.n_past == 180
        rig.complete(fork)


def test_a_copied_window_is_counted_where_the_window_cache_is_no_larger_than_the_rest(lab: Lab) -> None:
    # 9 windows and a batch would be 352 cells: here the window cache gets 256, as many as the full layers
    rig = lab.rig("window", n_ctx=256, n_seq=9)
    tokens = words(47, 100)
    rig.leave(tokens, marks=(40, 48, 56))
    # back from the store it holds only its last window
    assert rig.pool.evict()
    rig.leave([*tokens, 1])
    for n, start in enumerate((56, 48, 40), 1):
        sequence = rig.begin([*tokens[:start], 2])
        assert sequence is not None
        assert sequence.n_past == start
        assert rig.pool.used == 101 + n * WINDOW
    rig.fill()
    for sequence in list(rig.running):
        rig.complete(sequence)


def test_a_window_model_is_right_whatever_the_batch_holds(lab: Lab) -> None:
    # planning two micro-batches at once, llama.cpp drops the first tokens of `long`, which the first one needs:
    # the second one's search for cells comes by the others of `long`, when those count as out of its window
    rig = lab.rig("window", n_ctx=256, n_seq=8)
    before, long = rig.begin(words(49, 70)), rig.begin(words(50, 74))
    assert before is not None
    assert long is not None
    rig.complete(before)
    rig.step((long, 19))
    assert rig.begin([*long.tokens[:5], 1]) is not None
    rig.finish(before, keep=False)
    new = rig.begin(words(51, 73))
    assert new is not None
    rig.step((long, 55), (new, 73))
    rig.complete(long)


@cannot_cut
def test_a_damaged_checkpoint_means_a_fresh_start(kind: str, lab: Lab) -> None:
    rig = lab.rig(kind)
    tokens = words(16, 150)
    slot = rig.leave(tokens, marks=(40,))
    entry = rig.pool.entry(slot)
    rig.pool.clear()
    good = entry.checkpoints[0]
    rig.pool.store.put(Entry(entry.tokens, entry.state, (good, Checkpoint(100, good.state[:-8]))))
    sequence = rig.begin(tokens[:120] + words(17, 20))
    assert sequence is not None
    # the older one would restore, on top of nothing
    assert sequence.n_past == 0
    rig.complete(sequence)


@each_kind
def test_a_state_goes_to_the_store_and_back(kind: str, lab: Lab) -> None:
    rig = lab.rig(kind)
    tokens = words(18, 150)
    rig.leave(tokens, marks=(70,))
    assert rig.pool.evict()
    assert rig.pool.used == 0
    for prompt, start in ((tokens + words(19, 10), 150), (tokens[:90] + words(20, 10), 90 if kind == "plain" else 70)):
        sequence = rig.begin(prompt)
        assert sequence is not None
        assert sequence.n_past == start
        rig.finish(rig.complete(sequence), keep=False)


@each_kind
def test_a_state_of_another_shape_is_no_state(kind: str, lab: Lab) -> None:
    rig = lab.rig(kind)
    tokens = words(21, 100)
    entry = rig.pool.entry(rig.leave(tokens))
    rig.pool.clear()
    rig.pool.store.put(Entry(tokens, entry.state[: len(entry.state) // 2]))
    sequence = rig.begin(tokens + [1, 2, 3])
    assert sequence is not None
    assert sequence.n_past == 0
    rig.complete(sequence)


@each_kind
def test_a_stored_state_too_large_for_the_room_left_is_not_waited_for(kind: str, lab: Lab) -> None:
    rig = lab.rig(kind, n_ctx=512)
    tokens = words(22, 400)
    rig.leave(tokens, marks=(50,))
    assert rig.pool.evict()
    busy = rig.begin(words(23, 300))
    assert busy is not None
    sequence = rig.begin(tokens[:60] + words(24, 20))
    assert sequence is not None
    assert sequence.n_past == 0
    rig.complete(sequence)


@has_attention
def test_a_prefix_computed_twice_is_counted_until_its_last_holder_is_gone(kind: str, lab: Lab) -> None:
    rig = lab.rig(kind, n_ctx=512)
    tokens = words(25, 100)
    first, second = rig.begin(tokens), rig.begin(tokens)
    assert first is not None
    assert second is not None
    while first.n_past < 100:
        rig.step((first, 32), (second, 32))
    assert rig.pool.used == (100 if kind == "plain" else 200)
    rig.finish(second)
    third = rig.begin(tokens + words(26, 20), source=Source(100, slot=second.slot))
    assert third is not None
    assert rig.pool.evict()
    rig.complete(third)
    # `third` lives in the cells of `second`, `first` has its own
    rig.fill()
    rig.finish(first, keep=False)
    rig.finish(third, keep=False)
    assert rig.pool.used == 0


@each_kind
def test_a_live_prefix_is_shared_with_its_checkpoints(kind: str, lab: Lab) -> None:
    rig = lab.rig(kind)
    shared = words(27, 90)
    leader = rig.begin(shared + words(28, 30), marks=(40, 90))
    slot = rig.pool.open(Source(), 100, expected=90)
    assert leader is not None
    assert slot >= 0
    while leader.n_past < 90:
        rig.step((leader, min(50, 90 - leader.n_past)))
    rig.pool.fork_live(leader.slot, slot, 90)
    follower = Running(slot, shared + words(29, 10), 100, 100, 90)
    rig.running.append(follower)
    rig.step((leader, 10), (follower, 10))
    rig.complete(leader)
    rig.finish(leader, keep=False)
    rig.finish(follower)
    parted = rig.begin(shared[:60] + words(30, 10))
    assert parted is not None
    assert parted.n_past == (60 if kind == "plain" else 40)
    rig.complete(parted)


@each_kind
def test_truncation_keeps_what_the_memory_can(kind: str, lab: Lab) -> None:
    rig = lab.rig(kind)
    sequence = rig.begin(words(31, 150), marks=(60,), extra=10)
    assert sequence is not None
    rig.complete(sequence)
    kept = rig.pool.truncate(sequence.slot, 80)
    assert kept == rig.pool.length(sequence.slot) == (80 if kind in ("plain", "window") else 60)
    sequence.tokens, sequence.n_past = sequence.tokens[:80] + words(32, 30), kept
    rig.complete(sequence)


@cannot_cut
def test_checkpoints_stay_within_the_ram_given(kind: str, lab: Lab) -> None:
    free = lab.rig(kind)
    free.leave(words(33, 40))
    (checkpoint,) = free.pool.entry(free.context.n_seq - 1).checkpoints
    tight = lab.rig(kind, ram_bytes=3 * len(checkpoint.state))
    slots = [tight.leave(words(34 + i, 40)) for i in range(5)]
    # the newest two and, before the third was taken, one more
    assert [len(tight.pool.entry(slot).checkpoints) for slot in slots] == [0, 0, 1, 1, 1]


@cannot_cut
def test_only_the_latest_checkpoints_of_a_sequence_are_kept(kind: str, lab: Lab) -> None:
    rig = lab.rig(kind)
    slot = rig.leave(words(40, 100), marks=(10, 20, 30, 40, 50, 60))
    assert [c.position for c in rig.pool.entry(slot).checkpoints] == [40, 50, 60, 99][-MAX_CHECKPOINTS:]


@each_kind
def test_a_promise_is_kept_by_evicting_and_refused_when_that_is_not_enough(kind: str, lab: Lab) -> None:
    rig = lab.rig(kind, n_ctx=256, n_seq=4)
    rig.leave(words(41, 100))
    first = rig.begin(words(42, 60), extra=40)
    assert first is not None
    assert rig.pool.available == 256 - 100 - 100
    second = rig.begin(words(43, 100))
    assert second is not None
    assert rig.pool.n_resident == 0
    assert rig.begin(words(44, 60)) is None
    assert not rig.pool.promise(first.slot, 157)
    assert rig.pool.promise(first.slot, 156)
    assert rig.pool.available == 0
    rig.complete(second)
    rig.grow(rig.complete(first), words(45, 96))


@each_kind
def test_too_short_sequences_leave_nothing_behind(kind: str, lab: Lab) -> None:
    rig = lab.rig(kind)
    rig.leave(words(46, 10))
    assert (rig.pool.n_resident, rig.pool.used) == (0, 0)
    rig.check_books()
