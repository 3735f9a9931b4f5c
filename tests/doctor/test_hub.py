"""The Hub is asked only when the user wants that; here it is a server on this machine."""

from __future__ import annotations

import socket
import ssl
import threading
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from localllm.doctor.hub import ENDPOINT, is_true, judge_reach, offline_by, reach
from localllm.settings import Settings
from tests.doctor.machines import ids

SETTINGS = Settings.model_validate({})


class Hub(ThreadingHTTPServer):
    """Answers HEAD with `status` and remembers the requests."""

    def __init__(self) -> None:
        self.status = 200
        self.requests: list[tuple[str, dict[str, str]]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(handler) -> None:
                self.requests.append((handler.path, dict(handler.headers)))
                handler.send_response(self.status)
                handler.end_headers()

            def log_message(self, format: str, *args: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def refuse(url: str, timeout_s: float) -> int:
    raise AssertionError("asked")


def test_nothing_is_sent_unless_wanted() -> None:
    found = reach({}, SETTINGS, network=False, ask=refuse)
    assert (found.endpoint, found.asked, found.reachable, found.offline) == (ENDPOINT, False, None, False)
    assert list(judge_reach(found, {})) == []


@pytest.mark.parametrize(
    "env, setting, by",
    [
        ({"HF_HUB_OFFLINE": "1"}, False, ("HF_HUB_OFFLINE",)),
        ({"TRANSFORMERS_OFFLINE": "yes"}, False, ("TRANSFORMERS_OFFLINE",)),
        ({}, True, ("offline",)),
        ({"HF_HUB_OFFLINE": "0"}, False, ()),
        ({}, False, ()),
    ],
)
def test_offline_means_offline(env: dict[str, str], setting: bool, by: tuple[str, ...]) -> None:
    settings = Settings.model_validate({"offline": setting})
    assert offline_by(env, settings) == by
    asked: list[str] = []
    found = reach(env, settings, network=True, ask=lambda url, _: asked.append(url) or 200)
    assert found.offline is bool(by)
    assert found.asked is not bool(by)
    assert len(asked) == (not by)


def test_a_hub_that_answers(hub: Hub) -> None:
    env = {"HF_ENDPOINT": hub.url + "/", "HF_TOKEN": "hf_secret"}
    found = reach(env, SETTINGS, network=True)
    assert (found.reachable, found.status, found.error) == (True, 200, "")
    assert list(judge_reach(found, env)) == []
    ((path, headers),) = hub.requests
    assert path == "/api/models?limit=1"
    assert "hf_secret" not in str(headers)


@pytest.mark.parametrize("status, reachable", [(401, True), (404, True), (429, True), (500, False), (503, False)])
def test_a_refusal_is_an_answer_and_a_broken_server_is_none(hub: Hub, status: int, reachable: bool) -> None:
    hub.status = status
    found = reach({"HF_ENDPOINT": hub.url}, SETTINGS, network=True)
    assert (found.reachable, found.status) == (reachable, status)
    assert ids(judge_reach(found, {})) == ([] if reachable else ["hub-unreachable"])


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        env = {"HF_ENDPOINT": url}
        found = reach(env, SETTINGS, network=True)
    assert found.reachable is False
    assert found.error
    (finding,) = judge_reach(found, env)
    assert (finding.id, finding.level) == ("hub-unreachable", "warning")
    assert "HF_ENDPOINT" in finding.fix


def test_an_endpoint_that_is_none() -> None:
    found = reach({"HF_ENDPOINT": "huggingface"}, SETTINGS, network=True)
    assert found.reachable is False
    assert "huggingface" in found.error


def test_a_certificate_that_nobody_trusts() -> None:
    def ask(url: str, timeout_s: float) -> int:
        error = ssl.SSLCertVerificationError("x")
        error.verify_message = "self-signed certificate in certificate chain"
        raise urllib.error.URLError(error)

    found = reach({}, SETTINGS, network=True, ask=ask)
    (finding,) = judge_reach(found, {})
    assert (finding.id, finding.detail) == ("hub-certificate", "certificate: self-signed certificate in certificate chain")
    assert "SSL_CERT_FILE" in finding.fix


def test_a_name_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localllm.doctor.hub.TIMEOUT_S", -0.4)
    answered = threading.Event()

    def ask(url: str, timeout_s: float) -> int:
        answered.wait()
        return 200

    found = reach({}, SETTINGS, network=True, ask=ask)
    answered.set()
    assert found.reachable is False
    assert "no answer" in found.error


FLAGS = {"1": True, "on": True, "True": True, "yes": True, "0": False, "": False, None: False, "2": False}


@pytest.mark.parametrize("value, meaning", FLAGS.items())
def test_flags_mean_what_they_mean_to_the_hub(value: str | None, meaning: bool) -> None:
    assert is_true(value) is meaning
