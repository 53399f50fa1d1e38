"""What operators watch: probes, figures, lists, events."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from genvm_manager import MOST_STREAMS, SETTINGS, __version__

from .conftest import Start
from .support import PROJECT, WAIT, Daemon, Root, cpu_of, eventually, report, run_body

README = PROJECT / "README.md"
LLM_FILE = (
    "backends:\n  b:\n    enabled: true\n    host: http://127.0.0.1:9\n"
    "    provider: openai-compatible\n    key: ${ENV[KEY]}\n    models: {m: {}}\n"
)
WEB_CONFIG = {"bind_address": "127.0.0.1:0"}


def says(message: str) -> Callable[[dict[str, Any]], bool]:
    """Return what tells whether a record of the log has a message."""
    return lambda record: bool(record["message"] == message)


class Events:
    """The events of one stream, as they come."""

    def __init__(
        self,
        daemon: Daemon,
        path: str,
        headers: dict[str, str] | None = None,
        timeout: float = WAIT,
    ) -> None:
        self._connection = http.client.HTTPConnection(daemon.address, timeout=timeout)
        self._connection.request("GET", path, headers=headers or {})
        self.response = self._connection.getresponse()
        self.ids: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        fields: dict[str, str] = {}
        for line in self.response:
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name:
                fields[name] = value
            elif "event" in fields:
                self.ids.append(fields.get("id", ""))
                yield fields["event"], json.loads(fields["data"])
                fields = {}

    def until(self, kind: str) -> list[tuple[str, Any]]:
        """Return the events up to the first one of a kind."""
        found = []
        for event in self:
            found.append(event)
            if event[0] == kind:
                return found
        raise AssertionError(f"no {kind} in {found}")

    def close(self) -> None:
        """Hang up."""
        self.response.close()
        self._connection.close()


@contextlib.contextmanager
def following(daemon: Daemon, path: str, headers: dict[str, str] | None = None) -> Iterator[Events]:
    events = Events(daemon, path, headers)
    try:
        assert events.response.status == 200
        assert events.response.headers["content-type"] == "text/event-stream; charset=utf-8"
        yield events
    finally:
        events.close()


def text_of(events: list[tuple[str, Any]], kind: str) -> str:
    return "".join(data["text"] for name, data in events if name == kind)


# --- probes ---


def test_probes_need_no_token(root: Root, start: Start) -> None:
    token = root.path / "token"
    token.write_text("a-token-of-sixteen-characters")
    token.chmod(0o600)
    daemon = start("--auth-token-file", str(token))
    assert daemon.get("/livez") == {"result": "alive"}
    assert daemon.get("/readyz") == {"result": "ready"}
    for path in ("/metrics", "/versions", "/events", "/genvm", "/log/level"):
        assert daemon.request("GET", path).status == 401, path
    host = {"Host": "probe.example"}
    assert daemon.request("GET", "/livez", headers=host).status == 200


def not_ready(daemon: Daemon) -> list[str]:
    reply = daemon.request("GET", "/readyz")
    assert reply.status == 503, reply.raw
    assert (reply.json["code"], reply.json["retryable"]) == ("not_ready", True)
    assert all(reason in reply.json["error"] for reason in reply.json["reasons"])
    return list(reply.json["reasons"])


def test_what_makes_it_not_ready(root: Root, start: Start) -> None:
    daemon = start()
    assert daemon.get("/readyz") == {"result": "ready"}
    daemon.post("/drain")
    assert not_ready(daemon) == ["draining: no new executions are accepted"]
    daemon.post("/undrain")
    for folder in (root.path / "executor").iterdir():
        shutil.rmtree(folder)
    assert not_ready(daemon) == ["no executor is installed: see GET /versions"]
    assert daemon.get("/livez") == {"result": "alive"}


def status_line(daemon: Daemon, path: str) -> str:
    with daemon.connect() as peer, peer.makefile("rb") as answer:
        peer.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        return answer.readline().decode().rstrip()


def test_ready_for_executions_of_so_many_permits(start: Start) -> None:
    daemon = start("--permits", "3")
    assert daemon.get("/readyz?permits=9") == {"result": "ready"}, "nobody needs more than there is"
    daemon.run("sleep 600", is_sync=False)
    assert daemon.get("/readyz?permits=1") == {"result": "ready"}
    reply = daemon.request("GET", "/readyz?permits=2")
    assert (reply.status, reply.json["retryable"]) == (503, True)
    assert reply.json["reasons"] == ["2 permits wanted, 1 of 3 free, 0 executions waiting"]
    for path, line in (
        ("/readyz", "200 OK"),
        ("/readyz?weight=true", "200 1%"),
        ("/readyz?weight=true&permits=2", "503 0%"),
        ("/readyz?weight=false&permits=2", "503 Service Unavailable"),
        ("/livez", "200 OK"),
    ):
        assert status_line(daemon, path) == f"HTTP/1.0 {line}", path
    heavy = daemon.send("POST", "/genvm/run", run_body("sleep 600", is_sync=False))
    daemon.waiting(1)
    assert status_line(daemon, "/readyz?weight=true") == "HTTP/1.0 200 0%", "who comes has to wait"
    heavy.close()
    assert daemon.request("GET", "/readyz?weight=1").json["code"] == "invalid_request"
    assert daemon.get("/readyz") == {"result": "ready"}
    assert daemon.request("GET", "/readyz?permits=x").json["code"] == "invalid_request"


def test_a_module_that_should_run(root: Root, start: Start) -> None:
    daemon = start("--start-modules", "llm", environ={"KEY": "a-key-of-a-provider"})
    reasons = not_ready(daemon)
    assert reasons[0].startswith("the llm module is st"), reasons
    daemon.wait_log(
        lambda r: "the llm module cannot be started, trying again in 1 s" in r["message"]
    )
    (root.path / "config" / "genvm-module-llm.yaml").write_text(LLM_FILE)
    eventually(lambda: daemon.request("GET", "/readyz").status == 200, what="it is ready")
    assert daemon.get("/status")["modules"]["llm"]["state"] == "running"


def test_endpoints_and_readme_name_the_same(start: Start) -> None:
    answer = start().get("/")
    assert (answer["name"], answer["version"]) == ("genvm-manager", __version__)
    served = {(one["method"], one["path"]) for one in answer["endpoints"]}
    assert all(one["what"].endswith(".") for one in answer["endpoints"])
    table = README.read_text().partition("### All endpoints")[2].partition("\n`POST /genvm/run`")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = re.findall(r"`([A-Z]+) (\S+)`", "".join(cells))
    assert {(method, path.replace("/ID", "/{genvm_id}")) for method, path in named} == served


def test_settings_and_readme_name_the_same() -> None:
    text = README.read_text().partition("## Settings")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", "".join(cells))) == set(SETTINGS)


def test_many_who_look_at_once_share_a_look(start: Start) -> None:
    daemon = start()
    for path in ("/readyz", "/versions"):
        pending = [daemon.send("GET", path) for _ in range(40)]
        assert {one.reply().status for one in pending} == {200}


def test_a_stop_ends_the_attempts_to_start(root: Root, start: Start) -> None:
    daemon = start("--start-modules", "llm", environ={"KEY": "a-key-of-a-provider"})
    daemon.wait_log(lambda r: "trying again in 1 s" in r["message"])
    assert daemon.post("/module/stop", {"module_type": "llm"}) == {"result": "module_not_running"}
    (root.path / "config" / "genvm-module-llm.yaml").write_text(LLM_FILE)
    before = [r["message"] for r in daemon.records]
    daemon.post("/module/start", {"module_type": "web", "config": WEB_CONFIG})
    assert daemon.get("/status")["modules"]["llm"]["state"] == "stopped"
    after = [r["message"] for r in daemon.records]
    attempts = [text for text in after[len(before) :] if "the llm module cannot be started" in text]
    assert len(attempts) == 0


# --- figures ---


def test_metrics(root: Root, start: Start) -> None:
    daemon = start("--permits", "1")
    with following(daemon, "/events") as events:
        daemon.result(daemon.run("print hello", "exit 3"))
        events.until("finished")
    connection = http.client.HTTPConnection(daemon.address, timeout=WAIT)
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    text = response.read()
    connection.close()
    described = README.read_text().partition("### Figures")[2].partition("\n###")[0]
    names = {line.split()[2] for line in text.decode().splitlines() if line.startswith("# TYPE")}
    names -= {name for name in names if name.startswith("process_")}
    assert names == set(re.findall(r"`(genvm_\w+)`", described))
    found = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if line[0] != "#")
    assert float(found["genvm_permits"]) == 1
    assert float(found["genvm_execution_seconds_count"]) == 1
    version = daemon.get("/versions")["versions"][-1]["version"]
    ended = f'genvm_executions_finished_total{{cause="exited",version="{version}"}}'
    assert float(found[ended]) == 1
    run = 'genvm_http_request_seconds_count{method="POST",route="/genvm/run",status="200"}'
    assert float(found[run]) == 1
    assert float(found["process_open_fds"]) > 3
    promtool = shutil.which("promtool")
    if promtool is None:
        assert not os.environ.get("GENVM_REQUIRE_PROMTOOL"), "promtool is not installed"
        pytest.skip("promtool, of the package prometheus, is not installed")
    command = [promtool, "check", "metrics"]
    done = subprocess.run(command, input=text, capture_output=True, timeout=2 * WAIT, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


# --- lists ---


def test_versions(root: Root, start: Start) -> None:
    root.write_manifest(
        {
            "v0.1.0": "2025-01-01T00:00:00Z",
            "v0.1.1": "2025-03-01T00:00:00Z",
            "v0.2.0": "2025-02-01T00:00:00Z",
        }
    )
    root.script("exit 0", "v0.1.1")
    (root.path / "executor" / "v0.1.1" / "bin" / "genvm").chmod(0o644)
    daemon = start()
    answer = daemon.get("/versions")
    assert answer["reroute_to"] is None
    by_key = {entry["version"]: entry for entry in answer["versions"]}
    assert [*by_key] == ["v0.1.0", "v0.1.1", "v0.2.0"]
    assert by_key["v0.1.0"]["selected"] == []
    assert by_key["v0.1.1"]["selected"] == [
        {"begin": "2025-01-01T00:00:00.000Z", "end": "2025-02-01T00:00:00.000Z"}
    ]
    assert by_key["v0.2.0"]["selected"] == [{"begin": "2025-02-01T00:00:00.000Z", "end": None}]
    assert (by_key["v0.1.1"]["found"], by_key["v0.1.1"]["executable"]) == (True, os.geteuid() < 0)
    assert by_key["v0.2.0"]["program"] == f"{root.path}/executor/v0.2.0/bin/genvm"


def test_the_log_level_can_be_read(start: Start) -> None:
    daemon = start("--log-level", "warning", "--log-level", "info")
    assert daemon.get("/log/level") == {"level": "info"}
    daemon.post("/log/level", {"level": "DEBUG"})
    assert daemon.get("/log/level") == {"level": "debug"}


def test_executions_page_by_page(start: Start) -> None:
    daemon = start("--permits", "10")
    ids = [daemon.run("exit 0") for _ in range(5)]
    for genvm_id in ids:
        daemon.result(genvm_id)
    living = daemon.run("sleep 600")
    answer = daemon.get("/genvm?limit=4")
    assert [entry["id"] for entry in answer["executions"]] == [living, *ids[:1:-1]]
    assert answer["executions"][0]["state"] == "running"
    answer = daemon.get(f"/genvm?limit=4&before={answer['next']}")
    assert ([entry["id"] for entry in answer["executions"]], answer["next"]) == (ids[1::-1], None)
    answer = daemon.get("/genvm?state=running")
    assert [entry["id"] for entry in answer["executions"]] == [living]
    reply = daemon.request("GET", "/genvm?state=ended")
    assert reply.status == 500
    assert "expected one of waiting, running" in reply.json["error"]
    daemon.request("DELETE", f"/genvm/{living}")


def test_names_of_variables_never_their_values(start: Start) -> None:
    daemon = start()
    daemon.post("/env", {"key": "MY_KEY", "value": "secret-of-mine"})
    daemon.post("/env", {"key": "HOME", "value": "/secret-of-mine"})
    reply = daemon.request("GET", "/env")
    assert reply.json == {
        "variables": [{"key": "HOME", "passed_on": False}, {"key": "MY_KEY", "passed_on": True}]
    }


def test_permits_can_follow_memory_again(start: Start) -> None:
    daemon = start()
    automatic = daemon.permits()["permits"]
    daemon.post("/permits", {"permits": 77})
    assert daemon.post("/permits", {"permits": None})["result"] == "permits_set"
    assert 2 <= daemon.permits()["permits"] <= 2 * automatic


@pytest.mark.parametrize("style", ["reference", "http"])
def test_statuses_of_errors(root: Root, start: Start, style: str) -> None:
    daemon = start("--permits", "1", "--queue-limit", "0", "--error-status", style)
    running = daemon.run("sleep 600")
    expected: list[tuple[str, str, Any, int, int]] = [
        ("POST", "/genvm/run", {"major": 0}, 500, 400),
        ("POST", "/genvm/run", {**run_body("exit 0"), "host": "here"}, 500, 400),
        ("POST", "/genvm/run", {**run_body("exit 0"), "major": 9}, 500, 422),
        ("POST", "/genvm/run", run_body("exit 0"), 503, 429),
        ("POST", "/permits", {"permits": True}, 500, 400),
        ("POST", "/env", {"key": "LD_PRELOAD", "value": "x"}, 500, 422),
        ("POST", "/module/start", {"module_type": "llm", "config": {"x": 1}}, 500, 422),
        ("GET", "/genvm/7", None, 404, 404),
        ("GET", "/genvm/abc", None, 404, 404),
        ("PUT", "/status", None, 405, 405),
    ]
    for method, path, body, reference, http_ in expected:
        reply = daemon.request(method, path, body)
        assert reply.status == (reference if style == "reference" else http_), (path, reply.raw)
        assert ("Retry-After" in {name.title() for name in reply.headers}) is reply.json[
            "retryable"
        ]
    assert "an id is a number" in daemon.request("GET", "/genvm/abc").json["error"]
    assert "an id is a number" in daemon.request("GET", "/genvm/abc/events").json["error"]
    daemon.request("DELETE", f"/genvm/{running}")


# --- drain ---


def test_drain_waits_for_runs_and_for_their_readers(start: Start) -> None:
    daemon = start("--permits", "2")
    genvm_id = daemon.run("sleep 600")
    assert daemon.post("/drain?wait=10ms") == {"result": "draining"}
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(daemon.post, "/drain?wait=60s")
        daemon.request("DELETE", f"/genvm/{genvm_id}")
        eventually(lambda: daemon.get("/status")["unread"] == 1, what="a result that is not read")
        assert not drained.done()
        daemon.result(genvm_id)
        assert drained.result(WAIT) == {"result": "drained"}
    assert daemon.get("/status")["unread"] == 0
    assert daemon.post("/drain?wait=60s") == {"result": "drained"}


def test_who_waits_for_a_drain_hears_of_a_change_and_of_the_end(start: Start) -> None:
    daemon = start("--permits", "2")
    genvm_id = daemon.run("sleep 600")
    waiting = daemon.send("POST", "/drain?wait=60s")
    eventually(lambda: daemon.get("/status")["draining"], what="it drains")
    daemon.post("/undrain")
    daemon.request("DELETE", f"/genvm/{genvm_id}")
    daemon.result(genvm_id)
    assert waiting.reply().json == {"result": "accepting"}
    daemon.run("sleep 600")
    waiting = daemon.send("POST", "/drain?wait=60s")
    eventually(lambda: daemon.get("/status")["draining"], what="it drains")
    daemon.signal(signal.SIGTERM)
    assert waiting.reply().json == {"result": "draining"}
    assert daemon.wait() == 0


# --- events ---


def test_events_of_a_run_that_waits(start: Start) -> None:
    daemon = start("--permits", "1")
    with following(daemon, "/events") as events:
        first = daemon.run("sleep 600")
        second = daemon.send("POST", "/genvm/run", None)
        second.close()
        daemon.post("/permits", {"permits": 2})
        daemon.post("/drain")
        daemon.post("/undrain")
        daemon.request("DELETE", f"/genvm/{first}")
        found = events.until("finished")
        kinds = [kind for kind, _ in found]
        assert kinds == ["started", "permits", "drain", "drain", "finished"]
        assert found[1][1]["permits"] == 2
        assert [data["draining"] for kind, data in found if kind == "drain"] == [True, False]
        assert found[-1][1]["genvm_id"] == first
        assert found[-1][1]["cause"] == "cancelled"
        last = events.ids[1]
    with following(daemon, "/events", {"Last-Event-ID": last}) as events:
        assert [kind for kind, _ in events.until("finished")] == kinds[2:]
    with following(daemon, "/events", {"Last-Event-ID": "00000000-7"}) as events:
        assert [kind for kind, _ in events.until("finished")] == ["missed", *kinds]


def test_a_run_is_followed_from_its_start_to_its_end(start: Start) -> None:
    daemon = start()
    genvm_id = daemon.run("print early", "log info first", "sleep 600")
    with following(daemon, f"/genvm/{genvm_id}/events") as events:
        found = events.until("log")
        assert text_of(found, "stdout") == "early\n"
        assert found[-1][1]["message"] == "first"
        daemon.request("DELETE", f"/genvm/{genvm_id}")
        (end,) = [data for kind, data in events.until("finished") if kind == "finished"]
        assert (end["cause"], end["truncated"]) == ("cancelled", [])
        assert events.response.read() == b"", "that was the end"
    with following(daemon, f"/genvm/{genvm_id}/events") as events:
        found = events.until("finished")
        assert text_of(found, "stdout") == "early\n"
    assert daemon.request("GET", "/genvm/7/events").status == 404


def test_following_says_what_is_not_kept(root: Root, start: Start) -> None:
    daemon = start("--capture-max-bytes", "100000")
    root.script("head -c 300000 /dev/zero | tr '\\0' x; echo end")
    genvm_id = daemon.run()
    daemon.result(genvm_id)
    with following(daemon, f"/genvm/{genvm_id}/events") as events:
        found = events.until("finished")
    missed = [data for kind, data in found if kind == "missed"]
    assert len(missed) == 1
    assert missed[0]["stream"] == "stdout"
    text = text_of(found, "stdout")
    assert text.endswith("xxxend\n")
    assert missed[0]["bytes"] + len(text) == 300_004


def test_a_run_that_never_starts_is_followed_to_its_end(start: Start) -> None:
    daemon = start("--permits", "0")
    asked = daemon.send("POST", "/genvm/run", run_body("exit 0"))
    eventually(lambda: daemon.permits()["waiting"] == 1, what="it waits")
    (entry,) = daemon.get("/genvm")["executions"]
    with following(daemon, f"/genvm/{entry['id']}/events") as events:
        asked.close()
        assert [*events] == [], "the stream ends without an event"


def test_a_head_of_events_has_an_end(start: Start) -> None:
    daemon = start()
    genvm_id = daemon.run("sleep 600")
    connection = http.client.HTTPConnection(daemon.address, timeout=WAIT)
    for path in ("/events", f"/genvm/{genvm_id}/events", "/livez"):
        connection.request("HEAD", path)
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"")
    daemon.request("DELETE", f"/genvm/{genvm_id}")
    connection.request("HEAD", f"/genvm/{genvm_id}/events")
    assert connection.getresponse().read() == b"", "of one that has ended, too"
    connection.close()
    assert daemon.stop() == 0
    assert "critical" not in {record["level"] for record in daemon.records}


def test_what_a_run_has_written_until_now(start: Start) -> None:
    daemon = start()
    genvm_id = daemon.run("print now", "sleep 600")
    path = f"/genvm/{genvm_id}/events?follow="
    with following(daemon, f"/genvm/{genvm_id}/events") as events:
        events.until("stdout")
    with following(daemon, f"{path}false") as events:
        assert ("stdout", {"text": "now\n"}) in [*events], "it ends, while the run goes on"
    assert "follow: expected true or false" in daemon.request("GET", f"{path}no").json["error"]
    daemon.request("DELETE", f"/genvm/{genvm_id}")


def test_a_reader_that_reads_nothing_is_dropped(root: Root, start: Start) -> None:
    stalled = 2.0
    constants = {"STALLED_SECONDS": stalled}
    daemon = start("--capture-max-bytes", "60000000", constants=constants)
    root.script("head -c 50000000 /dev/zero | tr '\\0' x")
    genvm_id = daemon.run()
    daemon.result(genvm_id)
    with daemon.connect() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        begin = time.monotonic()
        peer.sendall(f"GET /genvm/{genvm_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        hung_up = select.poll()
        hung_up.register(peer, select.POLLRDHUP)  # and what is always told
        assert hung_up.poll(WAIT * 1000), "the manager hangs up"
        assert time.monotonic() - begin >= stalled


def test_streams_end_with_the_manager(start: Start) -> None:
    daemon = start()
    with following(daemon, "/events") as events:
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert {data["state"] for kind, data in events if kind == "module"} <= {
            "stopping",
            "stopped",
        }, "the stream has an end"


def test_a_reader_that_stops_holds_nothing_up(root: Root, start: Start) -> None:
    daemon = start("--capture-max-bytes", "30000000")
    root.script("head -c 20000000 /dev/zero | tr '\\0' x; echo end")
    genvm_id = daemon.run()
    with following(daemon, f"/genvm/{genvm_id}/events") as events:
        result = daemon.result(genvm_id)
        assert result["stdout"].endswith("xend\n")
        assert text_of(events.until("finished"), "stdout") == result["stdout"]


# --- the log ---


def test_who_changed_what_stands_in_the_log(root: Root, start: Start) -> None:
    daemon = start("--log-level", "info")
    request = {"X-Request-Id": "from-a-proxy:1"}
    reply = daemon.request("POST", "/permits", {"permits": 3}, request)
    assert {name.lower(): text for name, text in reply.headers.items()}["x-request-id"] == request[
        "X-Request-Id"
    ]
    record = daemon.wait_log(lambda r: r["message"] == "permits set")
    assert (record["permits"], record["peer"], record["request_id"]) == (
        3,
        "127.0.0.1",
        "from-a-proxy:1",
    )
    for path, body, message in (
        ("/drain", None, "draining"),
        ("/undrain", None, "accepting executions again"),
        ("/log/level", {"level": "error"}, "log level set"),
        ("/log/level", {"level": "info"}, "log level set"),
        ("/env", {"key": "A_KEY", "value": "a-secret-value"}, "environment variable set"),
        ("/manifest/reload", None, "manifest reloaded on request"),
        ("/module/stop", {"module_type": "llm"}, "module stopped"),
    ):
        daemon.post(path, body)
        record = daemon.wait_log(says(message))
        assert record["peer"] == "127.0.0.1"
        assert record["request_id"] not in ("", "from-a-proxy:1")
    reply = daemon.request("GET", "/genvm/7", headers={"X-Request-Id": 'not "plain"'})
    assert reply.json["request_id"] == reply.headers["x-request-id"] != 'not "plain"'
    daemon.stop()
    assert "a-secret-value" not in daemon.text


def test_each_request_has_a_line_at_debug(start: Start) -> None:
    daemon = start("--log-level", "debug")
    daemon.request("GET", "/genvm/7", headers={"X-Request-Id": "r1"})
    record = daemon.wait_log(lambda r: r["message"] == "GET /genvm/7")
    assert (record["route"], record["status"]) == ("/genvm/<int:genvm_id>", 404)
    assert (record["peer"], record["request_id"]) == ("127.0.0.1", "r1")
    assert record["ms"] > 0
    assert record["bytes"] > 50
    refused = daemon.request("POST", "/drain", {}, {"Host": "evil", "X-Request-Id": "r2"})
    assert refused.status == 403
    record = daemon.wait_log(lambda r: r.get("request_id") == "r2" and "route" in r)
    assert (record["route"], record["status"]) == ("none", 403)


def test_refusals_are_warned_of_now_and_then(root: Root, start: Start) -> None:
    token = root.path / "token"
    token.write_text("a-token-of-sixteen-characters")
    token.chmod(0o600)
    daemon = start("--auth-token-file", str(token))
    for _ in range(20):
        assert daemon.request("GET", "/status").status == 401
    daemon.wait_log(lambda r: r["message"] == "request refused")
    headers = {"Authorization": "Bearer a-token-of-sixteen-characters"}
    daemon.request("POST", "/drain", headers=headers)
    assert daemon.request("POST", "/genvm/run", run_body("exit 0"), headers).status == 503
    daemon.wait_log(lambda r: r.get("code") == "draining")
    daemon.stop()
    refused = [r for r in daemon.records if r["message"] == "request refused"]
    assert [(r["status"], r["code"], r["peer"]) for r in refused] == [
        (401, "unauthorized", "127.0.0.1"),
        (503, "draining", "127.0.0.1"),
    ]


def test_a_run_tells_how_long_it_waited(start: Start) -> None:
    daemon = start("--permits", "1", "--log-level", "info")
    reply = daemon.request(
        "POST", "/genvm/run", run_body("exit 0", is_sync=False), {"Idempotency-Key": "my-key"}
    )
    daemon.result(reply.json["id"])
    record = daemon.wait_log(lambda r: r["message"] == "execution finished")
    assert (record["permits"], record["idempotency_key"]) == (2, "my-key")
    assert 0 <= record["waited_s"] < WAIT


def test_an_earlier_value_of_a_key_stays_secret(start: Start) -> None:
    """Children that were started before have it."""
    daemon = start()
    for value in ("the-first-value", "the-second-value"):
        daemon.post("/env", {"key": "SOME_KEY", "value": value})
    run = daemon.run("log info the-first-value", "log info the-second-value", capture_output=False)
    daemon.result(run)
    daemon.stop()
    said = [r["message"] for r in daemon.records if r.get("genvm_id") == run]
    assert said[:2] == ["[redacted]", "[redacted]"]


def test_many_followers_hold_up_nobody(start: Start) -> None:
    """Each event is encoded once; beyond a number of followers the next one is refused."""
    daemon = start()
    run = daemon.run("print out\\n")
    daemon.result(run)
    for number in range(300):
        daemon.post("/permits", {"permits": 100 + number % 2})
    with contextlib.ExitStack() as streams:
        head = b"GET /events HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: x-1\r\n\r\n"
        peers = [streams.enter_context(daemon.connect()) for _ in range(MOST_STREAMS)]
        for peer in peers:
            peer.sendall(head)
        used = cpu_of(daemon.pid)
        assert daemon.get("/livez") == {"result": "alive"}
        used = cpu_of(daemon.pid) - used
        report(f"/livez beside followers that have missed much: after {used:.2f} s of a processor")
        assert used < 5.0, "the goal is 1 s"
        for peer in peers:
            assert peer.recv(15) == b"HTTP/1.1 200 OK"
        reply = daemon.request("GET", "/events")
        assert (reply.status, reply.json["code"]) == (503, "resources_exhausted")
        reply = daemon.request("GET", f"/genvm/{run}/events")
        assert (reply.status, reply.json["code"]) == (503, "resources_exhausted")
    with following(daemon, "/events", {"Last-Event-ID": "x-1"}) as events:
        assert next(iter(events))[0] == "missed"
    daemon.stop()
    # Who is refused is sent nothing afterwards, although there was something to send.
    assert [r["message"] for r in daemon.records if r["level"] == "critical"] == []
