"""What a person sees of a command: the answer on stdout, progress and statistics on stderr.

Knows terminals and pipes; knows nothing of engines, options or conversations.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from localllm.cli.visible import visible
from localllm.errors import LocalLLMError
from localllm.types import Delta, Event, Loading, Prefill, Queued, Timings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def statistics(timings: Timings) -> str:
    """One line from the engine's own clock; it always holds `tokens/s`."""
    rate = f"{timings.predicted_per_second:,.1f}" if timings.predicted_per_second else "–"
    parts = [f"{_count(timings.predicted_n)} · {rate} tokens/s"]
    if timings.predicted_n:
        parts.append(f"TTFT {_duration(timings.ttft_ms)}")
    prompt = f"prompt {_count(timings.cache_n + timings.prompt_n)}"
    if timings.cache_n:
        prompt += f" ({timings.cache_n:,} cached)"
    if timings.prompt_per_second:
        prompt += f" {timings.prompt_per_second:,.0f} tokens/s"
    parts.append(prompt)
    if timings.draft_n:
        parts.append(f"drafts {timings.draft_n_accepted:,} of {timings.draft_n:,} accepted")
    return " · ".join(parts)


def _count(tokens: int) -> str:
    return f"{tokens:,} token{'' if tokens == 1 else 's'}"


def _duration(ms: float) -> str:
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


class Screen:
    """Renders the events of a stream: text at once, the rest as a bar that leaves no trace.

    `answer=False` keeps the answer off stdout (for --json); `quiet` keeps progress and statistics off stderr,
    `progress=False` the progress alone (for a log on the same stderr).
    Without a terminal on stderr there is no progress, only the statistics.
    """

    def __init__(
        self, *, answer: bool = True, quiet: bool = False, progress: bool = True, show_thinking: bool = False, color: bool = True
    ) -> None:
        self._answer = answer
        self._quiet = quiet
        self._show_progress = progress and not quiet
        self._show_thinking = show_thinking
        self._out_is_terminal = sys.stdout.isatty()
        self._console = _console(color) if sys.stderr.isatty() else None
        self._bar: Progress | None = None
        self._thought_tokens = 0
        self._in_thought = False
        self._line_open = False

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.clear()

    def show(self, event: Event) -> None:
        """Render one event. Raises BrokenPipeError when the reader of stdout went away, LocalLLMError when it cannot take more."""
        match event:
            case Queued(position=position):
                self._progress(f"waiting, number {position} in the queue", None)
            case Loading(stage=stage, fraction=fraction):
                self._progress(f"loading {stage}", fraction)
            case Prefill(done=done, total=total) if done < total:
                self._progress(f"reading the prompt, {done:,} of {total:,} tokens", done / total)
            case Delta(channel="reasoning", text=text, tokens=tokens):
                self._reasoning(text, len(tokens))
            case Delta(text=text) if text:
                self.clear()
                self._text(text)
            case _:
                pass

    def end_answer(self) -> None:
        """Finish the answer's last line."""
        self.clear()
        if self._line_open:
            self._text("\n")

    def statistics(self, timings: Timings | None) -> None:
        """The line that ends every answer; None when it was stopped too hard for the engine to report."""
        if not self._quiet:
            self.note(statistics(timings) if timings else "stopped · tokens/s not reported")

    def note(self, text: str) -> None:
        """A dim line on stderr."""
        self.clear()
        # `2>&1 | head`: nobody is left to tell.
        with contextlib.suppress(BrokenPipeError):
            if self._console:
                self._console.print(text, style="dim", markup=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr, flush=True)

    def complain(self, error: LocalLLMError) -> None:
        """An error that does not end the command."""
        self.clear()
        with contextlib.suppress(BrokenPipeError):
            print(f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the progress bar away and end a shown thought."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        self._thought_tokens = 0
        if self._in_thought and self._console:
            self._console.print("\n")
            self._in_thought = False

    def _text(self, text: str) -> None:
        if not self._answer:
            return
        try:
            sys.stdout.write(visible(text) if self._out_is_terminal else text)
            sys.stdout.flush()
        except OSError as error:
            self._answer = self._line_open = False
            # EINVAL is what Windows calls a broken pipe.
            if isinstance(error, BrokenPipeError) or error.errno == errno.EINVAL:
                raise BrokenPipeError from error
            raise LocalLLMError(f"cannot write the answer: {error.strerror}", hint="see where stdout goes") from error
        self._line_open = not text.endswith("\n")

    def _reasoning(self, text: str, tokens: int) -> None:
        if self._show_thinking and self._console:
            if not self._in_thought:
                self.clear()
            self._in_thought = True
            self._console.print(visible(text), style="dim", end="", markup=False, soft_wrap=True)
        else:
            self._thought_tokens += tokens
            self._progress(f"thinking, {_count(self._thought_tokens)}", None)

    def _progress(self, description: str, fraction: float | None) -> None:
        if not self._show_progress or not self._console:
            return
        state: dict[str, Any] = {"description": description, "completed": fraction or 0.0, "total": None if fraction is None else 1.0}
        if self._bar:
            self._bar.update(self._bar.task_ids[0], **state)
        else:
            self._bar = _bar(self._console)
            self._bar.add_task(**state)
            self._bar.start()


def _console(color: bool) -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, emoji=False, no_color=None if color else True)


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    description = TextColumn("{task.description}", style="dim", markup=False)
    return Progress(description, BarColumn(bar_width=30), TimeElapsedColumn(), console=console, transient=True)
