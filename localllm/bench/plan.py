"""What a benchmark measures: workloads, the ratios between them, the goals. Pure: decided before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

ENGINES = ("worker", "engine")
"""Our engine in its child process, as `run` uses it, and in the process of who asks."""
ALL = (*ENGINES, "bare", "llama")

LONG_PROMPT = 16
SHARED, ENDING, SHARERS = 700, 16, 8
TINY_BYTES = 64 << 20
"""A step of a smaller model is so short that Python shows."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Simultaneous requests of one shape; all of them begin with the same `n_shared` tokens."""

    name: str
    streams: int
    n_prompt: int
    n_gen: int
    arms: tuple[str, ...]
    n_shared: int = 0

    @property
    def cells(self) -> int:
        """KV cells that the requests need in all."""
        return self.n_shared + self.streams * (self.n_prompt - self.n_shared + self.n_gen)


@dataclass(frozen=True, slots=True)
class Goal:
    """The limit that a median must reach; with `every_round` the worst round must pass it."""

    limit: float
    at_most: bool = False
    every_round: bool = False

    def met(self, median: float, low: float, high: float) -> bool:
        if self.every_round:
            return high < self.limit if self.at_most else low > self.limit
        return median <= self.limit if self.at_most else median >= self.limit

    def __str__(self) -> str:
        if self.every_round:
            return f"all {'<' if self.at_most else '>'} {self.limit:g}"
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Source:
    """One figure: the field `field` of a Run, of an arm under a workload."""

    arm: str
    workload: str
    field: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """`over` divided by `under`, round by round; without `under` the figure itself."""

    name: str
    over: Source
    under: Source | None = None
    goal: Goal | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    workloads: tuple[Workload, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm that has something to do, in a fixed order."""
        wanted = {arm for workload in self.workloads for arm in workload.arms}
        return tuple(arm for arm in ALL if arm in wanted)

    @property
    def streams(self) -> int:
        return max(workload.streams for workload in self.workloads)


def make_plan(
    *,
    n_prompt: int,
    n_gen: int,
    concurrency: tuple[int, ...],
    n_long: int = 1000,
    compare: bool = False,
    shared_prefix: bool = False,
    tiny: bool = False,
) -> Plan:
    """The workloads and comparisons; `tiny` sets the goals of a model where Python shows, `n_long` 0 leaves the long answer out."""
    arms = (*ENGINES, "bare") if compare else ("worker",)
    workloads = [Workload(streams(k), k, n_prompt, n_gen, (*arms, "llama") if compare and k == 1 else arms) for k in concurrency]
    comparisons: list[Comparison] = []
    if compare:
        if n_long:
            workloads.append(Workload("long answer", 1, LONG_PROMPT, n_long, (*ENGINES, "llama")))
        comparisons = [c for arm in ENGINES for c in _compare(arm, concurrency, n_long, tiny=tiny)]
    if shared_prefix:
        workloads += [
            Workload("alone", 1, SHARED + ENDING, 1, ("worker",)),
            Workload("shared prefix", SHARERS, SHARED + ENDING, 1, ("worker",), n_shared=SHARED),
        ]
        last, alone = (Source("worker", name, "last_ttft_ms") for name in ("shared prefix", "alone"))
        comparisons.append(
            Comparison(f"last of {SHARERS} sharing {SHARED} new tokens / one alone, TTFT", last, alone, Goal(1.3, at_most=True))
        )
    return Plan(tuple(workloads), tuple(comparisons))


def streams(k: int) -> str:
    return f"{k} stream{'' if k == 1 else 's'}"


def _compare(arm: str, concurrency: tuple[int, ...], n_long: int, *, tiny: bool) -> list[Comparison]:
    goals = {1: Goal(0.85 if tiny else 0.98), 8: Goal(0.80 if tiny else 0.95)}
    out = [
        Comparison(
            f"{arm} / bare, decode, {streams(k)}",
            Source(arm, streams(k), "decode_tps"),
            Source("bare", streams(k), "decode_tps"),
            goals.get(k),
        )
        for k in concurrency
    ]
    widest = streams(max(concurrency))
    memory, bare = Source(arm, widest, "rss_bytes"), Source("bare", widest, "rss_bytes")
    out.append(Comparison(f"{arm} / bare, memory", memory, bare, Goal(1.05, at_most=True)))
    if 1 in concurrency:
        alone = streams(1)
        for name, field in (("prompt", "prompt_tps"), ("TTFT", "ttft_ms")):
            out.append(Comparison(f"{arm} / bare, {name}, {alone}", Source(arm, alone, field), Source("bare", alone, field)))
        decode = Source(arm, alone, "decode_tps"), Source("llama", alone, "decode_tps")
        out.append(Comparison(f"{arm} / llama, decode, {alone}", *decode, Goal(1.0)))
        if arm == "engine":  # the worker's Python is in another process
            python = Source(arm, alone, "python_us_per_token")
            out.append(Comparison(f"{arm}, Python µs per token, {alone}", python, goal=Goal(50, at_most=True)))
    if n_long:
        long = Source(arm, "long answer", "decode_tps"), Source("llama", "long answer", "decode_tps")
        out.append(Comparison(f"{arm} / llama, decode, {n_long:,} tokens", *long, Goal(1.0, every_round=True)))
    return out
