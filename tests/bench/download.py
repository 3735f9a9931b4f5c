"""How fast `fetch` is beside curl: one server, limited to 100 MB/s with 30 ms before every answer, and then not limited.

    python tests/bench/download.py [--size-mb 1000] [--rounds 5]

Both take turns, so that a change of the machine meets both. Ours is timed from the call of `fetch` to its return: asking where the
file is, ranges, hashing, flushing and the rename; curl only writes. The goals: 0.95 of curl where the server is the limit, and less
than 150 MB of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMITED = ["--total-bytes-per-second", "100e6", "--latency-ms", "30"]
GOAL_RATIO = 0.95
GOAL_RSS_MB = 150


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--size-mb", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--folder", type=Path, help="where the files go; the default is a temporary folder")
    options.add_argument("--fetch", nargs=2, metavar=("ENDPOINT", "TARGET"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.fetch:
        return print(json.dumps(fetch_once(given.fetch[0], Path(given.fetch[1]))))
    if shutil.which("curl") is None:
        raise SystemExit("curl is not installed")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start; {given.size_mb} MB, {given.rounds} rounds")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        source = folder / "model.gguf"
        fill(source, given.size_mb * 1_000_000)
        for title, limits in (("100 MB/s, 30 ms", LIMITED), ("unlimited", [])):
            report(title, compare(source, folder, limits, given.rounds), goal=bool(limits))


def fill(path: Path, size: int) -> None:
    """A file that no file system or link can make smaller."""
    block = random.Random(1).randbytes(1 << 20)
    with path.open("wb") as file:
        while size > 0:
            file.write(block[:size])
            size -= len(block)


def compare(source: Path, folder: Path, limits: list[str], rounds: int) -> dict[str, list[dict[str, float]]]:
    """What each of both took, round by round."""
    results: dict[str, list[dict[str, float]]] = {"localllm": [], "curl": []}
    target = folder / "copy.bin"
    with served(source, limits) as about:
        for _ in range(rounds):
            ours = [sys.executable, __file__, "--fetch", about["endpoint"], str(target)]
            results["localllm"].append(json.loads(run(ours)))
            target.unlink()
            url = f"{about['endpoint']}/{about['repo']}/resolve/main/{about['file']}"
            begun = time.perf_counter()
            run(["curl", "--silent", "--show-error", "--fail", "--location", "--output", str(target), url])
            results["curl"].append({"seconds": time.perf_counter() - begun, "bytes": target.stat().st_size})
            target.unlink()
    return results


@contextlib.contextmanager
def served(source: Path, limits: list[str]) -> Iterator[dict[str, Any]]:
    """The server in a process of its own."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.hub_server", str(source), *limits], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        yield json.loads(server.stdout.readline())
    finally:
        server.stdin.close()
        server.wait(20)


def run(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def fetch_once(endpoint: str, target: Path) -> dict[str, float]:
    """One download, as `localllm pull` makes it; in a process of its own."""
    from localllm.download.transfer import fetch
    from localllm.hub import Hub

    hub = Hub(env={"HF_ENDPOINT": endpoint})
    listing = hub.listing("user/repo")
    before = os.times()
    begun = time.perf_counter()
    fetched = fetch(hub, listing.files[0], "user/repo", listing.commit, target)
    seconds = time.perf_counter() - begun
    after = os.times()
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    cpu = after.user + after.system - before.user - before.system
    return {"seconds": seconds, "bytes": fetched.fetched_bytes, "rss_mb": kib * 1024 / 1e6, "cpu_seconds": cpu}


def report(title: str, results: dict[str, list[dict[str, float]]], goal: bool) -> None:
    rates = {arm: [each["bytes"] / each["seconds"] / 1e6 for each in rounds] for arm, rounds in results.items()}
    print(f"\n{title}")
    for arm, values in rates.items():
        print(f"  {arm:<9} {statistics.median(values):7.1f} MB/s  ({min(values):.1f} to {max(values):.1f})")
    ratios = [ours / theirs for ours, theirs in zip(rates["localllm"], rates["curl"], strict=True)]
    aim = f", goal {GOAL_RATIO}" if goal else ""
    print(f"  ratio     {statistics.median(ratios):7.3f}       ({min(ratios):.3f} to {max(ratios):.3f}){aim}")
    rss = max(each["rss_mb"] for each in results["localllm"])
    cpu = statistics.median(each["cpu_seconds"] / each["bytes"] * 1e9 for each in results["localllm"])
    print(f"  localllm: {rss:.0f} MB of memory at most, goal {GOAL_RSS_MB}; {cpu:.2f} s of processor per GB")


if __name__ == "__main__":
    main()
