from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from localllm.metrics import Metrics, Rates, percentile
from localllm.types import Timings, Usage

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), abs=1e-6)


def test_percentile_of_nothing_and_outside() -> None:
    assert percentile([], 50) == 0.0
    for q in (-1, 100.1):
        with pytest.raises(ValueError, match="not in 0 to 100"):
            percentile([1.0], q)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


TIMINGS = Timings(
    cache_n=60, prompt_n=40, predicted_n=21, predicted_ms=400, predicted_per_second=50.0, ttft_ms=120.0, draft_n=8, draft_n_accepted=6
)
USAGE = Usage(prompt_tokens=100, cached_tokens=60, completion_tokens=21, reasoning_tokens=5)


def samples(metrics: Metrics) -> dict[str, float]:
    return {
        name + "".join(f"{{{value}}}" for value in labels.values()): value_
        for family in text_string_to_metric_families(metrics.prometheus_text())
        for name, labels, value_, *_ in family.samples
        if not name.endswith("_created")
    }


def test_rates_cover_the_last_minute() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    assert metrics.rates() == Rates()
    clock.now += 10
    metrics.record(TIMINGS, USAGE)
    metrics.record(TIMINGS, USAGE)
    rates = metrics.rates()
    assert rates == Rates(requests=2, prompt_tps=8.0, decode_tps=4.2, ttft_p50_ms=120.0, ttft_p95_ms=120.0, cached=0.6, acceptance=0.75), (
        "over the ten seconds since the start"
    )
    clock.now += 55
    metrics.record(TIMINGS, USAGE)
    assert metrics.rates().decode_tps == pytest.approx(63 / 60)
    clock.now += 10
    assert metrics.rates().requests == 1
    clock.now += 60
    assert metrics.rates() == Rates()


def test_a_request_without_tokens_has_no_first_one() -> None:
    metrics = Metrics(Clock())
    metrics.record(Timings(), Usage(), "failed")
    got = samples(metrics)
    assert got["localllm_requests_total{failed}"] == 1
    assert got["localllm_time_to_first_token_seconds_count"] == 0
    assert got["localllm_inter_token_seconds_count"] == 0
    assert metrics.rates().ttft_p95_ms == 0.0


def test_prometheus_text_adds_up() -> None:
    metrics, other = Metrics(), Metrics()
    for outcome in ("stop", "stop", "length", "cancelled"):
        metrics.record(TIMINGS, USAGE, outcome)
    got = samples(metrics)
    assert got["localllm_requests_total{stop}"] == 2
    assert got["localllm_requests_total{length}"] == 1
    kinds = {"prompt": 400, "cached": 240, "completion": 84, "reasoning": 20, "drafted": 32, "accepted": 24}
    assert {kind: got[f"localllm_tokens_total{{{kind}}}"] for kind in kinds} == kinds
    assert got["localllm_time_to_first_token_seconds_sum"] == pytest.approx(0.48)
    assert got["localllm_inter_token_seconds_bucket{0.02}"] == 4
    assert got["localllm_inter_token_seconds_bucket{0.01}"] == 0
    assert not any(name.startswith("localllm_requests_total") for name in samples(other)), "each has its own registry"


def test_recording_from_many_threads_loses_nothing() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(100):
            metrics.record(TIMINGS, USAGE)
            metrics.rates()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.rates().requests == 400
    assert samples(metrics)["localllm_requests_total{stop}"] == 400
