"""The API over connections in memory; real are all but sockets and time."""

from __future__ import annotations

import http.client
import io
import itertools
import json
import os
import re
import resource
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from genvm_manager import (
    INLINE_BODY_BYTES,
    KIB,
    LINGER_SECONDS,
    MIB,
    PIECE_BYTES,
    RECEIVE_SECONDS,
    REFUSED_SECONDS,
    STRANGER_SECONDS,
    TRIM_LITTLE_SECONDS,
    Config,
    InvalidRequest,
    LogObserver,
    ManagerError,
    ManagerService,
    QueueFull,
    Spawner,
    parse_manifest,
    preferred_seconds,
    status_of_error,
)

from .support import (
    FakeProcess,
    FakeSpawner,
    ThreadlessReactor,
    async_test,
    observing,
    real_reactor,
    without_spare_threads,
)

HOST = "127.0.0.1:3999"
LISTENING = IPv4Address("TCP", "127.0.0.1", 3999)


class ClientTransport(StringTransport):
    """A transport that asks for no more than its buffer holds, as those of sockets do."""

    BUFFER = 64 * KIB
    paused = False

    def __init__(self, address: Any) -> None:
        # A transport of TCP may be asked to go on after it was told to close.
        StringTransport.__init__(self, address, lenient=True)

    def write(self, data: bytes) -> None:
        StringTransport.write(self, data)
        if not self.paused and len(self.value()) > self.BUFFER and self.producer is not None:
            self.paused = True
            self.producer.pauseProducing()

    def writeSequence(self, data: Iterable[bytes]) -> None:
        self.write(b"".join(data))

    def read(self) -> bytes:
        """Let the client read what is there."""
        data: bytes = self.value()
        self.clear()
        if self.paused and self.producer is not None:
            self.paused = False
            self.producer.resumeProducing()
        return data


class Response:
    """An answer, as a client understands it."""

    def __init__(self, data: bytes, method: str) -> None:
        class Socket:
            def makefile(self, _mode: str) -> io.BufferedReader:
                return io.BufferedReader(io.BytesIO(data))

        parsed = http.client.HTTPResponse(cast(socket.socket, Socket()), method=method)
        parsed.begin()
        self.status = parsed.status
        self.headers = parsed.headers
        self.body = parsed.read()

    @property
    def json(self) -> Any:
        """The body, which has to be JSON and has to say so."""
        assert self.headers["Content-Type"] == "application/json; charset=utf-8", self.body
        return json.loads(self.body)


class Connection:
    """A client's connection to the API."""

    def __init__(self, manager: Manager, address: Any = LISTENING) -> None:
        self.transport = ClientTransport(address)
        self.channel = manager.service.site.buildProtocol(None)
        self.channel.makeConnection(self.transport)

    def send(self, data: bytes) -> None:
        self.channel.dataReceived(data)

    def lose(self) -> None:
        """Let the client disconnect; who produces for it hears of that first."""
        if self.transport.producer is not None:
            self.transport.producer.stopProducing()
        self.channel.connectionLost(Failure(ConnectionDone()))

    def ask(
        self, method: str, path: str, body: bytes | object = b"", **headers: str | bytes | None
    ) -> None:
        """Send a request; headers replace the usual ones, ``None`` leaves one out."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields: dict[str, str | bytes | None] = {"Host": HOST}
        if content or method == "POST":
            fields["Content-Length"] = str(len(content))
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = f"{method} {path} HTTP/1.1\r\n".encode("latin-1")
        for name, value in fields.items():
            if value is not None:
                text = value if isinstance(value, bytes) else value.encode()
                head += name.encode() + b": " + text + b"\r\n"
        self.method = method
        self.send(head + b"\r\n" + content)

    @property
    def answered(self) -> bool:
        return bool(self.transport.value())

    @property
    def response(self) -> Response:
        """What was answered since the last time that this was asked."""
        data = self.transport.read()
        assert data, "no answer yet"
        return Response(data, self.method)

    def request(self, *args: Any, **headers: Any) -> Response:
        """Send a request and return the answer, which must be there at once."""
        self.ask(*args, **headers)
        return self.response


class Manager:
    """The assembled manager, with a reactor and processes in memory."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.reactor = ThreadlessReactor()
        self.log = bytearray()
        fields = {"root": root, "manifest_path": root / "manifest.yaml", "permits": 2}
        config = Config(**{**fields, "log_level": "debug", **settings})
        observer = LogObserver(config, self.log.extend)
        self.service = ManagerService(config, self.reactor, observer, owns_process=False)
        self.spawner = FakeSpawner(self.reactor)
        self.service.executions._spawner = cast(Spawner, self.spawner)
        self.service.executions._ids = itertools.count(1)
        self.service.manifest.manifest = parse_manifest(
            "executor_versions: {v0.2.3: {available_after: 2025-01-01T00:00:00Z}}", "m.yaml"
        )

    @property
    def processes(self) -> list[FakeProcess]:
        return self.spawner.processes

    def connect(self, address: Any = LISTENING) -> Connection:
        return Connection(self, address)

    def request(self, *args: Any, **headers: Any) -> Response:
        """Send a request on a connection of its own."""
        return self.connect().request(*args, **headers)


RUN: dict[str, Any] = {
    "major": 0,
    "message": {},
    "is_sync": True,
    "capture_output": True,
    "host_data": "",
    "timestamp": "2025-06-01T00:00:00Z",
    "host": "h:1",
}


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """Return a manager with two permits and one executor version."""
    manager = Manager(tmp_path)
    with observing(manager.service.observer):
        yield manager


# --- what every answer has in common ---

#: Method, path, body, and the status and code of the answer.
ERRORS: list[tuple[str, str, Any, int, str]] = [
    ("GET", "/nope", b"", 404, "endpoint_not_found"),
    ("POST", "/status/", {}, 404, "endpoint_not_found"),
    ("GET", "/STATUS", b"", 404, "endpoint_not_found"),
    ("GET", "/status%00", b"", 404, "endpoint_not_found"),
    ("GET", "/%ff", b"", 404, "endpoint_not_found"),
    ("GET", "/genvm/", b"", 404, "endpoint_not_found"),
    ("GET", "/genvm/-1", b"", 404, "endpoint_not_found"),
    ("GET", "/genvm/1.5", b"", 404, "endpoint_not_found"),
    ("GET", "/genvm/one", b"", 404, "endpoint_not_found"),
    ("GET", "/genvm/7", b"", 404, "execution_not_found"),
    ("GET", "/genvm/0", b"", 404, "execution_not_found"),
    ("GET", "/genvm/" + "9" * 4000, b"", 404, "execution_not_found"),
    ("DELETE", "/genvm/7", b"", 404, "execution_not_found"),
    ("PUT", "/status", b"", 405, "method_not_allowed"),
    ("DELETE", "/permits", b"", 405, "method_not_allowed"),
    ("BREW", "/permits", b"", 405, "method_not_allowed"),
    ("POST", "/genvm/run", b"", 500, "invalid_request"),
    ("POST", "/genvm/run", b"[]", 500, "invalid_request"),
    ("POST", "/genvm/run", {}, 500, "invalid_request"),
    ("POST", "/genvm/run", {**RUN, "major": 5}, 500, "version_not_available"),
    ("POST", "/permits", {"permits": -1}, 500, "invalid_request"),
    ("POST", "/permits", {"permits": 1.5}, 500, "invalid_request"),
    ("POST", "/permits", {"permits": "4"}, 500, "invalid_request"),
    ("POST", "/permits", {"permits": True}, 500, "invalid_request"),
    ("POST", "/permits", {"permits": 1_000_001}, 500, "invalid_request"),
    ("POST", "/log/level", {"level": "loud"}, 500, "invalid_request"),
    ("POST", "/log/level", {"level": 3}, 500, "invalid_request"),
    ("POST", "/env", {"key": "", "value": "v"}, 500, "environment_refused"),
    ("POST", "/env", {"key": "A=B", "value": "v"}, 500, "environment_refused"),
    ("POST", "/env", {"key": "A", "value": "v\0"}, 500, "environment_refused"),
    ("POST", "/env", {"key": "A\0", "value": "v"}, 500, "environment_refused"),
    ("POST", "/env", {"key": "\ud800", "value": "v"}, 500, "invalid_request"),
    ("GET", "/genvm/1?wait=soon", b"", 404, "execution_not_found"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "code"), ERRORS)
def test_errors_are_json_with_the_documented_status_and_code(
    method: str, path: str, body: Any, status: int, code: str, manager: Manager
) -> None:
    response = manager.request(method, path, body)
    answer = response.json
    assert (response.status, answer["code"]) == (status, code)
    assert isinstance(answer["error"], str)
    assert answer["error"]
    assert answer["retryable"] is False
    assert set(answer) <= {"error", "code", "retryable", "genvm_id", "status", "request_id"}
    assert answer["request_id"] == response.headers["X-Request-Id"]


def test_an_execution_that_does_not_exist_has_a_null_status(manager: Manager) -> None:
    answer = manager.request("GET", "/genvm/7").json
    assert (answer["genvm_id"], answer["status"]) == (7, None)


def test_an_id_with_more_digits_than_python_reads_does_not_exist(manager: Manager) -> None:
    response = manager.request("GET", "/genvm/" + "9" * 6000)
    assert (response.status, response.json["retryable"]) == (404, False)


def all_errors() -> Iterator[type[ManagerError]]:
    todo = [ManagerError]
    while todo:
        kind = todo.pop()
        yield kind
        todo += kind.__subclasses__()


def test_every_error_has_a_stable_code_of_its_own() -> None:
    codes = [kind.code for kind in all_errors()]
    assert len(codes) > 15
    assert len(set(codes)) == len(codes)
    for code in codes:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", code)


def test_only_documented_statuses_are_used() -> None:
    for kind in all_errors():
        error = kind.__new__(kind)
        reference, http = (status_of_error(type(error), style) for style in ("reference", "http"))
        assert reference in {401, 403, 404, 405, 413, 415, 500, 503}
        assert http in {400, 401, 403, 404, 405, 409, 413, 415, 422, 429, 500, 503}
        assert reference in (http, 500) or kind is QueueFull
        if kind.retryable:
            assert reference == 503


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/status", {"GET", "HEAD"}),
        ("POST", "/status", {"GET", "HEAD"}),
        ("GET", "/genvm/run", {"POST"}),
        ("POST", "/genvm/1", {"GET", "HEAD", "DELETE"}),
        ("PATCH", "/permits", {"GET", "HEAD", "POST"}),
        ("OPTIONS", "/env", {"GET", "HEAD", "POST"}),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(
    method: str, path: str, allowed: set[str], manager: Manager
) -> None:
    response = manager.request(method, path)
    assert response.status == 405
    assert set(response.headers["Allow"].split(", ")) == allowed


def test_head_answers_like_get_without_a_body(manager: Manager) -> None:
    manager.request("POST", "/genvm/run", RUN)
    for path in ("/status", "/permits", "/genvm/1", "/genvm/99", "/nope"):
        head, get = manager.request("HEAD", path), manager.request("GET", path)
        assert head.body == b""
        assert head.status == get.status
        for name in ("Content-Type", "Content-Length"):
            assert head.headers[name] == get.headers[name]


@pytest.mark.parametrize(
    "error", [RuntimeError, KeyError, UnicodeDecodeError, OSError, CancelledError]
)
def test_what_nobody_foresaw_is_logged_and_not_shown(
    error: type[Exception], manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_limit: int) -> None:
        if error is UnicodeDecodeError:
            b"/root/internal \xff".decode()
        raise error("/root/internal")

    monkeypatch.setattr(manager.service.gate, "resize", fail)
    response = manager.request("POST", "/permits", {"permits": 1})
    answer = response.json
    if not issubclass(error, ValueError):
        assert (response.status, answer["code"]) == (500, "internal_error")
        assert answer["request_id"] in answer["error"]
        assert "internal " not in answer["error"].replace("internal error", "")
        (record,) = [json.loads(line) for line in manager.log.splitlines() if b"traceback" in line]
        assert record["request_id"] == answer["request_id"]
        assert "/root/internal" in record["traceback"]
    assert "/root" not in response.body.decode()
    assert "Traceback" not in response.body.decode()


@pytest.mark.parametrize(
    "name", ["Host", "Origin", "Authorization", "Idempotency-Key", "Deployment-Timestamp"]
)
@pytest.mark.parametrize("path", ["/genvm/run", "/contract/pre-deploy-writes", "/nope"])
def test_bytes_in_a_header_that_are_no_text_are_an_error_in_json(
    name: str, path: str, manager: Manager
) -> None:
    response = manager.request("POST", path, RUN, **{name.replace("-", "_"): b"\xff\xfe"})
    if name in ("Host", "Origin"):
        assert (response.status, response.json["code"]) == (403, "cross_site_request")
    else:
        # Where a header means nothing, its bytes do no harm.
        expected = {"/genvm/run": 200, "/contract/pre-deploy-writes": 500, "/nope": 404}
        assert response.status == expected[path], response.json
    assert b"traceback" not in manager.log, "nothing unforeseen happened"


@pytest.mark.parametrize(
    "content_type",
    [
        *(None, "application/json", "text/plain", "application/x-www-form-urlencoded"),
        *("multipart/form-data", "multipart/form-data; boundary=x", "nonsense"),
    ],
)
def test_json_is_read_whatever_the_content_type(content_type: str | None, manager: Manager) -> None:
    response = manager.request("POST", "/genvm/run", RUN, Content_Type=content_type)
    assert response.json == {"result": "started", "id": 1}


def test_a_connection_carries_many_requests(manager: Manager) -> None:
    connection = manager.connect()
    for _ in range(3):
        assert connection.request("GET", "/permits").status == 200
        assert connection.request("GET", "/nope").status == 404
    assert not connection.transport.disconnecting


def test_requests_in_one_packet_let_others_have_their_turn(manager: Manager) -> None:
    connection = manager.connect()
    one = f"GET /permits HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    connection.send(one * 3 + one[:20])
    connection.send(one[20:])
    assert connection.transport.value().count(b"HTTP/1.1 200 OK") == 1
    manager.reactor.advance(0)
    assert connection.transport.value().count(b"HTTP/1.1 200 OK") == 4
    connection.send(one * 3)
    connection.lose()
    manager.reactor.advance(0)


def test_requests_in_one_packet_are_not_read_faster_than_answered(manager: Manager) -> None:
    connection = manager.connect()
    transport = connection.transport
    one = f"GET /permits HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    connection.send(one * 1000)
    assert transport.producerState == "paused", "what the client sends now stays in the network"
    manager.reactor.advance(0)
    written = len(transport.value())
    assert transport.BUFFER < written < 2 * transport.BUFFER, "the client does not read"
    assert transport.producerState == "paused"
    answers = b""
    while more := transport.read():
        answers += more
        manager.reactor.advance(0)
    assert transport.producerState == "producing"
    assert answers.count(b"HTTP/1.1 200 OK") == 1000
    connection.lose()


def test_a_hostile_preference_does_not_take_long() -> None:
    start = time.process_time()
    assert preferred_seconds("wait=" + "0" * 15_000 + "x") is None
    assert preferred_seconds("wait=" + "0" * 15_000 + "7") == 7
    assert time.process_time() - start < 1  # 20 s when digits were looked for in three parts


# --- routes ---


def test_the_status_shows_everything(manager: Manager) -> None:
    for _ in range(3):
        manager.connect().ask("POST", "/genvm/run", RUN)
    manager.reactor.advance(1.5)
    manager.processes[0].end(3)
    manager.reactor.advance(1)
    answer = manager.request("GET", "/status").json
    assert (answer["llm_module"], answer["web_module"]) == ("stopped", "stopped")
    assert set(answer["modules"]) == {"llm", "web"}
    for module in answer["modules"].values():
        assert {"pid", "generation", "address", "restarts", "since", "last_error"} <= set(module)
    assert answer["permits"] == {"max": 2, "current": 0, "in_use": 2, "waiting": 0}
    assert answer["queue"] == {"length": 0, "oldest_wait_ms": 0}
    assert list(answer["executions"]) == ["3", "2", "1"]
    assert answer["executions"]["1"]["result"]["exit_code"] == 3
    assert answer["executions"]["2"]["result"] is None
    for entry in answer["executions"].values():
        assert set(entry) == {
            *("state", "version", "is_sync", "started_at", "strict_deadline", "has_result"),
            "result",
        }
    assert [e["has_result"] for e in answer["executions"].values()] == [False, False, True]
    assert (answer["draining"], answer["uptime_s"], answer["instance"]) == (False, 2.5, 0)
    assert len(answer["boot_id"]) >= 16


def test_results_that_were_read_are_listed_no_more(manager: Manager) -> None:
    for _ in range(3):
        manager.connect().ask("POST", "/genvm/run", RUN)
    for process in manager.processes[:2]:
        process.end(0)
    for genvm_id in (1, 3):  # the latter goes on: there is nothing to read yet
        manager.request("GET", f"/genvm/{genvm_id}")
    assert list(manager.request("GET", "/status").json["executions"]) == ["3", "2"]
    assert manager.request("GET", "/genvm/1").json["status"]["exit_code"] == 0, "it stays readable"


@pytest.mark.parametrize(
    ("wait_ms", "grace"), [("1", 0.1), ("20", 0.1), ("99", 0.1), ("250", 0.25)]
)
def test_a_short_wait_lets_an_executor_report_its_end(
    manager: Manager, wait_ms: str, grace: float
) -> None:
    """GenVM's own manager looks every 100 ms; the studio asks for 20."""
    manager.request("POST", "/genvm/run", RUN)
    (process,) = manager.processes
    manager.connect().ask("DELETE", f"/genvm/1?wait_timeout_ms={wait_ms}")
    manager.reactor.advance(grace - 0.001)
    assert process.signals == ["TERM"]
    manager.reactor.advance(0.002)
    assert process.signals == ["TERM", "KILL"]


def test_a_wait_of_nothing_kills_at_once(manager: Manager) -> None:
    manager.request("POST", "/genvm/run", RUN)
    manager.connect().ask("DELETE", "/genvm/1?wait_timeout_ms=0")
    assert manager.processes[0].signals == ["KILL"]


def test_the_status_shows_who_waits(manager: Manager) -> None:
    manager.service.gate.resize(0)
    manager.connect().ask("POST", "/genvm/run", RUN)
    manager.reactor.advance(2.25)
    manager.connect().ask("POST", "/genvm/run", RUN)
    answer = manager.request("GET", "/status").json
    assert answer["queue"] == {"length": 2, "oldest_wait_ms": 2250}
    assert answer["permits"] == {"max": 0, "current": 0, "in_use": 0, "waiting": 2}
    entry = answer["executions"]["1"]
    assert (entry["state"], entry["started_at"], entry["result"]) == ("waiting", None, None)


def test_a_run_from_its_start_to_its_result(manager: Manager) -> None:
    assert manager.request("POST", "/genvm/run", RUN).json == {"result": "started", "id": 1}
    assert manager.request("GET", "/genvm/1").json == {"genvm_id": 1, "status": None}
    manager.processes[0].write(1, "hé".encode())
    manager.processes[0].write(3, b'{"level": "info", "a": 1}\n')
    manager.processes[0].end(4)
    first = manager.request("GET", "/genvm/1").json
    assert first["status"]["stdout"] == "hé"
    assert first["status"]["genvm_log"] == [{"level": "info", "a": 1}]
    assert (first["status"]["exit_code"], first["status"]["cause"]) == (4, "exited")
    assert manager.request("GET", "/genvm/1").json == first, "reading does not consume"


def test_a_run_waits_for_its_permits_and_answers_then(manager: Manager) -> None:
    manager.request("POST", "/permits", {"permits": 0})
    connection = manager.connect()
    connection.ask("POST", "/genvm/run", RUN)
    assert not connection.answered
    manager.reactor.advance(3600)
    assert not connection.transport.disconnecting, "waiting is no reason to hang up"
    manager.request("POST", "/permits", {"permits": 1})
    assert connection.response.json == {"result": "started", "id": 1}


def test_the_message_reaches_the_executor_byte_for_byte(manager: Manager) -> None:
    raw = '{ "v" : 1.10e2, "n": 123456789012345678901234567890, "a":"\\u00e9é" }'
    body = json.dumps({**RUN, "message": 0}).replace('"message": 0', f'"message": {raw}')
    assert manager.request("POST", "/genvm/run", body.encode()).status == 200
    command = manager.spawner.commands[0]
    assert command[command.index("--message") + 1] == raw


def test_a_client_that_disconnects_cancels_its_waiting_run(manager: Manager) -> None:
    manager.service.gate.resize(0)
    leaving, staying = manager.connect(), manager.connect()
    leaving.ask("POST", "/genvm/run", RUN)
    staying.ask("POST", "/genvm/run", RUN)
    leaving.lose()
    status = manager.request("GET", "/status").json
    assert (status["queue"]["length"], list(status["executions"])) == (1, ["2"])
    manager.service.gate.resize(2)
    assert staying.response.json["id"] == 2
    assert [command[-1] for command in manager.spawner.commands] == ["--cookie=2"]
    assert b"traceback" not in manager.log


def test_a_client_that_disconnects_while_its_body_is_read_starts_nothing(
    manager: Manager,
) -> None:
    connection = manager.connect()
    connection.ask("POST", "/genvm/run", {**RUN, "padding": "x" * INLINE_BODY_BYTES})
    assert manager.reactor.jobs
    connection.lose()
    manager.reactor.work()
    assert manager.spawner.commands == []
    assert manager.request("GET", "/status").json["executions"] == {}
    assert b"traceback" not in manager.log


def test_a_retry_with_an_idempotency_key_gets_the_first_run(manager: Manager) -> None:
    for _ in range(2):
        response = manager.request("POST", "/genvm/run", RUN, Idempotency_Key="k")
        assert response.json == {"result": "started", "id": 1}
    other = manager.request("POST", "/genvm/run", {**RUN, "host": "x:1"}, Idempotency_Key="k")
    assert (other.status, other.json["code"]) == (500, "invalid_request")
    assert other.json["error"].startswith("Idempotency-Key: ")
    assert other.json["genvm_id"] == 1
    assert len(manager.spawner.commands) == 1


def test_a_failed_spawn_names_version_and_reason(manager: Manager) -> None:
    manager.spawner.problem = "not found"
    response = manager.request("POST", "/genvm/run", RUN)
    assert (response.status, response.json["code"]) == (500, "spawn_failed")
    assert "v0.2.3" in response.json["error"]
    assert "not found" in response.json["error"]
    assert manager.request("GET", "/permits").json["available"] == 2


def test_a_full_queue_and_draining_can_be_retried(tmp_path: Path) -> None:
    manager = Manager(tmp_path, queue_limit=1, permits=0)
    manager.connect().ask("POST", "/genvm/run", RUN)
    full = manager.request("POST", "/genvm/run", RUN)
    assert manager.request("POST", "/drain").json == {"result": "draining"}
    assert manager.request("GET", "/status").json["draining"] is True
    draining = manager.request("POST", "/genvm/run", RUN)
    for response, code in ((full, "queue_full"), (draining, "draining")):
        assert (response.status, response.json["code"]) == (503, code)
        assert response.json["retryable"] is True
        assert int(response.headers["Retry-After"]) >= 1
    assert manager.request("POST", "/undrain").json == {"result": "accepting"}
    assert manager.request("GET", "/status").json["draining"] is False


@pytest.mark.parametrize("query", ["wait=10s", "wait=10", "wait_ms=10000", "wait=10000ms"])
def test_a_result_can_be_waited_for(query: str, manager: Manager) -> None:
    manager.request("POST", "/genvm/run", RUN)
    early, late = manager.connect(), manager.connect()
    early.ask("GET", f"/genvm/1?{query}")
    manager.reactor.advance(9.9)
    assert not early.answered
    manager.reactor.advance(0.2)
    assert early.response.json == {"genvm_id": 1, "status": None}
    late.ask("GET", f"/genvm/1?{query}")
    assert not late.answered
    manager.processes[0].end()
    assert late.response.json["status"]["exit_code"] == 0


@pytest.mark.parametrize("query", ["wait=1h", "wait_ms=99999999999999999999", "wait=120s"])
def test_a_wait_is_bounded_but_longer_than_an_idle_connection(query: str, manager: Manager) -> None:
    manager.request("POST", "/genvm/run", RUN)
    connection = manager.connect()
    connection.ask("GET", f"/genvm/1?{query}")
    manager.reactor.pump([1] * 119)
    assert not connection.answered
    assert not connection.transport.disconnecting
    manager.reactor.advance(1)
    assert connection.response.json["status"] is None
    assert not connection.transport.disconnecting


@pytest.mark.parametrize(
    ("method", "query", "name"),
    [
        *(("GET", f"wait={text}", "wait") for text in ("soon", "-1", "1e3", "nan", "inf", "")),
        *(("GET", f"wait_ms={text}", "wait_ms") for text in ("x", "-1", "1.5", "%D9%A3", "")),
        *(("DELETE", f"wait_timeout_ms={text}", "wait_timeout_ms") for text in ("x", "-1", "1.5")),
    ],
)
def test_a_wrong_time_is_refused_by_its_name(
    method: str, query: str, name: str, manager: Manager
) -> None:
    manager.request("POST", "/genvm/run", RUN)
    response = manager.request(method, f"/genvm/1?{query}")
    assert (response.status, response.json["code"]) == (500, "invalid_request")
    assert response.json["error"].startswith(f"{name}: ")
    assert manager.processes[0].signals == []


def test_a_client_that_disconnects_while_it_waits_disturbs_nobody(manager: Manager) -> None:
    manager.request("POST", "/genvm/run", RUN)
    leaving, staying = manager.connect(), manager.connect()
    leaving.ask("GET", "/genvm/1?wait=60s")
    staying.ask("GET", "/genvm/1?wait=60s")
    leaving.lose()
    manager.processes[0].end()
    assert staying.response.json["status"]["cause"] == "exited"
    assert b"traceback" not in manager.log


def test_stopping_answers_when_all_is_over(manager: Manager) -> None:
    manager.request("POST", "/genvm/run", RUN)
    connection = manager.connect()
    connection.ask("DELETE", "/genvm/1")
    assert manager.processes[0].signals == ["TERM"]
    manager.reactor.advance(29.9)
    assert not connection.answered
    manager.processes[0].end()
    done = {"result": "shutdown_completed", "genvm_id": 1}
    assert connection.response.json == done
    assert manager.request("DELETE", "/genvm/1").json == done


@pytest.mark.parametrize(("query", "seconds"), [("", 30), ("?wait_timeout_ms=500", 0.5)])
def test_stopping_kills_and_says_so(query: str, seconds: float, manager: Manager) -> None:
    manager.request("POST", "/genvm/run", RUN)
    connection = manager.connect()
    connection.ask("DELETE", f"/genvm/1{query}")
    manager.reactor.advance(seconds)
    assert manager.processes[0].signals == ["TERM", "KILL"]
    assert not connection.answered
    manager.processes[0].end()
    response = connection.response
    assert response.status == 500
    assert response.json["error"] == "timeout during shutdown"
    assert response.json["genvm_id"] == 1
    assert response.json["code"] == "shutdown_timeout"


def test_permits_can_be_read_and_set(manager: Manager) -> None:
    manager.request("POST", "/genvm/run", RUN)
    assert manager.request("GET", "/permits").json == {
        **{"permits": 2, "available": 1, "in_use": 1, "waiting": 0}
    }
    for number in (0, 1_000_000, 1):
        response = manager.request("POST", "/permits", {"permits": number})
        assert response.json == {"result": "permits_set", "permits": number}
        assert manager.request("GET", "/permits").json["permits"] == number


def test_the_log_level_takes_effect_at_once(manager: Manager) -> None:
    response = manager.request("POST", "/log/level", {"level": "Warning"})
    assert response.json == {"result": "log_level_set", "level": "warn"}
    manager.log.clear()
    manager.request("POST", "/env", {"key": "GENVM_TEST_X", "value": "v"})
    assert manager.log == b""
    manager.request("POST", "/log/level", {"level": "TRACE"})
    manager.request("GET", "/permits")
    assert b"GET /permits" in manager.log


def test_the_manifest_can_be_reloaded(
    manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_spare_threads(monkeypatch)
    path = tmp_path / "manifest.yaml"
    path.write_text("executor_versions: {v1.0.0: {available_after: 2025-01-01T00:00:00Z}}")
    connection = manager.connect()
    connection.ask("POST", "/manifest/reload")
    assert not connection.answered, "it is read in a thread"
    manager.reactor.work()
    assert connection.response.json == {"result": "manifest_reloaded"}
    path.write_text("executor_versions:\n  v1: {}\n")
    connection.ask("POST", "/manifest/reload")
    manager.reactor.work()
    response = connection.response
    assert (response.status, response.json["code"]) == (500, "manifest_invalid")
    assert response.json["error"].startswith("manifest.yaml:2: ")
    assert manager.request("POST", "/genvm/run", {**RUN, "major": 1}).status == 200


def test_a_variable_is_set_and_its_value_is_never_shown(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENVM_TEST_KEY", "old")
    manager.request("POST", "/log/level", {"level": "trace"})
    response = manager.request("POST", "/env", {"key": "GENVM_TEST_KEY", "value": "s3cret-value"})
    assert response.json == {"result": "env_var_set", "key": "GENVM_TEST_KEY"}
    assert os.environ["GENVM_TEST_KEY"] == "old"
    noted = manager.request("POST", "/env", {"key": "HTTPS_PROXY", "value": "s3cret-value"})
    assert noted.status == 200
    assert "env_allow" in noted.json["note"]
    wrong = manager.request("POST", "/env", {"key": 1, "value": ["s3cret-value"]})
    assert wrong.status == 500
    joined = manager.request("POST", "/env", {"key": "A_KEY=s3cret-value", "value": ""})
    assert joined.json["error"] == "key: must not be empty, nor contain = or NUL"
    refused = manager.request("POST", "/env", {"key": "LD_PRELOAD", "value": "s3cret-value"})
    assert (refused.status, refused.json["code"]) == (500, "environment_refused")
    for text in (response.body, noted.body, wrong.body, refused.body, bytes(manager.log)):
        assert b"s3cret-value" not in text
    level = manager.request("POST", "/log/level", {"level": "s3cret-value"})
    assert "[redacted]" in level.json["error"], "what a variable for secrets holds is one"


# --- who may make requests ---

V6 = IPv6Address("TCP", "fd00::5", 3999)
V4 = IPv4Address("TCP", "192.168.1.9", 3999)
UNIX = UNIXAddress("/run/m.sock")
OUR_HOSTS = [
    *("127.0.0.1", "127.0.0.1:3999", "localhost", "LocalHost:1", "localhost.", "[::1]:3999"),
    *("127.8.8.8", "my.node", "MY.NODE:80"),
]
OTHER_HOSTS = [
    *("evil.example", "evil.example:3999", "127.0.0.1.evil", "localhost.evil", "my.node.evil"),
    *("x.my.node", "", "192.168.1.9", "0.0.0.0", "127.0.0.1@evil", "[evil]"),
    *("[::1", "[::1:3999", "::1]", "[]", "["),
]


@pytest.mark.parametrize(
    ("host", "address", "served"),
    [
        *((name, LISTENING, True) for name in OUR_HOSTS),
        *((name, LISTENING, False) for name in OTHER_HOSTS),
        ("192.168.1.9:3999", V4, True),
        ("192.168.1.8:3999", V4, False),
        ("127.0.0.1", V4, True),
        ("[fd00::5]:3999", V6, True),
        ("[fd00::6]:3999", V6, False),
        ("anything.at.all", UNIX, True),
    ],
)
def test_the_host_must_be_ours(
    host: str | None, address: Any, served: bool, tmp_path: Path
) -> None:
    manager = Manager(tmp_path, allowed_hosts=("My.Node",))
    response = manager.connect(address).request("GET", "/permits", Host=host)
    assert response.status == (200 if served else 403)
    if not served:
        assert response.json["code"] == "cross_site_request"


def test_the_refusal_names_the_host_as_it_is_to_be_entered(tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    for headers in ({"Host": "My.Node:3999"}, {"Origin": "https://My.Node:3999"}):
        response = manager.connect(LISTENING).request("GET", "/permits", **headers)
        assert response.status == 403
        assert response.json["error"].endswith(
            '; if this is intended, add "my.node" to allowed_hosts'
        )


@pytest.mark.parametrize(
    ("allowed", "host", "origin", "served"),
    [
        ("*", "any.node:1", None, True),
        ("*", HOST, "http://evil.example", False),
        ("*.node.example", "a.node.example", None, True),
        ("*.node.example", "b.a.node.example:1", "https://c.node.example", True),
        ("*.node.example", "node.example", None, False),
        ("*.node.example", "anode.example", None, False),
    ],
)
def test_patterns_of_hosts(
    allowed: str, host: str, origin: str | None, served: bool, tmp_path: Path
) -> None:
    manager = Manager(tmp_path, allowed_hosts=(allowed,))
    connection = manager.connect(LISTENING)
    response = connection.request("GET", "/permits", Host=host, Origin=origin)
    assert response.status == (200 if served else 403)


@pytest.mark.parametrize(
    ("origin", "served"),
    [
        *((origin, True) for origin in (None, f"http://{HOST}", f"HTTP://{HOST.upper()}")),
        *((origin, True) for origin in ("https://my.node", "http://my.node:8080")),
        *(
            (origin, False)
            for origin in ("null", "http://evil.example", "http://127.0.0.1:3000", "")
        ),
        *((origin, False) for origin in ("http://localhost:3999", "127.0.0.1:3999", "http://")),
        *((origin, False) for origin in ("http://my.node.evil", "http://127.0.0.1", "file://")),
    ],
)
@pytest.mark.parametrize("token", [False, True])
def test_a_page_of_another_site_is_refused(
    origin: str | None, served: bool, token: bool, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text("t0ken-t0ken\n")
    settings: dict[str, Any] = {"auth_token_file": path} if token else {}
    manager = Manager(tmp_path, allowed_hosts=("my.node",), **settings)
    authorization = "Bearer t0ken-t0ken" if token else None
    response = manager.request(
        "POST", "/permits", {"permits": 7}, Origin=origin, Authorization=authorization
    )
    assert response.status == (200 if served else 403)
    assert manager.service.gate.limit == (7 if served else 2)


@pytest.mark.parametrize(
    "host",
    [
        *("[::1].evil", "[::1]evil:3999", "[::1", "::1", "[localhost]", "localhost@evil"),
        *("localhost:80:80", "localhost:x", "localhost/", "localhost?", "local\thost"),
        *("[]", ":3999"),
    ],
)
def test_what_is_not_a_host_is_not_ours(host: str, manager: Manager) -> None:
    response = manager.request("GET", "/permits", Host=host)
    assert (response.status, response.json["code"]) == (403, "cross_site_request")


@pytest.mark.parametrize(
    "origin",
    [
        *("http://[::1].evil", f"ftp://{HOST}", f"http://{HOST}/", f"http://{HOST}@evil", HOST),
        *(f"http://evil/http://{HOST}", f"http:// {HOST}", f"http://evil {HOST}", f"//{HOST}"),
    ],
)
def test_what_is_not_our_origin(origin: str, manager: Manager) -> None:
    response = manager.request("GET", "/permits", Host=HOST, Origin=origin)
    assert (response.status, response.json["code"]) == (403, "cross_site_request")


@pytest.mark.parametrize("host", [""])
@pytest.mark.parametrize("origin", ["null", "", "http://"])
def test_an_origin_without_a_place_is_not_the_same_as_no_host(
    host: str | None, origin: str, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text("t0ken-t0ken\n")
    manager = Manager(tmp_path, auth_token_file=path)
    response = manager.request(
        "GET", "/permits", Host=host, Origin=origin, Authorization="Bearer t0ken-t0ken"
    )
    assert (response.status, response.json["code"]) == (403, "cross_site_request")


@pytest.mark.parametrize(
    ("authorization", "served"),
    [
        *(
            (text, True)
            for text in ("Bearer t0ken-t0ken", "bearer t0ken-t0ken", "BEARER  t0ken-t0ken ")
        ),
        *((text, False) for text in (None, "", "Bearer", "Bearer ", "Bearer t0ken", "t0ken-t0ken")),
        *((text, False) for text in ("Basic t0ken-t0ken", "Bearer t0ken-t0kenx", "Bearer é")),
        *((text, False) for text in ("Bearer T0KEN-T0KEN", "Bearer t0ken-t0ken, x")),
    ],
)
@pytest.mark.parametrize("path", ["/permits", "/nope", "/status"])
def test_a_token_is_required_everywhere(
    authorization: str | None, served: bool, path: str, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("t0ken-t0ken\n")
    manager = Manager(tmp_path, auth_token_file=file, host="0.0.0.0")
    # With a token, the Host may be anything.
    response = manager.request("GET", path, Authorization=authorization, Host="proxy.example")
    if served:
        assert response.status == (404 if path == "/nope" else 200)
    else:
        assert (response.status, response.json["code"]) == (401, "unauthorized")
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert "t0ken-t0ken" not in response.json["error"]


def test_a_token_beyond_ascii(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("gr\u00fcn-\u2713", encoding="utf-8")
    manager = Manager(tmp_path, auth_token_file=file)
    right, wrong = b"Bearer gr\xc3\xbcn-\xe2\x9c\x93", b"Bearer gr\xfcn"
    assert manager.request("GET", "/status", authorization=right).status == 200
    assert manager.request("GET", "/status", authorization=wrong).status == 401


def test_the_token_appears_in_no_answer_and_no_log(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("t0ken-t0ken\n")
    manager = Manager(tmp_path, auth_token_file=file)
    with observing(manager.service.observer):
        response = manager.request(
            "POST",
            "/log/level",
            {"level": "t0ken-t0ken"},
            Authorization="Bearer t0ken-t0ken",
        )
        manager.request("GET", "/t0ken-t0ken", Authorization="Bearer t0ken-t0ken")
    assert response.status == 500
    assert b"t0ken-t0ken" not in response.body
    assert b"GET /" in manager.log
    assert b"t0ken-t0ken" not in manager.log


def test_keys_that_clients_make_up_do_not_push_the_token_out(tmp_path: Path) -> None:
    # POST /llm/check makes a secret of every key that it is given.
    file = tmp_path / "token"
    file.write_text("t0ken-t0ken\n")
    redactor = Manager(tmp_path, auth_token_file=file).service.observer.redactor
    redactor.keep("a request", [f"made-up-key-{number}" for number in range(2000)])
    redactor.drop("a request")
    assert "t0ken-t0ken" not in redactor.scrub("the token is t0ken-t0ken")


def test_who_may_not_ask_does_not_learn_what_exists(tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    bodies = {
        manager.request("GET", path, Host="evil", X_Request_Id="r").body
        for path in ("/status", "/nope", "/genvm/1")
    }
    assert len(bodies) == 1


# --- limits of size ---


def test_a_body_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    manager = Manager(tmp_path, max_body_bytes=1000)
    body = json.dumps({"permits": 5}).encode().ljust(1000)
    assert manager.request("POST", "/permits", body).status == 200
    response = manager.request("POST", "/permits", body + b" ")
    assert (response.status, response.json["code"]) == (413, "body_too_large")


def test_a_length_that_is_too_large_is_refused_before_the_body(tmp_path: Path) -> None:
    manager = Manager(tmp_path, max_body_bytes=1000)
    connection = manager.connect()
    connection.ask("POST", "/genvm/run", b"", Content_Length="1001", Expect="100-continue")
    assert b"100 Continue" not in connection.transport.value()
    response = connection.response
    assert (response.status, response.json["code"]) == (413, "body_too_large")
    assert response.headers["Connection"] == "close"
    # A client that sends on reads the answer; what it sends is neither kept nor answered.
    for _ in range(100):
        connection.send(b"x" * 100_000)
    assert not connection.answered
    assert not connection.transport.disconnecting
    manager.reactor.advance(LINGER_SECONDS)
    assert connection.transport.disconnecting


def test_a_body_without_a_length_is_refused_while_it_is_read(tmp_path: Path) -> None:
    manager = Manager(tmp_path, max_body_bytes=1000)
    connection = manager.connect()
    connection.ask("POST", "/permits", b"", Content_Length=None, Transfer_Encoding="chunked")
    for _ in range(10):
        connection.send(b"64\r\n" + b" " * 100 + b"\r\n")
    assert not connection.answered
    connection.send(b"1\r\nx")
    assert (connection.response.status, connection.answered) == (413, False)
    connection.send(b"\r\n0\r\n\r\n" + b"64\r\n" + b" " * 100 + b"\r\n" * 100)
    assert not connection.answered
    manager.reactor.advance(LINGER_SECONDS)
    assert connection.transport.disconnecting
    connection.lose()
    assert manager.reactor.getDelayedCalls() == []


@pytest.mark.parametrize("rest", [b"", b"GET /permits HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_a_body_that_is_refused_and_ends_in_one_packet_is_not_taken(
    rest: bytes, tmp_path: Path
) -> None:
    manager = Manager(tmp_path, max_body_bytes=1000)
    before = manager.request("GET", "/permits").json
    connection = manager.connect()
    connection.ask("POST", "/permits", b"", Content_Length=None, Transfer_Encoding="chunked")
    parts = b'{"permits": 7}', b" " * 2000, b""
    connection.send(b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + rest)
    assert connection.response.json["code"] == "body_too_large"
    assert manager.reactor.jobs == []
    manager.reactor.advance(LINGER_SECONDS)
    assert not connection.answered
    assert connection.transport.disconnecting
    assert manager.request("GET", "/permits").json == before


def test_a_chunked_body_is_read(manager: Manager) -> None:
    connection = manager.connect()
    connection.ask("POST", "/permits", b"", Content_Length=None, Transfer_Encoding="chunked")
    for part in (b'{"per', b'mits": ', b"7}"):
        connection.send(b"%x\r\n%s\r\n" % (len(part), part))
    connection.send(b"0\r\n\r\n")
    manager.reactor.work()
    assert connection.response.json == {"result": "permits_set", "permits": 7}


def test_a_large_body_is_read_in_a_thread(manager: Manager) -> None:
    connection = manager.connect()
    connection.ask("POST", "/permits", {"permits": 7, "padding": "x" * INLINE_BODY_BYTES})
    assert not connection.answered
    assert manager.request("GET", "/status").status == 200
    assert len(manager.reactor.jobs) == 1
    manager.reactor.work()
    assert connection.response.json == {"result": "permits_set", "permits": 7}


def test_a_client_that_expects_to_be_asked_is_asked(manager: Manager) -> None:
    connection = manager.connect()
    connection.ask("POST", "/permits", b"", Content_Length="14", Expect="100-continue")
    assert connection.transport.value() == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.transport.clear()
    connection.send(b'{"permits": 7}')
    assert connection.response.status == 200


# --- limits of time ---


def test_an_idle_connection_is_closed(manager: Manager) -> None:
    connection = manager.connect()
    manager.reactor.advance(RECEIVE_SECONDS - 1)
    assert not connection.transport.disconnecting
    manager.reactor.advance(1)
    assert connection.transport.disconnecting


def test_a_stranger_has_five_seconds_for_a_head_with_the_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("t0ken-t0ken-t0ken")
    file.chmod(0o600)
    manager = Manager(tmp_path, auth_token_file=file)
    stranger, refused, friend, slow = (manager.connect() for _ in range(4))
    assert refused.request("GET", "/status").status == 401
    friend.ask("GET", "/status", Authorization="Bearer t0ken-t0ken-t0ken")
    slow.ask("POST", "/permits", Content_Length="9", Authorization="Bearer t0ken-t0ken-t0ken")
    for _ in range(STRANGER_SECONDS):
        assert not stranger.transport.disconnecting
        stranger.send(b"G")
        manager.reactor.advance(1)
    assert stranger.transport.disconnecting
    assert refused.transport.disconnecting
    manager.reactor.advance(RECEIVE_SECONDS - STRANGER_SECONDS - 1)
    assert not friend.transport.disconnecting
    assert not slow.transport.disconnecting
    manager.reactor.advance(1)
    assert friend.transport.disconnecting
    assert slow.transport.disconnecting


def test_what_came_while_we_were_late_is_read_before_a_connection_is_closed(
    manager: Manager,
) -> None:
    connection = manager.connect()
    # Of a reactor that is late, the timers run first, and then it reads.
    manager.reactor.callLater(RECEIVE_SECONDS + 1, connection.ask, "GET", "/permits")
    manager.reactor.advance(RECEIVE_SECONDS + 1)
    assert connection.response.status == 200
    assert not connection.transport.disconnecting


def test_one_address_has_half_of_the_connections(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (400, 400))
    site = cast(Any, manager.service.site)
    assert (site.most, site.room_of(16)) == (300, 16)
    address = IPv4Address("TCP", "192.0.2.1", 4000)
    channels = [site.buildProtocol(address) for _ in range(150)]
    assert None not in channels
    assert site.buildProtocol(address) is None
    others = [site.buildProtocol(IPv4Address("TCP", "192.0.2.2", 4000)) for _ in range(148)]
    assert (None in others, site.room_of(16)) == (False, 2)
    assert all(site.buildProtocol(UNIXAddress(None)) for _ in range(2))
    assert site.room_of(16) == 0
    channels[0].makeConnection(ClientTransport(LISTENING))
    channels[0].connectionLost(Failure(ConnectionDone()))
    assert site.room_of(16) == 1
    assert site.buildProtocol(address) is not None
    assert manager.log.count(b"no room for more connections: 150 from 192.0.2.1, of at") == 1
    assert manager.log.count(b"no room") == 1
    manager.reactor.advance(REFUSED_SECONDS)
    assert site.room_of(16) == 0
    assert b"no room for more connections: 300 in all, of at most 300" in manager.log
    # The limit that it has by default, and the one of a machine that has few.
    for descriptors, most in ((1 << 20, 4096 + 2 * 1024), (20, 64)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, n=descriptors: (n, n))
        assert site.most == most


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"GET /status HTTP/1.1\r\nX: ",
        b"POST /permits HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 100000\r\n\r\n",
        b"POST /permits HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\n\r\n100000\r\n",
    ],
    ids=["request line", "header", "body", "chunk"],
)
@pytest.mark.parametrize("after_a_request", [False, True])
def test_trickling_does_not_keep_a_connection_open(
    head: bytes, after_a_request: bool, manager: Manager
) -> None:
    connection = manager.connect()
    if after_a_request:
        connection.request("GET", "/permits")
        manager.reactor.advance(RECEIVE_SECONDS / 2)
    connection.send(head or b"G")
    seconds = 0
    while not connection.transport.disconnecting:
        manager.reactor.advance(1)
        seconds += 1
        assert seconds <= RECEIVE_SECONDS
        connection.send(b"x")
    assert seconds >= RECEIVE_SECONDS - 1


def test_a_closed_connection_that_does_not_go_away_is_cut(manager: Manager) -> None:
    connection = manager.connect()
    manager.reactor.pump([RECEIVE_SECONDS, 60])
    assert connection.transport.disconnected
    connection.lose()
    assert manager.reactor.getDelayedCalls() == []


def test_a_connection_that_is_used_stays_open(manager: Manager) -> None:
    connection = manager.connect()
    for _ in range(5):
        manager.reactor.advance(RECEIVE_SECONDS - 1)
        assert connection.request("GET", "/permits").status == 200
    assert not connection.transport.disconnecting


def test_a_connection_has_one_timer_however_many_requests_it_carries(manager: Manager) -> None:
    connection = manager.connect()
    before = [*manager.reactor.getDelayedCalls()]
    for _ in range(5):
        assert connection.request("GET", "/permits").status == 200
    assert manager.reactor.getDelayedCalls() == before


def test_lost_connections_leave_nothing_behind(manager: Manager) -> None:
    manager.service.gate.resize(0)
    for data in (b"", b"GET ", b"POST /genvm/run HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"):
        connection = manager.connect()
        connection.send(data)
        connection.lose()
    for path in ("/genvm/run", "/nope"):
        connection = manager.connect()
        connection.ask("POST", path, RUN)
        connection.lose()
    manager.reactor.advance(TRIM_LITTLE_SECONDS)  # memory goes back
    assert manager.reactor.getDelayedCalls() == []
    assert manager.service.site.channels == set()


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"GET /status\r\n\r\n",
        b"GET /status HTTP/9.9\r\n\r\n",
        b"GET /status HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /status HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"GET /status HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /permits HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /permits HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /permits HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /permits HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"GET /status HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
        b"GET /status HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
)
def test_malformed_http_is_refused_in_json_and_the_connection_closed(
    data: bytes, manager: Manager
) -> None:
    connection = manager.connect()
    connection.method = "GET"
    behind = b"POST /permits HTTP/1.1\r\nHost: localhost\r\nContent-Length: 13\r\n\r\n"
    # In one segment, as a client that smuggles a request behind another sends it.
    connection.send(data + behind + b'{"permits":9}')
    connection.send(behind + b'{"permits":8}')
    assert connection.transport.value().count(b"HTTP/1.1 ") <= 1
    if connection.answered:
        response = connection.response
        assert response.status in {400, 500}
        assert response.json["code"] == "invalid_request"
    assert manager.service.gate.limit == 2, "what follows is not understood any more"
    manager.reactor.advance(LINGER_SECONDS)
    assert connection.transport.disconnecting
    assert b"traceback" not in manager.log


# --- large answers ---

RESULT_BYTES = 3 * MIB


def make_large_result(manager: Manager) -> str:
    """Let a run end with a large output, and return it."""
    manager.request("POST", "/genvm/run", RUN)
    text = "é".join(str(number) for number in range(RESULT_BYTES // 8))
    data = text.encode()
    for at in range(0, len(data), 65_537):
        manager.processes[0].write(1, data[at : at + 65_537])
    manager.processes[0].end()
    return text


async def take_turns(count: int) -> None:
    """Let the real reactor, which Twisted's pull producers use, turn some times."""
    for _ in range(count):
        turn: Deferred[None] = Deferred()
        real_reactor().callLater(0, turn.callback, None)
        await turn


@async_test
async def test_a_large_result_is_sent_as_fast_as_the_client_reads(manager: Manager) -> None:
    text = make_large_result(manager)
    connection = manager.connect()
    connection.ask("GET", "/genvm/1")
    received = b""
    for _ in range(1000):
        await take_turns(2)
        waiting = len(connection.transport.value())
        # A piece may hold one piece of output, of which each byte may take six as JSON.
        assert waiting <= connection.transport.BUFFER + PIECE_BYTES * 7
        if not received:
            assert waiting > 0
            await take_turns(50)
            assert len(connection.transport.value()) == waiting, "the client reads nothing"
        assert manager.request("GET", "/permits").status == 200
        received += connection.transport.read()
        if received.endswith(b"\r\n0\r\n\r\n"):
            break
    response = Response(received, "GET")
    assert response.status == 200
    assert response.json["status"]["stdout"] == text
    assert connection.request("GET", "/permits").status == 200, "the connection lives on"


@async_test
async def test_a_client_that_leaves_in_the_middle_of_a_large_result_leaves_nothing(
    manager: Manager,
) -> None:
    make_large_result(manager)
    connection = manager.connect()
    connection.ask("GET", "/genvm/1")
    await take_turns(3)
    sent = len(connection.transport.value())
    assert 0 < sent < MIB
    connection.lose()
    await take_turns(10)
    assert len(connection.transport.value()) == sent
    assert b"traceback" not in manager.log
    assert connection.channel not in manager.service.site.channels


@async_test
async def test_head_of_a_large_result_has_no_body(manager: Manager) -> None:
    make_large_result(manager)
    connection = manager.connect()
    connection.ask("HEAD", "/genvm/1")
    await take_turns(200)
    response = connection.response
    assert (response.status, response.body) == (200, b"")
    assert connection.request("GET", "/permits").json["permits"] == 2, "nothing followed the head"


def test_errors_never_show_more_than_the_request_allows(manager: Manager) -> None:
    body = {**RUN, "is_sync": "x" * 50_000, "extra_args": ["y" * 200_000]}
    connection = manager.connect()
    connection.ask("POST", "/genvm/run", body)
    manager.reactor.work()
    response = connection.response
    assert response.json["code"] == InvalidRequest.code
    assert len(response.body) < 2000
