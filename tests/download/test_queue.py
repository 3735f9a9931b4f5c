"""The queue against a real server (hub_server.py)."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from localllm.demo import demo_models
from localllm.download.partial import Partial
from localllm.download.queue import Download, Order, Queue, check_disk, order_for, planned
from localllm.download.rate import RateLimit
from localllm.download.transfer import Fetched, Options, Stopped
from localllm.errors import DoesNotFit, LocalLLMError, NetworkError, NotFound, UsageError
from localllm.hub import Hub, RepoFile
from localllm.quant import RemoteModel
from tests.hub_server import HubServer

MIB = 1 << 20
QUICK = Options(stall_s=5.0, backoff_s=0.0, attempts=2)
MODEL = demo_models()["demo-small"].read_bytes()
# a sound header, and a tail that makes it another file
DATA = {name: MODEL + random.Random(name).randbytes(5 * MIB - len(MODEL)) for name in ("a.gguf", "b.gguf", "c.gguf")}
LONG_S = 30


class Watched(Queue):
    """A queue that tells a test when something has come about."""

    def __init__(self, hub: Hub, folder: Path | None, **more: object) -> None:
        self.seen: list[Download] = []
        self.news = threading.Condition()
        super().__init__(hub, folder, on_change=self.note, **{"options": QUICK, **more})  # type: ignore[arg-type]

    def note(self, download: Download) -> None:
        with self.news:
            self.seen.append(download)
            self.news.notify_all()

    def until(self, true: Callable[[Download], bool]) -> None:
        with self.news:
            assert self.news.wait_for(lambda: any(map(true, self.seen)), LONG_S), self.downloads()

    def states(self, id: str) -> list[str]:
        """The states it went through."""
        states = [each.state for each in self.seen if each.id == id]
        return [state for n, state in enumerate(states) if n == 0 or states[n - 1] != state]

    def state(self, id: str) -> str:
        return next(each.state for each in self.downloads() if each.id == id)


@pytest.fixture
def server(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    monkeypatch.setattr("localllm.download.parts.SLOW_S", 1000.0)  # on a busy machine any part may look slow
    hub.add_repo("user/repo", files=DATA)
    return hub


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


@pytest.fixture
def make(server: HubServer, records: Path) -> Iterator[Callable[..., Watched]]:
    queues: list[Watched] = []

    def make(**more: object) -> Watched:
        queues.append(Watched(Hub(), records, **more))
        return queues[-1]

    yield make
    for queue in queues:
        queue.close()


def order(models: Path, *names: str) -> Order:
    listing = Hub().listing("user/repo")
    return Order(f"user/repo:{'+'.join(names)}", "user/repo", listing.commit, tuple(f for f in listing.files if f.path in names), models)


def blocked(server: HubServer) -> None:
    """Nothing arrives from now on."""
    server.fault("*", "stall", after=MIB)


def left(models: Path) -> list[str]:
    return sorted(path.name for path in models.rglob("*") if path.is_file())


def test_a_download_goes_where_lm_studio_keeps_models(make: Callable[..., Watched], models: Path) -> None:
    queue = make()
    id = queue.add(order(models, "a.gguf", "b.gguf"))
    done = queue.wait(id)
    assert (done.state, done.done_bytes) == ("done", 10 * MIB)
    assert left(models) == ["a.gguf", "b.gguf"]
    assert all((models / "user" / "repo" / name).read_bytes() == DATA[name] for name in left(models))
    assert queue.states(id)[:2] == ["queued", "running"]
    assert queue.states(id)[-1] == "done"
    progress = [each.done_bytes for each in queue.seen if each.state == "running"]
    assert max(progress) <= 10 * MIB
    assert done.progress.name == "user/repo:a.gguf+b.gguf"


def test_downloads_run_in_their_order(make: Callable[..., Watched], server: HubServer, models: Path) -> None:
    queue = make()
    ids = [queue.add(order(models, name)) for name in ("c.gguf", "a.gguf", "b.gguf")]
    for id in ids:
        queue.wait(id)
    paths = [each.target.rpartition("/")[2] for each in server.sent(port="hub", method="HEAD")]
    assert list(dict.fromkeys(paths)) == ["c.gguf", "a.gguf", "b.gguf"]
    assert [each.state for each in queue.downloads()] == ["done"] * 3
    queue.clear()
    assert queue.downloads() == ()


def test_on_done_gets_the_files_before_it_counts_as_done(make: Callable[..., Watched], models: Path) -> None:
    got: list[tuple[str, list[str], str]] = []

    def on_done(order: Order, files: Sequence[Fetched]) -> None:
        got.append((order.name, [each.path.name for each in files], queue.state(order.id)))

    queue = make(on_done=on_done)
    queue.wait(queue.add(order(models, "a.gguf")))
    assert got[0][:2] == ("user/repo:a.gguf", ["a.gguf"])
    assert got[0][2] in {"running", "verifying"}


@pytest.mark.parametrize("error", [LocalLLMError("no room in the book"), ZeroDivisionError("oops")])
def test_an_on_done_that_raises_makes_it_fail(make: Callable[..., Watched], models: Path, error: Exception) -> None:
    def on_done(order: Order, files: Sequence[Fetched]) -> None:
        raise error

    queue = make(on_done=on_done)
    id = queue.add(order(models, "a.gguf"))
    with pytest.raises(LocalLLMError, match=str(error)):
        queue.wait(id)
    assert queue.state(id) == "failed"


def held(server: HubServer, queue: Watched, models: Path, *names: str) -> str:
    """A download that has something and gets no more."""
    blocked(server)
    id = queue.add(order(models, *names))
    queue.until(lambda each: each.id == id and each.state == "running" and each.done_bytes >= MIB)
    return id


def paused(queue: Watched, id: str) -> None:
    queue.pause(id)
    with pytest.raises(Stopped):
        queue.wait(id)


def test_pause_keeps_and_resume_goes_on(make: Callable[..., Watched], server: HubServer, models: Path) -> None:
    queue = make()
    id = held(server, queue, models, "a.gguf")
    paused(queue, id)
    assert queue.state(id) == "paused"
    assert left(models) == ["a.gguf.part", "a.gguf.part.json"]
    record = Partial(models / "user" / "repo" / "a.gguf").read()
    assert record is not None
    server.clear_faults()
    sent = server.bytes_sent("a.gguf")
    queue.resume(id)
    queue.wait(id)
    assert (models / "user" / "repo" / "a.gguf").read_bytes() == DATA["a.gguf"]
    assert server.bytes_sent("a.gguf") - sent == 5 * MIB - record.done.total_bytes


@pytest.mark.parametrize("keep", [False, True])
def test_cancel_removes_what_is_unfinished_unless_told_to_keep_it(
    make: Callable[..., Watched], server: HubServer, models: Path, records: Path, keep: bool
) -> None:
    queue = make()
    id = held(server, queue, models, "a.gguf")
    queue.cancel(id, keep=keep)
    with pytest.raises(Stopped):
        queue.wait(id)
    queue.until(lambda each: each.state == "cancelled")
    assert left(models) == (["a.gguf.part", "a.gguf.part.json"] if keep else [])
    assert list(records.iterdir()) == []
    server.clear_faults()
    queue.resume(id)
    assert queue.wait(id).state == "done"


def test_what_waits_can_be_paused_and_cancelled_at_once(make: Callable[..., Watched], server: HubServer, models: Path) -> None:
    queue = make()
    running = held(server, queue, models, "a.gguf")
    second, third = queue.add(order(models, "b.gguf")), queue.add(order(models, "c.gguf"))
    queue.pause(second)
    queue.cancel(third)
    assert [queue.state(id) for id in (running, second, third)] == ["running", "paused", "cancelled"]
    paused(queue, running)
    assert server.sent("b.gguf") == server.sent("c.gguf") == []


def test_a_paused_download_lets_the_next_one_run(make: Callable[..., Watched], server: HubServer, models: Path) -> None:
    queue = make()
    first = held(server, queue, models, "a.gguf")
    second = queue.add(order(models, "b.gguf"))
    server.clear_faults()
    paused(queue, first)
    assert queue.wait(second).state == "done"
    assert queue.state(first) == "paused"


def test_resume_straight_after_pause_is_not_lost(make: Callable[..., Watched], server: HubServer, models: Path) -> None:
    queue = make()
    id = held(server, queue, models, "a.gguf")
    server.clear_faults()
    queue.pause(id)
    queue.resume(id)
    assert queue.wait(id).state == "done"


def test_several_at_once(make: Callable[..., Watched], server: HubServer, models: Path) -> None:
    blocked(server)
    queue = make(at_once=2)
    for name in ("a.gguf", "b.gguf", "c.gguf"):
        queue.add(order(models, name))
    for name in ("a.gguf", "b.gguf"):
        queue.until(lambda each, name=name: name in each.order.name and each.done_bytes > 0)
    assert [each.state for each in queue.downloads()] == ["running", "running", "queued"]


def test_a_failure_is_kept_with_its_reason_and_can_be_tried_again(make: Callable[..., Watched], server: HubServer, models: Path) -> None:
    server.fault("a.gguf", "status", code=500, port="hub", times=20)
    queue = make()
    hub = queue._hub
    hub._sleep = lambda seconds: None  # type: ignore[attr-defined]
    id = queue.add(order(models, "a.gguf"))
    with pytest.raises(NetworkError):
        queue.wait(id)
    failed = queue.downloads()[0]
    assert failed.state == "failed"
    assert failed.error is not None
    server.clear_faults()
    queue.resume(id)
    assert queue.wait(id).error is None


def test_a_queue_survives_a_restart(make: Callable[..., Watched], server: HubServer, models: Path) -> None:
    first = make()
    id = held(server, first, models, "a.gguf", "b.gguf")
    waiting = first.add(order(models, "c.gguf"))
    first.close()
    assert {first.state(id), first.state(waiting)} == {"paused"}
    server.clear_faults()
    second = make()
    found = {each.id: each for each in second.downloads()}
    assert {each.state for each in found.values()} == {"paused"}
    assert found[id].order == order(models, "a.gguf", "b.gguf")
    assert found[id].done_bytes >= MIB
    for each in (id, waiting):
        second.resume(each)
        assert second.wait(each).state == "done"
    assert make().downloads() == ()


def test_what_was_running_in_a_killed_process_is_found_paused(
    make: Callable[..., Watched], server: HubServer, models: Path, records: Path
) -> None:
    first = make()
    id = held(server, first, models, "a.gguf")
    assert json.loads((records / f"{id}.json").read_text())["state"] == "running"
    assert [each.state for each in make().downloads()] == ["paused"]


def test_a_failure_survives_a_restart_with_its_reason(make: Callable[..., Watched], server: HubServer, models: Path) -> None:
    queue = make()
    queue._hub = Hub(offline=True)
    id = queue.add(order(models, "a.gguf"))
    with pytest.raises(NetworkError):
        queue.wait(id)
    found = make().downloads()[0]
    assert found.state == "failed"
    assert type(found.error).__name__ == "Offline"
    assert found.error.hint  # type: ignore[union-attr]


def test_records_that_make_no_sense_are_passed_over(make: Callable[..., Watched], models: Path, records: Path) -> None:
    records.mkdir()
    good = order(models, "a.gguf")
    (records / "1.json").write_text("{")
    (records / "2.json").write_text("[]")
    (records / "3.json").write_text('{"format": 99}')
    evil = {"format": 1, "name": "x", "repo": "user/repo", "commit": "c", "folder": str(models), "state": "paused", "error": None}
    (records / "4.json").write_text(json.dumps({**evil, "files": [{"path": "../../x", "size_bytes": 1, "sha256": None}]}))
    queue = make()
    assert queue.downloads() == ()
    assert queue.wait(queue.add(good)).state == "done"


def test_adding_what_is_there_already_does_not_double_it(make: Callable[..., Watched], server: HubServer, models: Path) -> None:
    queue = make()
    id = held(server, queue, models, "a.gguf")
    assert queue.add(order(models, "a.gguf")) == id
    assert len(queue.downloads()) == 1
    server.clear_faults()
    paused(queue, id)
    newer = replace(order(models, "a.gguf"), name="new name")
    assert queue.add(newer) == id
    assert queue.wait(id).order.name == "new name"


def test_an_unknown_id_is_an_error(make: Callable[..., Watched]) -> None:
    for action in (make().wait, make().pause, make().cancel, make().resume):
        with pytest.raises(NotFound):
            action("nothing")


def test_the_limit_is_shared_and_can_change_while_it_runs(make: Callable[..., Watched], models: Path) -> None:
    limit = RateLimit(10_000)
    queue = make(limit=limit, at_once=2)
    ids = [queue.add(order(models, name)) for name in ("a.gguf", "b.gguf")]
    for name in ("a.gguf", "b.gguf"):
        queue.until(lambda each, name=name: name in each.order.name and each.state == "running")
    limit.set(0)  # at 10 kB/s both would take 17 minutes
    for id in ids:
        assert queue.wait(id).state == "done"


def test_a_name_that_leaves_the_folder_is_refused(models: Path) -> None:
    bad = Order("x", "user/repo", "c" * 40, (RepoFile("../../../etc/passwd", 1, None),), models)
    with pytest.raises(UsageError):
        _ = bad.targets
    with pytest.raises(UsageError):
        Queue(Hub(), None).add(bad)


def test_an_order_is_known_by_its_targets(models: Path) -> None:
    files = (RepoFile("m.gguf", 10, "a" * 64),)
    model = RemoteModel("user/repo", "c" * 40, "Q4_K_M", files)
    made = order_for(model, models, extra=(RepoFile("mmproj.gguf", 5, "b" * 64),))
    assert made.name == "user/repo:Q4_K_M"
    assert made.targets == (models / "user" / "repo" / "m.gguf", models / "user" / "repo" / "mmproj.gguf")
    assert made.size_bytes == 15
    assert made.id == replace(made, commit="d" * 40).id
    assert made.id != order_for(model, models).id
    assert order_for(replace(model, quant=""), models).name == "user/repo/m.gguf"


def test_planned_tells_what_is_there(make: Callable[..., Watched], server: HubServer, models: Path) -> None:
    both = order(models, "a.gguf", "b.gguf", "c.gguf")
    assert [each.state for each in planned(both)] == ["new"] * 3
    queue = make()
    queue.wait(queue.add(order(models, "a.gguf")))
    paused(queue, held(server, queue, models, "b.gguf"))
    plan = planned(both)
    assert [each.state for each in plan] == ["present", "partial", "new"]
    assert plan[0].present_bytes == 5 * MIB
    assert MIB <= plan[1].present_bytes < 5 * MIB
    changed = replace(both, files=(both.files[0], replace(both.files[1], sha256="f" * 64), both.files[2]))
    assert planned(changed)[1].state == "new"


def test_a_model_that_does_not_fit_is_not_begun(make: Callable[..., Watched], server: HubServer, models: Path, monkeypatch) -> None:
    class Usage:
        free = 9 * MIB

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    both = order(models, "a.gguf", "b.gguf")
    with pytest.raises(DoesNotFit, match="needs 10.5 MB"):
        check_disk(both)
    queue = make()
    with pytest.raises(DoesNotFit):
        queue.wait(queue.add(both))
    assert left(models) == []
    check_disk(order(models, "a.gguf"))
