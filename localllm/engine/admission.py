"""Who runs and who waits: the queue, entering by accounting, sharing what others compute, making way.

A sequence enters when a slot is free and its tokens and the answer promised to it fit the cells.
One that needs a beginning which a running sequence is just computing follows it: it waits, then
shares. When room runs out the youngest goes back to the queue with everything it has. This module
decides; `kv.py` keeps the books and `loop.py` computes.
"""

from __future__ import annotations

import logging
import time
from bisect import insort

from localllm.engine.kv import Cut, KVPool, Source
from localllm.engine.prefix import common_prefix
from localllm.engine.sequence import Job, Sequence

logger = logging.getLogger("localllm.engine")

PROMISE = 512
"""Cells promised ahead to an answer; the promise is renewed as it is used up."""
WORTH_FOLLOWING = 16
"""Waiting for another sequence's prefill must save at least this many tokens."""

clock = time.perf_counter


class Admission:
    """The waiting and the running sequences of one pool; lengths in tokens."""

    def __init__(self, pool: KVPool, *, n_running: int, n_ctx_seq: int, max_queue: int) -> None:
        self.pool = pool
        self.n_running = n_running
        self.n_ctx_seq = n_ctx_seq
        self.max_queue = max_queue
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._blocked = False
        """Nobody waiting can enter before something changes."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do until somebody says something."""
        return not self.running and (not self.waiting or self._blocked)

    @property
    def full(self) -> bool:
        return len(self.waiting) + len(self.running) >= self.max_queue + self.n_running

    def enqueue(self, job: Job) -> None:
        self.waiting += job.sequences
        self._blocked = False

    def admit(self) -> Job | None:
        """Let in whom there is room for, in order; returns a job that does not even fit an empty cache."""
        if not self.waiting or self._blocked:
            return None
        now = clock()
        self.waiting.sort(key=lambda s: (*s.job.order(now), s.index))
        while self.waiting and len(self.running) < self.n_running and self._enter(self.waiting[0]):
            self.running.append(self.waiting.pop(0))
        if self.waiting and not self.running:
            return self.waiting[0].job
        # nothing changes for the rest until a sequence ends
        self._blocked = bool(self.waiting)
        for position, sequence in enumerate(self.waiting, 1):
            job = sequence.job
            if sequence.index == 0 and job.position != position and not job.admitted_s:
                job.position = position
                job.listener.queued(job, position)
        return None

    def serve_followers(self) -> None:
        """Hand a shared prefix to those who waited for it; send back those whose leader is gone."""
        for sequence in list(self.running):
            if sequence.following is None:
                continue
            leader, shared = sequence.following
            if leader.finished or leader.slot < 0 or (leader.n_past > shared and self.pool.cut is not Cut.ANY):
                self.requeue(sequence)
            elif leader.n_past >= shared:
                self.pool.fork_live(leader.slot, sequence.slot, shared)
                sequence.following = None
                sequence.pauses = [p for p in sequence.pauses if p > shared]
                self._starts_at(sequence, shared)

    def leave(self, sequence: Sequence, *, keep: bool) -> None:
        """Take a sequence out for good; its computed tokens stay resident when `keep`."""
        self._blocked = False
        sequence.finished = True
        sequence.sampler.close()
        if sequence.slot < 0:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        slot, sequence.slot = sequence.slot, -1
        if keep:
            self._book(slot, sequence)
            if sequence.job.session and sequence.index == 0 and self.pool.length(slot):
                self._save(sequence.job, slot)
        self.pool.close(slot, keep=keep)
        self.serve_followers()

    def requeue(self, sequence: Sequence) -> None:
        """Back to the queue; what it computed stays resident, or goes to the store, until it enters again."""
        slot, sequence.slot = sequence.slot, -1
        self.running.remove(sequence)
        self._book(slot, sequence)
        self.pool.close(slot, keep=sequence.job.cache)
        sequence.following, sequence.n_past = None, 0
        self.waiting.insert(0, sequence)
        self._blocked = False
        self.serve_followers()

    def renew_promise(self, sequence: Sequence) -> None:
        """Promise more cells to an answer that goes on; when there are none the youngest makes way, perhaps itself."""
        until = self._until(sequence)
        while not self.pool.promise(sequence.slot, until):
            youngest = self._youngest()
            self.requeue(youngest)
            if youngest is sequence:
                return
        sequence.until = until

    def make_way(self) -> bool:
        """Free cells although the books say there are some: evict, else preempt; False when one sequence is alone."""
        if self.pool.evict():
            return True
        if len(self.running) < 2:
            return False
        self.requeue(self._youngest())
        # at once it would only be given its room again
        self._blocked = True
        return True

    def shift(self, sequence: Sequence) -> None:
        """Drop the older half of a full context after its kept beginning; the rest is computed anew, exact for any model."""
        tokens, keep = sequence.tokens, min(sequence.job.n_keep, self.n_ctx_seq // 2)
        drop = max(1, (len(tokens) - keep) // 2)
        self._book(sequence.slot, sequence)
        sequence.tokens = tokens[:keep] + tokens[keep + drop :]
        sequence.n_past = self.pool.truncate(sequence.slot, keep)

    def _enter(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and the beginning of its tokens; False when there is no room for it now."""
        job, tokens, pool = sequence.job, sequence.tokens, self.pool
        until = self._until(sequence)
        source = pool.best(tokens, len(tokens) - 1) if job.cache else Source()
        leader, shared = self._leader(sequence)
        follows = leader is not None and shared >= source.length + WORTH_FOLLOWING
        slot = pool.open(Source(), until, expected=shared) if follows else pool.open(source, until)
        if slot < 0:
            return False
        sequence.slot, sequence.until = slot, until
        if leader is not None and follows:
            sequence.following = (leader, shared)
            if pool.cut is not Cut.ANY and shared not in leader.pauses:
                insort(leader.pauses, shared)
        if not job.admitted_s:
            job.admitted_s = clock()
        self._starts_at(sequence, pool.length(slot))
        sequence.pauses = self._pauses(sequence)
        return True

    def _until(self, sequence: Sequence) -> int:
        """Cells to promise: the tokens there are and the next stretch of the answer."""
        left = sequence.job.max_tokens - sequence.n_out if sequence.job.max_tokens >= 0 else PROMISE
        return min(len(sequence.tokens) + min(left, PROMISE), self.n_ctx_seq)

    def _leader(self, sequence: Sequence) -> tuple[Sequence | None, int]:
        """A running sequence that is still computing a beginning that this one needs too, and its length."""
        best, best_shared = None, 0
        for other in self.running:
            if other.pending > 1 and (sequence.job.cache or other.job is sequence.job):
                # the last token of the other may be computed while decoding, when nobody looks after followers
                limit = min(len(sequence.tokens), len(other.tokens)) - 1
                shared = min(common_prefix(other.tokens, 0, sequence.tokens, 0), limit)
                if shared > best_shared and shared > other.n_past:
                    best, best_shared = other, shared
        return best, best_shared

    def _starts_at(self, sequence: Sequence, n_past: int) -> None:
        sequence.n_past = n_past
        if sequence.index == 0 and not sequence.n_out:
            sequence.job.n_cached = n_past

    def _pauses(self, sequence: Sequence) -> list[int]:
        """Where to checkpoint a prompt whose model cannot go back: message starts and just before its end."""
        if self.pool.cut is Cut.ANY:
            return []
        end = len(sequence.tokens) - 1
        marks = [m for m in sequence.job.marks if m < end][-2:]
        return [p for p in (*marks, end) if p > sequence.n_past]

    def _book(self, slot: int, sequence: Sequence) -> None:
        """Tell the pool of tokens computed since it last heard: while decoding it is not told of each."""
        self.pool.advance(slot, sequence.tokens[self.pool.length(slot) : sequence.n_past])

    def _save(self, job: Job, slot: int) -> None:
        try:
            entry = self.pool.entry(slot)
        except MemoryError:
            logger.warning("the state of a session could not be copied: out of memory")
        else:
            job.listener.save(job, entry)

    def _youngest(self) -> Sequence:
        now = clock()
        return max(self.running, key=lambda s: (*s.job.order(now), s.index))
