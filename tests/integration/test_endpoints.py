"""Every endpoint: what it answers, and each way in which it fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from .conftest import IDLE, Start
from .support import (
    NO_HOST,
    NODE,
    VERSION,
    Daemon,
    Host,
    Root,
    alive,
    eventually,
    message,
    run_body,
    serving,
    timed,
)

EMPTY_MODULE = {
    "module_type": "llm",
    "config": {"bind_address": "127.0.0.1:0"},
    "allow_empty_backends": True,
}
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
UNKNOWN_ID = 10**9


def is_error(reply: Any, status: int, code: str, *parts: str) -> None:
    """Check the form of an error reply."""
    assert (reply.status, reply.json["code"]) == (status, code), reply.raw
    assert isinstance(reply.json["retryable"], bool)
    for part in parts:
        assert part in reply.json["error"], reply.json["error"]


# --- GET /status ---


def test_status(daemon: Daemon) -> None:
    first, second = daemon.get("/status"), daemon.get("/status")
    assert first["llm_module"] == first["web_module"] == "stopped"
    assert first["permits"] == {"max": 8, "current": 8, "in_use": 0, "waiting": 0}
    assert first["queue"] == {"length": 0, "oldest_wait_ms": 0}
    assert set(first["modules"]) == {"llm", "web"}
    for module in first["modules"].values():
        assert {"pid", "generation", "address", "restarts", "since", "last_error"} <= set(module)
    assert first["version"]
    assert first["boot_id"] == second["boot_id"]
    assert first["uptime_s"] <= second["uptime_s"]
    assert first["draining"] is False
    assert isinstance(first["executions"], dict)


def test_status_lists_executions(daemon: Daemon) -> None:
    running = daemon.run("sleep 600", is_sync=False, max_execution_minutes=20)
    finished = daemon.run("exit 4")
    name = str(finished)
    eventually(lambda: daemon.get("/status")["executions"][name]["has_result"])
    status = daemon.get("/status")
    entry = status["executions"][str(running)]
    assert entry == {
        "state": "running",
        "version": VERSION,
        "is_sync": False,
        "started_at": entry["started_at"],
        "strict_deadline": entry["strict_deadline"],
        "has_result": False,
        "result": None,
    }
    assert RFC3339.fullmatch(entry["started_at"])
    assert RFC3339.fullmatch(entry["strict_deadline"])
    assert entry["strict_deadline"] > entry["started_at"]
    assert status["permits"] == {"max": 8, "current": 6, "in_use": 2, "waiting": 0}
    entry = status["executions"][str(finished)]
    assert entry["state"] == "finished"
    assert (entry["result"]["exit_code"], entry["result"]["cause"]) == (4, "exited")
    daemon.request("DELETE", f"/genvm/{running}")
    order = list(daemon.get("/status")["executions"])
    assert order[:2] == [str(running), str(finished)], "the last to finish comes first"
    daemon.result(finished)
    assert name not in daemon.get("/status")["executions"], "somebody has read it"


# --- POST /genvm/run and GET /genvm/{id} ---


def test_a_run_and_its_result(daemon: Daemon) -> None:
    before = time.time() * 1000
    genvm_id = daemon.run(
        "print out",
        "print-err err",
        "log warn careful",
        'log-raw {"level": "debug", "message": "own", "n": 1.5, "deep": {"a": [null]}}',
        "log-raw not json",
        'log-raw {"message": "no level"}',
        "exit 7",
    )
    status = daemon.result(genvm_id)
    assert status["stdout"] == "out\n"
    assert status["stderr"].endswith("err\n")
    assert "not GenVM" in status["stderr"]
    assert status["genvm_log"] == [
        {"level": "warn", "message": "careful", "target": "practice"},
        {"level": "debug", "message": "own", "n": 1.5, "deep": {"a": [None]}},
        {"level": "info", "message": "genvm log", "line": "not json"},
        {"level": "info", "message": "no level"},
    ]
    assert (status["exit_code"], status["signal"], status["cause"]) == (7, None, "exited")
    assert (status["version"], status["truncated"]) == (VERSION, [])
    assert RFC3339.fullmatch(status["started_at"])
    assert isinstance(status["finished_at"], int)
    assert before - 1000 <= status["finished_at"] <= time.time() * 1000 + 1000


def test_reading_does_not_consume(daemon: Daemon) -> None:
    genvm_id = daemon.run("print once", "exit 0")
    daemon.result(genvm_id)
    answers = [daemon.request("GET", f"/genvm/{genvm_id}").raw for _ in range(3)]
    assert len(set(answers)) == 1


def test_status_is_null_while_it_runs(daemon: Daemon) -> None:
    genvm_id = daemon.run("sleep 600")
    assert daemon.get(f"/genvm/{genvm_id}") == {"genvm_id": genvm_id, "status": None}
    daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=0")


def test_ids_grow(daemon: Daemon) -> None:
    first = daemon.run("exit 0")
    second = daemon.run("exit 0")
    assert second > first >= 1


@pytest.mark.parametrize("query", ["wait=300ms", "wait=0.3s", "wait_ms=300", "wait=0.3"])
def test_waiting_for_a_result_that_does_not_come(daemon: Daemon, query: str) -> None:
    genvm_id = daemon.run("sleep 600")
    begin = time.monotonic()
    assert daemon.get(f"/genvm/{genvm_id}?{query}")["status"] is None
    assert time.monotonic() - begin >= 0.29
    daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=0")


@pytest.mark.parametrize("query", ["wait=0", "wait_ms=0", "wait=0s", ""])
def test_not_waiting_for_a_result(daemon: Daemon, query: str) -> None:
    genvm_id = daemon.run("sleep 600")
    assert daemon.get(f"/genvm/{genvm_id}?{query}")["status"] is None
    daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=0")


@pytest.mark.parametrize("query", ["wait=60s", "wait_ms=60000", "wait=1m", "wait=100h"])
def test_waiting_for_a_result(daemon: Daemon, tmp_path: Path, query: str) -> None:
    go = tmp_path / "go"
    genvm_id = daemon.run(f"wait-file {go}", "exit 0")
    waiting = [daemon.send("GET", f"/genvm/{genvm_id}?{query}") for _ in range(3)]
    go.touch()
    answers = [pending.reply() for pending in waiting]
    assert all(answer.json["status"]["exit_code"] == 0 for answer in answers)


@pytest.mark.parametrize(
    "query", ["wait=soon", "wait=-1", "wait=", "wait_ms=1.5", "wait_ms=-1", "wait_ms=x", "wait=1d"]
)
def test_waiting_wrongly(daemon: Daemon, query: str) -> None:
    genvm_id = daemon.run("exit 0")
    reply = daemon.request("GET", f"/genvm/{genvm_id}?{query}")
    is_error(reply, 500, "invalid_request", query.partition("=")[0])


def test_a_waiting_client_that_leaves_disturbs_nobody(daemon: Daemon, tmp_path: Path) -> None:
    go = tmp_path / "go"
    genvm_id = daemon.run(f"wait-file {go}", "exit 0")
    leaver = daemon.send("GET", f"/genvm/{genvm_id}?wait=60s")
    stayer = daemon.send("GET", f"/genvm/{genvm_id}?wait=60s")
    leaver.close()
    assert daemon.get(f"/genvm/{genvm_id}")["status"] is None
    go.touch()
    assert stayer.reply().json["status"]["exit_code"] == 0


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("genvm_id", [0, UNKNOWN_ID, 10**30])
def test_an_unknown_id(daemon: Daemon, method: str, genvm_id: int) -> None:
    reply = daemon.request(method, f"/genvm/{genvm_id}")
    is_error(reply, 404, "execution_not_found")
    assert reply.json["genvm_id"] == genvm_id
    assert reply.json["status"] is None


@pytest.mark.parametrize("name", ["abc", "-1", "1.5", "", "1/2", "9" * 5000, "%31%32x"])
def test_no_id_at_all(daemon: Daemon, name: str) -> None:
    reply = daemon.request("GET", f"/genvm/{name}")
    assert (reply.status, type(reply.json["error"])) == (404, str)


def test_without_capture(daemon: Daemon) -> None:
    daemon.post("/log/level", {"level": "info"})
    genvm_id = daemon.run(
        "print lost",
        "print-err lost",
        "log warn forwarded",
        "log-raw plain {text}",
        'log-raw {"level": "ERROR", "message": {"not": "text"}, "extra": 1}',
        "exit 5",
        capture_output=False,
    )
    status = daemon.result(genvm_id)
    assert (status["stdout"], status["stderr"], status["genvm_log"]) == ("", "", [])
    assert (status["exit_code"], status["truncated"]) == (5, [])
    forwarded = daemon.wait_log(lambda r: r["message"] == "forwarded")
    assert (forwarded["level"], forwarded["genvm_id"]) == ("warn", genvm_id)
    plain = daemon.wait_log(lambda r: "plain {text}" in json.dumps(r))
    assert (plain["level"], plain["genvm_id"]) == ("info", genvm_id)
    odd = daemon.wait_log(lambda r: r.get("record", {}).get("extra") == 1)
    assert (odd["level"], odd["genvm_id"]) == ("error", genvm_id)
    ended = daemon.wait_log(
        lambda r: r["message"] == "execution finished" and r["genvm_id"] == genvm_id
    )
    assert ended["stderr"].endswith("lost"), "nobody else can say why it failed"


def test_a_set_up_failure_without_capture_leaves_its_reason(root: Root, start: Start) -> None:
    start_of_line = "x" * 3000
    root.script(f"printf '{start_of_line}\\nno such host\\n' >&2; exit ${{data:-0}}")
    daemon = start()
    daemon.post("/log/level", {"level": "warn"})
    for code in ("0", "101"):
        daemon.result(daemon.run(capture_output=False, host_data=code))
    ended = daemon.wait_log(lambda r: r["message"] == "execution finished")
    assert (ended["level"], ended["exit_code"], ended["stderr"]) == ("warn", 101, "no such host")


def test_the_executor_gets_its_command_line(root: Root, start: Start) -> None:
    root.script('for word; do echo "$word"; done; test -e /proc/self/fd/3 && echo has-log-fd')
    daemon = start()
    text = '{"a" :  1.50,\t"b": "\\u00e9\u00e9", "a": 2}'
    body = json.dumps(
        run_body(is_sync=False, host="127.0.0.1:1", extra_args=["--debug-mode", "x y"])
    )
    body = body.replace(json.dumps(message()), text).replace(
        '"host_data": "', '"host_data": "\\u00e9 '
    )
    answer = daemon.post("/genvm/run", body.encode())
    status = daemon.result(answer["id"])
    assert status["stdout"].splitlines() == [
        *("--log-fd=3", "run", "--debug-mode", "x y"),
        *("--host-data", f"é {json.dumps({**NODE, 'practice': ''})}", "--host", "127.0.0.1:1"),
        *("--message", text, f"--cookie={answer['id']}", "has-log-fd"),
    ]
    synced = daemon.result(daemon.run(is_sync=True))["stdout"].splitlines()
    assert synced[1:3] == ["run", "--sync"]


def test_stdin_is_empty_and_the_environment_is_ours(root: Root, start: Start) -> None:
    root.script("cat; echo end; echo $MY_VARIABLE; ls /proc/self/fd | sort -n | tr '\\n' ' '")
    daemon = start(environ={"MY_VARIABLE": "inherited"})
    lines = daemon.result(daemon.run())["stdout"].splitlines()
    assert lines[:2] == ["end", "inherited"]
    descriptors = [int(word) for word in lines[2].split()]
    assert set(descriptors) <= {0, 1, 2, 3, 4}, "nothing of the manager's is inherited"


def test_version_by_timestamp(root: Root, start: Start) -> None:
    root.write_manifest(
        {
            "v0.1.0": "2025-01-01T00:00:00Z",
            "v0.10.0-rc1": "2025-03-01T00:00:00Z",
            "v0.9.0": "2025-02-01T00:00:00Z",
            "v1.0.0": "2025-04-01T00:00:00Z",
        }
    )
    for version in ("v0.1.0", "v0.10.0-rc1", "v0.9.0", "v1.0.0"):
        root.script(f"echo {version}", version)
    daemon = start()

    def version_at(major: int, timestamp: str) -> str:
        status = daemon.result(daemon.run(major=major, timestamp=timestamp))
        assert status["stdout"].strip() == status["version"]
        return str(status["version"])

    assert version_at(0, "2025-01-01T00:00:00Z") == "v0.1.0"
    assert version_at(0, "2025-02-01T02:00:00+02:00") == "v0.9.0"
    assert version_at(0, "2025-02-28T23:59:59.999Z") == "v0.9.0"
    assert version_at(0, "2030-01-01T00:00:00Z") == "v0.10.0-rc1"
    assert version_at(1, "2030-01-01T00:00:00Z") == "v1.0.0"
    for major, timestamp in ((0, "2024-12-31T23:59:59Z"), (1, "2025-03-31T00:00:00Z")):
        body = run_body(major=major, timestamp=timestamp)
        reply = daemon.request("POST", "/genvm/run", body)
        is_error(reply, 500, "version_not_available", f"major {major}", timestamp[:19], "v0.9.0")


# --- with a host ---

CONTRACT = """\
# v0.1.0
on init
    store greeting "$args.0"
on method greet
    load greeting
    return {"greeting": "$last", "name": "$kwargs.name", "big": 123456789012345678901234567890}
on method fail
    error no luck
"""


@pytest.mark.parametrize("listener", ["tcp", "unix"])
def test_a_contract_is_deployed_and_called(daemon: Daemon, tmp_path: Path, listener: str) -> None:
    with serving(Host("127.0.0.1" if listener == "tcp" else tmp_path / "h", CONTRACT)) as host:
        host.calls({"args": ["Hello"], "kwargs": {}})
        deployed = daemon.run(host=host.uri, message=message(is_init=True))
        assert host.outcome(0) == ("return", None)
        assert daemon.result(deployed)["exit_code"] == 0
        host.calls({"method": "greet", "args": [], "kwargs": {"name": "world"}})
        called = daemon.run(host=host.uri, is_sync=False)
        value = {"greeting": "Hello", "name": "world", "big": 123456789012345678901234567890}
        assert host.outcome(1) == ("return", value)
        assert daemon.result(called)["exit_code"] == 0
        host.calls({"method": "fail", "args": [], "kwargs": {}})
        failed = daemon.run(host=host.uri, capture_output=False)
        kind, error = host.outcome(2)
        assert (kind, error["message"]) == ("user_error", "no luck")
        assert daemon.result(failed)["exit_code"] == 0, "a contract's error is an outcome"


def test_a_host_hears_of_a_cancelled_run(daemon: Daemon, tmp_path: Path) -> None:
    with serving(Host(tmp_path / "h", "on method m\n    sleep 600\n")) as host:
        host.calls({"method": "m", "args": [], "kwargs": {}})
        genvm_id = daemon.run(host=host.uri)
        eventually(lambda: host.state.requests.total() >= 2, what="it runs")
        assert daemon.request("DELETE", f"/genvm/{genvm_id}").status == 200
        assert host.outcome() == ("vm_error", "timeout")
        status = daemon.result(genvm_id)
        assert (status["cause"], status["exit_code"]) == ("cancelled", 0)


def test_a_host_that_is_not_there(daemon: Daemon) -> None:
    status = daemon.result(daemon.run(host=NO_HOST))
    assert (status["exit_code"], status["cause"]) == (1, "exited")
    assert NO_HOST in status["stderr"]


# --- DELETE /genvm/{id} ---


def test_stop(daemon: Daemon) -> None:
    """The answer comes once the permits are free and the status can be read."""
    genvm_id = daemon.run("sleep 600", is_sync=False)
    assert daemon.permits()["in_use"] == 2
    reply = daemon.request("DELETE", f"/genvm/{genvm_id}")
    assert (reply.status, reply.json) == (
        200,
        {"result": "shutdown_completed", "genvm_id": genvm_id},
    )
    assert daemon.permits() == IDLE
    status = daemon.get(f"/genvm/{genvm_id}")["status"]
    assert status["cause"] == "cancelled"
    assert daemon.descendants() == []


def test_stop_one_that_does_not_end(daemon: Daemon, tmp_path: Path) -> None:
    up = tmp_path / "up"
    genvm_id = daemon.run("ignore-sigterm", f"touch {up}", "sleep 600")
    pid = int(eventually(lambda: up.exists() and up.read_text()) or 0)
    begin = time.monotonic()
    reply = daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=300")
    assert time.monotonic() - begin >= 0.29
    assert reply.status == 500
    assert reply.json["error"] == "timeout during shutdown"
    assert (reply.json["genvm_id"], reply.json["code"]) == (genvm_id, "shutdown_timeout")
    assert daemon.permits() == IDLE
    assert not alive(pid)
    status = daemon.get(f"/genvm/{genvm_id}")["status"]
    assert (status["cause"], status["signal"], status["exit_code"]) == ("cancelled", 9, None)
    again = daemon.request("DELETE", f"/genvm/{genvm_id}")
    assert (again.status, again.json["result"]) == (200, "shutdown_completed")


def test_stop_at_once(daemon: Daemon) -> None:
    genvm_id = daemon.run("sleep 600")
    reply = daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=0")
    is_error(reply, 500, "shutdown_timeout", "timeout during shutdown")
    status = daemon.get(f"/genvm/{genvm_id}")["status"]
    assert (status["cause"], status["signal"]) == ("cancelled", 9)


def test_stop_one_that_has_ended(daemon: Daemon) -> None:
    genvm_id = daemon.run("exit 3")
    before = daemon.result(genvm_id)
    for _ in range(2):
        reply = daemon.request("DELETE", f"/genvm/{genvm_id}")
        assert (reply.status, reply.json["result"]) == (200, "shutdown_completed")
    assert daemon.result(genvm_id) == before


def test_stop_one_that_waits(daemon: Daemon) -> None:
    daemon.post("/permits", {"permits": 0})
    pending = daemon.send("POST", "/genvm/run", run_body("exit 0"))
    daemon.waiting(1)
    (genvm_id,) = (
        key for key, e in daemon.get("/status")["executions"].items() if e["state"] == "waiting"
    )
    assert daemon.get(f"/genvm/{genvm_id}") == {"genvm_id": int(genvm_id), "status": None}
    poll = daemon.send("GET", f"/genvm/{genvm_id}?wait=60s")
    reply = daemon.request("DELETE", f"/genvm/{genvm_id}")
    assert (reply.status, reply.json["result"]) == (200, "shutdown_completed")
    assert daemon.permits()["waiting"] == 0
    refused = pending.reply()
    is_error(refused, 500, "execution_cancelled")
    assert refused.json["genvm_id"] == int(genvm_id)
    status = poll.reply().json["status"]
    assert (status["cause"], status["exit_code"], status["started_at"]) == ("cancelled", None, None)
    daemon.post("/permits", {"permits": 8})


@pytest.mark.parametrize("stubborn", [False, True])
def test_concurrent_stops_agree(daemon: Daemon, tmp_path: Path, stubborn: bool) -> None:
    up = tmp_path / "up"
    steps = ["ignore-sigterm"] if stubborn else []
    genvm_id = daemon.run(*steps, f"touch {up}", "sleep 600")
    eventually(up.exists)
    # The shortest one counts; who ends by SIGTERM has the time that a busy machine may take.
    waits = [400, 60000, 5000, 400, 30000] if stubborn else [90000, 120000, 100000]
    named = {"X-Request-Id": "each-the-same"}
    pending = [
        daemon.send("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms={w}", headers=named)
        for w in waits
    ]
    replies = [one.reply() for one in pending]
    assert {reply.status for reply in replies} == {500 if stubborn else 200}
    assert len({reply.raw for reply in replies}) == 1
    assert daemon.permits() == IDLE


def test_a_client_that_leaves_a_stop_does_not_undo_it(daemon: Daemon, tmp_path: Path) -> None:
    up = tmp_path / "up"
    genvm_id = daemon.run("ignore-sigterm", f"touch {up}", "sleep 600")
    eventually(up.exists)
    leaver = daemon.send("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=2000")
    eventually(lambda: daemon.get("/status")["executions"][str(genvm_id)]["state"] == "stopping")
    leaver.close()
    assert daemon.result(genvm_id)["cause"] == "cancelled"


@pytest.mark.parametrize("value", ["-1", "soon", "1.5", "", "1e3", "true"])
def test_stop_with_a_bad_time(daemon: Daemon, value: str) -> None:
    genvm_id = daemon.run("sleep 600")
    reply = daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms={value}")
    is_error(reply, 500, "invalid_request", "wait_timeout_ms")
    assert daemon.get(f"/genvm/{genvm_id}")["status"] is None, "it goes on"
    daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=0")


def test_stop_with_a_huge_time(daemon: Daemon) -> None:
    genvm_id = daemon.run("sleep 600")
    reply = daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms={10**40}")
    assert reply.status == 200


# --- deadline ---


def test_deadline(daemon: Daemon, tmp_path: Path) -> None:
    """A fraction of a minute; SIGKILL, so ignoring SIGTERM is no help."""
    for seconds in (1.5, 15, 60):  # a busy machine may be too late for the first
        up = tmp_path / f"{seconds}"
        steps = ("ignore-sigterm", f"touch {up}", "sleep 600")
        status = daemon.result(daemon.run(*steps, max_execution_minutes=seconds / 60))
        if up.exists():
            break
    assert (status["cause"], status["signal"], status["exit_code"]) == ("deadline", 9, None)
    started = status["started_at"]
    late = status["finished_at"] / 1000 - (datetime.fromisoformat(started).timestamp() + seconds)
    assert late >= -0.01
    timed("a deadline is enforced after its time", late, 1.0)


# --- permits ---


def test_permits(daemon: Daemon) -> None:
    assert daemon.permits() == IDLE
    for number in (0, 1, 1_000_000, 8):
        reply = daemon.post("/permits", {"permits": number})
        assert reply == {"result": "permits_set", "permits": number}
        assert daemon.permits() == {
            "permits": number,
            "available": number,
            "in_use": 0,
            "waiting": 0,
        }


@pytest.mark.parametrize("value", [-1, 1_000_001, 1.0, 1.5, "10", True, [], {}, 10**40])
def test_bad_permits(daemon: Daemon, value: object) -> None:
    is_error(
        daemon.request("POST", "/permits", {"permits": value}), 500, "invalid_request", "permits"
    )
    assert daemon.permits() == IDLE


def test_missing_permits(daemon: Daemon) -> None:
    is_error(daemon.request("POST", "/permits", {}), 500, "invalid_request", "permits: required")


def test_fewer_permits_kill_nobody(daemon: Daemon) -> None:
    first, second = daemon.run("sleep 600"), daemon.run("sleep 600")
    daemon.post("/permits", {"permits": 1})
    assert daemon.permits() == {"permits": 1, "available": 0, "in_use": 2, "waiting": 0}
    assert daemon.get(f"/genvm/{first}")["status"] is None
    daemon.request("DELETE", f"/genvm/{first}")
    assert daemon.permits()["in_use"] == 1
    daemon.request("DELETE", f"/genvm/{second}")
    daemon.post("/permits", {"permits": 8})


def test_more_permits_admit_at_once(daemon: Daemon) -> None:
    daemon.post("/permits", {"permits": 0})
    pending = [daemon.send("POST", "/genvm/run", run_body("exit 0")) for _ in range(3)]
    daemon.waiting(3)
    daemon.post("/permits", {"permits": 8})
    for one in pending:
        daemon.result(one.reply().json["id"])


def test_one_permit_is_enough_for_a_run_that_is_not_sync(daemon: Daemon) -> None:
    daemon.post("/permits", {"permits": 1})
    genvm_id = daemon.run("exit 0", is_sync=False)
    assert daemon.result(genvm_id)["exit_code"] == 0
    daemon.post("/permits", {"permits": 8})


# --- log level, environment ---


@pytest.mark.parametrize(
    ("level", "shown"),
    [("trace", "trace"), ("DEBUG", "debug"), ("Info", "info"), ("warning", "warn"), ("error",) * 2],
)
def test_log_level(daemon: Daemon, level: str, shown: str) -> None:
    answer = daemon.post("/log/level", {"level": level})
    assert answer == {"result": "log_level_set", "level": shown}


@pytest.mark.parametrize("level", ["loud", "", 1, None, True, "critical"])
def test_bad_log_level(daemon: Daemon, level: object) -> None:
    is_error(
        daemon.request("POST", "/log/level", {"level": level}), 500, "invalid_request", "level"
    )


def test_log_level_holds_for_executors(start: Start) -> None:
    daemon = start()
    levels = ("trace", "debug", "info", "warn", "error")
    for threshold in ("warn", "trace", "error"):
        daemon.post("/log/level", {"level": threshold})
        steps = [f"log {level} {threshold}-{level}" for level in levels]
        daemon.result(daemon.run(*steps, "exit 0", capture_output=False))
    daemon.stop()
    messages = {r["message"] for r in daemon.records}
    for threshold in ("warn", "trace", "error"):
        for level in levels:
            shown = levels.index(level) >= levels.index(threshold)
            assert (f"{threshold}-{level}" in messages) == shown, (threshold, level)


def test_environment(start: Start, root: Root) -> None:
    root.script('echo "$A_TOKEN"')
    daemon = start("--log-level", "trace")
    value = "va lue-\u00e9-{braces}-9f8e7d"
    reply = daemon.post("/env", {"key": "A_TOKEN", "value": value})
    assert reply == {"result": "env_var_set", "key": "A_TOKEN"}
    assert daemon.result(daemon.run())["stdout"] == f"{value}\n"
    assert value not in json.dumps(daemon.get("/status"), ensure_ascii=False)
    daemon.post("/env", {"key": "A_TOKEN", "value": ""})
    assert daemon.result(daemon.run())["stdout"] == "\n"
    daemon.stop()
    assert "9f8e7d" not in daemon.text + daemon.errors


@pytest.mark.parametrize(
    "key",
    [
        *("", "A=B", "A\0B", "=", "PATH", "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH"),
        *("PYTHONSTARTUP", "BASH_ENV", "IFS", "GCONV_PATH", "GENVM_MANAGED_BY"),
        *("LUA_PATH", "LUA_CPATH_5_4", "LUA_INIT"),
    ],
)
def test_refused_variables(daemon: Daemon, key: str) -> None:
    reply = daemon.request("POST", "/env", {"key": key, "value": "s3cr3t-value"})
    is_error(reply, 500, "environment_refused", "key")
    assert b"s3cr3t" not in reply.raw


@pytest.mark.parametrize(
    ("value", "code"),
    [("s3cr3t\0x", "environment_refused"), ("s3cr3t\ud800", "invalid_request")],
)
def test_refused_values(daemon: Daemon, value: str, code: str) -> None:
    reply = daemon.request("POST", "/env", {"key": "SOME", "value": value})
    is_error(reply, 500, code, "value" if code == "environment_refused" else "surrogate pair")
    assert b"s3cr3t" not in reply.raw


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"key": "K"}, "value: required"),
        ({"value": "s3cr3t"}, "key: required"),
        ({"key": 1, "value": "s3cr3t"}, "key: "),
        ({"key": "K", "value": ["s3cr3t"]}, "value: "),
        ({"key": "K", "value": None}, "value: "),
    ],
)
def test_bad_environment_bodies(daemon: Daemon, body: object, path: str) -> None:
    reply = daemon.request("POST", "/env", body)
    is_error(reply, 500, "invalid_request", path)
    assert b"s3cr3t" not in reply.raw
    assert "s3cr3t" not in daemon.text


#: What led to code, certificates, names or files that a client chose.
DETOURS = [
    *("OPENSSL_CONF", "HOME", "SSL_CERT_FILE", "TEMP", "LOCALDOMAIN", "GENVMROOT", "HTTP_PROXY"),
    *("http_proxy", "GIO_EXTRA_MODULES", "JAVA_TOOL_OPTIONS", "XDG_CONFIG_HOME", "A_VARIABLE"),
]


def test_what_children_get_of_what_is_set(root: Root, start: Start) -> None:
    """Neither an executor nor a module, and nothing in the manager itself."""
    root.script("env -0")
    daemon = start(environ={"FROM_THE_START": "kept", "OPENAIKEY": "old"})
    for key in DETOURS:
        reply = daemon.post("/env", {"key": key, "value": "/evil"})
        assert reply["result"] == "env_var_set"
        assert "executors and modules do not get it" in reply["note"]
    for key in ("OPENAIKEY", "DEBUG_MODE", "GENVM_X"):
        reply = daemon.post("/env", {"key": key, "value": "meant"})
        assert reply == {"result": "env_var_set", "key": key}
    daemon.post("/module/start", EMPTY_MODULE)
    pid = daemon.get("/status")["modules"]["llm"]["pid"]
    module = Path(f"/proc/{pid}/environ").read_text()
    for environ in (daemon.result(daemon.run())["stdout"], module):
        variables = dict(pair.split("=", 1) for pair in environ.split("\0") if pair)
        assert "/evil" not in variables.values()
        assert variables["FROM_THE_START"] == "kept"
        meant = {name for name, value in variables.items() if value == "meant"}
        assert meant == {"OPENAIKEY", "DEBUG_MODE", "GENVM_X"}
        assert variables["HOME"] == os.environ["HOME"]
    flags = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1:3]
    assert flags == ["-s", "-P"], "code of the account or of the current folder"


def test_what_executors_need_not_know(root: Root, start: Start) -> None:
    """Keys are for modules: with ``executor_env`` executors do not even get those."""
    root.script("env -0")
    environ = {"PROVIDER_KEY": "s3cr3t", "LANG": "C.UTF-8", "GENVM_LLM_MODULE": "ws://x:1"}
    daemon = start("--executor-env", "PATH,LANG,GENVM_*", environ=environ)
    for key in ("OPENAIKEY", "GENVM_X"):
        daemon.post("/env", {"key": key, "value": "s3cr3t" if key == "OPENAIKEY" else "meant"})
    daemon.post("/module/start", EMPTY_MODULE)
    pid = daemon.get("/status")["modules"]["llm"]["pid"]
    module = Path(f"/proc/{pid}/environ").read_text()
    assert {"PROVIDER_KEY=s3cr3t", "OPENAIKEY=s3cr3t"} <= {*module.split("\0")}
    executor = daemon.result(daemon.run())["stdout"]
    assert "s3cr3t" not in executor
    names = {pair.split("=")[0] for pair in executor.split("\0") if pair}
    assert {"PATH", "LANG", "GENVM_LLM_MODULE", "GENVM_X", "GENVM_MANAGED_BY"} <= names
    others = {name for name in names if not name.startswith("GENVM_")} - {"PATH", "LANG"}
    assert others <= {"PWD", "OLDPWD", "SHLVL", "_"}, "the shell of the script adds some"


def test_a_library_that_a_client_chose(start: Start, tmp_path: Path) -> None:
    """What OPENSSL_CONF names is loaded by everything that uses OpenSSL, as a module does."""
    proof = tmp_path / "loaded"
    library = tmp_path / "evil.so"
    code = (
        "#include <stdio.h>\n"
        '__attribute__((constructor)) void f(void) { fclose(fopen("%s", "w")); }\n'
    )
    compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(compiler, input=code % proof, text=True, check=True)
    settings = tmp_path / "openssl.cnf"
    settings.write_text(
        "openssl_conf = a\n[a]\nproviders = b\n[b]\nevil = c\n"
        f"[c]\nmodule = {library}\nactivate = 1\n"
    )
    home = tmp_path / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    (home / "site-packages").mkdir(parents=True)
    (home / "site-packages" / "usercustomize.py").write_text(f"open({str(proof)!r}, 'w')\n")
    daemon = start()
    pairs = {"OPENSSL_CONF": str(settings), "PYTHONUSERBASE": str(tmp_path), "HOME": str(tmp_path)}
    for key, value in pairs.items():
        daemon.request("POST", "/env", {"key": key, "value": value})
    daemon.post("/module/start", EMPTY_MODULE)
    assert not proof.exists()
    environ = {**os.environ, "OPENSSL_CONF": str(settings)}
    code = "import ssl; ssl.create_default_context()"
    # Its return value is of no interest: such a library is no provider of ciphers.
    subprocess.run([sys.executable, "-c", code], env=environ, check=False, capture_output=True)
    assert proof.exists(), "it is one that works"


def test_env_allow(root: Root, start: Start) -> None:
    root.script('echo "$A_VARIABLE:$MY_OTHER:$OPENAIKEY"')
    daemon = start("--env-allow", "A_VARIABLE,MY_*")
    for key in ("A_VARIABLE", "MY_OTHER"):
        reply = daemon.post("/env", {"key": key, "value": "allowed"})
        assert reply == {"result": "env_var_set", "key": key}
    assert "env_allow" in daemon.post("/env", {"key": "OPENAIKEY", "value": "x"})["note"]
    assert daemon.result(daemon.run())["stdout"] == "allowed:allowed:\n"
    reply = daemon.request("POST", "/env", {"key": "LD_PRELOAD", "value": "x"})
    is_error(reply, 500, "environment_refused", "LD_PRELOAD", "is started")


def test_a_value_with_half_a_surrogate_pair_in_the_environment(daemon: Daemon) -> None:
    """What was refused must not break later executions."""
    daemon.request("POST", "/env", {"key": "HALF", "value": "\ud800"})
    assert daemon.result(daemon.run("exit 0"))["exit_code"] == 0


def test_variables_with_which_nothing_can_be_started(daemon: Daemon) -> None:
    """As large as the kernel takes is accepted, one byte more is not, nor too many of them."""
    largest = "x" * (131_071 - len("LARGE="))
    daemon.post("/env", {"key": "LARGE", "value": largest})
    assert daemon.result(daemon.run("exit 0"))["exit_code"] == 0
    reply = daemon.request("POST", "/env", {"key": "LARGE", "value": largest + "x"})
    is_error(reply, 500, "environment_refused", "value: 131072 bytes")
    keys = [f"LARGE_{number}" for number in range(40)]
    replies = [daemon.request("POST", "/env", {"key": k, "value": "x" * 100_000}) for k in keys]
    assert replies[0].status == 200
    is_error(replies[-1], 500, "environment_refused", "whole environment")
    assert daemon.result(daemon.run("exit 0"))["exit_code"] == 0
    for key in ("LARGE", *keys):
        daemon.post("/env", {"key": key, "value": ""})


# --- manifest ---


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("executor_versions:\n  v0.2.0: {available_after: soon}\n", 2),
        ("executor_versions:\n  v0.2.0:\n    available_after: 12\n", 3),
        ("executor_versions:\n  v0.2.0: {}\n", 2),
        ("a: 1\nexecutor_versions:\n  nightly: {available_after: '2025-01-01T00:00:00Z'}\n", 3),
        ("executor_versions: []\n", 1),
        ("other: 1\n", 1),
        ("", 1),
        ("executor_versions:\n  v0.2.0: [\n", 3),
        (
            "executor_versions:\n"
            "  v0.2.0: {available_after: '2025-01-01T00:00:00Z'}\n"
            "  v0.2.0-rc1: {available_after: '2025-01-01T00:00:00Z'}\n",
            3,
        ),
    ],
)
def test_a_bad_manifest_changes_nothing(
    daemon: Daemon, shared_root: Root, text: str, line: int
) -> None:
    good = shared_root.manifest.read_text()
    shared_root.manifest.write_text(text)
    try:
        reply = daemon.request("POST", "/manifest/reload")
        is_error(reply, 500, "manifest_invalid", f"manifest.yaml:{line}")
        assert str(shared_root.path) not in reply.json["error"]
        assert daemon.result(daemon.run("exit 0"))["version"] == VERSION
        assert daemon.get("/status")["manifest"]["versions"] == 2
    finally:
        shared_root.manifest.write_text(good)
    assert daemon.post("/manifest/reload") == {"result": "manifest_reloaded"}


def test_a_manifest_that_is_gone(daemon: Daemon, shared_root: Root) -> None:
    good = shared_root.manifest.read_text()
    shared_root.manifest.unlink()
    is_error(daemon.request("POST", "/manifest/reload"), 500, "manifest_invalid", "manifest.yaml")
    assert daemon.result(daemon.run("exit 0"))["version"] == VERSION
    shared_root.manifest.write_text(good)


@pytest.mark.parametrize("how", ["endpoint", "SIGHUP"])
def test_reloading_the_manifest(root: Root, start: Start, how: str) -> None:
    daemon = start()
    root.script("echo new", "v0.2.0")
    root.write_manifest({VERSION: "2025-01-01T00:00:00Z", "v0.2.0": "2025-02-01T00:00:00Z"})
    assert daemon.result(daemon.run("exit 0"))["version"] == VERSION
    if how == "endpoint":
        daemon.post("/manifest/reload")
    else:
        daemon.signal(signal.SIGHUP)
        daemon.wait_log(lambda r: r["message"] == "manifest reloaded")
    assert daemon.result(daemon.run())["version"] == "v0.2.0"
    root.manifest.write_text("executor_versions:\n  bad: {}\n")
    if how == "SIGHUP":
        daemon.signal(signal.SIGHUP)
        daemon.wait_log(lambda r: r["level"] == "error" and "manifest.yaml:2" in r["message"])
    assert daemon.result(daemon.run())["version"] == "v0.2.0"


# --- drain ---


def test_drain(daemon: Daemon, tmp_path: Path) -> None:
    go = tmp_path / "go"
    running = daemon.run(f"wait-file {go}", "exit 0")
    daemon.post("/permits", {"permits": 1})
    queued = daemon.send("POST", "/genvm/run", run_body("exit 0"))
    daemon.waiting(1)
    daemon.post("/drain")
    assert daemon.get("/status")["draining"] is True
    reply = daemon.request("POST", "/genvm/run", run_body("exit 0"))
    is_error(reply, 503, "draining")
    assert reply.json["retryable"] is True
    assert int(reply.headers["retry-after"]) >= 1
    go.touch()
    assert daemon.result(running)["exit_code"] == 0
    assert daemon.result(queued.reply().json["id"])["exit_code"] == 0, "it was accepted before"
    daemon.post("/undrain")
    assert daemon.get("/status")["draining"] is False
    daemon.result(daemon.run("exit 0"))
    daemon.post("/permits", {"permits": 8})


# --- what is no endpoint ---


@pytest.mark.parametrize(
    "path", ["/nothing", "/status/", "/genvms", "/genvm/", "/a%2fb", "/%ff", "/%00"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_unknown_paths(daemon: Daemon, method: str, path: str) -> None:
    reply = daemon.request(method, path)
    is_error(reply, 404, "endpoint_not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/status", {"GET"}),
        ("DELETE", "/status", {"GET"}),
        ("GET", "/genvm/run", {"POST"}),
        ("POST", "/genvm/1", {"GET", "DELETE"}),
        ("PUT", "/permits", {"GET", "POST"}),
        ("PUT", "/log/level", {"GET", "POST"}),
        ("POST", "/genvm", {"GET"}),
        ("GET", "/manifest/reload", {"POST"}),
        ("PUT", "/env", {"GET", "POST"}),
        ("PATCH", "/drain", {"POST"}),
        ("BREW", "/undrain", {"POST"}),
        ("OPTIONS", "/status", {"GET"}),
    ],
)
def test_wrong_methods(daemon: Daemon, method: str, path: str, allowed: set[str]) -> None:
    reply = daemon.request(method, path)
    is_error(reply, 405, "method_not_allowed", *allowed)
    assert set(reply.headers["allow"].split(", ")) - {"HEAD", "OPTIONS"} == allowed


# --- retention ---


def test_retention_time(root: Root, start: Start) -> None:
    daemon = start("--execution-retention", "300ms")
    go = root.path / "go"
    genvm_id = daemon.run("print kept", f"wait-file {go}", "exit 0")
    poll = daemon.send("GET", f"/genvm/{genvm_id}?wait=60s")
    daemon.get("/status")
    go.touch()
    assert poll.reply().json["status"]["stdout"] == "kept\n"
    eventually(lambda: daemon.request("GET", f"/genvm/{genvm_id}").status == 404)
    is_error(daemon.request("GET", f"/genvm/{genvm_id}"), 404, "execution_not_found")
    is_error(daemon.request("DELETE", f"/genvm/{genvm_id}"), 404, "execution_not_found")
    assert daemon.get("/status")["executions"] == {}
    assert daemon.run("exit 0") > genvm_id, "ids are never used again"


def test_retention_bytes(start: Start) -> None:
    """The oldest results go first; a huge one is still readable until the next."""
    daemon = start("--retention-max-bytes", "1000000", "--permits", "1")
    ids = [daemon.run("spam stdout 300000", "exit 0") for _ in range(6)]
    daemon.result(ids[-1])
    found = [daemon.request("GET", f"/genvm/{genvm_id}").status for genvm_id in ids]
    assert found == [404, 404, 404, 200, 200, 200]
    huge = daemon.run("spam stdout 3000000", "exit 0")
    eventually(lambda: list(daemon.get("/status")["executions"]) == [str(huge)])
    eventually(daemon.idle)
    assert len(daemon.result(huge)["stdout"]) == 3_000_000


def test_at_most_1000_finished_executions_are_listed(root: Root, start: Start) -> None:
    root.script("exit 0")
    daemon = start("--permits", "64")
    ids: set[int] = set()
    for _ in range(21):
        pending = [daemon.send("POST", "/genvm/run", run_body()) for _ in range(50)]
        ids |= {one.reply().json["id"] for one in pending}
    assert len(ids) == 1050
    eventually(daemon.idle)
    listed = [int(key) for key in daemon.get("/status")["executions"]]
    assert len(listed) == 1000
    assert daemon.request("GET", f"/genvm/{min(ids)}").status == 200, "not listed, but retained"
