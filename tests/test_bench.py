"""`localllm bench`: what is planned, measured, computed and shown. No figure is judged here: this machine may be busy."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from localllm.bench.case import Case, Run
from localllm.bench.clock import Moments
from localllm.bench.machine import machine
from localllm.bench.plan import Comparison, Goal, Plan, Source, Workload, make_plan
from localllm.bench.prompts import prose
from localllm.bench.report import Report, make_report
from localllm.bench.rounds import Record, run_plan
from localllm.bench.table import show
from localllm.cli.bench import parse_concurrency
from localllm.engine.config import EngineConfig
from localllm.errors import UsageError

MODEL = {"name": "a model", "description": "llama ?B Q8_0", "size_bytes": 1 << 20, "n_cells": 8192}
MACHINE = {"cpu": "a CPU", "threads": 2, "build": "llama-cpp-python 1 (AVX2)", "date": "2026-01-01", "busy_percent": 0.0}
ARM_KEYS = {
    "name",
    "concurrency",
    "prompt_tps",
    "decode_tps",
    "ttft_ms",
    "itl_p50_ms",
    "itl_p95_ms",
    "python_us_per_token",
    "rss_bytes",
    "runs",
}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "localllm", "bench", *arguments], capture_output=True, text=True, timeout=300)


# the plan


def test_concurrency_is_sorted_and_unique() -> None:
    assert parse_concurrency("8,1,2,2") == (1, 2, 8)


@pytest.mark.parametrize("text", ["", "x", "1,", "0", "-1", "1,65", "1.5"])
def test_a_bad_concurrency_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_concurrency(text)


def test_a_plain_benchmark_measures_what_run_uses() -> None:
    plan = make_plan(n_prompt=8, n_gen=4, concurrency=(1, 4))
    assert plan.arms == ("worker",)
    assert [(w.name, w.streams) for w in plan.workloads] == [("1 stream", 1), ("4 streams", 4)]
    assert not plan.comparisons


def test_llama_takes_one_stream_only() -> None:
    plan = make_plan(n_prompt=8, n_gen=4, concurrency=(1, 2, 8), compare=True)
    assert {w.streams for w in plan.workloads if "llama" in w.arms} == {1}
    assert plan.arms == ("worker", "engine", "bare", "llama")


@pytest.mark.parametrize("concurrency", [(1,), (2,), (1, 2, 4, 8), (3, 16)])
def test_every_comparison_has_runs_to_compare(concurrency: tuple[int, ...]) -> None:
    plan = make_plan(n_prompt=8, n_gen=4, concurrency=concurrency, compare=True, shared_prefix=True)
    measured = {(arm, w.name) for w in plan.workloads for arm in w.arms}
    sources = [s for c in plan.comparisons for s in (c.over, c.under) if s]
    assert {(s.arm, s.workload) for s in sources} <= measured
    assert {s.field for s in sources} <= set(Run.__dataclass_fields__)


def test_a_tiny_model_has_other_goals() -> None:
    def goals(tiny: bool) -> dict[str, Goal | None]:
        plan = make_plan(n_prompt=8, n_gen=4, concurrency=(1, 8), compare=True, tiny=tiny)
        return {c.name: c.goal for c in plan.comparisons}

    assert goals(False)["worker / bare, decode, 1 stream"] == Goal(0.98)
    assert goals(False)["engine / bare, decode, 8 streams"] == Goal(0.95)
    assert goals(True)["worker / bare, decode, 1 stream"] == Goal(0.85)
    assert goals(True)["engine / bare, decode, 8 streams"] == Goal(0.80)


@pytest.mark.parametrize(
    "goal, low, middle, high, met",
    [
        (Goal(1.0), 0.5, 1.0, 2.0, True),
        (Goal(1.0), 0.5, 0.99, 2.0, False),
        (Goal(1.3, at_most=True), 0.5, 1.3, 2.0, True),
        (Goal(1.3, at_most=True), 0.5, 1.31, 2.0, False),
        (Goal(1.0, every_round=True), 1.01, 1.5, 2.0, True),
        (Goal(1.0, every_round=True), 0.99, 1.5, 2.0, False),
    ],
)
def test_goals(goal: Goal, low: float, middle: float, high: float, met: bool) -> None:
    assert goal.met(middle, low, high) is met


def test_a_shared_prefix_is_counted_once() -> None:
    assert Workload("w", 8, 716, 1, ("worker",), n_shared=700).cells == 700 + 8 * 17


def test_prompts_are_long_enough_and_never_alike() -> None:
    texts = [prose(f"{i}", 40) for i in range(50)]
    assert all(len(text.split()) >= 40 for text in texts)
    assert len({text[:12] for text in texts}) == 50
    assert prose("1", 40) == texts[1]


# figures


def test_figures_of_a_decode_in_lock_step() -> None:
    case = Case(((1, 2, 3), (4, 5, 6)), n_gen=3)
    run = Moments(10.0, first_s=[10.5, 11.0], steps_s=[11.0, 11.1, 11.4]).run(case, python_us=7.0, rss_bytes=9)
    assert run.prompt_tps == pytest.approx(6.0)
    assert run.decode_tps == pytest.approx(4 / 0.4)
    assert (run.ttft_ms, run.last_ttft_ms) == pytest.approx((750.0, 1000.0))
    assert run.itl_p50_ms == pytest.approx(200.0)
    assert (run.python_us_per_token, run.rss_bytes) == (7.0, 9)


def test_one_token_has_no_decode_rate() -> None:
    run = Moments(0.0, first_s=[2.0], steps_s=[2.0]).run(Case(((1, 2),), n_gen=1))
    assert (run.decode_tps, run.prompt_tps, run.itl_p50_ms) == (0.0, 1.0, 0.0)


def fake_run(decode_tps: float, *, python_us: float | None = None) -> Run:
    return Run(100.0, decode_tps, 20.0, 30.0, 1.0, 2.0, python_us, 5 << 20)


def recorded() -> Report:
    decode = {"worker": [9.0, 30.0, 19.0], "bare": [10.0, 20.0, 20.0]}
    plan = Plan(
        (Workload("1 stream", 1, 8, 4, ("worker", "bare", "llama")),),
        (
            Comparison("speed", Source("worker", "1 stream", "decode_tps"), Source("bare", "1 stream", "decode_tps"), Goal(0.98)),
            Comparison("python", Source("bare", "1 stream", "python_us_per_token"), goal=Goal(50, at_most=True)),
            Comparison("never run", Source("worker", "1 stream", "decode_tps"), Source("llama", "1 stream", "decode_tps"), Goal(1.0)),
            Comparison("unseen", Source("worker", "1 stream", "python_us_per_token"), goal=Goal(50)),
        ),
    )
    records = [
        Record(arm, "1 stream", n, fake_run(rate, python_us=40.0 if arm == "bare" else None))
        for arm, rates in decode.items()
        for n, rate in enumerate(rates)
    ]
    return make_report(plan, records, model=MODEL, machine=MACHINE)


def test_ratios_are_taken_round_by_round() -> None:
    # of the medians it would be 19 / 20
    assert recorded().to_json()["ratios"] == [{"name": "speed", "median": 0.95, "low": 0.9, "high": 1.5}]


def test_goals_are_told_as_they_came_out() -> None:
    assert recorded().to_json()["goals"] == [
        {"name": "speed", "wanted": "≥ 0.98", "median": 0.95, "met": False},
        {"name": "python", "wanted": "≤ 50", "median": 40.0, "met": True},
    ]


def test_the_json_has_the_shape_of_the_contract() -> None:
    data = json.loads(json.dumps(recorded().to_json()))
    assert data.keys() == {"model", "machine", "arms", "ratios", "goals", "warnings"}
    worker, bare = data["arms"]
    assert worker.keys() >= ARM_KEYS
    assert (worker["name"], worker["concurrency"], worker["decode_tps"]) == ("worker", 1, 19.0)
    assert [run["decode_tps"] for run in worker["runs"]] == [9.0, 30.0, 19.0]
    assert (worker["python_us_per_token"], bare["python_us_per_token"]) == (None, 40.0)


def test_doubtful_figures_come_with_a_warning() -> None:
    plan = make_plan(n_prompt=8, n_gen=4, concurrency=(1,), compare=True)
    records = [Record(arm, "1 stream", 0, fake_run(rate)) for arm, rate in (("worker", 13.0), ("engine", 10.2), ("bare", 10.0))]
    quiet = make_report(plan, records[1:], model=MODEL, machine=MACHINE)
    assert quiet.warnings == ()
    noisy = make_report(plan, records, model=MODEL, machine={**MACHINE, "busy_percent": 55.0})
    busy, above = noisy.to_json()["warnings"]
    assert "55 % of the CPU" in busy
    assert above.startswith("worker / bare, decode, 1 stream: 1.30 is above the bound")


@pytest.mark.parametrize("width", [40, 200])
def test_the_table_shows_every_figure(width: int) -> None:
    out = io.StringIO()
    show(recorded(), Console(file=out, width=width))
    text = out.getvalue()
    for part in ("a CPU, 2 threads", "1 stream, 8 + 4", "worker", "19.0", "40.0", "0.950", "(0.900 – 1.500)", "≥ 0.98", "✗ missed", "✓"):
        assert part in text
    assert "…" not in text


# the real thing


def test_the_bare_loop_computes_what_one_by_one_gives(demo_small: Path) -> None:
    from localllm.bench import bare
    from localllm.llama.context import Context, ContextParams
    from localllm.llama.model import Model
    from localllm.llama.sampling import Sampler
    from localllm.types import Sampling

    model = Model(str(demo_small))
    prompts = tuple(tuple(model.tokenize(prose(str(i), 20))[:11]) for i in range(3))

    def firsts(n_batch: int, prompts: tuple[tuple[int, ...], ...]) -> list[int]:
        context = Context(model, ContextParams(n_ctx=256, n_seq=4, n_batch=n_batch, n_outputs=4))
        samplers = [Sampler(model, Sampling(temperature=0), seed=0) for _ in prompts]
        try:
            return bare._prefill(context, Case(prompts, 1), samplers, Moments(0.0))
        finally:
            context.close()

    alone = [firsts(64, (prompt,))[0] for prompt in prompts]
    assert firsts(64, prompts) == alone
    assert firsts(8, prompts) == alone
    model.close()


def test_the_stopwatch_leaves_nothing_behind(demo_small: Path) -> None:
    from localllm.bench import bare
    from localllm.llama import stopwatch
    from localllm.llama.context import Context, ContextParams
    from localllm.llama.model import Model

    before = (stopwatch.api.llama_decode, stopwatch.api.llama_sampler_sample)
    model = Model(str(demo_small))
    context = Context(model, ContextParams(n_ctx=256, n_seq=2))
    run = bare.measure(context, Case(((1, 2, 3), (4, 5, 6)), n_gen=5), lambda: 123)
    context.close()
    model.close()
    assert run.python_us_per_token is not None
    assert run.python_us_per_token > 0
    assert run.rss_bytes == 123
    assert (stopwatch.api.llama_decode, stopwatch.api.llama_sampler_sample) == before


def test_bench_prints_json_and_nothing_else_on_stdout(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = bench("demo-small", "--json", "-o", str(file), "-r", "1", "-p", "16", "-n", "4", "--concurrency", "1,2")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert json.loads(file.read_text()) == data
    assert [(arm["name"], arm["concurrency"], arm["n_gen"]) for arm in data["arms"]] == [("worker", 1, 4), ("worker", 2, 4)]
    for arm in data["arms"]:
        assert arm.keys() >= ARM_KEYS
        assert all(arm[key] > 0 for key in ("prompt_tps", "decode_tps", "ttft_ms", "itl_p50_ms", "itl_p95_ms", "rss_bytes"))
        assert len(arm["runs"]) == 1
    assert data["ratios"] == []
    assert {"cpu", "threads", "ram_bytes", "build", "python", "date"} <= data["machine"].keys()
    assert "round 1 of 1: 2 streams, worker" in done.stderr


@pytest.mark.slow
async def test_bench_compares_all_arms(demo_small: Path) -> None:
    plan = make_plan(n_prompt=16, n_gen=4, concurrency=(1, 2), n_long=20, compare=True, shared_prefix=True)
    said: list[str] = []
    info, records = await run_plan(plan, EngineConfig(str(demo_small), n_seq=plan.streams), 1, said.append)
    data = make_report(plan, records, model=info, machine=machine(info)).to_json()
    assert said[-1] == "round 1 of 1: shared prefix, worker"
    assert {(arm["name"], arm["workload"]) for arm in data["arms"]} == {
        *((arm, "1 stream") for arm in ("worker", "engine", "bare", "llama")),
        *((arm, "2 streams") for arm in ("worker", "engine", "bare")),
        *((arm, "long answer") for arm in ("worker", "engine", "llama")),
        ("worker", "alone"),
        ("worker", "shared prefix"),
    }
    by_key = {(arm["name"], arm["workload"]): arm for arm in data["arms"]}
    assert by_key["engine", "1 stream"]["python_us_per_token"] > 0
    assert by_key["worker", "1 stream"]["python_us_per_token"] is None
    ratio = next(r for r in data["ratios"] if r["name"] == "worker / bare, decode, 2 streams")
    wanted = by_key["worker", "2 streams"]["decode_tps"] / by_key["bare", "2 streams"]["decode_tps"]
    assert ratio["median"] == pytest.approx(wanted)
    assert {goal["name"] for goal in data["goals"]} >= {"last of 8 sharing 700 new tokens / one alone, TTFT"}


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--concurrency", "two"], 2, "--concurrency two"),
        (["--flash-attn", "maybe"], 2, "flash_attn"),
        (["--concurrency", "8", "-b", "4"], 2, "raise -b"),
        (["-n", "1"], 2, "--n-gen"),
        (["-ctk", "f8"], 2, "type_k"),
        (["--shape", "2b"], 2, "1b, 3b, 8b, 70b"),
        (["--shape", "1b", "--quant", "q2_k"], 2, "q8_0, q4_k_m"),
        (["no-such-model"], 3, "no-such-model"),
        (["demo-small", "-q", "-p", "2000"], 2, "does not fit the context"),
        (["demo-small", "-q", "-c", "256", "-p", "100", "-n", "50", "--concurrency", "2"], 2, "use -c 300"),
    ],
)
def test_bad_flags_are_explained(arguments: list[str], code: int, said: str) -> None:
    done = bench(*arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_keeps_the_complete_rounds() -> None:
    arguments = ["demo", "-p", "8", "-n", "8", "--concurrency", "1", "-r", "100000", "--json"]
    child = subprocess.Popen(
        [sys.executable, "-m", "localllm", "bench", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("round 3 "):
            child.send_signal(signal.SIGINT)
            break
    out, err = child.communicate(timeout=60)
    assert "complete rounds" in err
    assert len(json.loads(out)["arms"][0]["runs"]) >= 2
    assert child.returncode == 0
