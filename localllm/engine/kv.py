"""Who holds which KV cells: slots, finished sequences kept for reuse, promises, checkpoints.

A slot is a llama.cpp sequence id. A running sequence holds one and a promise of cells; a finished
one stays resident in its slot until the room is needed. All physical sharing and eviction happens
here, and the trie's size is the number of cells really in use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from localllm.engine.prefix import PrefixTrie
from localllm.engine.store import Checkpoint, Entry, StateStore
from localllm.llama.context import PARTIAL, Context

MIN_KEPT = 16
"""Shorter sequences are not worth a slot after they finish."""
MIN_STORED = 64
"""Shorter ones are computed again sooner than they are copied."""
MAX_CHECKPOINTS = 4


class Cut(Enum):
    """What a model's memory can drop: any suffix, a suffix within its window, or nothing."""

    ANY = "any"
    WINDOW = "window"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a prefix can come from: `length` tokens of a slot, or of a saved entry."""

    length: int = 0
    slot: int = -1
    entry: Entry | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Twin:
    """Cells [start, end) of a slot that repeat what the trie counts once; forks of the slot share the twin."""

    start: int
    end: int


class KVPool:
    """The cells of one context; every number is in tokens (cells)."""

    def __init__(self, context: Context, store: StateStore, *, n_swa: int = 0) -> None:
        self.context = context
        self.store = store
        self.n_swa = n_swa
        # llama.cpp gives the window cache a window per sequence and a batch, or as many cells as the rest where that is less
        self._roomy = n_swa * context.n_seq + context.n_batch <= context.n_ctx
        self.cut = Cut.NONE if not context.can_cut else Cut.WINDOW if n_swa else Cut.ANY
        self.trie = PrefixTrie()
        self._free = list(range(context.n_seq))
        self._residents: OrderedDict[int, None] = OrderedDict()
        self._promised: dict[int, int] = {}
        self._twins: dict[int, list[_Twin]] = {}
        self._checkpoints: dict[int, list[Checkpoint]] = {}

    @property
    def used(self) -> int:
        """Cells holding computed tokens that the trie knows, twins included; never less than llama.cpp uses for them."""
        return self.trie.size + self._twin_cells(self._twins)

    @property
    def available(self) -> int:
        """Cells neither used nor promised; evicting residents can add to them."""
        return self.context.n_ctx - self.used - self._open_promises

    @property
    def n_resident(self) -> int:
        return len(self._residents)

    def best(self, tokens: list[int], limit: int) -> Source:
        """The longest usable beginning of `tokens`, at most `limit` long, in a slot or in the store."""
        wanted = tokens[:limit]
        best = Source()
        for slot, length in self.trie.matches(wanted).items():
            whole = slot in self._residents and length == self.trie.length(slot)
            usable = length if whole or self._reaches(slot, length) else _last(self._checkpoints.get(slot, ()), length)
            if usable > best.length:
                best = Source(usable, slot=slot)
        for entry, length in self.store.matches(wanted):
            held = len(entry.tokens)
            whole = length == held or self.cut is Cut.ANY or (self.cut is Cut.WINDOW and held <= self.n_swa)
            usable = length if whole else _last(entry.checkpoints, length)
            # a state costs a copy and cells; a resident of nearly the same length costs nothing
            if usable > best.length + MIN_STORED or (usable > best.length and best.slot < 0):
                best = Source(usable, entry=entry)
        return best

    def open(self, source: Source, cells: int, *, expected: int = 0) -> int:
        """A slot that starts as `source`, with room for `cells` in all promised to it; -1 when there is none yet.

        `expected` tokens will come later by `fork_live` and cost nothing. Residents are evicted, least
        recently used first, as far as needed. Read `length(slot)` for what was really reused.
        """
        if not self._could_fit(source, cells - expected):
            return -1
        if source.slot in self._residents:
            self._residents.move_to_end(source.slot)
        if source.entry is not None and not self._make_room(max(cells, len(source.entry.tokens))):
            source = Source()
        if self._free or self._evict_one(keep=source.slot):
            slot = self._free.pop()
            if source.entry is not None:
                self._load(source.entry, slot, source.length)
            elif source.slot >= 0:
                self._fork(source.slot, slot, source.length)
        elif source.slot in self._residents:
            # the only slot that is not running is the source itself: continue in place
            slot = source.slot
            del self._residents[slot]
            self.truncate(slot, source.length)
        else:
            return -1
        # only now may the source itself be evicted: what is shared with it stays
        if not self._make_room(cells - expected - self.trie.length(slot)):
            self._free_slot(slot)
            return -1
        self._promised[slot] = cells - expected
        return slot

    def length(self, slot: int) -> int:
        """Leading tokens of the slot that the trie knows as computed."""
        return self.trie.length(slot)

    def fork_live(self, source: int, slot: int, length: int) -> None:
        """Let a fresh slot share the first `length` tokens of a running one, which must stand exactly there
        unless the model can cut anywhere."""
        self.context.share(source, slot, 0, length if self.cut is not Cut.NONE else -1)
        self._own_window(source, slot, length)
        self._inherit(source, slot, length)
        self._promised[slot] += length

    def promise(self, slot: int, cells: int) -> bool:
        """Raise a slot's promise to `cells`; False when even evicting residents does not make room."""
        if not self._make_room(cells - self._promised[slot]):
            return False
        self._promised[slot] = cells
        return True

    def advance(self, slot: int, tokens: list[int]) -> None:
        """Tell that `tokens` more of the slot have been computed; cells that duplicate another's are given back."""
        for other, start, end in self.trie.extend(slot, tokens):
            if self.cut is Cut.ANY:
                self.context.remove(slot, start, end)
                self.context.share(other, slot, start, end)
            else:
                self._twins.setdefault(slot, []).append(_Twin(start, end))

    def checkpoint(self, slot: int, position: int) -> None:
        """Save what is needed to resume the slot's sequence at `position`, where it stands now."""
        if self.cut is Cut.ANY:
            return
        kept = self._checkpoints.setdefault(slot, [])
        if all(c.position != position for c in kept):
            kept.append(Checkpoint(position, self.context.state(slot, PARTIAL)))
            del kept[:-MAX_CHECKPOINTS]
            self._bound_checkpoints()

    def close(self, slot: int, *, keep: bool) -> None:
        """End a running slot: keep it resident for reuse, or free its cells."""
        self._promised.pop(slot, None)
        if not keep or self.trie.length(slot) < MIN_KEPT:
            self._free_slot(slot)
            return
        self._residents[slot] = None
        if self.cut is Cut.ANY:
            for other in self.trie.covered(slot):
                if other in self._residents:
                    self._free_slot(other)

    def entry(self, slot: int) -> Entry:
        """A copy of the slot's state, for saving."""
        return Entry(self.trie.tokens(slot), self.context.state(slot), tuple(self._checkpoints.get(slot, ())))

    def evict(self) -> bool:
        """Free the least recently used resident; False when there is none."""
        return self._evict_one()

    def clear(self) -> None:
        """Forget every resident and everything in the RAM store."""
        for slot in list(self._residents):
            self._free_slot(slot)
        self.store.clear()

    def truncate(self, slot: int, length: int) -> int:
        """Keep the slot's first `length` tokens, or as many of them as its memory can; returns how many."""
        tokens = self.trie.tokens(slot)
        checkpoints, twins = self._checkpoints.pop(slot, []), self._twins.pop(slot, [])
        if length < len(tokens):
            length, restored = self._resume(slot, length, checkpoints)
            twins += restored
        self.trie.remove(slot)
        # joins nothing new: what is left was shared or counted as a twin before
        self.trie.extend(slot, tokens[:length])
        self._remember(slot, length, checkpoints, twins)
        return min(length, len(tokens))

    def _fork(self, source: int, slot: int, length: int) -> None:
        """Start `slot` as what can be had of the first `length` tokens of `source`."""
        if self.cut is Cut.ANY:
            self.context.share(source, slot, 0, length)
            self.trie.fork(source, slot, length)
            return
        self.context.share(source, slot)
        twins: list[_Twin] = []
        if length == self.trie.length(source) and source in self._residents:
            self._own_window(source, slot, length)
        elif self._reaches(slot, length):
            self.context.remove(slot, length)
            self._own_window(source, slot, length)
        else:
            length, twins = self._resume(slot, length, self._checkpoints.get(source, ()))
        self._inherit(source, slot, length)
        self._remember(slot, length, self._checkpoints[slot], [*self._twins[slot], *twins])

    def _load(self, entry: Entry, slot: int, length: int) -> None:
        if not self.context.restore(slot, entry.state):
            return
        self.store.touch(entry)
        twins: list[_Twin] = []
        if length < len(entry.tokens):
            length, twins = self._resume(slot, length, entry.checkpoints)
        self.advance(slot, entry.tokens[:length])
        self._remember(slot, length, entry.checkpoints, [*self._twins.get(slot, ()), *twins])

    def _reaches(self, slot: int, length: int) -> bool:
        """Whether a slot that holds more can be cut to `length` tokens and go on from there."""
        if self.cut is not Cut.WINDOW:
            return self.cut is Cut.ANY
        # an empty window begins at -1
        return 0 <= self.context.span(slot)[0] <= max(0, length - self.n_swa)

    def _resume(self, slot: int, length: int, checkpoints: Iterable[Checkpoint]) -> tuple[int, list[_Twin]]:
        """Bring a slot that holds more back to `length` tokens; returns where it stands (0 when nothing is usable)
        and the cells that this took."""
        if self._reaches(slot, length) and self.context.remove(slot, length):
            return length, []
        # a state that cannot be restored leaves the slot empty, so an older one would have nothing to stand on
        last = max((c for c in checkpoints if c.position <= length), key=lambda c: c.position, default=None)
        if last is not None and self.context.restore(slot, last.state, PARTIAL) and self.context.remove(slot, last.position):
            copied = self.cut is Cut.WINDOW and not self._roomy
            return last.position, [_Twin(max(0, last.position - self.n_swa), last.position)] if copied else []
        self.context.remove(slot)
        return 0, []

    def _own_window(self, source: int, slot: int, length: int) -> None:
        """Give `slot`, which shares `length` tokens of `source`, a copy of its window where the window cache has room for one each.

        llama.cpp does not reuse a shared cell that has left the window, so sharing would fill that cache for good.
        """
        if self.cut is not Cut.WINDOW or not self._roomy:
            return
        if not self.context.restore(slot, self.context.state(slot, PARTIAL), PARTIAL):
            self.context.share(source, slot, 0, length)

    def _inherit(self, source: int, slot: int, length: int) -> None:
        """Book that `slot` now holds the first `length` tokens of `source`."""
        self.trie.fork(source, slot, length)
        self._remember(slot, length, self._checkpoints.get(source, ()), self._twins.get(source, ()))

    def _remember(self, slot: int, length: int, checkpoints: Iterable[Checkpoint], twins: Iterable[_Twin]) -> None:
        """Keep of a slot's checkpoints and twins those within its first `length` tokens."""
        self._checkpoints[slot] = [c for c in checkpoints if c.position <= length]
        self._twins[slot] = [t for t in twins if t.start < length]

    def _bound_checkpoints(self) -> None:
        """Drop checkpoints of the least recently used residents while all together exceed the RAM store's size."""
        for slot in self._residents:
            sizes = {id(c): len(c.state) for checkpoints in self._checkpoints.values() for c in checkpoints}
            if sum(sizes.values()) <= self.store.ram_bytes:
                return
            self._checkpoints.pop(slot, None)

    def _could_fit(self, source: Source, cells: int) -> bool:
        """Whether there is room once every resident is gone but for what is shared: else evicting them is for nothing."""
        running = set(self._promised)
        held = self.trie.held(running, also=source.slot, length=source.length) + self._twin_cells(running)
        shared = source.length if source.slot >= 0 else 0
        return held + self._open_promises + cells - shared <= self.context.n_ctx

    @property
    def _open_promises(self) -> int:
        """Cells promised to running slots and not used yet."""
        return sum(max(0, until - self.trie.length(slot)) for slot, until in self._promised.items())

    def _twin_cells(self, slots: Iterable[int]) -> int:
        """Cells of the twins that `slots` have, shared ones counted once."""
        twins = {twin for slot in slots for twin in self._twins.get(slot, ())}
        return sum(twin.end - twin.start for twin in twins)

    def _make_room(self, need: int) -> bool:
        while self.available < need:
            if not self._evict_one():
                return False
        return True

    def _evict_one(self, *, keep: int = -1) -> bool:
        """Move the least recently used resident to the store and free its slot."""
        for slot in self._residents:
            if slot != keep:
                if self.trie.unique(slot) >= MIN_STORED and self.store.ram_bytes:
                    self.store.put(self.entry(slot))
                self._free_slot(slot)
                return True
        return False

    def _free_slot(self, slot: int) -> None:
        self.context.remove(slot)
        self.trie.remove(slot)
        self._residents.pop(slot, None)
        self._twins.pop(slot, None)
        self._checkpoints.pop(slot, None)
        self._free.append(slot)


def _last(checkpoints: Iterable[Checkpoint], limit: int) -> int:
    """Position of the last checkpoint not after `limit`; 0 when there is none."""
    return max((c.position for c in checkpoints if c.position <= limit), default=0)
