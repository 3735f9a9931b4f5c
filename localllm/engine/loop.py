"""The step loop: admit, batch, decode, sample, tell. One thread owns the llama.cpp context.

It knows token ids, slots and time. Text, JSON and templates are other threads' work: everything it
says goes through `Listener`, everything it is told comes through the inbox.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import insort
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from localllm.engine.kv import Cut, KVPool, Source
from localllm.engine.prefix import common_prefix
from localllm.engine.scheduler import Prompt, StepCost, share_rows
from localllm.engine.sequence import Job, Sequence, TokenScore
from localllm.errors import EngineError, LocalLLMError, Overloaded
from localllm.llama.context import Context, NoRoom
from localllm.llama.sampling import top_logprobs
from localllm.types import FinishReason

T = TypeVar("T")

logger = logging.getLogger("localllm.engine")

PROMISE = 512
"""Cells promised ahead to an answer without max_tokens; the promise is renewed as it is used up."""
WORTH_FOLLOWING = 16
"""Waiting for another sequence's prefill must save at least this many tokens."""

clock = time.perf_counter


class StepLoop:
    """Runs jobs on one context. Public methods may be called from any thread."""

    def __init__(self, context: Context, pool: KVPool, *, n_running: int, n_ctx_seq: int, step_target_ms: float, max_queue: int) -> None:
        self.context = context
        self.pool = pool
        self.n_running = n_running
        self.n_ctx_seq = n_ctx_seq
        self.step_target_ms = step_target_ms
        self.max_queue = max_queue
        self.cost = StepCost()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.n_steps = 0
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._blocked = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="localllm-step", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        job.submitted_s = clock()
        self._inbox.put(lambda: self._enqueue(job))

    def cancel(self, job: Job) -> None:
        """End the job at the next step; its listener still gets finished and done."""
        self._inbox.put(lambda: self._cancel(job))

    def do(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the step thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._inbox.put(run)
        return future

    def close(self) -> None:
        """Fail what runs and waits, and end the thread; nothing may be submitted after."""

        def stop() -> None:
            self._closing = True

        self._inbox.put(stop)
        self._thread.join()

    # the loop

    def _run(self) -> None:
        while not self._closing:
            try:
                if not self.running and (not self.waiting or self._blocked):
                    self._inbox.get()()
                while not self._inbox.empty():
                    self._inbox.get()()
                self.step()
            except LocalLLMError as error:
                self._fail_all(error)
            except Exception as error:
                logger.exception("the step loop failed")
                self._fail_all(EngineError(f"the engine failed: {error!r}", hint="this is a bug in localllm; please report it"))
        self._fail_all(EngineError("the engine was closed", hint="load the model again"))

    def step(self) -> None:
        """One batch: a row for every decoding sequence, prompt chunks in what is left."""
        self._admit()
        decoding = [s for s in self.running if s.decoding]
        chunks = self._chunks(len(decoding))
        if not decoding and not chunks:
            return
        rows = self._fill(decoding, chunks)
        started = clock()
        try:
            self.context.decode(rows)
        except NoRoom as error:
            self._make_room(error)
            return
        except EngineError as error:
            for sequence in [*decoding, *(s for s, _ in chunks)]:
                self._fail(sequence.job, error)
            return
        self.cost.record((clock() - started) * 1e3, len(decoding), rows - len(decoding))
        self.n_steps += 1
        ready = self._advance(chunks, len(decoding))
        for sequence in decoding:
            sequence.n_past += 1
        for row, sequence in enumerate(decoding):
            self._sample(sequence, row)
        for sequence, row in ready:
            self._sample(sequence, row)

    def _chunks(self, n_decoding: int) -> list[tuple[Sequence, int]]:
        """Sequences in prefill and how many of their tokens go into this batch."""
        prefilling = [s for s in self.running if not s.decoding and s.following is None]
        if not prefilling:
            return []
        now = clock()
        target = self.cost.prompt_rows(self.step_target_ms, decoding=n_decoding > 0)
        budget = min(self.context.n_batch - n_decoding, target)
        prompts = (
            Prompt(
                key=i,
                remaining=s.pending,
                limit=s.pauses[0] - s.n_past if s.pauses else s.pending,
                rank=s.job.order(now)[0],
                deadline_s=s.job.order(now)[1],
                waited_s=now - s.job.submitted_s,
            )
            for i, s in enumerate(prefilling)
        )
        return [(prefilling[i], n) for i, n in share_rows(prompts, budget, self.cost.rows_per_second).items()]

    def _fill(self, decoding: list[Sequence], chunks: list[tuple[Sequence, int]]) -> int:
        """Write the batch arrays; returns the number of rows."""
        context = self.context
        tokens, positions, slots, outputs = context.tokens, context.positions, context.sequences, context.outputs
        row = 0
        for sequence in decoding:
            tokens[row] = sequence.tokens[-1]
            positions[row] = sequence.n_past
            slots[row] = sequence.slot
            row += 1
        outputs[:row] = 1
        for sequence, n in chunks:
            end, start = row + n, sequence.n_past
            tokens[row:end] = sequence.tokens[start : start + n]
            positions[row:end] = range(start, start + n)
            slots[row:end] = sequence.slot
            outputs[row:end] = 0
            outputs[end - 1] = n == sequence.pending
            row = end
        return row

    def _advance(self, chunks: list[tuple[Sequence, int]], row: int) -> list[tuple[Sequence, int]]:
        """Book computed prompt chunks; returns the sequences whose prompt is complete, with their output row."""
        ready: list[tuple[Sequence, int]] = []
        for sequence, n in chunks:
            row += n
            start = sequence.n_past
            sequence.n_past += n
            self.pool.advance(sequence.slot, sequence.tokens[start : start + n])
            if sequence.pauses and sequence.pauses[0] == sequence.n_past:
                sequence.pauses.pop(0)
                self.pool.checkpoint(sequence.slot, sequence.n_past)
            if sequence.pending == 0:
                ready.append((sequence, row - 1))
            # not for what a preemption or a shifted context makes compute again
            if sequence.index == 0 and not sequence.n_out:
                sequence.job.listener.prefilled(sequence.job, sequence.n_past, sequence.job.n_cached)
        if chunks:
            self._serve_followers()
        return ready

    def _sample(self, sequence: Sequence, row: int) -> None:
        """Choose the next token of a sequence, tell it, and end the sequence where it ends."""
        job = sequence.job
        # an earlier row of this batch may have failed its job or sent it back to the queue
        if job.over or sequence.slot < 0:
            return
        if job.max_tokens == 0:
            job.first_token_s = job.last_token_s = clock()
            self._finish(sequence, "length")
            return
        try:
            token = sequence.sampler.sample(self.context, row)
            score = TokenScore(*_scores(self.context, row, token, job.logprobs)) if job.logprobs >= 0 else None
        except EngineError as error:
            self._fail(job, error)
            return
        now = clock()
        if sequence.n_out:
            job.intervals_ms.append((now - sequence.last_s) * 1e3)
        elif not job.first_token_s:
            job.first_token_s = now
        sequence.last_s = job.last_token_s = now
        sequence.tokens.append(token)
        sequence.n_out += 1
        job.n_predicted += 1
        job.listener.token(sequence, token, score)
        if token in job.end_tokens or (job.stop_bytes and _stopped(sequence, token)):
            self._finish(sequence, "stop")
        elif sequence.n_out == job.max_tokens:
            self._finish(sequence, "length")
        elif len(sequence.tokens) >= self.n_ctx_seq:
            if job.context_shift:
                self._shift(sequence)
            else:
                self._finish(sequence, "length")
        elif len(sequence.tokens) > sequence.until:
            self._extend_promise(sequence)

    # waiting and admission

    def _enqueue(self, job: Job) -> None:
        # a cancel from another thread may have come first
        if job.over:
            return
        if len(self.waiting) + len(self.running) >= self.max_queue + self.n_running:
            job.over = True
            job.listener.failed(job, Overloaded(f"the queue is full: {len(self.waiting)} requests wait", hint="try again later"))
            return
        self.waiting += job.sequences
        self._blocked = False

    def _admit(self) -> None:
        if not self.waiting or self._blocked:
            return
        now = clock()
        self.waiting.sort(key=lambda s: (*s.job.order(now), s.index))
        while self.waiting and len(self.running) < self.n_running and self._open(self.waiting[0]):
            self.running.append(self.waiting.pop(0))
        if self.waiting and not self.running:
            self._fail(self.waiting[0].job, EngineError("the request fits no empty cache", hint="use a larger context (-c)"))
            return
        # nothing changes for the rest until a sequence ends
        self._blocked = bool(self.waiting)
        for position, sequence in enumerate(self.waiting, 1):
            job = sequence.job
            if sequence.index == 0 and job.position != position and not job.admitted_s:
                job.position = position
                job.listener.queued(job, position)

    def _open(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and its prefix; False when there is no room for it now."""
        job, tokens = sequence.job, sequence.tokens
        left = job.max_tokens - sequence.n_out if job.max_tokens >= 0 else PROMISE
        until = min(len(tokens) + min(left, PROMISE), self.n_ctx_seq)
        source = self.pool.best(tokens, len(tokens) - 1) if job.cache else Source()
        leader, shared = self._leader(sequence)
        if leader is not None and shared >= source.length + WORTH_FOLLOWING:
            slot = self.pool.open(Source(), until, expected=shared)
            sequence.following = (leader, shared)
        else:
            slot = self.pool.open(source, until)
            sequence.following = None
        if slot < 0:
            sequence.following = None
            return False
        sequence.slot, sequence.until = slot, until
        sequence.n_past = self.pool.length(slot)
        sequence.pauses = self._pauses(sequence)
        if sequence.following is not None and self.pool.cut is not Cut.ANY:
            assert leader is not None
            if shared not in leader.pauses:
                insort(leader.pauses, shared)
        if not job.admitted_s:
            job.admitted_s = clock()
        if sequence.index == 0 and not sequence.n_out:
            job.n_cached = sequence.n_past
        return True

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

    def _pauses(self, sequence: Sequence) -> list[int]:
        """Where to checkpoint a prompt whose model cannot go back: message starts and just before its end."""
        if self.pool.cut is Cut.ANY:
            return []
        end = len(sequence.tokens) - 1
        marks = [m for m in sequence.job.marks if m < end][-2:]
        return [p for p in (*marks, end) if p > sequence.n_past]

    def _serve_followers(self) -> None:
        """Hand a shared prefix to those who waited for it; send back those whose leader is gone."""
        for sequence in list(self.running):
            if sequence.following is None:
                continue
            leader, shared = sequence.following
            if leader.finished or leader.slot < 0 or (leader.n_past > shared and self.pool.cut is not Cut.ANY):
                self._requeue(sequence)
            elif leader.n_past >= shared:
                self.pool.fork_live(leader.slot, sequence.slot, shared)
                sequence.following, sequence.n_past = None, shared
                sequence.pauses = [p for p in sequence.pauses if p > shared]
                if sequence.index == 0 and not sequence.n_out:
                    sequence.job.n_cached = shared

    # endings

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        job = sequence.job
        self._release(sequence, keep=job.cache)
        sequence.finished = True
        job.listener.finished(sequence, reason)
        job.open_sequences -= 1
        if job.open_sequences == 0:
            job.over = True
            job.listener.done(job, job.timings())

    def _cancel(self, job: Job) -> None:
        for sequence in job.sequences:
            if not sequence.finished and not job.over:
                self._finish(sequence, "cancelled")

    def _fail(self, job: Job, error: LocalLLMError) -> None:
        if job.over:
            return
        job.over = True
        for sequence in job.sequences:
            if not sequence.finished:
                self._release(sequence, keep=False)
                sequence.finished = True
        job.listener.failed(job, error)

    def _fail_all(self, error: LocalLLMError) -> None:
        for job in dict.fromkeys(s.job for s in (*self.running, *self.waiting)):
            self._fail(job, error)

    def _release(self, sequence: Sequence, *, keep: bool) -> None:
        """Take a sequence out of the loop for good; its computed tokens stay resident when `keep`."""
        self._blocked = False
        sequence.sampler.close()
        if sequence.slot < 0:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        slot, sequence.slot = sequence.slot, -1
        if keep:
            self.pool.advance(slot, sequence.tokens[self.pool.length(slot) : sequence.n_past])
            if sequence.job.session and sequence.index == 0 and self.pool.length(slot):
                self._save(sequence.job, slot)
        self.pool.close(slot, keep=keep)
        self._serve_followers()

    def _save(self, job: Job, slot: int) -> None:
        try:
            entry = self.pool.entry(slot)
        except MemoryError:
            logger.warning("the state of a session could not be copied: out of memory")
        else:
            job.listener.save(job, entry)

    def _requeue(self, sequence: Sequence) -> None:
        """Back to the queue, with everything it has; what it computed goes to the store."""
        slot, sequence.slot = sequence.slot, -1
        self.running.remove(sequence)
        self.pool.advance(slot, sequence.tokens[self.pool.length(slot) : sequence.n_past])
        self.pool.close(slot, keep=sequence.job.cache)
        sequence.following, sequence.n_past = None, 0
        self.waiting.insert(0, sequence)
        self._blocked = False
        self._serve_followers()

    # room

    def _extend_promise(self, sequence: Sequence) -> None:
        """Promise more cells to an answer that goes on; when there are none, the youngest waits for others to end."""
        limit = len(sequence.job.prompt) + sequence.job.max_tokens if sequence.job.max_tokens >= 0 else self.n_ctx_seq
        until = min(len(sequence.tokens) + PROMISE, self.n_ctx_seq, max(limit, len(sequence.tokens) + 1))
        now = clock()
        while not self.pool.promise(sequence.slot, until):
            youngest = max(self.running, key=lambda s: (*s.job.order(now), s.index))
            self._requeue(youngest)
            if youngest is sequence:
                return
        sequence.until = until

    def _make_room(self, error: NoRoom) -> None:
        """llama.cpp found no cells although the books say there are: evict, then preempt, then give up."""
        if self.pool.evict():
            return
        now = clock()
        youngest = max(self.running, key=lambda s: (*s.job.order(now), s.index))
        if len(self.running) > 1:
            self._requeue(youngest)
            # at once it would only be given its room again
            self._blocked = bool(self.running)
        else:
            self._fail(youngest.job, error)

    def _shift(self, sequence: Sequence) -> None:
        """Drop the older half after the kept beginning and compute the rest anew: exact, for any model."""
        tokens, keep = sequence.tokens, min(sequence.job.n_keep, self.n_ctx_seq // 2)
        drop = max(1, (len(tokens) - keep) // 2)
        self.pool.advance(sequence.slot, tokens[self.pool.length(sequence.slot) : sequence.n_past])
        sequence.tokens = tokens[:keep] + tokens[keep + drop :]
        sequence.n_past = self.pool.truncate(sequence.slot, keep)


def _stopped(sequence: Sequence, token: int) -> bool:
    """Whether a stop string ends in this token's bytes."""
    job = sequence.job
    assert job.piece is not None
    piece = job.piece(token)
    text = sequence.tail + piece
    keep = max(map(len, job.stop_bytes)) - 1
    sequence.tail = text[-keep:] if keep else b""
    return any(stop in text for stop in job.stop_bytes)


def _scores(context: Context, row: int, token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    logprob, top = top_logprobs(context.logits(row), token, n)
    return logprob, tuple(top)
