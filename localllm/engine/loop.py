"""The step loop: admit, batch, decode, sample, tell. One thread owns the llama.cpp context.

It knows token ids, slots and time. Text, JSON and templates are other threads' work: everything it
says goes through `Listener`, everything it is told comes through the inbox.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from localllm.engine.admission import Admission
from localllm.engine.kv import KVPool
from localllm.engine.scheduler import Prompt, StepCost, share_rows
from localllm.engine.sequence import Job, Sequence, TokenScore
from localllm.errors import EngineError, LocalLLMError, Overloaded
from localllm.llama.context import Context, NoRoom
from localllm.llama.sampling import top_logprobs
from localllm.types import FinishReason

T = TypeVar("T")

logger = logging.getLogger("localllm.engine")

clock = time.perf_counter


class StepLoop:
    """Runs jobs on one context. Public methods may be called from any thread."""

    def __init__(self, context: Context, pool: KVPool, *, n_running: int, n_ctx_seq: int, step_target_ms: float, max_queue: int) -> None:
        self.context = context
        self.pool = pool
        self.admission = Admission(pool, n_running=n_running, n_ctx_seq=n_ctx_seq, max_queue=max_queue)
        self.running = self.admission.running
        self.waiting = self.admission.waiting
        self.n_ctx_seq = n_ctx_seq
        self.step_target_ms = step_target_ms
        self.cost = StepCost()
        self.n_steps = 0
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
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
                if self.admission.idle:
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
        if (misfit := self.admission.admit()) is not None:
            self._fail(misfit, EngineError("the request does not fit the empty cache", hint="use a larger context (-c)"))
        decoding = [s for s in self.running if s.decoding]
        chunks = self._chunks(len(decoding))
        if not decoding and not chunks:
            return
        rows = self._fill(decoding, chunks)
        started = clock()
        try:
            self.context.decode(rows)
        except NoRoom as error:
            if not self.admission.make_way():
                self._fail(self.running[0].job, error)
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
        prompts: list[Prompt] = []
        for i, s in enumerate(prefilling):
            rank, deadline_s, submitted_s = s.job.order(now)
            limit = s.pauses[0] - s.n_past if s.pauses else s.pending
            prompts.append(Prompt(i, s.pending, limit, rank, deadline_s, waited_s=now - submitted_s))
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
            self.admission.serve_followers()
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
                self.admission.shift(sequence)
            else:
                self._finish(sequence, "length")
        elif len(sequence.tokens) > sequence.until:
            self.admission.renew_promise(sequence)

    # beginnings and endings

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        job = sequence.job
        self.admission.leave(sequence, keep=job.cache)
        job.listener.finished(sequence, reason)
        job.open_sequences -= 1
        if job.open_sequences == 0:
            job.over = True
            job.listener.done(job, job.timings())

    def _enqueue(self, job: Job) -> None:
        # a cancel from another thread may have come first
        if job.over:
            return
        if self.admission.full:
            self._fail(job, Overloaded(f"the queue is full: {len(self.waiting)} requests wait", hint="try again later"))
        else:
            self.admission.enqueue(job)

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
                self.admission.leave(sequence, keep=False)
        job.listener.failed(job, error)

    def _fail_all(self, error: LocalLLMError) -> None:
        for job in dict.fromkeys(s.job for s in (*self.running, *self.waiting)):
            self._fail(job, error)


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
